//! What a group commit looks up, and what becomes of each unit by what was found. Pure.
//!
//! Invariants: no two units of a batch are of one instance; a unit that is refused writes nothing.
//! Tests: `tests/it/store_contract.rs`, `tests/it/store_model.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::writes::{Asked, Writes};
use crate::{
    store::{Committed, Error, Head, Rejection, Unit, Work, check, roaming::Origin},
    types::{InstanceKey, Millis, Profile, Stimulus, StimulusId, TurnRecord},
};

/// The stimuli that a unit's work may bring into the store.
fn arriving(work: &Work) -> impl Iterator<Item = &StimulusId> {
    let (turns, stimuli) = match work {
        Work::Turns { turns, .. } => (turns.as_slice(), [].as_slice()),
        Work::Accept { stimuli } | Work::Lodge { stimuli } => ([].as_slice(), stimuli.as_slice()),
        _ => ([].as_slice(), [].as_slice()),
    };
    turns.iter().map(|turn| &turn.stimulus.id).chain(stimuli.iter().map(|stimulus| &stimulus.id))
}

/// Where an instance stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// Its life.
    pub life: i64,
    /// The number of its last turn, 0 before the first.
    pub turn: u64,
}

/// Where the rows of a stimulus stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// In the inbox.
    pub waiting: Option<i64>,
    /// How many others stand there before it.
    pub before: i64,
    /// Among the dead letters.
    pub dead: Option<i64>,
    /// The turn that decided it.
    pub decided: Option<i64>,
}

/// A place whose row tells what is known of a repeated stimulus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the inbox, at.
    Waiting(i64),
    /// Among the dead letters, at.
    Dead(i64),
    /// Decided in a life, by a turn.
    Decided(i64, i64),
}

/// What a batch looks up.
#[derive(Default)]
pub(super) struct Questions<'a> {
    /// Shards, in order.
    pub shards: BTreeSet<u32>,
    /// Instances.
    pub instances: Vec<&'a InstanceKey>,
    /// Stimuli.
    pub stimuli: Vec<Asked<'a>>,
    /// MQTT sessions that stimuli come from, each with its tenant.
    pub sessions: BTreeSet<(&'a str, &'a str)>,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Epoch and lodged count of each shard.
    pub shards: HashMap<u32, (u64, u64), ahash::RandomState>,
    /// The instances that exist, by their place in the question.
    pub instances: HashMap<usize, Standing, ahash::RandomState>,
    /// The stimuli that are known, by their place in the question.
    pub stimuli: HashMap<usize, Places, ahash::RandomState>,
    /// The newest hold that is barred of each session of which one is, by tenant and session.
    pub barred: HashMap<(String, String), u64, ahash::RandomState>,
}

/// Which answers are a unit's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking {
    instance: Option<usize>,
    stimuli: usize,
}

/// How a unit ends.
pub(super) enum End {
    /// It is written.
    Written(Committed),
    /// It is refused.
    Refused(Rejection),
    /// It repeats a stimulus; what is known of that one is yet to be read.
    Repeats(usize, Place),
}

/// The head of an instance that stands so.
pub(super) fn head(standing: Standing) -> Head {
    match standing.turn {
        0 => Head::default(),
        turn => Head { turn, links: [standing.life, 0, 0, 0] },
    }
}

impl<'a> Questions<'a> {
    /// Asks what a unit needs; the same unit is decided with what this returns.
    pub(super) fn ask(&mut self, unit: &'a Unit, dedupe: bool) -> Asking {
        self.shards.insert(unit.fence.shard);
        let key = &unit.key;
        let stimuli = self.stimuli.len();
        let arriving = arriving(&unit.work).filter_map(Origin::of);
        self.sessions.extend(arriving.map(|origin| (key.tenant.as_str(), origin.session)));
        let mut asked = |stimulus: &'a StimulusId, life: Option<i64>, wide: bool| {
            self.stimuli.push(Asked { key, stimulus, life, wide });
        };
        let known = match &unit.work {
            Work::Turns { head, turns } => {
                let life = (head.turn > 0).then_some(head.links[0]);
                for turn in turns {
                    asked(&turn.stimulus.id, life, dedupe && turn.stimulus.repeatable);
                }
                life.is_some()
            }
            Work::Accept { stimuli } | Work::Lodge { stimuli } => {
                for stimulus in stimuli.iter().filter(|stimulus| dedupe && stimulus.repeatable) {
                    asked(&stimulus.id, None, true);
                }
                false
            }
            Work::Bury { stimulus, .. } => {
                asked(&stimulus.id, None, true);
                false
            }
            Work::Revive { stimulus } => {
                asked(stimulus, None, true);
                false
            }
            Work::Step { .. } => true,
            Work::PutProfile { .. } | Work::Forget => false,
        };
        let instance = (!known).then_some(self.instances.len());
        if !known {
            self.instances.push(key);
        }
        Asking { instance, stimuli }
    }
}

