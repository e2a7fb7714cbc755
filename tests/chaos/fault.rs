//! What goes wrong, and when: a list of faults drawn from a seed, so that a run can be repeated.
//!
//! Pure. Not here: doing it (`world.rs`). Tests: at the foot.

use std::{collections::HashMap, fmt, time::Duration};

/// Something that goes wrong for a while, now and then something else with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub what: What,
    /// What else, in the middle of it, at another place.
    pub also: Option<What>,
    /// How long, until it is mended.
    pub hold: Duration,
}

impl Fault {
    /// A single one.
    pub const fn one(what: What, hold: Duration) -> Self {
        Self { what, also: None, hold }
    }

    /// What is counted together.
    pub const fn kind(&self) -> &'static str {
        if self.also.is_some() { "two at once" } else { self.what.kind() }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// SIGKILL of a node; it is started again.
    Kill(usize),
    /// SIGKILL, and again while it starts.
    KillTwice(usize),
    /// SIGSTOP of a node, then SIGCONT: it wakes late and does not know.
    Freeze(usize),
    /// SIGTERM of a node; it is started again.
    Drain(usize),
    /// The connections of a node to one end misbehave.
    Link(usize, End, Flow),
    /// A server ends and is started again, in order or by SIGKILL.
    Restart(Server, bool),
    /// A server is stopped for a while.
    Stop(Server),
}

/// What is at the other end of a node's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Those who call.
    Clients,
    /// A server it calls.
    Server(Server),
}

/// A server beside the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Server {
    /// The truth.
    Postgres,
    /// The bus.
    Redis,
    /// The MQTT broker.
    Broker,
}

/// How connections behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flow {
    /// As they should.
    Open,
    /// They break, and new ones end at once.
    Cut,
    /// Nothing arrives in either direction.
    Stalled,
    /// What is asked arrives, what is answered does not.
    Mute,
}

impl What {
    /// The node it hurts; none for a server.
    pub const fn node(self) -> Option<usize> {
        match self {
            What::Kill(n) | What::KillTwice(n) | What::Freeze(n) | What::Drain(n) | What::Link(n, ..) => Some(n),
            What::Restart(..) | What::Stop(_) => None,
        }
    }

    /// The same at another node.
    const fn at(self, node: usize) -> Self {
        match self {
            What::Kill(_) => What::Kill(node),
            What::KillTwice(_) => What::KillTwice(node),
            What::Freeze(_) => What::Freeze(node),
            What::Drain(_) => What::Drain(node),
            What::Link(_, end, flow) => What::Link(node, end, flow),
            server => server,
        }
    }

    /// The order in which two are mended: servers, then ways, then nodes, which need both to start.
    pub const fn mended(self) -> u8 {
        match self {
            What::Restart(..) | What::Stop(_) => 0,
            What::Link(..) | What::Freeze(_) => 1,
            What::Kill(_) | What::KillTwice(_) | What::Drain(_) => 2,
        }
    }

    /// The kind, without the place: what is counted together.
    pub const fn kind(self) -> &'static str {
        match self {
            What::Kill(_) => "kill -9",
            What::KillTwice(_) => "kill -9 twice",
            What::Freeze(_) => "SIGSTOP",
            What::Drain(_) => "drain",
            What::Link(_, End::Clients, Flow::Cut) => "clients cut off",
            What::Link(_, End::Clients, Flow::Mute) => "clients unanswered",
            What::Link(_, End::Clients, _) => "clients stalled",
            What::Link(_, End::Server(Server::Postgres), Flow::Cut) => "PostgreSQL cut off",
            What::Link(_, End::Server(Server::Postgres), _) => "PostgreSQL stalled",
            What::Link(_, End::Server(Server::Redis), Flow::Cut) => "Redis cut off",
            What::Link(_, End::Server(Server::Redis), _) => "Redis stalled",
            What::Link(_, End::Server(Server::Broker), Flow::Cut) => "broker cut off",
            What::Link(_, End::Server(Server::Broker), _) => "broker stalled",
            What::Restart(Server::Postgres, false) => "PostgreSQL restart",
            What::Restart(Server::Postgres, true) => "PostgreSQL kill -9",
            What::Restart(Server::Redis, false) => "Redis restart",
            What::Restart(Server::Redis, true) => "Redis kill -9",
            What::Restart(Server::Broker, false) => "broker restart",
            What::Restart(Server::Broker, true) => "broker kill -9",
            What::Stop(Server::Postgres) => "PostgreSQL stopped",
            What::Stop(Server::Redis) => "Redis stopped",
            What::Stop(Server::Broker) => "broker stopped",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = |what: What| what.node().map_or(String::new(), |node| format!(" of node {node}"));
        write!(f, "{}{}", self.what.kind(), place(self.what))?;
        if let Some(also) = self.also {
            write!(f, " with {}{}", also.kind(), place(also))?;
        }
        write!(f, " for {} ms", self.hold.as_millis())
    }
}

