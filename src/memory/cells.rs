//! An index over many vectors: cells around centres found by k-means, of which the likely ones are scanned (an inverted file;
//! Jégou et al. 2011, without the product quantisation: the bytes are small enough).
//!
//! Built from a sample, so building takes time in the order of the vectors. Centres are found in two levels, and found again
//! through a second level of centres. The rows stand in the order of their cells (`vector`), so a cell is a range of rows; what comes later stands
//! behind them until the index is made anew. A [`Plan`] is what is kept of one: the centres, and which slot stands where (`index`).
//!
//! Invariant: a centre is the mean of vectors that stand in its cell, and of none that was taken out.
//! Pure and deterministic. Tests: at the foot; recall and times in `docs/performance.md`.

use std::ops::Range;

use super::vector::{Best, Coarse, dots, nearest};
use crate::types::memory::Vector;

/// Most vectors the centres are found from.
const SAMPLE: usize = 100_000;
/// Most centres.
const CENTRES: usize = 16_384;
/// Rounds of k-means.
const ROUNDS: usize = 6;
/// Outer centres whose cells are looked at to place a vector.
const OUTER: usize = 4;

/// The cell of a slot that is in none.
pub(crate) const NOWHERE: u16 = u16::MAX;

/// Centres, as their coarse planes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Centres {
    dimension: usize,
    scales: Vec<f32>,
    high: Vec<i8>,
}

impl Centres {
    /// Of their planes, one after the other; nothing when these do not fit together.
    pub(crate) fn of(dimension: usize, scales: Vec<f32>, high: Vec<i8>) -> Option<Self> {
        let fits = scales.len().checked_mul(dimension) == Some(high.len()) && (1..=CENTRES).contains(&scales.len());
        let sound = scales.iter().all(|scale| scale.is_finite() && *scale >= 0.0);
        (dimension > 0 && fits && sound).then_some(Self { dimension, scales, high })
    }

    /// How many numbers each has.
    pub(crate) const fn dimension(&self) -> usize {
        self.dimension
    }

    /// What a step of each is worth, and the steps.
    pub(crate) fn planes(&self) -> (&[f32], &[i8]) {
        (&self.scales, &self.high)
    }

    fn push(&mut self, centre: &Vector) {
        self.scales.push(centre.scale);
        self.high.extend_from_slice(&centre.high);
    }

    fn row(&self, at: usize) -> &[i8] {
        &self.high[at * self.dimension..(at + 1) * self.dimension]
    }

    fn coarse(&self, at: usize) -> Coarse<'_> {
        Coarse { scale: self.scales[at], high: self.row(at) }
    }

    fn nearest(&self, high: &[i8]) -> usize {
        let all = (0..self.len()).map(|at| self.coarse(at));
        nearest(Coarse { scale: 1.0, high }, all).map_or(0, |(at, _)| at)
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.scales.len()
    }
}

/// What is kept of an index.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub centres: Centres,
    /// How many rows there were when the centres were found.
    pub found: usize,
    /// Of each slot the cell it stands in, or [`NOWHERE`].
    pub places: Vec<u16>,
}

impl Plan {
    /// How many slots stand in cells.
    pub(crate) fn len(&self) -> usize {
        self.places.iter().filter(|cell| **cell != NOWHERE).count()
    }
}

/// Slots that are still to come into the cells of a plan.
#[derive(Debug)]
pub(crate) struct Awaited {
    places: Vec<u16>,
    /// The next row of each cell.
    next: Vec<u32>,
    missing: usize,
}

impl Awaited {
    /// The row of a slot that came now.
    pub(crate) fn row(&mut self, slot: u32) -> Option<usize> {
        let place = self.places.get_mut(slot as usize).filter(|cell| **cell != NOWHERE)?;
        let next = self.next.get_mut(usize::from(std::mem::replace(place, NOWHERE)))?;
        let row = *next as usize;
        *next += 1;
        self.missing -= 1;
        Some(row)
    }

    /// How many did not come yet.
    pub(crate) const fn missing(&self) -> usize {
        self.missing
    }
}

/// The index.
#[derive(Debug)]
pub(crate) struct Cells {
    centres: Centres,
    /// How many rows there were when the centres were found.
    found: usize,
    /// Where the rows of each cell end; they begin where those of the cell before end.
    ends: Vec<u32>,
}

impl Cells {
    /// Centres for all rows, and the cell of each row. Rows without a scale are of no weight.
    pub(crate) fn find(dimension: usize, scales: &[f32], high: &[i8]) -> (Self, Vec<u32>) {
        let row = |at: usize| &high[at * dimension..(at + 1) * dimension];
        let count = (4 * scales.len().isqrt()).clamp(1, CENTRES);
        let step = scales.len().div_ceil(SAMPLE).max(1);
        let sample: Vec<&[i8]> = (0..scales.len()).step_by(step).filter(|at| scales[*at] > 0.0).map(row).collect();
        let centres = centres(dimension, &sample, count);
        let places = Finder::of(&centres).places(scales.len(), row);
        (Self { centres, found: scales.len(), ends: Vec::new() }, places)
    }

