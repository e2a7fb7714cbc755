//! What every store that nodes share promises about membership and ownership, one suite over all backends.
//!
//! Each test takes a [`Subject`]. Leases pass by the subject's own means: a manual clock in memory.

use std::{sync::Arc, time::Duration};

use sophont::{
    runtime::clock::Clock,
    store::{
        Done, Fence, Head, Rejection, Store, Unit, Work,
        memory::MemoryStore,
        ownership::{Alone, Claim, Error, Joining, Ownership, Renewal, View},
        postgres::PostgresStore,
    },
    types::{Load, Millis, NodeId, Protocol, Role, Roles},
};

use crate::{
    store_contract::{key, postgres_settings, record, stimulus},
    support::postgres,
};

/// A store that nodes share, and how time and crashes come about in it.
pub struct Subject {
    pub ownership: Arc<dyn Ownership>,
    pub store: Arc<dyn Store>,
    memory: Option<(MemoryStore, Clock)>,
    /// The database, where it is one.
    url: Option<String>,
}

impl Subject {
    pub fn memory() -> Self {
        let clock = Clock::manual(Millis(1_000_000));
        let store = MemoryStore::shared(true, 100, SHARDS, clock.clone());
        Self {
            ownership: Arc::new(store.clone()),
            store: Arc::new(store.clone()),
            memory: Some((store, clock)),
            url: None,
        }
    }

    pub async fn postgres() -> Self {
        let url = postgres::shared().database().await;
        let (config, runtime) = (postgres_settings(&url), postgres::runtime());
        let opening =
            runtime.clone().spawn(async move { PostgresStore::open(&config, SHARDS, Clock::System, runtime).await });
        let store = opening.await.unwrap().unwrap();
        Self { ownership: store.clone(), store, memory: None, url: Some(url) }
    }

    /// Lets leases of [`LEASE`] pass, unless they are renewed later.
    pub async fn pass_a_lease(&self) {
        if let Some((_, clock)) = &self.memory {
            clock.advance(LEASE.as_millis() as i64 + 1);
        }
        if let Some(url) = &self.url {
            let past = "UPDATE nodes SET lease_until = lease_until - interval '3001 milliseconds'";
            postgres::connect(url).await.execute(past, &[]).await.unwrap();
        }
    }

    /// Ends the node's process without a word.
    pub async fn kill(&self, node: &NodeId) {
        if let Some((store, _)) = &self.memory {
            store.faults().set_alive(node, false);
        }
        if let Some(url) = &self.url {
            let kill =
                "SELECT pg_terminate_backend(l.pid, 10000) FROM pg_locks l JOIN nodes n ON l.objid::int8 = n.session
                        WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND n.node = $1
                        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            let killed = postgres::connect(url).await.query(kill, &[&node.as_str()]).await.unwrap();
            assert_eq!(killed.len(), 1, "its session was there");
        }
    }
}

pub const LEASE: Duration = Duration::from_secs(3);
const SHARDS: u32 = 4;

pub fn joining(name: &str) -> Joining {
    Joining {
        node: NodeId::generate(name),
        cluster: String::from("test"),
        shards: SHARDS,
        addresses: vec![format!("http={name}:1")],
        roles: [Role::Mind, Role::Gateway].into_iter().collect(),
        weight: 100,
        protocol: Protocol { min: 1, max: 2 },
        lease: LEASE,
    }
}

async fn join(subject: &Subject, name: &str) -> NodeId {
    let joining = joining(name);
    subject.ownership.join(&joining).await.unwrap();
    joining.node
}

fn renewal() -> Renewal {
    Renewal { lease: LEASE, load: Load::default(), weight: 100, draining: false }
}

async fn take(subject: &Subject, node: &NodeId, claims: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let claims: Vec<Claim> = claims.iter().map(|&(shard, epoch)| Claim { shard, epoch }).collect();
    let taken = subject.ownership.take(node, &claims).await.unwrap();
    taken.iter().map(|fence| (fence.shard, fence.epoch)).collect()
}

