//! Vectors of an instance, ready to be searched: all of them while they are few, the likely cells of an index above that.
//!
//! The coarse plane of bytes is scanned with sums the compiler turns into vector instructions; the best few are scored again with
//! both planes, which makes the order exact for all purposes. Above [`Matrix::limit`] the vectors move into the cells of an
//! index (`cells`), where the likely cells are scanned by the coarse plane alone.
//!
//! Pure. Tests: at the foot; recall and times in `docs/performance.md`.

use super::cells::Cells;
use crate::types::memory::Vector;

/// How many more than asked for are scored with both planes.
const SPARE: usize = 4;

/// The sum of products.
pub(crate) fn dot(one: &[i8], other: &[i8]) -> i32 {
    const LANE: usize = 32;
    let (ones, one_rest) = one.as_chunks::<LANE>();
    let (others, other_rest) = other.as_chunks::<LANE>();
    let mut sum = 0;
    for (one, other) in ones.iter().zip(others) {
        let mut part = 0i32;
        for at in 0..LANE {
            part += i32::from(i16::from(one[at]) * i16::from(other[at]));
        }
        sum += part;
    }
    sum + one_rest.iter().zip(other_rest).map(|(one, other)| i32::from(*one) * i32::from(*other)).sum::<i32>()
}

/// The cosine of two vectors by their coarse planes.
#[allow(clippy::cast_precision_loss)] // far below 2^24 for any dimension taken
pub(crate) fn cosine(one: &Vector, other: &Vector) -> f32 {
    dot(&one.high, &other.high) as f32 * one.scale * other.scale
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
    slots: Vec<u32>,
    scales: Vec<f32>,
    high: Vec<i8>,
    low: Vec<i8>,
    cells: Option<Cells>,
}

impl Matrix {
    /// Without vectors. More than `limit` of them get an index.
    pub(crate) fn new(dimension: usize, limit: usize) -> Self {
        Self { dimension, limit, slots: Vec::new(), scales: Vec::new(), high: Vec::new(), low: Vec::new(), cells: None }
    }

    pub(crate) const fn dimension(&self) -> usize {
        self.dimension
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.cells.as_ref().map_or(self.slots.len(), Cells::len)
    }

    /// Whether searches go through the index.
    pub(crate) const fn is_indexed(&self) -> bool {
        self.cells.is_some()
    }

    /// About how many bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        let own = 8 * self.slots.capacity() + self.high.capacity() + self.low.capacity();
        own + self.cells.as_ref().map_or(0, Cells::bytes)
    }

    /// One more; slots come in order. A vector of another dimension is left out.
    pub(crate) fn push(&mut self, slot: u32, vector: &Vector) {
        if vector.dimension() != self.dimension {
            return;
        }
        if let Some(cells) = &mut self.cells {
            return cells.push(slot, vector.scale, &vector.high);
        }
        self.slots.push(slot);
        self.scales.push(vector.scale);
        self.high.extend_from_slice(&vector.high);
        self.low.extend_from_slice(&vector.low);
    }

    /// Makes the index when there are enough for it. Takes seconds for a million.
    pub(crate) fn settle(&mut self) {
        if self.cells.is_none() && self.slots.len() > self.limit {
            let cells = Cells::build(self.dimension, &self.slots, &self.scales, &self.high);
            *self = Self { cells: Some(cells), ..Self::new(self.dimension, self.limit) };
        }
    }

    /// Takes vectors out, of slots in order.
    pub(crate) fn remove(&mut self, gone: &[u32]) {
        let is_gone = |slot: u32| gone.binary_search(&slot).is_ok();
        if let Some(cells) = &mut self.cells {
            return cells.remove(is_gone);
        }
        for (row, slot) in self.slots.iter().enumerate() {
            if is_gone(*slot) {
                let at = row * self.dimension;
                self.high[at..at + self.dimension].fill(0);
                self.low[at..at + self.dimension].fill(0);
                self.scales[row] = 0.0;
            }
        }
    }

    /// The slots nearest to a vector among those to keep, best first, with their cosines above `least`. `all` scans everything
    /// also where there is an index.
    #[allow(clippy::cast_precision_loss)] // far below 2^24
    pub(crate) fn nearest(
        &self,
        query: &Vector,
        limit: usize,
        least: f32,
        all: bool,
        keep: impl Fn(u32) -> bool,
    ) -> Vec<(u32, f32)> {
        if query.dimension() != self.dimension || limit == 0 {
            return Vec::new();
        }
        if let Some(cells) = &self.cells {
            return cells.nearest(query, limit, least, all, keep);
        }
        let mut rows = Best::new(limit * SPARE);
        for (row, high) in self.high.chunks_exact(self.dimension).enumerate() {
            let score = dot(high, &query.high) as f32 * self.scales[row] * query.scale;
            if score > least - 0.01 && rows.wants(score) && keep(self.slots[row]) {
                #[allow(clippy::cast_possible_truncation)] // slots are 32 bits
                rows.offer(row as u32, score);
            }
        }
        let numbers: Vec<f32> = query.numbers().collect();
        let mut best = Best::new(limit);
        for (row, _) in rows.finish() {
            let row = row as usize;
            let score = self.exactly(row, &numbers);
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
        let mut matrix = Matrix::new(96, 10_000);
        for (slot, vector) in (0..).zip(&all) {
            matrix.push(slot, &Vector::of(vector).unwrap());
        }
        let mut hits = 0;
        for _ in 0..50 {
            let query = dice.numbers(96);
            let found = matrix.nearest(&Vector::of(&query).unwrap(), 10, -1.0, false, |_| true);
            let truth = truth(&all, &query, 10);
            hits += found.iter().filter(|(slot, _)| truth.contains(slot)).count();
        }
        assert!(hits >= 499, "{hits} of 500");
    }

    #[test]
    fn what_is_not_kept_and_what_is_removed_is_not_found() {
        let mut matrix = Matrix::new(3, 10);
        for (slot, x) in [(0, 1.0), (1, 0.9), (2, 0.8), (3, -1.0)] {
            matrix.push(slot, &Vector::of(&[x, 0.3, 0.0]).unwrap());
        }
        matrix.push(4, &Vector::of(&[1.0]).unwrap());
        let query = Vector::of(&[1.0, 0.0, 0.0]).unwrap();
        let slots = |matrix: &Matrix, keep: &dyn Fn(u32) -> bool| {
            matrix.nearest(&query, 9, 0.0, false, keep).into_iter().map(|(slot, _)| slot).collect::<Vec<_>>()
        };
        assert_eq!(slots(&matrix, &|_| true), [0, 1, 2]);
        assert_eq!(slots(&matrix, &|slot| slot != 1), [0, 2]);
        matrix.remove(&[0]);
        assert_eq!(slots(&matrix, &|_| true), [1, 2]);
        assert_eq!(matrix.len(), 4);
        assert!(matrix.nearest(&Vector::of(&[1.0]).unwrap(), 9, 0.0, false, |_| true).is_empty());
    }

    #[test]
    fn the_best_of_a_stream_are_kept() {
        let mut best = Best::new(3);
        (0..100u32).for_each(|n| best.offer(n, (n * 37 % 101) as f32));
        assert_eq!(best.finish().iter().map(|(_, score)| *score).collect::<Vec<_>>(), [100.0, 99.0, 98.0]);
    }
}
