//! Vectors of an instance, ready to be searched: all of them while they are few, the likely cells of an index above that.
//!
//! The coarse plane of bytes is scanned with whatever vector instructions the processor has; the best few are scored again with
//! both planes, which makes the order exact for all purposes. Above [`Matrix::limit`] the rows are put in the order of the
//! cells of an index (`cells`), and only the likely cells are scanned, and what came since.
//!
//! Pure. Tests: at the foot; recall and times in `docs/performance.md`.

use pulp::Arch;

use super::cells::Cells;
use crate::types::memory::Vector;

/// How many more than asked for are scored with both planes.
const SPARE: usize = 4;
/// Of this share of the vectors at least (one in so many) the nearest cells are scanned.
const SHARE: usize = 16;
/// And at least so many.
const LEAST: usize = 20_000;
/// More than this share of the rows (one in so many) that came after the index are put into its cells; twice as many rows get
/// another index.
const TAIL: usize = 16;
/// A slot without a vector.
const NONE: u32 = u32::MAX;

/// The sum of products. Vector instructions where it is inlined into [`Arch::dispatch`].
#[inline(always)]
fn dot(one: &[i8], other: &[i8]) -> i32 {
    one.iter().zip(other).map(|(one, other)| i32::from(*one) * i32::from(*other)).sum()
}

/// The products of some rows with a query, by row.
#[inline]
pub(crate) fn dots(rows: &[i8], query: &[i8], mut each: impl FnMut(usize, i32)) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (at, row) in rows.chunks_exact(query.len().max(1)).enumerate() {
                each(at, dot(row, query));
            }
        },
    );
}

/// A coarse plane, or part of one: what one step is worth, and the steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coarse<'a> {
    pub scale: f32,
    pub high: &'a [i8],
}

/// The place of the coarse plane that is nearest to another, and their cosine.
#[allow(clippy::cast_precision_loss)] // far below 2^24 for any dimension taken
pub(crate) fn nearest<'a>(of: Coarse<'_>, among: impl Iterator<Item = Coarse<'a>>) -> Option<(usize, f32)> {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut best = None;
            for (at, other) in among.enumerate() {
                let cosine = dot(other.high, of.high) as f32 * other.scale * of.scale;
                if best.is_none_or(|(_, most)| cosine > most) {
                    best = Some((at, cosine));
                }
            }
            best
        },
    )
}

/// The best of a stream, without keeping more than twice as many.
pub(crate) struct Best {
    limit: usize,
    floor: f32,
    found: Vec<(u32, f32)>,
}

impl Best {
    /// At most so many.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), floor: f32::NEG_INFINITY, found: Vec::new() }
    }

    /// Whether something with this score is worth offering.
    pub(crate) fn wants(&self, score: f32) -> bool {
        score > self.floor
    }

    /// One more.
    pub(crate) fn offer(&mut self, slot: u32, score: f32) {
        if score <= self.floor {
            return;
        }
        self.found.push((slot, score));
        if self.found.len() >= 2 * self.limit {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.found.len() > self.limit {
            self.found.select_nth_unstable_by(self.limit - 1, order);
            self.found.truncate(self.limit);
            self.floor = self.found.iter().fold(f32::INFINITY, |least, (_, score)| least.min(*score));
        }
    }

    /// They, best first; of equals the newer.
    pub(crate) fn finish(mut self) -> Vec<(u32, f32)> {
        self.cut();
        self.found.sort_unstable_by(order);
        self.found
    }
}

fn order(one: &(u32, f32), other: &(u32, f32)) -> std::cmp::Ordering {
    other.1.total_cmp(&one.1).then(other.0.cmp(&one.0))
}

/// Vectors of one dimension, each of a slot.
#[derive(Debug)]
pub(crate) struct Matrix {
    dimension: usize,
    /// So many are scanned without an index.
    limit: usize,
    /// Whether both planes are kept; else scores are those of the coarse one.
    fine: bool,
    /// By row.
    slots: Vec<u32>,
    scales: Vec<f32>,
    high: Vec<i8>,
    low: Vec<i8>,
    /// By slot.
    rows: Vec<u32>,
    index: Option<Cells>,
}

impl Matrix {
    /// Without vectors. More than `limit` of them get an index.
    pub(crate) fn new(dimension: usize, limit: usize, fine: bool) -> Self {
        Self {
            dimension,
            limit,
            fine,
            slots: Vec::new(),
            scales: Vec::new(),
            high: Vec::new(),
            low: Vec::new(),
            rows: Vec::new(),
            index: None,
        }
    }

    pub(crate) const fn dimension(&self) -> usize {
        self.dimension
    }

    /// How many there are.
    pub(crate) const fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether searches go through the index.
    pub(crate) const fn is_indexed(&self) -> bool {
        self.index.is_some()
    }

