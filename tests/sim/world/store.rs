//! The way to the store and back, and what it does with what arrives.

use super::*;

impl World {
    pub(super) fn serve(&mut self, at: usize, life: u32, id: u64, call: Call) {
        self.clock.advance(self.now as i64 + 1_000_000 - self.clock.now().0);
        let node = named(at, life);
        let failure = self.failure(id, &call);
        let store = self.store.clone();
        let news = match call {
            Call::Join => {
                let joining = Joining {
                    node: node.clone(),
                    cluster: String::from("sim"),
                    shards: SHARDS,
                    addresses: Vec::new(),
                    roles: Roles::default(),
                    weight: 100,
                    protocol: Protocol { min: 1, max: 1 },
                    lease: TERMS.lease,
                };
                News::View(id, now(store.join(&joining)))
            }
            Call::Renew => {
                let draining = self.nodes[at].life == life && self.nodes[at].lease.is_draining();
                let renewal = Renewal { lease: TERMS.lease, load: Load::default(), weight: 100, draining };
                News::View(id, now(store.renew(&node, renewal)))
            }
            Call::Gone => News::Gone(id, now(store.gone()).unwrap_or_default()),
            Call::Take(claims) => News::Taken(id, now(store.take(&node, &claims))),
            Call::Release(fences) => {
                let _ = now(store.release(&node, &fences));
                News::Released(id)
            }
            Call::Load { epoch, key } => {
                let loaded = now(store.load(&key)).ok();
                News::Loaded(epoch, key, id, loaded)
            }
            Call::Unit { fence, key, work } => {
                let end = self.commit(fence, &key, work, true);
                News::Ended(fence.epoch, key, id, end)
            }
            Call::Lodge { request, shard, key, stimulus } => {
                let work = Work::Lodge { stimuli: vec![Arc::new(stimulus)] };
                News::Lodged(request, self.commit(Fence { shard, ..Fence::default() }, &key, work, false))
            }
            Call::Scan(shards) => {
                let scope = Scope::of(SHARDS, shards);
                News::Scanned(now(store.waiting(&scope, None, 100)).unwrap_or_default())
            }
        };
        if self.nodes[at].life != life {
            return;
        }
        let delay = self.delay();
        let lost = self.nodes[at].cut_until > self.now || (self.rough() && self.random.percent(1));
        match (lost, failure) {
            (false, _) => self.after(delay, Event::Node(at, life, news)),
            // Applied, and the caller is told that it failed.
            (true, Some(failure)) => self.after(delay + 300, Event::Node(at, life, failure)),
            (true, None) => {}
        }
    }

    pub(super) fn commit(
        &mut self,
        fence: Fence,
        key: &InstanceKey,
        work: Work,
        owner: bool,
    ) -> Result<Committed, Rejection> {
        if self.rough() && self.random.percent(2) {
            self.store.faults().fail_next(1, sophont::store::Error::Backend(String::from("a failed commit")));
        }
        let told = Arc::new(Mutex::new(None));
        let tell = told.clone();
        let done = Done::new(move |end| *tell.lock().unwrap() = Some(end));
        self.store.submit(Unit { key: key.clone(), fence, work, done });
        let end = told.lock().unwrap().take().unwrap();
        if owner && end.is_ok() {
            let view = now(self.store.view()).unwrap();
            self.history.committed(fence, view.shards[fence.shard as usize].epoch);
        }
        end
    }
}
