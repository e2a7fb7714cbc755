//! Finds the highest rate whose p99 stays within a bound: doubles until it fails, then halves the gap.
//!
//! Pure: rates out, verdicts in. Tests: at the foot.

/// Steps of the second phase: the answer is within a sixteenth of the gap, about 6 % of the rate.
const REFINEMENTS: u32 = 4;
/// Most doublings; at the start rate of 1,000 that is beyond any box.
const MAX_DOUBLINGS: u32 = 12;

/// A search under way.
#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    good: Option<f64>,
    bad: Option<f64>,
    next: f64,
    doublings: u32,
    refinements: u32,
}

impl Search {
    /// Begins at a rate.
    pub fn new(start: f64) -> Self {
        Self { good: None, bad: None, next: start, doublings: 0, refinements: 0 }
    }

    /// The rate to try next; `None` when the search is over.
    pub fn next(&self) -> Option<f64> {
        (self.refinements < REFINEMENTS && self.doublings < MAX_DOUBLINGS).then_some(self.next)
    }

    /// Takes the result of the rate last tried.
    pub fn tried(&mut self, within: bool) {
        let rate = self.next;
        if within {
            self.good = Some(rate);
        } else {
            self.bad = Some(rate);
        }
        self.next = match (self.good, self.bad) {
            (Some(good), Some(bad)) => {
                self.refinements += 1;
                f64::midpoint(good, bad)
            }
            (_, None) => {
                self.doublings += 1;
                rate * 2.0
            }
            (None, Some(_)) => {
                self.doublings += 1;
                rate / 2.0
            }
        };
    }

    /// The highest rate that was within the bound.
    pub fn best(&self) -> Option<f64> {
        self.good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(start: f64, capacity: f64) -> (Option<f64>, u32) {
        let mut search = Search::new(start);
        let mut tries = 0;
        while let Some(rate) = search.next() {
            search.tried(rate <= capacity);
            tries += 1;
        }
        (search.best(), tries)
    }

    #[test]
    fn it_finds_the_edge_from_below_and_above() {
        for start in [1_000.0, 100_000.0] {
            let (best, tries) = find(start, 30_000.0);
            assert!(best.is_some_and(|b| b <= 30_000.0 && b > 27_000.0), "{best:?}");
            assert!(tries < 12, "{tries}");
        }
    }

    #[test]
    fn it_ends_when_nothing_or_everything_is_within() {
        assert_eq!(find(1_000.0, 0.0).0, None);
        assert!(find(1_000.0, f64::INFINITY).0.is_some());
    }
}