    /// About how many bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        let own = 8 * self.slots.capacity() + self.high.capacity() + self.low.capacity() + 4 * self.rows.capacity();
        own + self.index.as_ref().map_or(0, Cells::bytes)
    }

    /// One more, of a slot that has none. A vector of another dimension is left out.
    pub(crate) fn push(&mut self, slot: u32, scale: f32, high: &[i8], low: &[i8]) {
        if high.len() != self.dimension || (self.fine && low.len() != self.dimension) {
            return;
        }
        #[allow(clippy::cast_possible_truncation)] // fewer rows than slots, and slots are 32 bits
        let row = self.slots.len() as u32;
        self.slots.push(slot);
        self.scales.push(scale);
        self.high.extend_from_slice(high);
        if self.fine {
            self.low.extend_from_slice(low);
        }
        let slot = slot as usize;
        if self.rows.len() <= slot {
            self.rows.resize(slot + 1, NONE);
        }
        self.rows[slot] = row;
    }

    /// Makes the index when there are enough vectors for it, or many came since it was made. Takes seconds for a million.
    pub(crate) fn settle(&mut self) {
        let found = match &self.index {
            None if self.len() <= self.limit => return,
            Some(cells) if self.len() - cells.len() <= (self.len() / TAIL).max(LEAST / 2) => return,
            Some(cells) if self.len() < 2 * cells.found() => cells.extend(&self.high),
            _ => Cells::find(self.dimension, &self.scales, &self.high),
        };
        self.arrange(found.0, &found.1);
    }

    /// Puts the rows in the order of their cells.
    fn arrange(&mut self, mut cells: Cells, places: &[u32]) {
        let order = cells.order(places);
        let mut next = Self::new(self.dimension, self.limit, self.fine);
        next.slots.reserve_exact(self.len());
        next.scales.reserve_exact(self.len());
        next.high.reserve_exact(self.high.len());
        next.low.reserve_exact(self.low.len());
        for row in order {
            let row = row as usize;
            let at = row * self.dimension..(row + 1) * self.dimension;
            let low = self.low.get(at.clone()).unwrap_or_default();
            next.push(self.slots[row], self.scales[row], &self.high[at], low);
        }
        next.index = Some(cells);
        *self = next;
    }

    /// Takes vectors out, of slots in order.
    pub(crate) fn remove(&mut self, gone: &[u32]) {
        for slot in gone {
            let Some(row) = self.row(*slot) else { continue };
            let at = row * self.dimension..(row + 1) * self.dimension;
            self.high[at.clone()].fill(0);
            if let Some(low) = self.low.get_mut(at) {
                low.fill(0);
            }
            self.scales[row] = 0.0;
            self.rows[*slot as usize] = NONE;
        }
    }

    fn row(&self, slot: u32) -> Option<usize> {
        self.rows.get(slot as usize).filter(|row| **row != NONE).map(|row| *row as usize)
    }

    /// The slots nearest to a vector among those to keep, best first, with their cosines above `least`. Where `among` names
    /// slots these are looked at, all of them and no others.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // far below 2^24; rows are 32 bits
    pub(crate) fn nearest(
        &self,
        query: &Vector,
        limit: usize,
        least: f32,
        among: Option<&[u32]>,
        keep: impl Fn(u32) -> bool,
    ) -> Vec<(u32, f32)> {
        if query.dimension() != self.dimension || limit == 0 {
            return Vec::new();
        }
        // The coarse plane alone may be off by a little.
        let floor = if self.fine { least - 0.01 } else { least };
        let mut rows = Best::new(if self.fine { limit * SPARE } else { limit });
        if let Some(among) = among {
            let found: Vec<usize> = among.iter().filter_map(|slot| self.row(*slot)).collect();
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for row in &found {
                        let high = &self.high[row * self.dimension..(row + 1) * self.dimension];
                        let score = dot(high, &query.high) as f32 * self.scales[*row] * query.scale;
                        if score > floor {
                            rows.offer(*row as u32, score);
                        }
                    }
                },
            );
            return self.ranked(rows, query, limit, least);
        }
        let mut scan = |part: std::ops::Range<usize>| {
            let planes = &self.high[part.start * self.dimension..part.end * self.dimension];
            dots(planes, &query.high, |at, dot| {
                let row = part.start + at;
                let score = dot as f32 * self.scales[row] * query.scale;
                if score > floor && rows.wants(score) && keep(self.slots[row]) {
                    rows.offer(row as u32, score);
                }
            });
        };
        match &self.index {
            None => scan(0..self.len()),
            Some(index) => {
                index.likely(query, (index.len() / SHARE).max(LEAST)).for_each(&mut scan);
                scan(index.len()..self.len());
            }
        }
        self.ranked(rows, query, limit, least)
    }

    /// Slots by both planes, where there are both.
    fn ranked(&self, rows: Best, query: &Vector, limit: usize, least: f32) -> Vec<(u32, f32)> {
        let numbers: Vec<f32> = query.numbers().collect();
        let mut best = Best::new(limit);
        for (row, coarse) in rows.finish() {
            let row = row as usize;
            let score = if self.fine { self.exactly(row, &numbers) } else { coarse };
            if score > least {
                best.offer(self.slots[row], score);
            }
        }
        best.finish()
    }

    fn exactly(&self, row: usize, numbers: &[f32]) -> f32 {
        let at = row * self.dimension;
        let planes = self.high[at..at + self.dimension].iter().zip(&self.low[at..at + self.dimension]);
        let sum: f32 =
            planes.zip(numbers).map(|((high, low), n)| (f32::from(*high) + f32::from(*low) / 254.0) * n).sum();
        sum * self.scales[row]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_precision_loss)]
