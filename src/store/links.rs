//! The skip list through an append-only log: how [`Head`] grows and how an old turn is reached from it.
//!
//! A record is written once and never touched again, so its links can only point back. The record of turn `n` holds the
//! positions of the last turns before it whose numbers are multiples of 1, 16, 256 and 4096; a record whose own number is a
//! multiple of 4096 holds four coarser ones as well. After Pugh (1990), made deterministic by the turn numbers.
//!
//! Pure; the backends read and write. Tests: at the foot.

use super::Head;

/// Distance of the links, level by level.
pub(crate) const STEPS: [u64; LEVELS] = [1, 16, 256, 4096, 1 << 16, 1 << 20, 1 << 24, 1 << 28];
/// Levels in all.
pub(crate) const LEVELS: usize = 8;
/// Levels every record and [`Head`] hold.
pub(crate) const LOW: usize = 4;

/// A place in the chain: a turn's number and the links that lead back from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The turn's number.
    pub turn: u64,
    /// Log positions of earlier turns, by level; zero where there is none (or the record does not hold that level).
    pub back: [i64; LEVELS],
}

impl Head {
    /// The head after the next turn was written at `position`.
    pub(crate) fn advance(self, position: i64) -> Head {
        let turn = self.turn + 1;
        let mut links = self.links;
        for (link, step) in links.iter_mut().zip(STEPS) {
            if turn.is_multiple_of(step) {
                *link = position;
            }
        }
        Head { turn, links }
    }

    /// The place of the turn that will come next: from here every turn is reached.
    pub(crate) fn place(self) -> Place {
        let mut back = [0; LEVELS];
        back[..LOW].copy_from_slice(&self.links);
        Place { turn: self.turn + 1, back }
    }
}

impl Place {
    /// The head as it was before this turn.
    pub(crate) fn head_before(&self) -> Head {
        let mut links = [0; LOW];
        links.copy_from_slice(&self.back[..LOW]);
        Head { turn: self.turn - 1, links }
    }

    /// The farthest jump back that does not pass `target`: number and position of the turn it lands on. `None` at or
    /// before the target.
    pub(crate) fn jump(&self, target: u64) -> Option<(u64, i64)> {
        let last = self.turn.checked_sub(1)?;
        let target = target.max(1);
        (0..LEVELS).rev().find_map(|level| {
            let turn = last - last % STEPS[level];
            let position = self.back[level];
            (turn >= target && position != 0).then_some((turn, position))
        })
    }

    /// The numbers of the turns that one jump can land on, farthest first.
    pub(crate) fn landings(&self) -> impl Iterator<Item = u64> + use<> {
        let last = self.turn.saturating_sub(1);
        let back = self.back;
        (0..LEVELS).rev().filter(move |level| back[*level] != 0).map(move |level| last - last % STEPS[level])
    }

    /// The coarse links of the record that follows 4096 turns after this one, which stands at `position` and whose number
    /// is a multiple of 4096.
    pub(crate) fn coarse_for_next(&self, position: i64) -> [i64; LEVELS - LOW] {
        let mut coarse = [0; LEVELS - LOW];
        for (index, link) in coarse.iter_mut().enumerate() {
            let on_level = self.turn.is_multiple_of(STEPS[LOW + index]);
            *link = if on_level { position } else { self.back[LOW + index] };
        }
        coarse
    }
}

/// Whether the record of this turn holds the coarse links too.
pub(crate) const fn holds_coarse(turn: u64) -> bool {
    turn.is_multiple_of(STEPS[LOW - 1])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes a chain as a backend does; the turn `n` stands at position `n * stride + 7`.
    struct Chain {
        places: Vec<Place>,
        head: Head,
        stride: i64,
    }

    impl Chain {
        fn position(&self, turn: u64) -> i64 {
            i64::try_from(turn).unwrap() * self.stride + 7
        }

        fn of(turns: u64, stride: i64) -> Chain {
            let mut chain = Chain { places: Vec::new(), head: Head::default(), stride };
            for turn in 1..=turns {
                let mut place = chain.head.place();
                if holds_coarse(turn) && place.back[LOW - 1] != 0 {
                    let before = turn - STEPS[LOW - 1];
                    let coarse = chain.at(before).coarse_for_next(chain.position(before));
                    place.back[LOW..].copy_from_slice(&coarse);
                }
                chain.places.push(place);
                chain.head = chain.head.advance(chain.position(turn));
            }
            chain
        }

        fn at(&self, turn: u64) -> Place {
            self.places[usize::try_from(turn).unwrap() - 1]
        }

        /// Reads until the target is found; the number of records read.
        fn reads_to(&self, target: u64) -> usize {
            let mut place = self.head.place();
            let mut reads = 0;
            while let Some((turn, position)) = place.jump(target) {
                assert!(turn >= target && turn < place.turn);
                assert_eq!(position, self.position(turn), "the link leads to the turn it names");
                place = self.at(turn);
                reads += 1;
            }
            assert_eq!(place.turn, target);
            reads
        }
    }

    #[test]
    fn every_turn_of_a_long_chain_is_near() {
        let chain = Chain::of(200_000, 3);
        let worst = (1..=200_000).step_by(97).map(|turn| chain.reads_to(turn)).max().unwrap();
        // At most 15 steps down each of the five levels this chain has, and the last one.
        assert!(worst <= 15 * 5 + 1, "{worst} reads");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_turn_is_reached_in_logarithmic_reads(turns in 1u64..9000, pick in 0.0f64..1.0, stride in 1i64..1000) {
            let chain = Chain::of(turns, stride);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let target = 1 + ((turns - 1) as f64 * pick) as u64;
            let levels = 1 + usize::try_from(turns.ilog2() / 4).unwrap();
            prop_assert!(chain.reads_to(target) <= 15 * levels + 1);
        }
    }

    #[test]
    fn a_head_is_the_place_before_the_next_turn() {
        let head = Head::default().advance(10).advance(20);
        assert_eq!(head, Head { turn: 2, links: [20, 0, 0, 0] });
        assert_eq!(head.place().head_before(), head);
        assert_eq!(Head::default().place().jump(1), None);
    }
}
