//! What a unit must satisfy before anything is written, as far as it can be told from the unit alone.
//!
//! Pure. Tests: at the foot.

use std::sync::Arc;

use super::{Error, Fence, Head, Known, Rejection, Work};
use crate::types::{Millis, Stimulus, StimulusId, TurnRecord};

/// A unit under this fence may be written while its shard has this epoch and count of lodged stimuli. `next` tells
/// whether a stimulus stands in the instance's inbox and nothing of its priority before it but what the unit decides first;
/// it is asked only when something was lodged that the owner has not looked at. That it stands there is not enough: it may
/// have been lodged itself, after others that the owner does not know.
///
/// # Errors
/// [`Rejection::Fenced`], [`Rejection::Behind`].
pub(crate) fn fence(
    fence: Fence,
    (epoch, lodged): (u64, u64),
    work: &Work,
    next: impl Fn(&StimulusId) -> bool,
) -> Result<(), Rejection> {
    let looked = || fence.lodged >= lodged;
    match work {
        Work::Lodge { .. } => Ok(()),
        _ if fence.epoch != epoch => Err(Rejection::Fenced),
        Work::Accept { .. } if !looked() => Err(Rejection::Behind { lodged }),
        Work::Turns { turns, .. } if !looked() && !turns.iter().all(|turn| next(&turn.stimulus.id)) => {
            Err(Rejection::Behind { lodged })
        }
        _ => Ok(()),
    }
}

/// The turns must follow the head without gaps.
///
/// # Errors
/// [`Error::Backend`]: a fault of the caller, which must load the instance again.
pub(crate) fn numbered(head: Head, turns: &[Arc<TurnRecord>]) -> Result<(), Rejection> {
    let expected = (head.turn + 1)..;
    match turns.iter().zip(expected).find(|(record, number)| record.turn != *number) {
        None if turns.is_empty() => Err(refused(String::from("a unit without turns"))),
        None => Ok(()),
        Some((record, number)) => Err(refused(format!("turn {} where {number} must follow", record.turn))),
    }
}

/// The head the unit builds on must be the one in force.
///
/// # Errors
/// [`Error::Backend`]: the caller works on a history that has moved on, and must load the instance again.
pub(crate) fn current(given: Head, actual: Head) -> Result<(), Rejection> {
    if given == actual {
        return Ok(());
    }
    Err(refused(format!("the unit builds on turn {}, the instance is at turn {}", given.turn, actual.turn)))
}

fn refused(why: String) -> Rejection {
    Rejection::Failed(Error::Backend(why))
}

/// The first item whose repeatable id stands earlier in the same unit, and where that is.
pub(crate) fn repeated<'a>(stimuli: impl Iterator<Item = &'a Stimulus> + Clone) -> Option<(usize, usize)> {
    stimuli.clone().enumerate().filter(|(_, s)| s.repeatable).find_map(|(index, later)| {
        let earlier = stimuli.clone().take(index).position(|earlier| earlier.repeatable && earlier.id == later.id)?;
        Some((index, earlier))
    })
}

/// Refuses turns among which one repeats another of the same unit. What is known of it is the other one, unwritten.
///
/// # Errors
/// [`Rejection::Duplicate`].
pub(crate) fn distinct_turns(turns: &[Arc<TurnRecord>]) -> Result<(), Rejection> {
    match repeated(turns.iter().map(|t| &t.stimulus)) {
        None => Ok(()),
        Some((index, earlier)) => {
            Err(Rejection::Duplicate { index, known: Known::Decided(Arc::clone(&turns[earlier])) })
        }
    }
}

/// Refuses stimuli among which one repeats another of the same unit. What is known of it is the other one, unwritten.
///
/// # Errors
/// [`Rejection::Duplicate`].
pub(crate) fn distinct_stimuli(stimuli: &[Arc<Stimulus>]) -> Result<(), Rejection> {
    match repeated(stimuli.iter().map(AsRef::as_ref)) {
        None => Ok(()),
        Some((index, earlier)) => {
            Err(Rejection::Duplicate { index, known: Known::Waiting(Arc::clone(&stimuli[earlier])) })
        }
    }
}

/// When a unit that meets an unknown instance creates it.
pub(crate) fn created_at(turns: &[Arc<TurnRecord>]) -> Millis {
    turns.first().map_or(Millis(0), |record| record.decided_at)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Source, StimulusId};

    fn stimulus(id: Option<&str>) -> Stimulus {
        let plain = Stimulus::text(Source::Http, Channel::new("c").unwrap(), "x", Millis(1));
        match id {
            Some(id) => plain.with_repeatable_id(StimulusId::new(id).unwrap()),
            None => plain,
        }
    }

    #[test]
    fn a_repeat_within_the_unit_is_found_with_its_first() {
        let unit = [stimulus(Some("a")), stimulus(None), stimulus(Some("b")), stimulus(Some("a"))];
        assert_eq!(repeated(unit.iter()), Some((3, 0)));
        assert_eq!(repeated(unit[..3].iter()), None);
    }

    #[test]
    fn a_generated_id_is_not_compared() {
        let twin = stimulus(None);
        assert_eq!(repeated([twin.clone(), twin].iter()), None);
    }
}