fn owner(view: &View, shard: u32) -> (Option<&NodeId>, u64) {
    let row = &view.shards[shard as usize];
    assert_eq!(row.shard, shard);
    (row.node.as_ref(), row.epoch)
}

fn fence(shard: u32, epoch: u64) -> Fence {
    Fence { shard, epoch, lodged: 0 }
}

/// Writes a turn under a fence.
async fn write(subject: &Subject, name: &str, fence: Fence) -> Result<(), Rejection> {
    let (done, end) = Done::channel();
    let turns = vec![Arc::new(record(1, stimulus(None)))];
    let work = Work::Turns { head: Head::default(), turns };
    subject.store.submit(Unit { key: key(name), fence, work, done });
    end.await.unwrap().map(drop)
}

macro_rules! contract {
    ($($name:ident)*) => {
        mod memory {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::memory()).await; })*
        }
        mod on_postgres {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::postgres().await).await; })*
        }
    };
}

contract! {
    the_first_node_founds_the_cluster
    another_number_of_shards_is_refused
    a_build_too_far_apart_is_refused
    renewal_keeps_a_lease_and_tells_what_changed
    a_lease_that_is_over_is_over
    a_free_shard_is_taken_once
    what_a_live_node_holds_is_not_taken
    what_a_gone_process_held_is_taken_at_once
    what_was_released_is_free
    who_leaves_leaves_nothing
    a_stale_owner_writes_nothing
    a_claim_of_a_shard_that_is_not_there_is_left_out
    a_drain_is_seen_by_the_node_and_not_taken_back
}

async fn the_first_node_founds_the_cluster(subject: Subject) {
    let joining = joining("a");
    let view = subject.ownership.join(&joining).await.unwrap();
    assert_eq!(
        view.shards.iter().map(|row| (row.shard, row.epoch)).collect::<Vec<_>>(),
        [(0, 0), (1, 0), (2, 0), (3, 0)]
    );
    assert!(view.shards.iter().all(|row| row.node.is_none() && row.lodged == 0));
    let [row] = view.nodes.as_slice() else { panic!("{view:?}") };
    assert_eq!((&row.node, &row.addresses, &row.roles), (&joining.node, &joining.addresses, &joining.roles));
    assert_eq!((row.weight, row.protocol, row.draining, row.holds()), (100, joining.protocol, false, true));
    assert!(row.lease_left > 0 && row.lease_left <= LEASE.as_millis() as i64, "{}", row.lease_left);
    let other = join(&subject, "b").await;
    let view = subject.ownership.view().await.unwrap();
    assert_eq!(view.nodes.iter().map(|row| &row.node).collect::<Vec<_>>(), [&joining.node, &other]);
}

async fn another_number_of_shards_is_refused(subject: Subject) {
    join(&subject, "a").await;
    let end = subject.ownership.join(&Joining { shards: SHARDS + 1, ..joining("b") }).await;
    assert!(
        matches!(end, Err(Error::OtherShards { stored: SHARDS, configured, .. }) if configured == SHARDS + 1),
        "{end:?}"
    );
    assert_eq!(subject.ownership.view().await.unwrap().nodes.len(), 1);
}

async fn a_build_too_far_apart_is_refused(subject: Subject) {
    let old = join(&subject, "old").await;
    let newer = |name| Joining { protocol: Protocol { min: 3, max: 4 }, ..joining(name) };
    let end = subject.ownership.join(&newer("new")).await;
    assert!(matches!(&end, Err(Error::OtherProtocol { node, .. }) if *node == old), "{end:?}");
    subject.ownership.join(&Joining { protocol: Protocol { min: 2, max: 3 }, ..joining("between") }).await.unwrap();
    subject.pass_a_lease().await;
    subject.ownership.join(&newer("new")).await.unwrap();
}

