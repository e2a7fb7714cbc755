//! Who there is and how busy: what decides where work goes that any of several nodes may do. An immutable snapshot.
//!
//! Not here: which node owns an instance (`membership`, `forward`), who makes the snapshot (`balancer`), the strategies
//! (`scaling::load_balancer`). Invariants: a node is picked for a role only if it has it, its lease runs, its process is
//! there and it does not drain; of a node that was not heard of for long, nothing is believed, neither that it is idle nor
//! that it is busy. Tests: at the foot.

use crate::{
    scaling::{
        load_balancer::{Balance, Member},
        load_report::Report,
    },
    store::ownership::NodeRow,
    types::{NodeId, Role, Strategy, id::stable_hash},
};

/// How busy a node says it is that is full, in thousandths.
pub const BUSIEST: u32 = 1000;

/// A node, as work is given to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Who.
    pub row: NodeRow,
    /// What is believed of its load; nothing when it was not heard of for long.
    pub report: Option<Report>,
}

impl Peer {
    /// Where a door of it is reached: `http`, `mqtt`. Not an address that says nothing to others, such as 0.0.0.0.
    pub fn door(&self, name: &str) -> Option<&str> {
        let of = |address: &'_ str| address.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).map(str::len);
        let address = self.row.addresses.iter().find(|address| of(address).is_some())?;
        let place = &address[name.len() + 1..];
        let anywhere = place.parse().is_ok_and(|place: std::net::SocketAddr| place.ip().is_unspecified());
        (!anywhere).then_some(place)
    }

    fn takes(&self, role: Role) -> bool {
        self.row.holds() && !self.row.draining && self.row.roles.has(role)
    }
}

/// All nodes at one moment, and the strategy among them.
#[derive(Debug)]
pub struct Routing {
    me: NodeId,
    peers: Vec<Peer>,
    /// By role, in the order of [`Role::ALL`]: the others, by their place among the peers.
    others: [Balance<usize>; Role::ALL.len()],
}

/// What is taken for the load of a node nobody believes anything of, when nobody is believed.
const UNKNOWN: u32 = 500;

impl Routing {
    /// Of these nodes, of which `me` is this one. Goes on taking turns where `before` left off.
    pub fn new(me: NodeId, strategy: Strategy, peers: Vec<Peer>, before: Option<&Self>) -> Self {
        let believed: Vec<u32> =
            peers.iter().filter_map(|peer| peer.report.as_ref()).map(|report| report.load.busy_permille).collect();
        let count = u32::try_from(believed.len()).unwrap_or(u32::MAX);
        let usual = believed.iter().sum::<u32>().checked_div(count).unwrap_or(UNKNOWN);
        let member = |(node, peer): (usize, &Peer), role| Member {
            node,
            hash: stable_hash(peer.row.node.name().bytes()),
            weight: peer.row.weight,
            busy_permille: peer.report.map_or(usual, |report| report.load.busy_permille),
            open: peer.takes(role) && peer.row.node != me,
        };
        let others = Role::ALL.map(|role| {
            let balance = Balance::new(strategy, peers.iter().enumerate().map(|peer| member(peer, role)));
            match before {
                Some(before) => balance.after(&before.others[place(role)]),
                None => balance,
            }
        });
        Self { me, peers, others }
    }

    /// All nodes whose lease runs, in id order.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// A node.
    pub fn peer(&self, node: &NodeId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.row.node == *node)
    }

    /// Another node that takes work of this role, by the strategy; with the same key the same one, where the strategy goes
    /// by keys. Lock-free.
    pub fn other(&self, role: Role, key: u64) -> Option<&Peer> {
        self.others[place(role)].pick(key).and_then(|member| self.peers.get(member.node))
    }

    /// How busy the other nodes are on average that own shards, in thousandths; nothing when nothing is believed of them.
    pub fn others_average(&self) -> Option<u32> {
        let others = self.peers.iter().filter(|peer| peer.row.node != self.me && peer.takes(Role::Mind));
        let known: Vec<u32> = others.filter_map(|peer| Some(peer.report?.average_permille)).collect();
        known.iter().sum::<u32>().checked_div(u32::try_from(known.len()).ok()?)
    }

    /// Whether another node that owns shards has room, by what is believed of it: one that is full says that it is as busy as
    /// can be.
    pub fn others_have_room(&self) -> bool {
        let others = self.peers.iter().filter(|peer| peer.row.node != self.me && peer.takes(Role::Mind));
        others.filter_map(|peer| peer.report).any(|report| report.load.busy_permille < BUSIEST)
    }

    /// The newest version of the protocol that every node speaks.
    pub fn spoken(&self) -> u32 {
        self.peers.iter().map(|peer| peer.row.protocol.max).min().unwrap_or(0)
    }
}

