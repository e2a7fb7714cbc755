//! Who still waits for what: the doors say who listens to the answer to a stimulus, and who left before it came.
//!
//! Owns: the places of listeners, those here and, by node, those elsewhere. Not here: what is made of it (`actor/unheard.rs`), the way
//! to the owner on another node (`cluster::hearing`, behind [`Neighbours`]).
//! Invariants: nobody is said to have left but by a door that saw them go. What doors of other nodes said is a hint: before a
//! thought is given up they are asked ([`Ears::wanted_elsewhere`]), and one that does not answer may have somebody who listens. While
//! somebody listens for whom the registry had no place, nobody counts as unheard.
//! Tests: at the foot; `tests/it/unheard.rs`.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use crate::types::{InstanceKey, NodeId, StimulusId};

/// Most stimuli that are kept in mind.
const MOST: usize = 65_536;
/// What nobody listens to is forgotten after so long: its turn was committed elsewhere, or the node has long moved on.
const STALE: Duration = Duration::from_secs(3_600);
/// The stale are looked for no more often than this.
const SWEEP: Duration = Duration::from_secs(60);

/// What a door tells of those who listen to a stimulus there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// Somebody does, the first one.
    Listens,
    /// Nobody does any more.
    Ends,
    /// Nobody does any more, and one who left sent it.
    Left,
    /// Its sender was told to come back for the answer.
    Kept,
}

/// Port: doors on other nodes. Implemented by `cluster`.
pub trait Neighbours: Send + Sync + 'static {
    /// The owner of the instance wants to know. Must not block. Returns whether that is another node, which was told.
    fn changed(&self, key: &InstanceKey, stimulus: &StimulusId, news: News) -> bool;
    /// Whether somebody at another node may want the answer to one of these: no only when each of them said so. Ends within a bound.
    fn may_listen(&self, key: &InstanceKey, stimuli: Vec<StimulusId>) -> BoxFuture<'static, bool>;
}

type Name = (InstanceKey, StimulusId);

/// Those who listen to one stimulus.
#[derive(Debug)]
struct Seats {
    here: usize,
    /// Nodes that said that somebody listens at their doors.
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
    /// How many listen here for whom there was no place.
    standing: AtomicUsize,
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
            self.seats.retain(|_, seats| seats.here > 0 || now.duration_since(seats.since) < STALE);
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
        Ear { ears: self.clone(), name: (key.clone(), stimulus.clone()), sender, place: Place::None, over: false }
    }

    /// A door of another node tells of those who listen there.
    pub fn elsewhere(&self, node: NodeId, key: InstanceKey, stimulus: StimulusId, news: News) {
        let (name, now) = ((key, stimulus), Instant::now());
        self.with(|state| {
            let Some(seats) = state.seats(&name, now) else { return };
            match news {
                News::Kept => seats.kept = true,
                _ => seats.elsewhere.retain(|other| *other != node),
            }
            match news {
                News::Listens => seats.elsewhere.push(node),
                News::Left => seats.left = true,
                News::Ends | News::Kept => {}
            }
            seats.since = now;
            if seats.is_idle() {
                state.seats.remove(&name);
            }
        });
    }

    /// Since when nobody waits, as far as is known here, for the answer to a stimulus for which somebody did. None while somebody
    /// does, and when nobody ever has.
    pub fn unheard_since(&self, key: &InstanceKey, stimulus: &StimulusId) -> Option<Instant> {
        if self.is_empty() || self.some_stand() {
            return None;
        }
        let name = (key.clone(), stimulus.clone());
        self.with(|state| {
            let seats = state.seats.get(&name)?;
            (seats.is_empty() && seats.left && !seats.kept).then_some(seats.since)
        })
    }

    /// Whether somebody at another node may want the answer to one of these: they are asked, since what they told may be lost. Ends
    /// within a bound. Cancel safe.
    pub fn wanted_elsewhere(&self, key: &InstanceKey, stimuli: Vec<StimulusId>) -> BoxFuture<'static, bool> {
        match self.0.neighbours.get() {
            Some(neighbours) => neighbours.may_listen(key, stimuli),
            None => Box::pin(std::future::ready(false)),
        }
    }

    /// Those of the stimuli that somebody here wants answered, for an owner who asks.
    pub fn wanted(&self, key: &InstanceKey, mut stimuli: Vec<StimulusId>) -> Vec<StimulusId> {
        if !self.some_stand() {
            let wanted = |seats: &Seats| seats.here > 0 || seats.kept;
            self.with(|state| stimuli.retain(|id| state.seats.get(&(key.clone(), id.clone())).is_some_and(wanted)));
        }
        stimuli
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

    fn some_stand(&self) -> bool {
        self.0.standing.load(Ordering::Acquire) > 0
    }

    fn changed(&self, (key, stimulus): &Name, news: News) -> bool {
        self.0.neighbours.get().is_some_and(|neighbours| neighbours.changed(key, stimulus, news))
    }
}

/// Whether one who listens counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Not yet, or no more.
    #[default]
    None,
    /// Among those of the stimulus.
    Seat,
    /// There was no seat: as long as they stand, any stimulus may be theirs.
    Standing,
}

