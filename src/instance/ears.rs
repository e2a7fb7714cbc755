//! Who still waits for what: the doors say who listens to the answer to a stimulus, and who left before it came.
//!
//! Owns: the places of listeners, those here and, by node, those elsewhere. Not here: what is made of it (`actor/unheard.rs`), the way
//! to the owner on another node (`cluster::hearing`, behind [`Neighbours`]).
//! Invariants: nobody is said to have left but by a door that saw them go. A node that dies, a message that is lost and a registry that
//! is full make a stimulus look as if somebody still listened.
//! Tests: at the foot; `tests/it/unheard.rs`.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::types::{InstanceKey, NodeId, StimulusId};

/// Most stimuli that are kept in mind.
const MOST: usize = 65_536;
/// What nobody listens to is forgotten after so long: its turn was committed elsewhere, or the node has long moved on.
const STALE: Duration = Duration::from_secs(3_600);
/// The stale are looked for no more often than this.
const SWEEP: Duration = Duration::from_secs(60);

/// Port: the owner of an instance on another node wants to know, too. Implemented by `cluster`.
pub trait Neighbours: Send + Sync + 'static {
    /// Somebody here listens to a stimulus, the first one, or nobody does any more; `left`: its sender is gone. Must not block.
    /// Returns whether the owner is another node, which was told.
    fn changed(&self, key: &InstanceKey, stimulus: &StimulusId, listens: bool, left: bool) -> bool;
}

type Name = (InstanceKey, StimulusId);

/// Those who listen to one stimulus.
#[derive(Debug)]
struct Seats {
    here: usize,
    /// Nodes at whose doors somebody listens.
    elsewhere: Vec<NodeId>,
    /// A sender left before the answer.
    left: bool,
    /// A sender was told to come back for the answer: it is wanted whoever leaves.
    kept: bool,
    /// The last change.
    since: Instant,
}

impl Seats {
    fn is_empty(&self) -> bool {
        self.here == 0 && self.elsewhere.is_empty()
    }

    /// Whether nothing of it matters any more.
    fn is_idle(&self) -> bool {
        self.is_empty() && !self.left && !self.kept
    }
}

/// The listeners of a node. Cheap to clone.
#[derive(Clone, Default)]
pub struct Ears(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// Number of entries, read without the lock.
    entries: AtomicUsize,
    state: Mutex<State>,
    neighbours: OnceLock<Arc<dyn Neighbours>>,
}

#[derive(Default)]
struct State {
    seats: HashMap<Name, Seats, ahash::RandomState>,
    swept: Option<Instant>,
}

impl State {
    /// The seats of a stimulus; none when there are too many.
    fn seats(&mut self, name: &Name, now: Instant) -> Option<&mut Seats> {
        let full = self.seats.len() >= MOST && !self.seats.contains_key(name);
        if full && self.swept.is_none_or(|swept| now.duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.seats.retain(|_, seats| !seats.is_empty() || now.duration_since(seats.since) < STALE);
        }
        if full && self.seats.len() >= MOST {
            return None;
        }
        let vacant = || Seats { here: 0, elsewhere: Vec::new(), left: false, kept: false, since: now };
        Some(self.seats.entry(name.clone()).or_insert_with(vacant))
    }
}

impl std::fmt::Debug for Ears {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ears({})", self.len())
    }
}