/// What there is that can go wrong.
#[derive(Debug, Clone)]
pub struct Terrain {
    /// Nodes.
    pub nodes: usize,
    /// Servers beside them.
    pub servers: Vec<Server>,
}

impl Terrain {
    /// Each kind of fault once, at the first node.
    fn kinds(&self) -> Vec<What> {
        let mut all = vec![What::Kill(0), What::KillTwice(0), What::Freeze(0), What::Drain(0)];
        all.extend([Flow::Cut, Flow::Stalled, Flow::Mute].map(|flow| What::Link(0, End::Clients, flow)));
        for server in &self.servers {
            all.extend([Flow::Cut, Flow::Stalled].map(|flow| What::Link(0, End::Server(*server), flow)));
            all.push(What::Restart(*server, false));
            all.push(What::Stop(*server));
            // A broker that is killed forgets what it acknowledged a moment ago, which is its own promise and not ours.
            if *server != Server::Broker {
                all.push(What::Restart(*server, true));
            }
        }
        all
    }
}

/// Of so many faults one has another with it, where there is more than one node.
const TWO_AT_ONCE: usize = 4;

/// Draws faults: every kind before any comes again, in an order and for times that the seed decides; each kind at one node
/// after the other.
pub fn plan(seed: u64, count: usize, terrain: &Terrain) -> Vec<Fault> {
    let mut random = Random(seed);
    let mut places: HashMap<&str, usize> = HashMap::new();
    let (mut deck, mut faults) = (Vec::new(), Vec::with_capacity(count));
    while faults.len() < count {
        let what = draw(&mut random, &mut deck, &mut places, terrain);
        let second = terrain.nodes > 1 && random.below(TWO_AT_ONCE) == 0;
        let also = second.then(|| {
            let all = terrain.kinds();
            all[random.below(all.len())].at(random.below(terrain.nodes))
        });
        // A node and a server: of two nodes that are gone nobody learns more. One that drains must reach its servers.
        let also = also.filter(|also| also.node().is_none() != what.node().is_none());
        let also = also.filter(|also| !matches!(also, What::Drain(_) | What::KillTwice(_)));
        // Short ones that a client hardly sees, and long ones that outlive a lease.
        let hold = Duration::from_millis([50, 500, 1500, 4500][random.below(4)] + random.below(500) as u64);
        faults.push(Fault { what, also, hold });
    }
    faults
}

fn draw(
    random: &mut Random,
    deck: &mut Vec<What>,
    places: &mut HashMap<&'static str, usize>,
    terrain: &Terrain,
) -> What {
    if deck.is_empty() {
        *deck = terrain.kinds();
        (1..deck.len()).rev().for_each(|at| deck.swap(at, random.below(at + 1)));
    }
    let kind = deck.pop().expect("there is always a node to hurt");
    let node = places.entry(kind.kind()).or_insert_with(|| random.below(terrain.nodes));
    *node = (*node + 1) % terrain.nodes;
    kind.at(*node)
}

/// Only these kinds, over and over: for measuring.
pub fn only(seed: u64, terrain: &Terrain, wanted: &[(&str, usize)]) -> Vec<Fault> {
    let mut left: HashMap<&str, usize> = wanted.iter().copied().collect();
    let most = wanted.iter().map(|(_, count)| count * terrain.kinds().len()).sum();
    let mut faults = plan(seed, most, terrain);
    faults.iter_mut().for_each(|fault| fault.also = None);
    faults.retain(|fault| {
        left.get_mut(fault.what.kind()).is_some_and(|left| {
            let wanted = *left > 0;
            *left = left.saturating_sub(1);
            wanted
        })
    });
    faults
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound.max(1) as u64).unwrap()
    }
}

#[test]
fn a_seed_repeats_and_every_kind_comes_before_any_comes_again() {
    let terrain = Terrain { nodes: 3, servers: vec![Server::Postgres, Server::Redis, Server::Broker] };
    let (one, two) = (plan(7, 100, &terrain), plan(7, 100, &terrain));
    assert_eq!(one, two);
    assert_ne!(one, plan(8, 100, &terrain));
    let kinds = terrain.kinds().len();
    let mut first: Vec<&str> = one[..kinds].iter().map(|fault| fault.what.kind()).collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), kinds, "{first:?}");
    assert!(one.iter().any(|fault| fault.also.is_some()), "some come together");
    let killed: Vec<bool> = (0..3).map(|n| one.iter().any(|fault| fault.what == What::Kill(n))).collect();
    assert_eq!(killed, [true; 3]);
}

#[test]
fn only_what_is_wanted_as_often_as_it_is_wanted() {
    let faults = only(1, &Terrain { nodes: 3, servers: Vec::new() }, &[("kill -9", 5), ("drain", 2)]);
    let count = |kind| faults.iter().filter(|fault| fault.what.kind() == kind).count();
    assert_eq!((faults.len(), count("kill -9"), count("drain")), (7, 5, 2));
}