async fn renewal_keeps_a_lease_and_tells_what_changed(subject: Subject) {
    let node = join(&subject, "a").await;
    let load = Load { busy_permille: 500, instances: 7, in_hand: 3 };
    let longer = Renewal { lease: LEASE * 20, load, weight: 60, draining: true };
    let view = subject.ownership.renew(&node, longer).await.unwrap();
    assert_eq!((view.nodes[0].load, view.nodes[0].weight, view.nodes[0].draining), (load, 60, true));
    subject.pass_a_lease().await;
    let view = subject.ownership.renew(&node, renewal()).await.unwrap();
    assert!(view.nodes[0].holds() && view.nodes[0].draining, "a drain is not taken back");
}

async fn a_lease_that_is_over_is_over(subject: Subject) {
    let node = join(&subject, "a").await;
    assert_eq!(take(&subject, &node, &[(0, 0)]).await, [(0, 1)]);
    subject.pass_a_lease().await;
    assert!(matches!(subject.ownership.renew(&node, renewal()).await, Err(Error::Lost)));
    assert!(matches!(subject.ownership.take(&node, &[Claim { shard: 1, epoch: 0 }]).await, Err(Error::Lost)));
    let stranger = NodeId::generate("stranger");
    assert!(matches!(subject.ownership.renew(&stranger, renewal()).await, Err(Error::Lost)));
    let next = join(&subject, "b").await;
    assert_eq!(take(&subject, &next, &[(0, 1)]).await, [(0, 2)]);
}

async fn a_free_shard_is_taken_once(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    assert_eq!(take(&subject, &one, &[(0, 0), (1, 0)]).await, [(0, 1), (1, 1)]);
    assert_eq!(take(&subject, &other, &[(1, 0), (2, 0)]).await, [(2, 1)]);
    let view = subject.ownership.view().await.unwrap();
    assert_eq!(
        [0, 1, 2, 3].map(|shard| owner(&view, shard)),
        [(Some(&one), 1), (Some(&one), 1), (Some(&other), 1), (None, 0)]
    );
}

async fn what_a_live_node_holds_is_not_taken(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    take(&subject, &one, &[(0, 0)]).await;
    assert_eq!(take(&subject, &other, &[(0, 1)]).await, []);
    assert_eq!(take(&subject, &one, &[(0, 1)]).await, [], "not even by itself");
    subject.ownership.renew(&other, Renewal { lease: LEASE * 20, ..renewal() }).await.unwrap();
    subject.pass_a_lease().await;
    assert_eq!(take(&subject, &other, &[(0, 0)]).await, [], "the epoch seen is an old one");
    assert_eq!(take(&subject, &other, &[(0, 1)]).await, [(0, 2)]);
}

async fn what_a_gone_process_held_is_taken_at_once(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    take(&subject, &one, &[(0, 0)]).await;
    assert!(subject.ownership.gone().await.unwrap().is_empty());
    subject.kill(&one).await;
    assert_eq!(subject.ownership.gone().await.unwrap(), std::slice::from_ref(&one));
    let view = subject.ownership.renew(&other, renewal()).await.unwrap();
    assert_eq!(
        view.nodes.iter().map(|row| (&row.node, row.holds())).collect::<Vec<_>>(),
        [(&one, false), (&other, true)]
    );
    assert_eq!(take(&subject, &other, &[(0, 1)]).await, [(0, 2)]);
}

async fn what_was_released_is_free(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    take(&subject, &one, &[(0, 0), (1, 0), (2, 0)]).await;
    subject.ownership.release(&other, &[fence(0, 1)]).await.unwrap();
    subject.ownership.release(&one, &[fence(1, 0), fence(2, 1)]).await.unwrap();
    let view = subject.ownership.view().await.unwrap();
    assert_eq!([0, 1, 2].map(|shard| owner(&view, shard)), [(Some(&one), 1), (Some(&one), 1), (None, 1)]);
    assert_eq!(take(&subject, &other, &[(2, 1)]).await, [(2, 2)]);
}