pub(crate) mod tests {
    use super::*;

    /// Numbers that look random and are the same everywhere (splitmix64).
    pub(crate) struct Dice(pub u64);

    impl Dice {
        pub(crate) fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        /// About normal.
        pub(crate) fn normal(&mut self) -> f32 {
            (0..6).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() * 2f32.sqrt()
                - 3.0 * 2f32.sqrt()
        }

        pub(crate) fn numbers(&mut self, count: usize) -> Vec<f32> {
            (0..count).map(|_| self.normal()).collect()
        }

        /// Around one of some centres.
        pub(crate) fn around(&mut self, centres: &[Vec<f32>], spread: f32) -> Vec<f32> {
            let centre = &centres[usize::try_from(self.next()).unwrap() % centres.len()];
            centre.iter().map(|n| n + spread * self.normal()).collect()
        }
    }

    pub(crate) fn add(matrix: &mut Matrix, slot: u32, numbers: &[f32]) {
        let vector = Vector::of(numbers).unwrap();
        matrix.push(slot, vector.scale, &vector.high, &vector.low);
    }

    /// The slots nearest by the numbers themselves.
    pub(crate) fn truth(all: &[Vec<f32>], query: &[f32], limit: usize) -> Vec<u32> {
        let unit = |v: &[f32]| {
            let length = v.iter().map(|n| n * n).sum::<f32>().sqrt();
            v.iter().map(|n| n / length).collect::<Vec<f32>>()
        };
        let query = unit(query);
        let mut best = Best::new(limit);
        for (slot, vector) in (0..).zip(all) {
            best.offer(slot, unit(vector).iter().zip(&query).map(|(a, b)| a * b).sum());
        }
        best.finish().into_iter().map(|(slot, _)| slot).collect()
    }

    #[test]
    fn the_scan_finds_what_the_numbers_say() {
        let mut dice = Dice(7);
        let all: Vec<Vec<f32>> = (0..2000).map(|_| dice.numbers(96)).collect();
        let mut matrix = Matrix::new(96, 10_000, true);
        for (slot, vector) in (0..).zip(&all) {
            add(&mut matrix, slot, vector);
        }
        let mut hits = 0;
        for _ in 0..50 {
            let query = dice.numbers(96);
            let found = matrix.nearest(&Vector::of(&query).unwrap(), 10, -1.0, None, |_| true);
            let truth = truth(&all, &query, 10);
            hits += found.iter().filter(|(slot, _)| truth.contains(slot)).count();
        }
        assert!(hits >= 499, "{hits} of 500");
    }

    #[test]
    fn what_is_not_kept_and_what_is_removed_is_not_found() {
        let mut matrix = Matrix::new(3, 10, true);
        for (slot, x) in [(0, 1.0), (1, 0.9), (2, 0.8), (3, -1.0)] {
            add(&mut matrix, slot, &[x, 0.3, 0.0]);
        }
        add(&mut matrix, 4, &[1.0]);
        let query = Vector::of(&[1.0, 0.0, 0.0]).unwrap();
        let slots = |matrix: &Matrix, keep: &dyn Fn(u32) -> bool| {
            matrix.nearest(&query, 9, 0.0, None, keep).into_iter().map(|(slot, _)| slot).collect::<Vec<_>>()
        };
        assert_eq!(slots(&matrix, &|_| true), [0, 1, 2]);
        let among: Vec<u32> =
            matrix.nearest(&query, 9, 0.0, Some(&[2, 3, 4, 9]), |_| true).iter().map(|(s, _)| *s).collect();
        assert_eq!(among, [2], "of those that are named, and no others");
        assert_eq!(slots(&matrix, &|slot| slot != 1), [0, 2]);
        matrix.remove(&[0]);
        assert_eq!(slots(&matrix, &|_| true), [1, 2]);
        assert_eq!(matrix.len(), 4);
        assert!(matrix.nearest(&Vector::of(&[1.0]).unwrap(), 9, 0.0, None, |_| true).is_empty());
    }

    #[test]
    fn the_best_of_a_stream_are_kept() {
        let mut best = Best::new(3);
        (0..100u32).for_each(|n| best.offer(n, (n * 37 % 101) as f32));
        assert_eq!(best.finish().iter().map(|(_, score)| *score).collect::<Vec<_>>(), [100.0, 99.0, 98.0]);
    }
}