/// Decides units one after the other and collects what they write.
pub(super) struct Decider<'a, 'w> {
    /// What was found.
    pub facts: &'w Facts,
    /// What is written.
    pub writes: &'w mut Writes<'a>,
    /// Unused lives.
    pub lives: &'w mut Vec<i64>,
    /// Whether repeats are recognised.
    pub dedupe: bool,
    /// Whether an owner must be the one the row names.
    pub fenced: bool,
}

impl<'a> Decider<'a, '_> {
    /// What becomes of a unit.
    ///
    /// # Errors
    /// Only when something cannot be serialized.
    pub(super) fn unit(&mut self, unit: &'a Unit, asking: Asking) -> Result<End, Error> {
        let standing = asking.instance.and_then(|at| self.facts.instances.get(&at)).copied();
        let admitted = match self.facts.shards.get(&unit.fence.shard) {
            Some(_) if !self.fenced => Ok(()),
            Some(shard) => check::fence(unit.fence, *shard, &unit.work, |id| self.is_next(unit, asking, id)),
            None => Err(Rejection::Fenced),
        };
        let end = admitted.map_or_else(
            |rejection| Ok(End::Refused(rejection)),
            |()| match &unit.work {
                Work::Turns { head, turns } => self.turns(unit, *head, turns, standing, asking),
                Work::Accept { stimuli } => self.accept(unit, stimuli, standing, asking),
                Work::Lodge { stimuli } => {
                    let end = self.accept(unit, stimuli, standing, asking)?;
                    // One that waits already may have come by a commit whose end its owner never heard: it has to look.
                    if matches!(end, End::Written(_) | End::Repeats(_, Place::Waiting(_))) {
                        self.writes.lodge(unit.fence.shard, stimuli.len());
                    }
                    Ok(end)
                }
                Work::Step { head, stimulus, first, steps } => {
                    self.writes.journals.enter(&unit.key, stimulus, *first, steps)?;
                    Ok(End::Written(Committed { head: *head, created: false }))
                }
                Work::Bury { stimulus, reason, tries, at } => {
                    self.writes.journals.leave(&unit.key, &stimulus.id);
                    let places = self.places(asking.stimuli);
                    let standing = self.create(&unit.key, standing, *at, None);
                    places.waiting.into_iter().for_each(|ord| self.writes.leave_inbox(ord));
                    self.writes.bury(&unit.key, stimulus, (reason, *tries, *at), places.dead)?;
                    Ok(unchanged(standing, false))
                }
                Work::Revive { .. } => Ok(self.revive(unit, standing, asking)),
                Work::PutProfile { profile, at } => self.put_profile(unit, profile, *at, standing),
                Work::Forget => {
                    if let Some(standing) = standing {
                        self.writes.forget(&unit.key, standing.life);
                    }
                    Ok(End::Written(Committed { head: Head::default(), created: false }))
                }
            },
        )?;
        Ok(end)
    }

    /// Whether the session a stimulus comes from went on elsewhere, where it may be sent again under another id.
    fn is_barred(&self, unit: &Unit, id: &StimulusId) -> bool {
        if self.facts.barred.is_empty() {
            return false;
        }
        let Some(origin) = Origin::of(id) else { return false };
        let session = (unit.key.tenant.as_str().to_owned(), origin.session.to_owned());
        self.facts.barred.get(&session).is_some_and(|barred| origin.hold <= *barred)
    }

    fn places(&self, at: usize) -> Places {
        self.facts.stimuli.get(&at).copied().unwrap_or_default()
    }

    /// Whether a stimulus of a unit of turns stands in the inbox, and nothing before it but what the unit decides first. Does
    /// not look at priorities: an owner that must look once more for nothing loses a moment.
    fn is_next(&self, unit: &Unit, asking: Asking, id: &StimulusId) -> bool {
        let Work::Turns { turns, .. } = &unit.work else { return false };
        let Some(at) = turns.iter().position(|turn| turn.stimulus.id == *id) else { return false };
        let Places { waiting: Some(ord), before, .. } = self.places(asking.stimuli + at) else { return false };
        let earlier = (0..at).filter_map(|earlier| self.places(asking.stimuli + earlier).waiting);
        earlier.filter(|earlier| *earlier < ord).count() as i64 == before
    }

    /// Makes the instance if it is not there.
    fn create(
        &mut self,
        key: &'a InstanceKey,
        standing: Option<Standing>,
        at: Millis,
        profile: Option<String>,
    ) -> Standing {
        standing.unwrap_or_else(|| {
            // As many as there are units are at hand.
            let life = self.lives.pop().unwrap_or_default();
            self.writes.instance(key, life, at, profile);
            Standing { life, turn: 0 }
        })
    }

    fn turns(
        &mut self,
        unit: &'a Unit,
        given: Head,
        turns: &'a [Arc<TurnRecord>],
        standing: Option<Standing>,
        asking: Asking,
    ) -> Result<End, Error> {
        let actual = if given.turn == 0 { standing.map_or_else(Head::default, head) } else { given };
        let checked = check::numbered(given, turns).and_then(|()| check::current(given, actual));
        let checked = checked.and_then(|()| if self.dedupe { check::distinct_turns(turns) } else { Ok(()) });
        if let Err(rejection) = checked {
            return Ok(End::Refused(rejection));
        }
        let life = if given.turn == 0 { standing.map(|standing| standing.life) } else { Some(given.links[0]) };
        for (index, _) in turns.iter().enumerate().filter(|(_, turn)| self.dedupe && turn.stimulus.repeatable) {
            // One that waits is decided now: the end of the slow path.
            let settled = Places { waiting: None, ..self.places(asking.stimuli + index) };
            if let Some(place) = place(settled, life) {
                return Ok(End::Repeats(index, place));
            }
        }
        let is_barred = |(index, turn): (usize, &Arc<TurnRecord>)| {
            self.places(asking.stimuli + index).waiting.is_none() && self.is_barred(unit, &turn.stimulus.id)
        };
        if let Some(index) = turns.iter().enumerate().position(is_barred) {
            return Ok(End::Refused(Rejection::Barred { index }));
        }
        let life = match life {
            Some(life) => life,
            None => self.create(&unit.key, None, check::created_at(turns), None).life,
        };
        for (index, turn) in turns.iter().enumerate() {
            let waiting = self.places(asking.stimuli + index).waiting;
            // Of two turns with one id that is not to be recognised, the first took it.
            let first = !turns[..index].iter().any(|earlier| earlier.stimulus.id == turn.stimulus.id);
            let waiting = waiting.filter(|_| first);
            if let Some(ord) = waiting {
                self.writes.leave_inbox(ord);
                self.writes.journals.leave(&unit.key, &turn.stimulus.id);
            }
            self.writes.turn(&unit.key, unit.fence, life, turn, waiting.is_some())?;
        }
        let head = Head { turn: given.turn + turns.len() as u64, links: [life, 0, 0, 0] };
        Ok(End::Written(Committed { head, created: false }))
    }

    fn accept(
        &mut self,
        unit: &'a Unit,
        stimuli: &'a [Arc<Stimulus>],
        standing: Option<Standing>,
        asking: Asking,
    ) -> Result<End, Error> {
        if self.dedupe {
            if let Err(rejection) = check::distinct_stimuli(stimuli) {
                return Ok(End::Refused(rejection));
            }
            let repeatable = stimuli.iter().enumerate().filter(|(_, stimulus)| stimulus.repeatable);
            for (at, (index, _)) in repeatable.enumerate() {
                let places = self.places(asking.stimuli + at);
                if let Some(place) = place(places, standing.map(|standing| standing.life)) {
                    return Ok(End::Repeats(index, place));
                }
            }
        }
        if let Some(index) = stimuli.iter().position(|stimulus| self.is_barred(unit, &stimulus.id)) {
            return Ok(End::Refused(Rejection::Barred { index }));
        }
        let at = stimuli.first().map_or(Millis(0), |stimulus| stimulus.accepted_at);
        let standing = self.create(&unit.key, standing, at, None);
        for stimulus in stimuli {
            self.writes.enter_inbox(&unit.key, unit.fence.shard, stimulus)?;
        }
        Ok(unchanged(standing, false))
    }

    fn revive(&mut self, unit: &'a Unit, standing: Option<Standing>, asking: Asking) -> End {
        let (Some(ord), Some(standing)) = (self.places(asking.stimuli).dead, standing) else {
            return End::Refused(Rejection::NotFound);
        };
        self.writes.revive(ord, unit.fence.shard);
        unchanged(standing, false)
    }

    fn put_profile(
        &mut self,
        unit: &'a Unit,
        profile: &Profile,
        at: Millis,
        standing: Option<Standing>,
    ) -> Result<End, Error> {
        let json =
            serde_json::to_string(profile).map_err(|e| Error::Backend(format!("a profile that is no JSON: {e}")))?;
        let created = standing.is_none();
        if created {
            return Ok(unchanged(self.create(&unit.key, None, at, Some(json)), true));
        }
        self.writes.profile(&unit.key, json);
        Ok(unchanged(standing.unwrap_or(Standing { life: 0, turn: 0 }), false))
    }
}

/// The end of work that adds no turn.
fn unchanged(standing: Standing, created: bool) -> End {
    End::Written(Committed { head: head(standing), created })
}

/// Which row tells what became of a stimulus.
fn place(places: Places, life: Option<i64>) -> Option<Place> {
    let decided = || Some(Place::Decided(life?, places.decided?));
    places.waiting.map(Place::Waiting).or(places.dead.map(Place::Dead)).or_else(decided)
}