/// The place of one who listens. Dropped before [`Ear::ended`] or [`Ear::keep`] they have left.
#[derive(Debug)]
pub struct Ear {
    ears: Ears,
    name: Name,
    sender: bool,
    place: Place,
    over: bool,
}

impl Ear {
    /// It counts from here on.
    pub fn sit(&mut self) {
        if self.place != Place::None {
            return;
        }
        let now = Instant::now();
        let first = self.ears.with(|state| {
            let seats = state.seats(&self.name, now)?;
            seats.here += 1;
            seats.since = now;
            Some(seats.here == 1)
        });
        self.place = if first.is_some() { Place::Seat } else { Place::Standing };
        match first {
            Some(true) => {
                self.ears.changed(&self.name, News::Listens);
            }
            Some(false) => {}
            None => {
                self.ears.0.standing.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// The answer is there, or the door ends the wait.
    pub fn ended(mut self) {
        self.over = true;
        self.rise(News::Ends);
    }

    /// The sender is told to come back for the answer: it is wanted from now on, whoever leaves.
    pub fn keep(mut self) {
        self.over = true;
        self.sit();
        self.rise(News::Kept);
    }

    fn rise(&mut self, why: News) {
        match std::mem::take(&mut self.place) {
            Place::None => return,
            Place::Standing => {
                self.ears.0.standing.fetch_sub(1, Ordering::AcqRel);
                return;
            }
            Place::Seat => {}
        }
        let last = self.ears.with(|state| {
            let seats = state.seats.get_mut(&self.name)?;
            seats.here = seats.here.saturating_sub(1);
            seats.left |= why == News::Left;
            seats.kept |= why == News::Kept;
            seats.since = Instant::now();
            let news = if seats.left && !seats.kept { News::Left } else { News::Ends };
            let last = (seats.here == 0).then_some(news);
            if seats.is_idle() {
                state.seats.remove(&self.name);
            }
            last
        });
        if why == News::Kept {
            self.ears.changed(&self.name, News::Kept);
        }
        // What another node owns is for that node to remember.
        if let Some(news) = last
            && self.ears.changed(&self.name, news)
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
            self.rise(if self.sender { News::Left } else { News::Ends });
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
        let say = |news| ears.elsewhere(node(), key(), id(), news);
        say(News::Listens);
        drop(ears.listen(&key(), &id(), true));
        assert_eq!(ears.unheard_since(&key(), &id()), None);
        say(News::Ends);
        assert!(ears.unheard_since(&key(), &id()).is_some());
        ears.over(&key(), &id());
        say(News::Listens);
        say(News::Ends);
        assert!(ears.is_empty(), "nobody left there");
        say(News::Left);
        assert!(ears.unheard_since(&key(), &id()).is_some(), "who came is known from their leaving");
        say(News::Kept);
        assert_eq!(ears.unheard_since(&key(), &id()), None, "one of them was told to come back");
    }

    /// What was told; nobody listens elsewhere.
    #[derive(Default)]
    struct Told(Mutex<Vec<News>>);

    impl Neighbours for Told {
        fn changed(&self, _: &InstanceKey, _: &StimulusId, news: News) -> bool {
            self.0.lock().unwrap().push(news);
            true
        }
        fn may_listen(&self, _: &InstanceKey, _: Vec<StimulusId>) -> BoxFuture<'static, bool> {
            Box::pin(std::future::ready(false))
        }
    }

    #[test]
    fn an_owner_elsewhere_is_told_once_and_keeps_it_in_mind() {
        let (ears, told) = (Ears::default(), Arc::new(Told::default()));
        ears.set_neighbours(told.clone());
        let all = || std::mem::take(&mut *told.0.lock().unwrap());
        let (one, two) = (ears.listen(&key(), &id(), true), ears.listen(&key(), &id(), false));
        assert_eq!((ears.here(), ears.wanted(&key(), vec![id()])), (vec![(key(), id())], vec![id()]));
        drop((one, two));
        assert_eq!(ears.wanted(&key(), vec![id()]), []);
        ears.listen(&key(), &id(), true).ended();
        assert_eq!(all(), [News::Listens, News::Left, News::Listens, News::Ends]);
        let other = ears.listen(&key(), &id(), true);
        ears.prick(&key(), &id(), true).keep();
        drop(other);
        assert_eq!(all(), [News::Listens, News::Kept, News::Ends]);
        assert!(ears.is_empty());
    }

    #[test]
    fn while_somebody_has_no_place_nobody_is_unheard() {
        let ears = Ears::default();
        drop(ears.listen(&key(), &id(), true));
        assert!(ears.unheard_since(&key(), &id()).is_some());
        for n in 1..MOST {
            ears.elsewhere(node(), key(), StimulusId::new(format!("full-{n}")).unwrap(), News::Listens);
        }
        let late = StimulusId::new("late").unwrap();
        let standing = ears.listen(&key(), &late, true);
        assert_eq!((ears.len(), ears.unheard_since(&key(), &id())), (MOST, None));
        assert_eq!(ears.wanted(&key(), vec![late.clone()]), [late]);
        drop(standing);
        assert!(ears.unheard_since(&key(), &id()).is_some());
    }
}