    /// The same centres for more rows: of those that stand in cells, and of what came since.
    pub(crate) fn extend(&self, high: &[i8]) -> (Self, Vec<u32>) {
        let dimension = self.centres.dimension;
        let mut places = Vec::with_capacity(high.len() / dimension.max(1));
        for (at, end) in (0..).zip(&self.ends) {
            places.resize(*end as usize, at);
        }
        let tail = &high[places.len() * dimension..];
        let row = |at: usize| &tail[at * dimension..(at + 1) * dimension];
        places.append(&mut Finder::of(&self.centres).places(tail.len() / dimension.max(1), row));
        (Self { centres: self.centres.clone(), found: self.found, ends: Vec::new() }, places)
    }

    /// As planned, and the slots that are to come into the cells.
    pub(crate) fn planned(plan: Plan) -> (Self, Awaited) {
        let mut counts = vec![0u32; plan.centres.len()];
        for cell in plan.places.iter().filter(|cell| **cell != NOWHERE) {
            counts[usize::from(*cell).min(plan.centres.len() - 1)] += 1;
        }
        let mut missing = 0;
        let runs = counts.iter().map(|count| {
            let start = missing;
            missing += count;
            (start, missing)
        });
        let (next, ends) = runs.unzip();
        let awaited = Awaited { places: plan.places, next, missing: missing as usize };
        (Self { centres: plan.centres, found: plan.found, ends }, awaited)
    }

    /// What is to be kept of it; nothing where all vectors were taken out before it was made. Rows of no weight were taken out.
    #[allow(clippy::cast_possible_truncation)] // there are fewer cells
    pub(crate) fn plan(&self, slots: &[u32], scales: &[f32]) -> Option<Plan> {
        let known = slots.iter().zip(scales).filter(|(_, scale)| **scale > 0.0);
        let mut places = vec![NOWHERE; known.map(|(slot, _)| *slot as usize + 1).max().unwrap_or(0)];
        for cell in 0..self.centres.len() {
            for row in self.rows(cell).filter(|row| scales[*row] > 0.0) {
                places[slots[row] as usize] = cell as u16;
            }
        }
        (self.centres.len() > 0).then(|| Plan { centres: self.centres.clone(), found: self.found, places })
    }

    /// The rows of a cell.
    fn rows(&self, cell: usize) -> Range<usize> {
        let start = cell.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        start..self.ends[cell] as usize
    }

    /// Finds the centres of all cells again among what stands in them.
    pub(crate) fn centre(&mut self, high: &[i8]) {
        (0..self.centres.len()).for_each(|cell| self.recentre(cell, high));
    }

    /// Finds the centres again of the cells in which these rows stood, that are zeros now: nothing of them is to shine through.
    pub(crate) fn forget(&mut self, rows: &[usize], high: &[i8]) {
        let cell = |row: &usize| self.ends.partition_point(|end| *end as usize <= *row);
        let mut cells: Vec<usize> = rows.iter().map(cell).filter(|cell| *cell < self.centres.len()).collect();
        cells.sort_unstable();
        cells.dedup();
        cells.into_iter().for_each(|cell| self.recentre(cell, high));
    }

    #[allow(clippy::cast_precision_loss)] // sums of bytes
    fn recentre(&mut self, cell: usize, high: &[i8]) {
        let (dimension, rows) = (self.centres.dimension, self.rows(cell));
        let mut sum = vec![0i32; dimension];
        for row in high[rows.start * dimension..rows.end * dimension].chunks_exact(dimension) {
            sum.iter_mut().zip(row).for_each(|(sum, n)| *sum += i32::from(*n));
        }
        let mean = Vector::of(&sum.iter().map(|n| *n as f32).collect::<Vec<_>>());
        let plane = &mut self.centres.high[cell * dimension..(cell + 1) * dimension];
        match &mean {
            Some(mean) => plane.copy_from_slice(&mean.high),
            None => plane.fill(0),
        }
        self.centres.scales[cell] = mean.map_or(0.0, |mean| mean.scale);
    }

    /// How many rows there were when the centres were found.
    pub(crate) const fn found(&self) -> usize {
        self.found
    }

    /// The rows in the order of these cells of theirs.
    pub(crate) fn order(&mut self, places: &[u32]) -> Vec<u32> {
        let mut starts = vec![0u32; self.centres.len().max(1)];
        let last = starts.len() - 1;
        let cell = |place: u32| (place as usize).min(last);
        places.iter().for_each(|place| starts[cell(*place)] += 1);
        let mut sum = 0;
        for start in &mut starts {
            (sum, *start) = (sum + *start, sum);
        }
        let mut order = vec![0u32; places.len()];
        for (row, place) in (0..).zip(places) {
            let start = &mut starts[cell(*place)];
            order[*start as usize] = row;
            *start += 1;
        }
        self.ends = starts;
        order
    }

