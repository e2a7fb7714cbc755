//! The numbers of frames: given by the writer, checked by the reader. Pure.
//!
//! Tests: at the foot.

use std::collections::HashMap;

use indexmap::IndexMap;

use super::Outgoing;
use crate::{
    cluster::bus::{
        Error,
        frame::{self, Header},
    },
    types::NodeId,
};

/// A frame is closed when it has so many bytes: large enough that its cost is spread, small enough to be one command.
const FRAME_BYTES: usize = 256 * 1024;
/// Senders a reader remembers, and receivers a writer does. Lives of nodes come and go; the ones longest unused go first.
const REMEMBERED: usize = 4096;

/// A frame for one receiver (`None`: everybody else).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sealed {
    pub to: Option<NodeId>,
    pub bytes: Vec<u8>,
    /// How many messages it holds.
    pub messages: u64,
}

/// What a writer knows of the numbers it gave.
#[derive(Debug, Default)]
pub(super) struct Numbers(IndexMap<Option<NodeId>, u64, ahash::RandomState>);

impl Numbers {
    /// Puts messages into as few frames as may be, in order for each receiver.
    pub fn seal(&mut self, from: &NodeId, messages: impl Iterator<Item = Outgoing>) -> Result<Vec<Sealed>, Error> {
        let mut frames: Vec<Sealed> = Vec::new();
        let mut open: HashMap<Option<NodeId>, usize, ahash::RandomState> = HashMap::default();
        for Outgoing { to, message } in messages {
            let at = open.get(&to).copied().filter(|at| frames[*at].bytes.len() + message.len() <= FRAME_BYTES);
            let at = match at {
                Some(at) => at,
                None => {
                    let header = Header { from: from.clone(), number: self.next(&to) };
                    frames.push(Sealed { to: to.clone(), bytes: frame::begin(&header)?, messages: 0 });
                    open.insert(to, frames.len() - 1);
                    frames.len() - 1
                }
            };
            frame::push(&mut frames[at].bytes, &message);
            frames[at].messages += 1;
        }
        Ok(frames)
    }

    fn next(&mut self, to: &Option<NodeId>) -> u64 {
        if let Some(number) = self.0.get_mut(to) {
            *number += 1;
            return *number;
        }
        // Forgetting a receiver's number while it lives would make it drop what follows, so that numbers go on from the
        // highest given to anybody.
        let number = self.0.values().max().copied().unwrap_or(0) + 1;
        if self.0.len() >= REMEMBERED {
            self.0.swap_remove_index(0);
        }
        self.0.insert(to.clone(), number);
        number
    }
}

/// What a reader has seen of each sender.
#[derive(Debug, Default)]
pub(super) struct Seen {
    last: HashMap<(NodeId, bool), (u64, u64), ahash::RandomState>,
    turn: u64,
}

impl Seen {
    /// Whether a frame is newer than all before it from its sender. `to_all`: it came as a broadcast.
    pub fn admits(&mut self, header: &Header, to_all: bool) -> bool {
        self.turn += 1;
        let turn = self.turn;
        if let Some((last, used)) = self.last.get_mut(&(header.from.clone(), to_all)) {
            *used = turn;
            let newer = header.number > *last;
            *last = header.number.max(*last);
            return newer;
        }
        if self.last.len() >= REMEMBERED {
            let oldest = self.last.iter().min_by_key(|(_, (_, used))| *used).map(|(sender, _)| sender.clone());
            oldest.and_then(|sender| self.last.remove(&sender));
        }
        self.last.insert((header.from.clone(), to_all), (header.number, turn));
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn out(to: Option<&str>, len: usize) -> Outgoing {
        Outgoing { to: to.map(node), message: vec![0; len] }
    }

    fn shape(frames: &[Sealed]) -> Vec<(Option<&str>, u64, u64)> {
        let number = |sealed: &Sealed| frame::open(&sealed.bytes).unwrap().0.number;
        frames.iter().map(|one| (one.to.as_ref().map(NodeId::as_str), number(one), one.messages)).collect()
    }

    #[test]
    fn messages_for_one_receiver_share_a_frame_while_it_is_small() {
        let mut numbers = Numbers::default();
        let batch = [out(Some("b"), 10), out(None, 10), out(Some("b"), 10), out(Some("b"), FRAME_BYTES), out(None, 1)];
        let frames = numbers.seal(&node("a"), batch.into_iter()).unwrap();
        assert_eq!(shape(&frames), [(Some("b"), 1, 2), (None, 2, 2), (Some("b"), 2, 1)]);
        let frames = numbers.seal(&node("a"), [out(Some("b"), 1), out(None, 1)].into_iter()).unwrap();
        assert_eq!(shape(&frames), [(Some("b"), 3, 1), (None, 3, 1)]);
    }

    #[test]
    fn a_reader_takes_only_growing_numbers() {
        let mut seen = Seen::default();
        let mut admits = |from: &str, number, to_all| seen.admits(&Header { from: node(from), number }, to_all);
        assert!(admits("a", 1, false) && admits("a", 3, false) && admits("b", 1, false) && admits("a", 1, true));
        assert!(!admits("a", 3, false) && !admits("a", 2, false) && !admits("a", 1, true));
        assert!(admits("a", 4, false));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_numbers_still_grow() {
        let (mut numbers, mut seen) = (Numbers::default(), Seen::default());
        let mut last = 0;
        for round in 0..=REMEMBERED {
            let to = format!("n{round}");
            let frames = numbers.seal(&node("a"), [out(Some(&to), 1), out(Some("b"), 1)].into_iter()).unwrap();
            let number = shape(&frames)[1].1;
            assert!(number > last);
            last = number;
            seen.admits(&Header { from: node(&to), number: 1 }, false);
        }
        assert!(numbers.0.len() <= REMEMBERED && seen.last.len() <= REMEMBERED);
    }
}
