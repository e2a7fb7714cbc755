//! The ownership protocol, checked exhaustively in a small cluster: every order of calls, answers, losses, crashes, false
//! alarms and late commits within a few ticks of the store's clock.
//!
//! The nodes are the real `cluster::lease`, the store is the real `store::ownership::Rows`. Modelled: time (ticks of a
//! second, one clock for all), the shell between the two (each call, its arrival at the store and its answer are apart), and
//! commits (a fence on its way). A node that pauses is one that takes no step while time passes.

use std::time::Duration;

use sophont::{
    cluster::lease::{Due, Lease, Moment, Moves, Terms},
    store::{
        Fence,
        ownership::{Joining, Renewal, Rows, View},
    },
    types::{Load, Millis, NodeId, Protocol, Roles},
};
use stateright::{Checker, Model, Property};

const TERMS: Terms = Terms { lease: Duration::from_secs(2), every: Duration::from_secs(1), moves: 2, shared: true };

/// A cluster and what may happen to it.
struct Cluster {
    nodes: usize,
    shards: u32,
    /// Last tick.
    ticks: u64,
    crashes: u8,
    alarms: u8,
    losses: u8,
    drains: u8,
    /// Whether the store compares epochs.
    fence: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    lease: Lease,
    up: bool,
    /// What the store answered to a join or renewal asked for at that moment.
    answer: Option<(Moment, Option<View>)>,
    /// What it decided and did not do yet.
    moves: Moves,
    /// A commit on its way.
    commit: Option<Fence>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    rows: Rows,
    tick: u64,
    nodes: Vec<Node>,
    crashes: u8,
    alarms: u8,
    losses: u8,
    drains: u8,
    /// A commit was applied after its shard had been taken by another.
    stale: bool,
    /// A commit was applied for a shard that had been taken from somebody.
    passed_on: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    /// Time passes.
    Tick,
    /// The node does what is due; a call arrives at the store.
    Ask(usize),
    /// The answer arrives, or never does.
    Hear(usize, bool),
    /// Release and take arrive at the store; the answer to the taking arrives or is lost.
    Act(usize, bool),
    /// A hand-off is closed and released.
    Close(usize, u32),
    /// A commit leaves.
    Send(usize, u32),
    /// It arrives, at any later time, even when the node is gone.
    Arrive(usize),
    Crash(usize),
    /// The store sees that the process is gone; as a false alarm also when it is not.
    Gone(usize),
    Drain(usize),
}

fn joining(node: &NodeId, shards: u32) -> Joining {
    Joining {
        node: node.clone(),
        cluster: String::from("model"),
        shards,
        addresses: Vec::new(),
        roles: Roles::default(),
        weight: 100,
        protocol: Protocol { min: 1, max: 1 },
        lease: TERMS.lease,
    }
}

impl State {
    fn now(&self) -> Moment {
        Duration::from_secs(self.tick)
    }

    fn millis(&self) -> Millis {
        Millis(self.tick as i64 * 1000)
    }

    fn ask(&mut self, at: usize, shards: u32) {
        let (now, millis) = (self.now(), self.millis());
        let node = &mut self.nodes[at];
        match node.lease.due(now) {
            Due::Stop => drop(node.lease.stop(false)),
            Due::Join => {
                node.lease.asks(now);
                node.answer = Some((now, self.rows.join(&joining(node.lease.node(), shards), millis).ok()));
            }
            Due::Renew => {
                node.lease.asks(now);
                let draining = node.lease.is_draining();
                let renewal = Renewal { lease: TERMS.lease, load: Load::default(), weight: 100, draining };
                node.answer = Some((now, self.rows.renew(node.lease.node(), renewal, millis).ok()));
            }
            Due::Nothing(_) => {}
        }
    }

    fn hear(&mut self, at: usize) {
        let now = self.now();
        let node = &mut self.nodes[at];
        match node.answer.take() {
            Some((asked, Some(view))) => {
                node.lease.renewed(asked);
                node.moves = node.lease.look(&view, now);
            }
            Some((_, None)) => drop(node.lease.stop(true)),
            None => {}
        }
    }