impl Ears {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let out = act(&mut state);
        self.0.entries.store(state.seats.len(), Ordering::Release);
        out
    }

    /// From here on owners on other nodes are told. Only the first one counts.
    pub fn set_neighbours(&self, neighbours: Arc<dyn Neighbours>) {
        drop(self.0.neighbours.set(neighbours));
    }

    /// Somebody listens to the answer to a stimulus from here on. A `sender` who leaves before it makes it unheard; others
    /// only listen.
    pub fn listen(&self, key: &InstanceKey, stimulus: &StimulusId, sender: bool) -> Ear {
        let mut ear = self.prick(key, stimulus, sender);
        ear.sit();
        ear
    }

    /// The same for one who may have the answer before it is worth telling anybody: see [`Ear::sit`].
    pub fn prick(&self, key: &InstanceKey, stimulus: &StimulusId, sender: bool) -> Ear {
        Ear { ears: self.clone(), name: (key.clone(), stimulus.clone()), sender, seated: false, over: false }
    }

    /// A door of another node says that somebody there listens, or that nobody does any more.
    pub fn elsewhere(&self, node: NodeId, key: InstanceKey, stimulus: StimulusId, listens: bool, left: bool) {
        let (name, now) = ((key, stimulus), Instant::now());
        self.with(|state| {
            let Some(seats) = state.seats(&name, now) else { return };
            seats.elsewhere.retain(|other| *other != node);
            if listens {
                seats.elsewhere.push(node);
            }
            seats.left |= left;
            seats.since = now;
            if seats.is_idle() {
                state.seats.remove(&name);
            }
        });
    }

    /// Since when nobody waits for the answer to a stimulus for which somebody did. None while somebody does, and when nobody
    /// ever has.
    pub fn unheard_since(&self, key: &InstanceKey, stimulus: &StimulusId) -> Option<Instant> {
        if self.is_empty() {
            return None;
        }
        let name = (key.clone(), stimulus.clone());
        self.with(|state| {
            let seats = state.seats.get(&name)?;
            (seats.is_empty() && seats.left && !seats.kept).then_some(seats.since)
        })
    }

    /// The stimulus has its end.
    pub fn over(&self, key: &InstanceKey, stimulus: &StimulusId) {
        if !self.is_empty() {
            let name = (key.clone(), stimulus.clone());
            self.with(|state| {
                // Whoever still listens here is about to hear of the end, and leaves then.
                if let Some(seats) = state.seats.get_mut(&name) {
                    (seats.elsewhere, seats.left, seats.kept) = (Vec::new(), false, false);
                    if seats.is_idle() {
                        state.seats.remove(&name);
                    }
                }
            });
        }
    }

    /// What is listened to here.
    pub fn here(&self) -> Vec<(InstanceKey, StimulusId)> {
        let here = |(name, seats): (&Name, &Seats)| (seats.here > 0).then(|| name.clone());
        self.with(|state| state.seats.iter().filter_map(here).collect())
    }

    /// Number of stimuli kept in mind.
    pub fn len(&self) -> usize {
        self.0.entries.load(Ordering::Acquire)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn changed(&self, (key, stimulus): &Name, listens: bool, left: bool) -> bool {
        self.0.neighbours.get().is_some_and(|neighbours| neighbours.changed(key, stimulus, listens, left))
    }
}

/// The place of one who listens. Dropped before [`Ear::ended`] or [`Ear::keep`] they have left.
#[derive(Debug)]
pub struct Ear {
    ears: Ears,
    name: Name,
    sender: bool,
    /// Whether it counts.
    seated: bool,
    over: bool,
}

impl Ear {
    /// It counts from here on.
    pub fn sit(&mut self) {
        if self.seated {
            return;
        }
        let now = Instant::now();
        let first = self.ears.with(|state| {
            let seats = state.seats(&self.name, now)?;
            seats.here += 1;
            seats.since = now;
            Some(seats.here == 1)
        });
        self.seated = first.is_some();
        if first == Some(true) {
            self.ears.changed(&self.name, true, false);
        }
    }

    /// The answer is there, or the door ends the wait.
    pub fn ended(mut self) {
        self.over = true;
        self.rise(false, false);
    }

    /// The sender is told to come back for the answer: it is wanted from now on, whoever leaves.
    pub fn keep(mut self) {
        self.over = true;
        self.sit();
        self.rise(false, true);
    }

