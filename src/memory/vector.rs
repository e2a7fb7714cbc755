//! Vectors of an instance, ready to be searched: all of them while they are few, the likely cells of an index above that.
//!
//! The coarse plane of bytes is scanned with whatever vector instructions the processor has; the best few are scored again with
//! both planes, which makes the order exact for all purposes. Above [`Matrix::limit`] the rows are put in the order of the
//! cells of an index (`cells`), and only the likely cells are scanned, and what came since.
//!
//! Pure. Tests: `vector/tests.rs`; recall and times in `docs/performance.md`.

use pulp::Arch;

use super::cells::{Awaited, Cells, Plan};
use crate::types::memory::Vector;

/// How many more than asked for are scored with both planes.
const SPARE: usize = 4;
/// Of this share of the vectors at least (one in so many) the nearest cells are scanned.
const SHARE: usize = 16;
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
    /// Slots whose rows in the cells are still empty.
    awaited: Option<Awaited>,
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
            awaited: None,
        }
    }

    /// With an index that was kept, whose vectors are to come. Has room for some more.
    pub(crate) fn planned(plan: Plan, limit: usize, fine: bool) -> Self {
        let dimension = plan.centres.dimension();
        let rows = Vec::with_capacity(plan.places.len());
        let (cells, awaited) = Cells::planned(plan);
        let count = cells.len();
        let room = count + count / TAIL;
        // Pages that nothing was written to yet take no memory.
        let plane = || {
            let mut plane = vec![0; room * dimension];
            plane.truncate(count * dimension);
            plane
        };
        let (high, low) = (plane(), if fine { plane() } else { Vec::new() });
        let (slots, scales) = (vec![NONE; count], vec![0.0; count]);
        Self { dimension, limit, fine, slots, scales, high, low, rows, index: Some(cells), awaited: Some(awaited) }
    }

    /// What is to be kept of the index.
    pub(crate) fn plan(&self) -> Option<Plan> {
        let index = self.index.as_ref()?;
        index.plan(&self.slots[..index.len()], &self.scales)
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
        let awaited = self.awaited.as_mut().and_then(|awaited| awaited.row(slot));
        let row = awaited.unwrap_or(self.slots.len());
        if awaited.is_some() {
            (self.slots[row], self.scales[row]) = (slot, scale);
            let at = row * self.dimension..(row + 1) * self.dimension;
            self.high[at.clone()].copy_from_slice(high);
            if self.fine {
                self.low[at].copy_from_slice(low);
            }
        } else {
            self.slots.push(slot);
            self.scales.push(scale);
            self.high.extend_from_slice(high);
            if self.fine {
                self.low.extend_from_slice(low);
            }
        }
        let slot = slot as usize;
        if self.rows.len() <= slot {
            self.rows.resize(slot + 1, NONE);
        }
        #[allow(clippy::cast_possible_truncation)] // fewer rows than slots, and slots are 32 bits
        let row = row as u32;
        self.rows[slot] = row;
    }

    /// Makes the index when there are enough vectors for it, or many came since it was made; whether it did. Takes seconds for a
    /// million.
    pub(crate) fn settle(&mut self) -> bool {
        if self.awaited.take().is_some_and(|awaited| awaited.missing() > 0) {
            self.scatter();
        }
        let (found, new) = match &self.index {
            None if self.len() <= self.limit => return false,
            Some(cells) if self.len() - cells.len() <= (self.len() / TAIL).max(self.least() / 2) => return false,
            Some(cells) if self.len() < 2 * cells.found() => (cells.extend(&self.high), false),
            _ => (Cells::find(self.dimension, &self.scales, &self.high), true),
        };
        self.arrange(found.0, &found.1);
        if let Some(cells) = self.index.as_mut().filter(|_| new) {
            cells.centre(&self.high);
        }
        true
    }

    /// So many are scanned with an index at least: less than half of what is scanned without.
    const fn least(&self) -> usize {
        self.limit / 5 * 2
    }

    /// Lets go of an index that is of other vectors than those that came.
    fn scatter(&mut self) {
        let mut next = Self::new(self.dimension, self.limit, self.fine);
        for row in (0..self.len()).filter(|row| self.slots[*row] != NONE) {
            let at = row * self.dimension..(row + 1) * self.dimension;
            let low = self.low.get(at.clone()).unwrap_or_default();
            next.push(self.slots[row], self.scales[row], &self.high[at], low);
        }
        *self = next;
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
        let mut rows = Vec::new();
        for slot in gone {
            let Some(row) = self.row(*slot) else { continue };
            rows.push(row);
            let at = row * self.dimension..(row + 1) * self.dimension;
            self.high[at.clone()].fill(0);
            if let Some(low) = self.low.get_mut(at) {
                low.fill(0);
            }
            self.scales[row] = 0.0;
            self.rows[*slot as usize] = NONE;
        }
        if let Some(index) = &mut self.index {
            index.forget(&rows, &self.high);
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
                index.likely(query, (index.len() / SHARE).max(self.least())).for_each(&mut scan);
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
pub(crate) mod tests;