    fn act(&mut self, at: usize, told: bool) {
        let millis = self.millis();
        let node = &mut self.nodes[at];
        let moves = std::mem::take(&mut node.moves);
        self.rows.release(node.lease.node(), &moves.release);
        match self.rows.take(node.lease.node(), &moves.take, millis) {
            Ok(fences) if told => node.lease.taken(&fences),
            Ok(_) => {}
            Err(_) => drop(node.lease.stop(true)),
        }
    }

    fn close(&mut self, at: usize, shard: u32) {
        let lease = &mut self.nodes[at].lease;
        if let Some(fence) = lease.closed(shard) {
            self.rows.release(lease.node(), &[fence]);
        }
    }

    fn arrive(&mut self, at: usize, fence: bool) {
        let Some(commit) = self.nodes[at].commit.take() else { return };
        let row = &self.rows.view(self.millis()).shards[commit.shard as usize];
        if fence && row.epoch != commit.epoch {
            return;
        }
        self.stale |= row.epoch != commit.epoch;
        self.passed_on |= row.epoch > 1;
    }

    /// Shards that are being closed by a node.
    fn closing(&self, at: usize, shards: u32) -> impl Iterator<Item = u32> + '_ {
        (0..shards).filter(move |shard| self.nodes[at].lease.clone().closed(*shard).is_some())
    }

    /// What happens when nothing goes wrong any more: time passes and everybody who is up does their rounds.
    fn settled(&self, shards: u32) -> Self {
        let mut state = self.clone();
        for node in state.nodes.iter().filter(|node| node.up) {
            state.rows.set_alive(node.lease.node(), true);
        }
        for _ in 0..10 {
            state.tick += 1;
            for at in (0..state.nodes.len()).filter(|at| self.nodes[*at].up) {
                state.ask(at, shards);
                state.hear(at);
                state.act(at, true);
                for shard in state.closing(at, shards).collect::<Vec<_>>() {
                    state.close(at, shard);
                }
            }
        }
        state
    }

    /// Whether every shard is open at exactly that node that the store names.
    fn is_whole(&self) -> bool {
        self.rows.view(self.millis()).shards.iter().all(|row| {
            let holds = |node: &&Node| node.up && node.lease.open().any(|open| open == (row.shard, row.epoch));
            let holders: Vec<&NodeId> = self.nodes.iter().filter(holds).map(|node| node.lease.node()).collect();
            holders == row.node.iter().collect::<Vec<_>>()
        })
    }
}