const fn place(role: Role) -> usize {
    role as usize
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        scaling::load_report::Way,
        types::{Load, Protocol, Roles},
    };

    fn peer(name: &str, busy: Option<u32>) -> Peer {
        let row = NodeRow {
            node: NodeId::new(format!("{name}.0")).unwrap(),
            addresses: vec![format!("http={name}:8080"), String::from("mqtt=0.0.0.0:1883")],
            roles: Roles::default(),
            weight: 100,
            protocol: Protocol { min: 1, max: 2 },
            lease_left: 1000,
            load: Load::default(),
            draining: false,
            alive: true,
        };
        let report = busy.map(|busy| Report {
            load: Load { busy_permille: busy, ..Load::default() },
            average_permille: busy,
            age: Duration::ZERO,
            way: Way::Bus,
        });
        Peer { row, report }
    }

    fn routing(strategy: Strategy, peers: Vec<Peer>) -> Routing {
        Routing::new(NodeId::new("me.0").unwrap(), strategy, peers, None)
    }

    fn named(peer: Option<&Peer>) -> Option<&str> {
        peer.map(|peer| peer.row.node.name())
    }

    #[test]
    fn only_another_node_that_has_the_role_and_stays_is_picked() {
        for strategy in [Strategy::RoundRobin, Strategy::LeastLoaded, Strategy::PowerOfTwo, Strategy::Rendezvous] {
            let mut peers: Vec<Peer> =
                ["a", "b", "c", "d", "me"].map(|name| peer(name, (name != "c").then_some(900))).into();
            peers[0].row.draining = true;
            peers[1].row.alive = false;
            peers[3].row.roles = [Role::Gateway].into_iter().collect();
            let routing = routing(strategy, peers);
            for key in 0..20 {
                assert_eq!(named(routing.other(Role::Mind, key)), Some("c"), "{strategy:?}");
                assert!(["c", "d"].contains(&named(routing.other(Role::Gateway, key)).unwrap()), "{strategy:?}");
            }
        }
        assert!(routing(Strategy::PowerOfTwo, vec![peer("me", Some(0))]).other(Role::Mind, 1).is_none(), "it is alone");
    }

    #[test]
    fn others_have_room_when_one_of_them_says_so() {
        let room = |peers: Vec<Peer>| routing(Strategy::RoundRobin, peers).others_have_room();
        assert!(!room(vec![peer("me", Some(0))]), "it is alone");
        assert!(!room(vec![peer("me", Some(0)), peer("a", Some(1000)), peer("b", None)]), "full, and not heard of");
        assert!(room(vec![peer("me", Some(1000)), peer("a", Some(1000)), peer("b", Some(990))]));
        let mut leaving = peer("a", Some(0));
        leaving.row.draining = true;
        assert!(!room(vec![peer("me", Some(1000)), leaving]));
    }

    #[test]
    fn of_whom_nothing_is_believed_is_taken_for_usual() {
        let peers = vec![peer("a", Some(800)), peer("b", None), peer("c", Some(200))];
        let routing = routing(Strategy::LeastLoaded, peers.clone());
        assert_eq!(named(routing.other(Role::Mind, 0)), Some("c"));
        let without = Routing::new(routing.me.clone(), Strategy::LeastLoaded, peers[..2].to_vec(), None);
        assert_eq!(without.others_average(), Some(800));
        assert_eq!(
            Routing::new(routing.me.clone(), Strategy::LeastLoaded, vec![peer("b", None)], None).others_average(),
            None
        );
    }

    #[test]
    fn turns_go_on_over_a_new_snapshot() {
        let peers = || ["a", "b", "c"].map(|name| peer(name, Some(1))).to_vec();
        let mut now = routing(Strategy::RoundRobin, peers());
        let picked: Vec<String> = (0..6)
            .map(|_| {
                now = Routing::new(now.me.clone(), Strategy::RoundRobin, peers(), Some(&now));
                named(now.other(Role::Gateway, 0)).unwrap().to_owned()
            })
            .collect();
        assert_eq!(picked, ["a", "b", "c", "a", "b", "c"]);
    }

    #[test]
    fn an_address_that_is_everywhere_is_told_to_nobody() {
        let peer = peer("a", None);
        assert_eq!((peer.door("http"), peer.door("mqtt"), peer.door("htt")), (Some("a:8080"), None, None));
    }

    #[test]
    fn all_speak_what_the_oldest_speaks() {
        let mut peers = vec![peer("a", None), peer("b", None)];
        peers[1].row.protocol = Protocol { min: 1, max: 1 };
        assert_eq!(routing(Strategy::PowerOfTwo, peers).spoken(), 1);
    }
}