async fn who_leaves_leaves_nothing(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    take(&subject, &one, &[(0, 0), (1, 0)]).await;
    subject.ownership.leave(&one).await.unwrap();
    let view = subject.ownership.view().await.unwrap();
    assert_eq!(view.nodes.iter().map(|row| &row.node).collect::<Vec<_>>(), [&other]);
    assert_eq!([0, 1].map(|shard| owner(&view, shard)), [(None, 1), (None, 1)]);
    assert!(matches!(subject.ownership.renew(&one, renewal()).await, Err(Error::Lost)));
    subject.ownership.leave(&one).await.unwrap();
}

async fn a_drain_is_seen_by_the_node_and_not_taken_back(subject: Subject) {
    let one = join(&subject, "a").await;
    assert!(subject.ownership.drain(&one).await.unwrap());
    assert!(!subject.ownership.drain(&NodeId::generate("nobody")).await.unwrap());
    let view = subject.ownership.renew(&one, Renewal { draining: false, ..renewal() }).await.unwrap();
    assert!(view.nodes[0].draining);
}

async fn a_stale_owner_writes_nothing(subject: Subject) {
    let (one, other) = (join(&subject, "a").await, join(&subject, "b").await);
    assert!(matches!(write(&subject, "i0", fence(0, 1)).await, Err(Rejection::Fenced)), "not taken yet");
    take(&subject, &one, &[(0, 0)]).await;
    write(&subject, "i1", fence(0, 1)).await.unwrap();
    subject.kill(&one).await;
    write(&subject, "i2", fence(0, 1)).await.unwrap();
    take(&subject, &other, &[(0, 1)]).await;
    assert!(matches!(write(&subject, "i3", fence(0, 1)).await, Err(Rejection::Fenced)));
    write(&subject, "i4", fence(0, 2)).await.unwrap();
    for (name, there) in [("i0", false), ("i1", true), ("i2", true), ("i3", false), ("i4", true)] {
        assert_eq!(subject.store.load(&key(name)).await.unwrap().exists, there, "{name}");
    }
}

async fn a_claim_of_a_shard_that_is_not_there_is_left_out(subject: Subject) {
    let node = join(&subject, "a").await;
    assert_eq!(take(&subject, &node, &[(SHARDS, 0), (0, 0)]).await, [(0, 1)]);
    subject.ownership.release(&node, &[fence(SHARDS, 1)]).await.unwrap();
}

#[tokio::test]
async fn without_the_fence_a_stale_owner_writes() {
    let subject = Subject::memory();
    let node = join(&subject, "a").await;
    take(&subject, &node, &[(0, 0)]).await;
    let faults = subject.memory.as_ref().unwrap().0.faults();
    faults.fence_off(true);
    write(&subject, "i1", fence(0, 0)).await.unwrap();
    faults.fence_off(false);
    assert!(matches!(write(&subject, "i2", fence(0, 0)).await, Err(Rejection::Fenced)));
}

#[tokio::test]
async fn a_store_that_nobody_joined_fences_nobody() {
    let subject = Subject::memory();
    write(&subject, "i1", fence(7, 3)).await.unwrap();
}

#[tokio::test]
async fn alone_one_owns_all_and_no_lease_ends() {
    let (alone, joining) = (Alone::default(), Joining { roles: Roles::default(), ..joining("a") });
    alone.join(&joining).await.unwrap();
    let claims: Vec<Claim> = (0..SHARDS).map(|shard| Claim { shard, epoch: 0 }).collect();
    let taken = alone.take(&joining.node, &claims).await.unwrap();
    assert_eq!(taken, (0..SHARDS).map(|shard| fence(shard, 1)).collect::<Vec<_>>());
    let view = alone.renew(&joining.node, renewal()).await.unwrap();
    assert!(view.nodes[0].holds() && view.shards.iter().all(|row| row.node.as_ref() == Some(&joining.node)));
}
