//! An index over many vectors: cells around centres found by k-means, of which the likely ones are scanned (an inverted file;
//! Jégou et al. 2011, without the product quantisation: the bytes are small enough).
//!
//! Built from a sample, so building takes time in the order of the vectors. Centres themselves are found through a second
//! level of centres. Vectors that come later go to their nearest cell; the centres stay.
//!
//! Pure and deterministic. Tests: at the foot; recall and times in `docs/performance.md`.

use super::vector::{Best, dot};
use crate::types::memory::Vector;

/// Most vectors the centres are found from.
const SAMPLE: usize = 24_000;
/// Rounds of k-means.
const ROUNDS: usize = 5;
/// Outer centres whose cells are looked at to place a vector.
const OUTER: usize = 4;
/// Of this share of the vectors at least (one in so many) the nearest cells are scanned.
const SHARE: usize = 10;
/// And at least so many.
const LEAST: usize = 20_000;

/// Centres, as their coarse planes.
#[derive(Debug, Default)]
struct Centres {
    dimension: usize,
    scales: Vec<f32>,
    high: Vec<i8>,
}

impl Centres {
    fn push(&mut self, centre: &Vector) {
        self.scales.push(centre.scale);
        self.high.extend_from_slice(&centre.high);
    }

    fn row(&self, at: usize) -> &[i8] {
        &self.high[at * self.dimension..(at + 1) * self.dimension]
    }

    #[allow(clippy::cast_precision_loss)] // far below 2^24
    fn score(&self, at: usize, high: &[i8]) -> f32 {
        dot(self.row(at), high) as f32 * self.scales[at]
    }

    fn nearest(&self, among: impl Iterator<Item = usize>, high: &[i8]) -> usize {
        among.map(|at| (at, self.score(at, high))).max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(at, _)| at)
    }

    fn len(&self) -> usize {
        self.scales.len()
    }
}

#[derive(Debug, Default)]
struct Cell {
    slots: Vec<u32>,
    scales: Vec<f32>,
    high: Vec<i8>,
}

/// The index.
#[derive(Debug)]
pub(crate) struct Cells {
    dimension: usize,
    centres: Centres,
    outer: Centres,
    /// The centres around each outer one.
    around: Vec<Vec<usize>>,
    cells: Vec<Cell>,
    len: usize,
}

impl Cells {
    /// Over all rows.
    pub(crate) fn build(dimension: usize, slots: &[u32], scales: &[f32], high: &[i8]) -> Self {
        let row = |at: usize| &high[at * dimension..(at + 1) * dimension];
        let count = slots.len().isqrt().clamp(1, 4096);
        let step = slots.len().div_ceil(SAMPLE).max(1);
        let sample: Vec<&[i8]> = (0..slots.len()).step_by(step).filter(|at| scales[*at] > 0.0).map(row).collect();
        let centres = means(dimension, &sample, count);
        let rows: Vec<&[i8]> = (0..centres.len()).map(|at| centres.row(at)).collect();
        let outer = means(dimension, &rows, centres.len().isqrt().max(1));
        let mut around = vec![Vec::new(); outer.len()];
        for at in 0..centres.len() {
            around[outer.nearest(0..outer.len(), centres.row(at))].push(at);
        }
        let cells = std::iter::repeat_with(Cell::default).take(centres.len()).collect();
        let mut index = Self { dimension, centres, outer, around, cells, len: 0 };
        let places = index.places(slots.len(), row);
        for (at, place) in places.into_iter().enumerate() {
            index.put(place, slots[at], scales[at], row(at));
        }
        index
    }

