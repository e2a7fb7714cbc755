//! A node's membership: what `cluster::membership` does around the lease.

use super::*;

impl World {
    pub(super) fn tick(&mut self, at: usize) {
        if self.nodes[at].call.is_some() {
            return;
        }
        self.close_idle(at);
        if !self.nodes[at].releases.is_empty() {
            let fences = std::mem::take(&mut self.nodes[at].releases);
            return self.ask(at, Call::Release(fences));
        }
        let local = self.local(at);
        match self.nodes[at].lease.due(local) {
            Due::Stop => {
                let lost = self.nodes[at].lease.stop(false);
                self.drop_shards(at, &lost);
                self.tell(at, 1, News::Tick);
            }
            Due::Join => {
                self.nodes[at].lease.asks(local);
                self.ask(at, Call::Join);
            }
            Due::Renew => {
                self.nodes[at].lease.asks(local);
                self.ask(at, Call::Renew);
            }
            Due::Nothing(until) => {
                let delay = self.until(at, until);
                self.tell(at, delay.max(1), News::Tick);
            }
        }
    }

    /// Calls the store with a deadline: a third of a lease, or until serving must stop.
    pub(super) fn ask(&mut self, at: usize, call: Call) {
        self.calls += 1;
        let (id, local) = (self.calls, self.local(at));
        let third = TERMS.lease / 3;
        let left = self.nodes[at].lease.serves_until().map(|until| until.saturating_sub(local));
        let limit = left.filter(|left| !left.is_zero()).map_or(third, |left| left.min(third));
        self.nodes[at].call = Some((id, local));
        let late = self.until(at, local + limit);
        self.tell(at, late, News::Late(id));
        self.call(at, id, call);
    }

    /// Whether this is the end of the call that is out.
    pub(super) fn ends(&mut self, at: usize, id: u64) -> Option<Duration> {
        let asked = self.nodes[at].call.filter(|(out, _)| *out == id)?.1;
        self.nodes[at].call = None;
        Some(asked)
    }

    pub(super) fn viewed(&mut self, at: usize, asked: Duration, view: Result<View, ownership::Error>) {
        let local = self.local(at);
        match view {
            Ok(view) => {
                let node = &mut self.nodes[at];
                node.lease.renewed(asked);
                let moves = node.lease.look(&view, local);
                let holds = |id: &&NodeId| view.nodes.iter().any(|row| row.node == **id && row.holds());
                node.routes = view.shards.iter().map(|row| row.node.as_ref().filter(holds).cloned()).collect();
                if node.lease.is_restless() {
                    node.lease.within(local + Duration::from_millis(RESTLESS));
                }
                self.drop_shards(at, &moves.lost);
                for shard in &moves.hand_off {
                    if let Some(home) = self.nodes[at].homes.get_mut(shard) {
                        home.closing = Some(self.now);
                    }
                }
                self.nodes[at].releases.extend(&moves.release);
                if !moves.release.is_empty() {
                    self.nodes[at].lease.hurry();
                }
                let claims = moves.take.clone();
                self.nodes[at].moves = moves;
                if !claims.is_empty() {
                    return self.ask(at, Call::Take(claims));
                }
            }
            Err(ownership::Error::Lost) => {
                let lost = self.nodes[at].lease.stop(true);
                self.drop_shards(at, &lost);
                self.nodes[at].lease.hurry();
            }
            Err(_) => {}
        }
        self.tick(at);
    }

    pub(super) fn taken(&mut self, at: usize, fences: Result<Vec<Fence>, ownership::Error>) {
        if let Ok(fences) = fences {
            self.nodes[at].lease.taken(&fences);
            for fence in fences {
                let me = named(at, self.nodes[at].life);
                self.nodes[at].routes[fence.shard as usize] = Some(me);
                if let Some(old) = self.nodes[at].homes.insert(fence.shard, Home::new(fence.epoch)) {
                    old.instances.into_values().for_each(Instance::end);
                }
            }
            self.tell(at, 0, News::Scan);
        }
        self.tick(at);
    }

    pub(super) fn drop_shards(&mut self, at: usize, shards: &[u32]) {
        for shard in shards {
            if let Some(home) = self.nodes[at].homes.remove(shard) {
                home.instances.into_values().for_each(Instance::end);
            }
        }
    }

    /// Shards that are being closed and have nothing in hand, or had time enough, are let go.
    pub(super) fn close_idle(&mut self, at: usize) {
        let now = self.now;
        let node = &mut self.nodes[at];
        let ready = |home: &Home| home.closing.is_some_and(|since| home.is_idle() || now > since + 1_000);
        let closed: Vec<u32> = node.homes.iter().filter(|(_, home)| ready(home)).map(|(shard, _)| *shard).collect();
        for shard in &closed {
            node.releases.extend(node.lease.closed(*shard));
        }
        self.drop_shards(at, &closed);
    }
}
