//! Actors that die: what it costs, and who replaces them.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use actix_rt::Arbiter;

use super::{
    super::{Kind, Options, Slot, TieredCache},
    *,
};
use crate::{
    telemetry::{metric, prometheus},
    types::TenantId,
};

/// Ends an actor as a panic in it would: what it has in hand is lost.
#[derive(Message)]
#[rtype(result = "()")]
struct Die;

impl Handler<Die> for CacheSupervisor {
    type Result = ();
    fn handle(&mut self, _: Die, ctx: &mut Self::Context) {
        ctx.terminate();
    }
}

impl Handler<Die> for L1Actor {
    type Result = ();
    fn handle(&mut self, _: Die, ctx: &mut Self::Context) {
        ctx.terminate();
    }
}

impl Handler<Die> for L2Actor {
    type Result = ();
    fn handle(&mut self, _: Die, ctx: &mut Self::Context) {
        ctx.terminate();
    }
}

impl Handler<Die> for L3Actor {
    type Result = ();
    fn handle(&mut self, _: Die, ctx: &mut Self::Context) {
        ctx.terminate();
    }
}

fn slot(id: &str) -> Slot {
    Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), id)
}

struct Subject {
    cache: TieredCache,
    loads: AtomicUsize,
    arbiters: [Arbiter; 2],
    _folder: tempfile::TempDir,
}

impl Subject {
    async fn start() -> Self {
        prometheus::install();
        let folder = tempfile::tempdir().unwrap();
        let sizes = Sizes { l1: 1 << 20, l2: 1 << 20, l3: 1 << 20 };
        let cache = TieredCache::new(Options { sizes, folder: Some(folder.path().to_owned()), ..Options::default() });
        let arbiters = [Arbiter::new(), Arbiter::new()];
        cache.start(arbiters[0].handle(), arbiters[1].handle());
        let subject = Self { cache, loads: AtomicUsize::new(0), arbiters, _folder: folder };
        subject.until("its tiers live", |subject| subject.tiers().is_some()).await;
        subject
    }

    fn tiers(&self) -> Option<Tiers> {
        let tiers = self.cache.0.crew.0.tiers.load_full().map(|tiers| (*tiers).clone())?;
        let living = tiers.l1.connected() && tiers.l2.connected() && tiers.l3.as_ref().is_some_and(Addr::connected);
        living.then_some(tiers)
    }

    async fn get(&self, id: &str) -> String {
        let load = || async {
            self.loads.fetch_add(1, Ordering::SeqCst);
            Ok::<_, ()>(Some(id.to_owned()))
        };
        let value = self.cache.get_or_make::<String, _, _, _>(&slot(id), 0, load).await.unwrap();
        (*value.unwrap()).clone()
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !is_so(self) {
            assert!(Instant::now() < end, "in vain: {what}");
            tokio::task::yield_now().await;
        }
    }

    async fn until_below(&self, id: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.cache.inspect(&slot(id)).await.len() < 3 {
            assert!(Instant::now() < end, "in vain: all tiers hold {id}");
            tokio::task::yield_now().await;
        }
    }

    fn replaced(&self) -> [f64; 3] {
        let page = prometheus::render();
        TIERS.map(|tier| {
            let name = format!("{}{{tier=\"{tier}\"}} ", metric::CACHE_REPLACED);
            page.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0.0)
        })
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

#[actix_rt::test]
async fn a_tier_that_died_is_replaced_and_what_is_held_is_still_served() {
    let subject = Subject::start().await;
    subject.get("held").await;
    subject.until_below("held").await;
    let before = subject.replaced();
    let tiers = subject.tiers().unwrap();
    assert!(tiers.l1.try_send(Die).is_ok() && tiers.l2.try_send(Die).is_ok());
    assert!(tiers.l3.unwrap().try_send(Die).is_ok());
    subject.until("they are dead", |subject| subject.tiers().is_none()).await;
    assert_eq!(subject.get("held").await, "held");
    assert_eq!(subject.loads.load(Ordering::SeqCst), 1, "a hit needs none of them");
    assert_eq!(subject.get("alone").await, "alone", "and a miss finds its own way");
    subject.until("they were replaced", |subject| subject.tiers().is_some()).await;
    let grown: Vec<f64> = subject.replaced().iter().zip(before).map(|(after, before)| after - before).collect();
    assert!(grown.iter().all(|grown| *grown >= 1.0), "{grown:?}");
    // The new ones do what the old ones did: what is loaded goes to all tiers, and what they held is there.
    subject.get("after").await;
    subject.until_below("after").await;
    subject.until_below("held").await;
}

#[actix_rt::test]
async fn a_supervisor_that_died_is_replaced_by_the_next_who_misses_it() {
    let subject = Subject::start().await;
    let supervisor = lock(&subject.cache.0.crew.0.supervisor).clone().unwrap();
    let tiers = subject.tiers().unwrap();
    assert!(supervisor.try_send(Die).is_ok() && tiers.l1.try_send(Die).is_ok());
    subject.until("they are dead", |subject| !supervisor.connected() && subject.tiers().is_none()).await;
    let mut n = 0;
    let end = Instant::now() + Duration::from_secs(60);
    while subject.tiers().is_none() {
        assert!(Instant::now() < end, "in vain: somebody looks after the tiers again");
        n += 1;
        assert_eq!(subject.get(&format!("miss-{n}")).await, format!("miss-{n}"));
    }
    subject.get("after").await;
    subject.until_below("after").await;
}