    /// The cell of each row, found on all cores.
    fn places<'a>(&self, count: usize, row: impl Fn(usize) -> &'a [i8] + Sync) -> Vec<usize> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let part = count.div_ceil(cores).max(1);
        let mut places = vec![0; count];
        std::thread::scope(|scope| {
            for (nth, places) in places.chunks_mut(part).enumerate() {
                let row = &row;
                scope.spawn(move || {
                    for (at, place) in places.iter_mut().enumerate() {
                        *place = self.place(row(nth * part + at));
                    }
                });
            }
        });
        places
    }

    /// The nearest centre, among those around the nearest outer ones.
    fn place(&self, high: &[i8]) -> usize {
        let mut best = Best::new(OUTER);
        for at in 0..self.outer.len() {
            #[allow(clippy::cast_possible_truncation)] // some dozens
            best.offer(at as u32, self.outer.score(at, high));
        }
        let near = best.finish();
        self.centres.nearest(near.iter().flat_map(|(at, _)| self.around[*at as usize].iter().copied()), high)
    }

    fn put(&mut self, place: usize, slot: u32, scale: f32, high: &[i8]) {
        if let Some(cell) = self.cells.get_mut(place) {
            cell.slots.push(slot);
            cell.scales.push(scale);
            cell.high.extend_from_slice(high);
            self.len += 1;
        }
    }

    pub(crate) fn push(&mut self, slot: u32, scale: f32, high: &[i8]) {
        self.put(self.place(high), slot, scale, high);
    }

    pub(crate) fn remove(&mut self, is_gone: impl Fn(u32) -> bool) {
        for cell in &mut self.cells {
            for (at, slot) in cell.slots.iter().enumerate() {
                if is_gone(*slot) {
                    cell.scales[at] = 0.0;
                    cell.high[at * self.dimension..(at + 1) * self.dimension].fill(0);
                }
            }
        }
    }

    #[cfg(test)]
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        let own = self.centres.high.capacity() + self.outer.high.capacity();
        own + self.cells.iter().map(|cell| 8 * cell.slots.capacity() + cell.high.capacity() + 72).sum::<usize>()
    }

    /// As `Matrix::nearest`, by the coarse plane.
    #[allow(clippy::cast_precision_loss)] // far below 2^24
    pub(crate) fn nearest(
        &self,
        query: &Vector,
        limit: usize,
        least: f32,
        all: bool,
        keep: impl Fn(u32) -> bool,
    ) -> Vec<(u32, f32)> {
        let mut order: Vec<(usize, f32)> =
            (0..self.centres.len()).map(|at| (at, self.centres.score(at, &query.high))).collect();
        order.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        let budget = if all { self.len } else { (self.len / SHARE).max(LEAST) };
        let mut best = Best::new(limit);
        let mut scanned = 0;
        for (at, _) in order {
            if scanned >= budget {
                break;
            }
            let cell = &self.cells[at];
            scanned += cell.slots.len();
            for (nth, high) in cell.high.chunks_exact(self.dimension).enumerate() {
                if all && !keep(cell.slots[nth]) {
                    continue;
                }
                let score = dot(high, &query.high) as f32 * cell.scales[nth] * query.scale;
                if score > least && best.wants(score) && (all || keep(cell.slots[nth])) {
                    best.offer(cell.slots[nth], score);
                }
            }
        }
        best.finish()
    }
}

/// Centres of rows by their directions, at most so many.
fn means(dimension: usize, rows: &[&[i8]], count: usize) -> Centres {
    let mut centres = Centres { dimension, ..Centres::default() };
    let count = count.min(rows.len());
    for nth in 0..count {
        let numbers: Vec<f32> = rows[nth * rows.len() / count].iter().map(|n| f32::from(*n)).collect();
        if let Some(centre) = Vector::of(&numbers) {
            centres.push(&centre);
        }
    }
    for _ in 0..ROUNDS {
        let mut sums = vec![0f32; centres.len() * dimension];
        for row in rows {
            let at = centres.nearest(0..centres.len(), row);
            let sum = &mut sums[at * dimension..(at + 1) * dimension];
            sum.iter_mut().zip(*row).for_each(|(sum, n)| *sum += f32::from(*n));
        }
        let mut next = Centres { dimension, ..Centres::default() };
        // A centre that nothing is near to is let go.
        sums.chunks_exact(dimension).filter_map(Vector::of).for_each(|centre| next.push(&centre));
        centres = next;
    }
    centres
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::vector::{
        Matrix,
        tests::{Dice, truth},
    };

    #[test]
    fn the_index_finds_nearly_all_of_what_a_scan_finds() {
        let mut dice = Dice(11);
        let centres: Vec<Vec<f32>> = (0..40).map(|_| dice.numbers(32)).collect();
        let all: Vec<Vec<f32>> = (0..3000).map(|_| dice.around(&centres, 0.4)).collect();
        let mut matrix = Matrix::new(32, 2000);
        for (slot, vector) in (0..).zip(&all) {
            matrix.push(slot, &Vector::of(vector).unwrap());
        }
        assert!(!matrix.is_indexed());
        matrix.settle();
        assert!(matrix.is_indexed());
        assert_eq!(matrix.len(), 3000);
        let late = dice.numbers(32);
        matrix.push(3000, &Vector::of(&late).unwrap());
        let found = matrix.nearest(&Vector::of(&late).unwrap(), 1, 0.5, false, |_| true);
        assert_eq!(found.first().map(|(slot, _)| *slot), Some(3000), "what comes later is found");
        let mut hits = 0;
        for _ in 0..30 {
            let query = dice.around(&centres, 0.4);
            let found = matrix.nearest(&Vector::of(&query).unwrap(), 10, -1.0, false, |_| true);
            let truth = truth(&all, &query, 10);
            hits += found.iter().filter(|(slot, _)| truth.contains(slot)).count();
        }
        assert!(hits >= 285, "{hits} of 300");
        matrix.remove(&[3000]);
        assert!(matrix.nearest(&Vector::of(&late).unwrap(), 1, 0.9, true, |_| true).is_empty());
        let few = matrix.nearest(&Vector::of(&late).unwrap(), 99, -1.0, true, |slot| slot < 7);
        assert_eq!(few.len(), 7, "a filter is exact");
    }
}