    fn rise(&mut self, left: bool, kept: bool) {
        if !std::mem::take(&mut self.seated) {
            return;
        }
        let last = self.ears.with(|state| {
            let seats = state.seats.get_mut(&self.name)?;
            seats.here = seats.here.saturating_sub(1);
            seats.left |= left;
            seats.kept |= kept;
            seats.since = Instant::now();
            let last = (seats.here == 0).then_some(seats.left && !seats.kept);
            if seats.is_idle() {
                state.seats.remove(&self.name);
            }
            last
        });
        // What another node owns is for that node to remember.
        if let Some(left) = last
            && self.ears.changed(&self.name, false, left)
        {
            self.ears.with(|state| {
                if state.seats.get(&self.name).is_some_and(Seats::is_empty) {
                    state.seats.remove(&self.name);
                }
            });
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        if !self.over {
            self.sit();
            self.rise(self.sender, false);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    fn id() -> StimulusId {
        StimulusId::new("s-1").unwrap()
    }

    fn node() -> NodeId {
        NodeId::new("b.4567").unwrap()
    }

    #[test]
    fn a_stimulus_is_unheard_when_its_sender_left_and_nobody_else_listens() {
        let ears = Ears::default();
        let unheard = || ears.unheard_since(&key(), &id()).is_some();
        assert!(!unheard(), "nobody ever waited");
        let (sender, other) = (ears.listen(&key(), &id(), true), ears.listen(&key(), &id(), false));
        drop(sender);
        assert!(!unheard(), "somebody else listens");
        drop(other);
        assert!(unheard());
        let again = ears.listen(&key(), &id(), true);
        assert!(!unheard(), "the sender came back");
        drop(again);
        ears.over(&key(), &id());
        assert!(!unheard() && ears.is_empty());
    }

    #[test]
    fn who_only_listened_and_who_got_the_answer_leave_nothing_behind() {
        let ears = Ears::default();
        drop(ears.listen(&key(), &id(), false));
        ears.listen(&key(), &id(), true).ended();
        ears.prick(&key(), &id(), true).ended();
        assert!(ears.is_empty());
        drop(ears.prick(&key(), &id(), true));
        assert!(ears.unheard_since(&key(), &id()).is_some(), "one who left before it was worth telling has left");
    }

    #[test]
    fn what_a_sender_will_come_back_for_is_wanted() {
        let ears = Ears::default();
        let other = ears.listen(&key(), &id(), true);
        ears.prick(&key(), &id(), true).keep();
        drop(other);
        assert_eq!(ears.unheard_since(&key(), &id()), None);
    }

    #[test]
    fn those_at_other_nodes_count() {
        let ears = Ears::default();
        let say = |listens, left| ears.elsewhere(node(), key(), id(), listens, left);
        say(true, false);
        drop(ears.listen(&key(), &id(), true));
        assert_eq!(ears.unheard_since(&key(), &id()), None);
        say(false, false);
        assert!(ears.unheard_since(&key(), &id()).is_some());
        ears.over(&key(), &id());
        say(true, false);
        say(false, false);
        assert!(ears.is_empty(), "nobody left there");
        say(false, true);
        assert!(ears.unheard_since(&key(), &id()).is_some(), "who came is known from their leaving");
    }

    #[test]
    fn an_owner_elsewhere_is_told_once_and_keeps_it_in_mind() {
        #[derive(Default)]
        struct Told(Mutex<Vec<(bool, bool)>>);
        impl Neighbours for Told {
            fn changed(&self, _: &InstanceKey, _: &StimulusId, listens: bool, left: bool) -> bool {
                self.0.lock().unwrap().push((listens, left));
                true
            }
        }
        let (ears, told) = (Ears::default(), Arc::new(Told::default()));
        ears.set_neighbours(told.clone());
        let (one, two) = (ears.listen(&key(), &id(), true), ears.listen(&key(), &id(), false));
        assert_eq!(ears.here(), [(key(), id())]);
        drop((one, two));
        ears.listen(&key(), &id(), true).ended();
        assert_eq!(*told.0.lock().unwrap(), [(true, false), (false, true), (true, false), (false, false)]);
        assert!(ears.is_empty());
    }
}