impl Model for Cluster {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let node = |n: usize| Node {
            lease: Lease::new(NodeId::new(format!("n{n}.0")).unwrap(), TERMS),
            up: true,
            answer: None,
            moves: Moves::default(),
            commit: None,
        };
        vec![State {
            rows: Rows::default(),
            tick: 0,
            nodes: (0..self.nodes).map(node).collect(),
            crashes: self.crashes,
            alarms: self.alarms,
            losses: self.losses,
            drains: self.drains,
            stale: false,
            passed_on: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.stale {
            return; // what follows on it teaches nothing
        }
        if state.tick < self.ticks {
            actions.push(Action::Tick);
        }
        for (at, node) in state.nodes.iter().enumerate() {
            if node.commit.is_some() {
                actions.push(Action::Arrive(at));
            }
            let is_seen =
                state.rows.view(state.millis()).nodes.iter().any(|row| row.node == *node.lease.node() && row.alive);
            if is_seen && (!node.up || state.alarms > 0) {
                actions.push(Action::Gone(at));
            }
            if !node.up {
                continue;
            }
            // The shell is one task: it hears and acts before it asks again.
            if node.answer.is_some() {
                actions.push(Action::Hear(at, true));
                if state.losses > 0 {
                    actions.push(Action::Hear(at, false));
                }
            } else if !node.moves.release.is_empty() || !node.moves.take.is_empty() {
                actions.push(Action::Act(at, true));
                if state.losses > 0 {
                    actions.push(Action::Act(at, false));
                }
            } else if !matches!(node.lease.due(state.now()), Due::Nothing(_)) {
                actions.push(Action::Ask(at));
            }
            actions.extend(state.closing(at, self.shards).map(|shard| Action::Close(at, shard)));
            if node.commit.is_none() {
                actions.extend(node.lease.open().map(|(shard, _)| Action::Send(at, shard)));
            }
            if state.crashes > 0 {
                actions.push(Action::Crash(at));
            }
            if state.drains > 0 && !node.lease.is_draining() {
                actions.push(Action::Drain(at));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => state.tick += 1,
            Action::Ask(at) => state.ask(at, self.shards),
            Action::Hear(at, true) => state.hear(at),
            Action::Hear(at, false) => {
                state.losses -= 1;
                state.nodes[at].answer = None;
            }
            Action::Act(at, told) => {
                state.losses -= u8::from(!told);
                state.act(at, told);
            }
            Action::Close(at, shard) => state.close(at, shard),
            Action::Send(at, shard) => {
                let node = &mut state.nodes[at];
                let epoch = node.lease.open().find(|(open, _)| *open == shard)?.1;
                node.commit = Some(Fence { shard, epoch, ..Fence::default() });
            }
            Action::Arrive(at) => state.arrive(at, self.fence),
            Action::Crash(at) => {
                state.crashes -= 1;
                let node = &mut state.nodes[at];
                (node.up, node.answer, node.moves) = (false, None, Moves::default());
            }
            Action::Gone(at) => {
                state.alarms -= u8::from(state.nodes[at].up);
                state.rows.set_alive(state.nodes[at].lease.node(), false);
            }
            Action::Drain(at) => {
                state.drains -= 1;
                state.nodes[at].lease.drain();
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_EPOCH, |_, state: &State| !state.stale),
            Property::always("an epoch has one holder", |_, state: &State| {
                let mut held: Vec<(u32, u64)> = state.nodes.iter().flat_map(|node| node.lease.open()).collect();
                let all = held.len();
                held.sort_unstable();
                held.dedup();
                held.len() == all
            }),
            Property::always(
                "everything is owned again when nothing goes wrong any more",
                |cluster: &Cluster, state: &State| {
                    let able = state.nodes.iter().any(|node| node.up && !node.lease.is_draining());
                    !able || state.settled(cluster.shards).is_whole()
                },
            ),
            Property::sometimes("a shard is passed on and written for", |_, state: &State| state.passed_on),
        ]
    }
}

const ONE_EPOCH: &str = "only the newest epoch commits";

/// Two nodes, one shard, and nothing that goes wrong.
const CALM: Cluster =
    Cluster { nodes: 2, shards: 1, ticks: 3, crashes: 0, alarms: 0, losses: 0, drains: 0, fence: true };

fn check(cluster: Cluster) {
    let checked = cluster.checker().threads(2).spawn_bfs().join();
    println!("{} states, {} of them different", checked.state_count(), checked.unique_state_count());
    checked.assert_properties();
}

#[test]
fn a_crash_is_survived_in_every_order_of_events() {
    check(Cluster { crashes: 1, ..CALM });
}

#[test]
fn a_false_alarm_and_a_lost_answer_do_no_harm() {
    check(Cluster { alarms: 1, losses: 1, ticks: 2, ..CALM });
}

#[test]
fn shards_are_handed_over_in_every_order_of_events() {
    check(Cluster { drains: 1, ..CALM });
}

#[test]
fn three_nodes_agree() {
    check(Cluster { nodes: 3, crashes: 1, ticks: 1, ..CALM });
}

#[test]
fn without_the_fence_the_checker_finds_a_stale_commit() {
    let checked = Cluster { crashes: 1, fence: false, ..CALM }.checker().threads(2).spawn_bfs().join();
    let Some(path) = checked.discovery(ONE_EPOCH) else { panic!("a store without a fence goes unnoticed") };
    println!("{:?}", path.into_actions());
}