    /// How many rows stand in cells.
    pub(crate) fn len(&self) -> usize {
        self.ends.last().map_or(0, |end| *end as usize)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.centres.high.capacity() + 8 * self.ends.capacity()
    }

    /// The rows of the cells nearest to a vector, nearest first, until there are so many.
    #[allow(clippy::cast_precision_loss)] // far below 2^24
    pub(crate) fn likely(&self, query: &Vector, budget: usize) -> impl Iterator<Item = Range<usize>> {
        let mut order: Vec<(usize, f32)> = Vec::with_capacity(self.centres.len());
        dots(&self.centres.high, &query.high, |at, dot| order.push((at, dot as f32 * self.centres.scales[at])));
        order.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        let mut scanned = 0;
        order.into_iter().map_while(move |(at, _)| {
            if scanned >= budget {
                return None;
            }
            let rows = self.rows(at);
            scanned += rows.len();
            Some(rows)
        })
    }
}

/// What places rows in cells.
struct Finder<'c> {
    centres: &'c Centres,
    outer: Centres,
    /// The centres around each outer one.
    around: Vec<Vec<usize>>,
}

impl<'c> Finder<'c> {
    fn of(centres: &'c Centres) -> Self {
        let rows: Vec<&[i8]> = (0..centres.len()).map(|at| centres.row(at)).collect();
        let outer = means(centres.dimension, &rows, centres.len().isqrt().max(1));
        let mut around = vec![Vec::new(); outer.len()];
        for at in 0..centres.len() {
            around[outer.nearest(centres.row(at))].push(at);
        }
        Self { centres, outer, around }
    }

    /// The cell of each row, found on all cores.
    fn places<'a>(&self, count: usize, row: impl Fn(usize) -> &'a [i8] + Sync) -> Vec<u32> {
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
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // far below 2^24; some thousands
    fn place(&self, high: &[i8]) -> u32 {
        let mut best = Best::new(OUTER);
        dots(&self.outer.high, high, |at, dot| best.offer(at as u32, dot as f32 * self.outer.scales[at]));
        let near = best.finish();
        let all: Vec<usize> = near.iter().flat_map(|(at, _)| self.around[*at as usize].iter().copied()).collect();
        let found = nearest(Coarse { scale: 1.0, high }, all.iter().map(|at| self.centres.coarse(*at)));
        found.and_then(|(nth, _)| all.get(nth)).map_or(0, |at| *at as u32)
    }
}

/// About so many centres of rows: those of some large groups first, then of each group its own. Time goes with the root of their
/// number, so there may be as many as the rows deserve.
fn centres(dimension: usize, rows: &[&[i8]], count: usize) -> Centres {
    let outer = means(dimension, rows, count.isqrt().max(1));
    let mut groups: Vec<Vec<&[i8]>> = vec![Vec::new(); outer.len()];
    for row in rows {
        if let Some(group) = groups.get_mut(outer.nearest(row)) {
            group.push(row);
        }
    }
    let mut all = Centres { dimension, ..Centres::default() };
    for group in &groups {
        let mut own = means(dimension, group, (group.len() * count).div_ceil(rows.len().max(1)));
        all.scales.append(&mut own.scales);
        all.high.append(&mut own.high);
    }
    all
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
            let at = centres.nearest(row);
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
        tests::{Dice, add, truth},
    };

    #[test]
    fn the_index_finds_nearly_all_of_what_a_scan_finds() {
        let mut dice = Dice(11);
        let centres: Vec<Vec<f32>> = (0..40).map(|_| dice.numbers(32)).collect();
        let all: Vec<Vec<f32>> = (0..3000).map(|_| dice.around(&centres, 0.4)).collect();
        let mut matrix = Matrix::new(32, 2000, true);
        for (slot, vector) in (0..).zip(&all) {
            add(&mut matrix, slot, vector);
        }
        assert!(!matrix.is_indexed());
        matrix.settle();
        assert!(matrix.is_indexed());
        assert_eq!(matrix.len(), 3000);
        let late = dice.numbers(32);
        add(&mut matrix, 3000, &late);
        let found = matrix.nearest(&Vector::of(&late).unwrap(), 1, 0.5, None, |_| true);
        assert_eq!(found.first().map(|(slot, _)| *slot), Some(3000), "what comes later is found");
        let mut hits = 0;
        for _ in 0..30 {
            let query = dice.around(&centres, 0.4);
            let found = matrix.nearest(&Vector::of(&query).unwrap(), 10, -1.0, None, |_| true);
            let truth = truth(&all, &query, 10);
            hits += found.iter().filter(|(slot, _)| truth.contains(slot)).count();
        }
        assert!(hits >= 285, "{hits} of 300");
        matrix.remove(&[3000]);
        assert!(matrix.nearest(&Vector::of(&late).unwrap(), 1, 0.9, None, |_| true).is_empty());
        let few = matrix.nearest(&Vector::of(&late).unwrap(), 99, -1.0, Some(&[0, 1, 2, 3, 4, 5, 6]), |_| true);
        assert_eq!(few.len(), 7, "what a filter leaves is looked at whole");
    }
}
