//! Which turns answered people lately, so that they are found among what streams report. Pure.
//!
//! Not here: reading them (`actor/recent.rs`). Invariants: bounded; a hint, lost with the activation. Tests: at the foot.

use std::collections::VecDeque;

use crate::types::{Priority, TurnRecord};

/// Turns known.
const MAX_KNOWN: usize = 16;

/// The last turns that answered people.
#[derive(Debug, Default)]
pub struct Talk {
    turns: VecDeque<u64>,
}

impl Talk {
    /// Hears that a turn was committed.
    pub fn decided(&mut self, turn: &TurnRecord) {
        if is_talk(turn) {
            if self.turns.len() == MAX_KNOWN {
                self.turns.pop_front();
            }
            self.turns.push_back(turn.turn);
        }
    }

    /// Their numbers, in order.
    pub fn turns(&self) -> Vec<u64> {
        self.turns.iter().copied().collect()
    }
}

/// Whether a person was answered in a turn. What streams are told is no talk.
pub fn is_talk(turn: &TurnRecord) -> bool {
    turn.stimulus.priority == Priority::Human && turn.reply.is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Millis, Outcome, Reply, Source, StateChange, Stimulus};

    fn turn(number: u64, source: Source, reply: Option<Reply>) -> TurnRecord {
        TurnRecord {
            turn: number,
            version: 0,
            stimulus: Stimulus::text(source, Channel::new("c").unwrap(), "hi", Millis(0)),
            outcome: Outcome::Silent,
            reply,
            effects: vec![],
            state: StateChange::None,
            episodes: vec![],
            steps: 0,
            engine: String::new(),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(0),
            epoch: 0,
        }
    }

    #[test]
    fn only_the_last_answers_to_people_are_known() {
        let mut talk = Talk::default();
        talk.decided(&turn(1, Source::Mqtt, Some(Reply::default())));
        talk.decided(&turn(2, Source::Http, None));
        assert!(talk.turns().is_empty());
        (3..100).for_each(|number| talk.decided(&turn(number, Source::Http, Some(Reply::default()))));
        assert_eq!(talk.turns(), (84..100).collect::<Vec<_>>());
    }
}
