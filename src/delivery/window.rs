//! How far the log is dealt with: positions open in order, close in any order, and the durable position follows the oldest
//! open one. Pure.
//!
//! Invariant: [`Window::settled`] never passes a position with an effect that is neither delivered nor put off durably.
//! Tests: at the foot.

use std::collections::VecDeque;

/// Positions read from the log and how many effects of each are still open.
#[derive(Debug, Default)]
pub(super) struct Window {
    entries: VecDeque<(i64, usize)>,
    settled: i64,
    open: usize,
}

impl Window {
    /// A window behind a durable position.
    pub(super) fn after(position: i64) -> Self {
        Self { entries: VecDeque::new(), settled: position, open: 0 }
    }

    /// A position was read; `effects` of it are to be delivered. Positions must grow.
    pub(super) fn open(&mut self, position: i64, effects: usize) {
        self.open += effects;
        self.entries.push_back((position, effects));
        self.advance();
    }

    /// One effect of a position is delivered or put off; whether it was open.
    pub(super) fn close(&mut self, position: i64) -> bool {
        if let Ok(at) = self.entries.binary_search_by_key(&position, |entry| entry.0)
            && let Some(entry) = self.entries.get_mut(at)
            && entry.1 > 0
        {
            entry.1 -= 1;
            self.open -= 1;
            if at == 0 {
                self.advance();
            }
            return true;
        }
        false
    }

    /// The last position up to which nothing is open.
    pub(super) fn settled(&self) -> i64 {
        self.settled
    }

    /// Effects open.
    pub(super) fn in_hand(&self) -> usize {
        self.open
    }

    fn advance(&mut self) {
        while let Some(&(position, 0)) = self.entries.front() {
            self.settled = position;
            self.entries.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_position_waits_for_the_oldest_open_effect() {
        let mut window = Window::after(3);
        window.open(5, 2);
        window.open(9, 1);
        window.open(10, 0);
        window.close(9);
        assert_eq!((window.settled(), window.in_hand()), (3, 2));
        window.close(5);
        assert_eq!(window.settled(), 3);
        window.close(5);
        assert_eq!((window.settled(), window.in_hand()), (10, 0));
        assert!(!window.close(5));
        assert_eq!(window.in_hand(), 0);
    }

    proptest! {
        /// Whatever the order of closing, the position is the last one before the first that is still open.
        #[test]
        fn the_position_never_passes_an_open_effect(sizes in prop::collection::vec(0usize..4, 1..40), seed in any::<u64>()) {
            let mut window = Window::after(0);
            let mut open: Vec<(i64, usize)> = Vec::new();
            for (at, size) in sizes.iter().enumerate() {
                let position = (at as i64 + 1) * 7;
                window.open(position, *size);
                open.push((position, *size));
            }
            let mut seed = seed;
            while open.iter().any(|entry| entry.1 > 0) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % open.len();
                if open[at].1 == 0 {
                    continue;
                }
                open[at].1 -= 1;
                window.close(open[at].0);
                let first = open.iter().position(|entry| entry.1 > 0);
                let expected = match first {
                    Some(0) => 0,
                    Some(first) => open[first - 1].0,
                    None => open[open.len() - 1].0,
                };
                prop_assert_eq!(window.settled(), expected);
                prop_assert_eq!(window.in_hand(), open.iter().map(|entry| entry.1).sum::<usize>());
            }
        }
    }
}
