//! The way of a stimulus: from its sender through gateways to its instance and back.

use super::*;

impl World {
    pub(super) fn home(&mut self, at: usize, shard: u32, epoch: u64) -> Option<&mut Home> {
        self.nodes[at].homes.get_mut(&shard).filter(|home| home.epoch == epoch)
    }

    /// Carries out what an instance asks for.
    pub(super) fn grant(&mut self, at: usize, shard: u32, key: &InstanceKey, wishes: impl IntoIterator<Item = Wish>) {
        let Some(epoch) = self.nodes[at].homes.get(&shard).map(|home| home.epoch) else { return };
        for wish in wishes {
            match wish {
                Wish::Load(call) => self.call(at, call, Call::Load { epoch, key: key.clone() }),
                Wish::Commit { call, work, lodged } => {
                    self.call(at, call, Call::Unit { fence: Fence { shard, epoch, lodged }, key: key.clone(), work });
                }
                Wish::Think => {
                    let delay = self.random.within(20..400);
                    self.tell(at, delay, News::Thought(shard, epoch, key.clone()));
                }
                Wish::Pause => self.tell(at, 1_000, News::Rested(epoch, key.clone())),
            }
        }
    }

    pub(super) fn touch(
        &mut self,
        at: usize,
        key: &InstanceKey,
        epoch: Option<u64>,
        act: impl FnOnce(&mut Instance, &mut u64, &mut Random) -> Result<Vec<Wish>, ()>,
    ) {
        let shard = key.shard(SHARDS);
        let Some(home) = self.nodes[at].homes.get_mut(&shard) else { return };
        if epoch.is_some_and(|epoch| epoch != home.epoch) {
            return;
        }
        let instance = home.instances.entry(key.clone()).or_default();
        match act(instance, &mut home.lodged, &mut self.random) {
            Ok(wishes) => self.grant(at, shard, key, wishes),
            // The store refused the epoch. The lease learns of it with its next look, which is due now.
            Err(()) => {
                self.drop_shards(at, &[shard]);
                self.nodes[at].lease.hurry();
                self.tick(at);
            }
        }
    }

    pub(super) fn has_open(&self, at: usize, shard: u32) -> bool {
        self.nodes[at].homes.get(&shard).is_some_and(|home| home.closing.is_none())
    }

    pub(super) fn deliver(&mut self, at: usize, to: Origin, key: &InstanceKey, stimulus: &Stimulus, until: Until) {
        let (waiter, end) = Waiter::new(until, None);
        self.nodes[at].pending.push(Pending { to, end });
        self.touch(at, key, None, |instance, lodged, random| {
            Ok(instance.deliver(stimulus, waiter, *lodged, random).into_iter().collect())
        });
    }

    pub(super) fn asked(&mut self, at: usize, request: u64, asked: Asked, until: Until) {
        let shard = asked.key.shard(SHARDS);
        if self.has_open(at, shard) {
            let to = Origin::Sender(asked.sender, request);
            return self.deliver(at, to, &asked.key, &asked.stimulus, until);
        }
        let me = named(at, self.nodes[at].life);
        let owner = self.nodes[at].routes[shard as usize].clone().filter(|owner| *owner != me);
        let other =
            owner.and_then(|owner| (0..self.nodes.len()).find(|other| named(*other, self.nodes[*other].life) == owner));
        let Some(other) = other else { return self.lodge(at, request, asked) };
        let (key, stimulus) = (asked.key.clone(), asked.stimulus.clone());
        self.nodes[at].asked.insert(request, asked);
        let life = self.nodes[other].life;
        self.bus(other, life, || News::Forward {
            from: at,
            request,
            key: key.clone(),
            stimulus: stimulus.clone(),
            until,
        });
        self.tell(at, FORWARD, News::Deadline(request));
    }

    pub(super) fn lodge(&mut self, at: usize, request: u64, asked: Asked) {
        let (key, stimulus) = (asked.key.clone(), asked.stimulus.clone());
        self.nodes[at].asked.insert(request, Asked { lodging: true, ..asked });
        self.call(at, 0, Call::Lodge { request, shard: key.shard(SHARDS), key, stimulus });
    }

    pub(super) fn lodged(&mut self, at: usize, request: u64, end: Result<Committed, Rejection>) {
        let Some(asked) = self.nodes[at].asked.remove(&request) else { return };
        let ack = match end {
            Ok(_) => {
                // A hint for the owner, which may be lost.
                for other in 0..self.nodes.len() {
                    let (life, key) = (self.nodes[other].life, asked.key.clone());
                    self.bus(other, life, || News::Wake(key.clone()));
                }
                Some(Ack::Accepted)
            }
            Err(Rejection::Duplicate { known: Known::Decided(turn), .. }) => Some(Ack::Decided(turn.turn)),
            Err(Rejection::Duplicate { .. }) => Some(Ack::Accepted),
            Err(_) => None,
        };
        self.answer(at, asked.sender, request, ack);
    }

    /// An answer on its way to a sender. It may be lost with the process that gives it, not on the way.
    pub(super) fn answer(&mut self, at: usize, sender: usize, request: u64, ack: Option<Ack>) {
        let _ = at;
        let delay = self.random.within(1..20);
        self.after(delay, Event::Sender(sender, request, ack));
    }

    /// Passes on what instances have told those who wait.
    pub(super) fn pass_on(&mut self, at: usize) {
        let mut ended = Vec::new();
        self.nodes[at].pending.retain_mut(|pending| match pending.end.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => true,
            Ok(Ok(Receipt::Decided { turn, .. })) => {
                ended.push((pending.to, Some(Ack::Decided(turn.turn))));
                false
            }
            Ok(Ok(Receipt::Accepted { .. })) => {
                ended.push((pending.to, Some(Ack::Accepted)));
                false
            }
            Ok(Ok(Receipt::Dead(_)) | Err(_)) | Err(oneshot::error::TryRecvError::Closed) => {
                ended.push((pending.to, None));
                false
            }
        });
        for (to, ack) in ended {
            match to {
                Origin::Sender(sender, request) => self.answer(at, sender, request, ack),
                Origin::Node(from, life, request) => {
                    let answer = ack.map_or(Answer::No, Answer::Yes);
                    self.bus(from, life, || News::Answer(request, answer));
                }
            }
        }
    }

    pub(super) fn send(&mut self, sender: usize, attempt: u64, ack: Option<Ack>) {
        let Sender { key, count, next, attempt: current, done } = &mut self.senders[sender];
        if *done || attempt != *current {
            return;
        }
        let id = |number: u64| StimulusId::new(format!("s{sender}-{number}")).unwrap();
        if let Some(ack) = ack {
            self.history.acknowledged(key, &id(*next), ack);
            *next += 1;
            if *next == *count {
                *done = true;
                return;
            }
        }
        // Attempts are numbered over all senders, so that each is a request of its own.
        self.calls += 1;
        *current = self.calls;
        let (key, id, request) = (key.clone(), id(*next), *current);
        let stimulus = Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), "x", Millis(1)).with_repeatable_id(id);
        let until = if self.random.percent(50) { Until::Accepted } else { Until::Decided };
        let to = self.random.index(self.nodes.len());
        let delay = self.random.within(1..50);
        self.tell(to, delay, News::Ask { request, sender, key, stimulus, until });
        self.after(PATIENCE, Event::Sender(sender, request, None));
    }
}
