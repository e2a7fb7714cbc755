//! The indexes over a shelf's vectors: begun with what was kept in the store, made anew, told to be kept.
//!
//! Pure. Not here: the form (`index`), when it is kept (`checkpoint`). Tests: `tests.rs`.

use super::{
    super::{cells::Plan, index::Plans, lexical},
    Matrix, Shelf,
};

impl Shelf {
    /// Takes the index that was kept after a turn, before any turn is followed.
    pub(crate) fn begin(&mut self, plans: Plans, upto: u64) {
        let many = |plan: &Plan| plan.len() > self.limit;
        let lexical = plans.lexical.filter(many).filter(|plan| plan.centres.dimension() == lexical::DIMENSION);
        if let (Some(matrix), Some(plan)) = (&mut self.lexical, lexical) {
            *matrix = Matrix::planned(plan, self.limit, false);
        }
        self.given = plans.given.filter(many).map(|plan| Matrix::planned(plan, self.limit, true));
        self.kept = Some(upto);
    }

    /// What is to be kept of the indexes, where there are any and the store has none as good.
    pub(crate) fn plans(&self) -> Option<Plans> {
        let plan = |matrix: &Option<Matrix>| matrix.as_ref().and_then(Matrix::plan);
        self.is_unkept().then(|| Plans { lexical: plan(&self.lexical), given: plan(&self.given) })
    }

    /// Whether [`Shelf::plans`] are worth keeping.
    pub(crate) fn is_unkept(&self) -> bool {
        self.is_indexed() && self.kept.is_none_or(|upto| upto < self.since)
    }

    /// Makes what is worth making when a run of turns was followed.
    pub(crate) fn settle(&mut self) {
        for matrix in self.lexical.iter_mut().chain(&mut self.given) {
            if matrix.settle() {
                self.since = self.turn;
                self.kept = self.kept.filter(|upto| *upto < self.turn);
            }
        }
    }

    pub(super) fn is_indexed(&self) -> bool {
        self.lexical.iter().chain(&self.given).any(Matrix::is_indexed)
    }
}
