//! Tests of `vector`, and of what is kept of an index.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss)]

use super::*;
use crate::memory::cells;

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
        (0..6).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() * 2f32.sqrt() - 3.0 * 2f32.sqrt()
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

/// Rows around some centres, from the dice, in an index.
fn indexed(dice: &mut Dice, count: u32) -> (Matrix, Vec<Vec<f32>>) {
    let centres: Vec<Vec<f32>> = (0..40).map(|_| dice.numbers(32)).collect();
    let mut matrix = Matrix::new(32, 1000, true);
    for slot in 0..count {
        add(&mut matrix, slot, &dice.around(&centres, 0.4));
    }
    assert!(matrix.settle());
    (matrix, centres)
}

/// The same vectors pushed in the order of their slots, as a cold shelf meets them.
fn again(into: &mut Matrix, of: &Matrix) {
    for (slot, row) in of.rows.iter().enumerate().filter(|(_, row)| **row != NONE) {
        let at = *row as usize * of.dimension..(*row as usize + 1) * of.dimension;
        into.push(u32::try_from(slot).unwrap(), of.scales[*row as usize], &of.high[at.clone()], &of.low[at]);
    }
}

#[test]
fn a_kept_index_stands_as_it_did() {
    let mut dice = Dice(5);
    let (mut matrix, centres) = indexed(&mut dice, 2500);
    for slot in 2500..2600 {
        add(&mut matrix, slot, &dice.around(&centres, 0.4));
    }
    assert!(!matrix.settle(), "so few stand behind the cells");
    let plan = matrix.plan().unwrap();
    let mut cold = Matrix::planned(plan.clone(), 1000, true);
    again(&mut cold, &matrix);
    assert!(!cold.settle(), "nothing is to be made");
    assert_eq!(cold.plan(), Some(plan));
    assert_eq!((&cold.slots, &cold.rows), (&matrix.slots, &matrix.rows));
    assert_eq!((&cold.scales, &cold.high, &cold.low), (&matrix.scales, &matrix.high, &matrix.low));
    for _ in 0..20 {
        let query = Vector::of(&dice.around(&centres, 0.4)).unwrap();
        let found = |matrix: &Matrix| matrix.nearest(&query, 10, -1.0, None, |_| true);
        assert_eq!(found(&cold), found(&matrix));
    }
    // And without those that were taken out since.
    let gone: Vec<u32> = (0..2600).step_by(7).collect();
    matrix.remove(&gone);
    let plan = matrix.plan().unwrap();
    let place = |slot: &u32| plan.places.get(*slot as usize).copied().unwrap_or(cells::NOWHERE);
    assert!(gone.iter().all(|slot| place(slot) == cells::NOWHERE) && place(&1) != cells::NOWHERE);
    let mut cold = Matrix::planned(plan.clone(), 1000, true);
    again(&mut cold, &matrix);
    assert!(!cold.settle());
    assert_eq!(cold.plan(), Some(plan));
    assert_eq!(cold.len(), 2600 - gone.len());
}

#[test]
fn vectors_that_do_not_fit_a_plan_are_placed_anew() {
    let mut dice = Dice(6);
    let (matrix, _) = indexed(&mut dice, 2500);
    let plan = matrix.plan().unwrap();
    for short in [0, 1] {
        let mut cold = Matrix::planned(plan.clone(), 1000, true);
        let mut fewer = Matrix::new(32, 1000, true);
        again(&mut fewer, &matrix);
        for (slot, row) in (0..2500 - short).map(|slot| (slot, slot as usize * 32..(slot as usize + 1) * 32)) {
            cold.push(slot, fewer.scales[slot as usize], &fewer.high[row.clone()], &fewer.low[row]);
        }
        assert_eq!(cold.settle(), short > 0, "one is missing");
        assert_eq!(cold.len(), 2500 - short as usize);
        assert!(cold.is_indexed() && !cold.slots.contains(&NONE));
    }
    let mut none = Matrix::planned(plan, 1000, true);
    assert!(!none.settle());
    assert_eq!((none.len(), none.is_indexed()), (0, false));
}

/// The largest cosine of a vector to a centre of what would be kept.
fn shines(matrix: &Matrix, vector: &Vector) -> f32 {
    let plan = matrix.plan().unwrap();
    let (scales, high) = plan.centres.planes();
    let centres = scales.iter().zip(high.chunks_exact(matrix.dimension));
    let near = nearest(
        Coarse { scale: vector.scale, high: &vector.high },
        centres.map(|(scale, high)| Coarse { scale: *scale, high }),
    );
    near.unwrap().1
}

#[test]
fn what_was_taken_out_does_not_shine_through_a_centre() {
    let mut dice = Dice(8);
    // One that has a cell for itself, one that shares it with a fellow, and others.
    let (lonely, one) = (dice.numbers(32), dice.numbers(32));
    let other: Vec<f32> = one.iter().map(|n| n + 0.5 * dice.normal()).collect();
    let places = [&[0, 1, 1][..], &[2; 40]].concat();
    let centres = cells::Centres::of(32, vec![1.0; 3], vec![1; 96]).unwrap();
    let mut matrix = Matrix::planned(Plan { centres, found: 43, places }, 10, true);
    let rest: Vec<Vec<f32>> = (0..40).map(|_| dice.numbers(32)).collect();
    for (slot, numbers) in (0..).zip([&lonely, &one, &other].into_iter().chain(&rest)) {
        add(&mut matrix, slot, numbers);
    }
    assert!(!matrix.settle());
    matrix.index.as_mut().unwrap().centre(&matrix.high);
    let [lonely, one, other] = [lonely, one, other].map(|numbers| Vector::of(&numbers).unwrap());
    assert!(shines(&matrix, &lonely) > 0.99, "its cell is its own");
    let (before, of_other) = (shines(&matrix, &one), shines(&matrix, &other));
    assert!(before > 0.9 && of_other < 0.99, "{before} {of_other}");
    matrix.remove(&[0, 1]);
    assert!(shines(&matrix, &lonely) < 0.7, "{}", shines(&matrix, &lonely));
    let alike = nearest(
        Coarse { scale: one.scale, high: &one.high },
        std::iter::once(Coarse { scale: other.scale, high: &other.high }),
    );
    assert!(shines(&matrix, &one) <= alike.unwrap().1 + 0.01, "no more of it than of its fellow");
    assert!(shines(&matrix, &other) > 0.99, "who has the cell for itself now");
    assert_eq!(matrix.plan().unwrap().places[..3], [cells::NOWHERE, cells::NOWHERE, 1]);
}

#[test]
fn an_index_over_nothing_is_none_to_keep() {
    let mut dice = Dice(9);
    let mut matrix = Matrix::new(32, 100, true);
    for slot in 0..200 {
        add(&mut matrix, slot, &dice.numbers(32));
    }
    matrix.remove(&(0..200).collect::<Vec<_>>());
    assert!(matrix.settle());
    assert_eq!(matrix.plan(), None);
    add(&mut matrix, 200, &dice.numbers(32));
    matrix.remove(&[200]);
}
