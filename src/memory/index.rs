//! The stored form of the indexes over a memory's vectors, so that a cold node need not find their cells again.
//!
//! Bytes: version (1), for the built-in vectors and for the given ones the plan of their index if there is one (postcard), and the
//! sum of a part (`part`) over all before. Cells are told by slot, two bytes each, which does not change with what comes
//! later. Derived: whatever is wrong with one, cells are found from the vectors. Another built-in embedder is another version.
//! Tests: at the foot; `tests/golden/memory` holds one.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::{
    cells::{Centres, NOWHERE, Plan},
    digest::{self, numbers},
    part::{Damaged, seal, sealed},
};

/// The newest version.
const VERSION: u8 = 1;

/// What is kept of the indexes of a shelf.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Plans {
    /// Over the vectors of the built-in embedder.
    pub lexical: Option<Plan>,
    /// Over those of clients or of a model.
    pub given: Option<Plan>,
}

#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    #[serde(borrow)]
    lexical: Option<Table<'a>>,
    #[serde(borrow)]
    given: Option<Table<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Table<'a> {
    dimension: usize,
    found: usize,
    scales: Vec<f32>,
    #[serde(borrow, with = "digest::bytes")]
    high: Cow<'a, [u8]>,
    #[serde(borrow, with = "digest::bytes")]
    places: Cow<'a, [u8]>,
}

impl Table<'_> {
    fn of(plan: &Plan) -> Table<'_> {
        let (scales, high) = plan.centres.planes();
        let high: Vec<u8> = high.iter().map(|n| n.cast_unsigned()).collect();
        let places: Vec<u8> = plan.places.iter().flat_map(|cell| cell.to_le_bytes()).collect();
        let (dimension, found) = (plan.centres.dimension(), plan.found);
        Table { dimension, found, scales: scales.to_vec(), high: high.into(), places: places.into() }
    }

    fn plan(self) -> Result<Plan, Damaged> {
        let centres = Centres::of(self.dimension, self.scales, numbers(&self.high).to_vec()).ok_or(Damaged)?;
        let (pairs, rest) = self.places.as_chunks::<2>();
        let places: Vec<u16> = pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
        let sound = |cell: &u16| *cell == NOWHERE || usize::from(*cell) < centres.len();
        if !rest.is_empty() || !places.iter().all(sound) {
            return Err(Damaged);
        }
        Ok(Plan { centres, found: self.found, places })
    }
}

/// The bytes of plans.
pub(crate) fn encode(plans: &Plans) -> Option<Vec<u8>> {
    let stored = Stored { lexical: plans.lexical.as_ref().map(Table::of), given: plans.given.as_ref().map(Table::of) };
    Some(seal(postcard::to_extend(&stored, vec![VERSION]).ok()?))
}

/// The plans.
///
/// # Errors
/// [`Damaged`].
pub(crate) fn decode(bytes: &[u8]) -> Result<Plans, Damaged> {
    let Some((&VERSION, stored)) = sealed(bytes)?.split_first() else { return Err(Damaged) };
    let Ok((stored, [])) = postcard::take_from_bytes::<Stored<'_>>(stored) else { return Err(Damaged) };
    let plan = |table: Option<Table<'_>>| table.map(Table::plan).transpose();
    Ok(Plans { lexical: plan(stored.lexical)?, given: plan(stored.given)? })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Plans {
        let centres = Centres::of(3, vec![0.25, 0.0], vec![1, -2, 127, 0, 0, 0]).unwrap();
        Plans { lexical: None, given: Some(Plan { centres, found: 5, places: vec![0, NOWHERE, 1, 0] }) }
    }

    #[test]
    fn the_form_is_as_published() {
        let bytes = encode(&sample()).unwrap();
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/memory/index-1.bin");
        let stored =
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; it should hold {bytes:02x?}", path.display()));
        assert_eq!(stored, bytes, "another form needs another version");
        assert_eq!(decode(&bytes).unwrap(), sample());
    }

    #[test]
    fn whatever_is_wrong_is_damage() {
        let bytes = encode(&sample()).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), Err(Damaged), "byte {at}");
        }
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), Err(Damaged));
        }
        // What has the right sum, and still makes no sense.
        let told = sealed(&bytes).unwrap();
        let mut newer = told.to_vec();
        newer[0] = VERSION + 1;
        assert_eq!(decode(&seal(newer)), Err(Damaged), "of a newer build");
        assert_eq!(decode(&seal([told, &[0]].concat())), Err(Damaged), "more than is told");
        let mut nowhere = sample();
        nowhere.given.as_mut().unwrap().places[0] = 2;
        assert_eq!(decode(&encode(&nowhere).unwrap()), Err(Damaged), "a cell without a centre");
        let table = |dimension, scales, high: &'static [u8]| {
            let table = Table { dimension, found: 1, scales, high: high.into(), places: Cow::Borrowed(&[]) };
            let stored = Stored { lexical: Some(table), given: None };
            seal(postcard::to_extend(&stored, vec![VERSION]).unwrap())
        };
        assert!(decode(&table(2, vec![1.0], &[1, 2])).is_ok());
        for bad in [
            table(2, vec![1.0], &[1]),
            table(0, vec![1.0], &[]),
            table(2, Vec::new(), &[]),
            table(usize::MAX, vec![1.0; 2], &[1, 2]),
            table(2, vec![f32::NAN], &[1, 2]),
            table(2, vec![-1.0], &[1, 2]),
        ] {
            assert_eq!(decode(&bad), Err(Damaged));
        }
    }

    fn plan() -> impl Strategy<Value = Option<Plan>> {
        let sizes = (1..5usize, 1..9usize, any::<u32>());
        let plan = sizes.prop_flat_map(|(dimension, count, found)| {
            let scales = prop::collection::vec(0f32..1.0, count);
            let high = prop::collection::vec(-127..=127i8, count * dimension);
            let cell = prop_oneof![Just(NOWHERE), 0..u16::try_from(count).unwrap()];
            (scales, high, prop::collection::vec(cell, 0..50)).prop_map(move |(scales, high, places)| Plan {
                centres: Centres::of(dimension, scales, high).unwrap(),
                found: found as usize,
                places,
            })
        });
        prop::option::of(plan)
    }

    proptest! {
        #[test]
        fn what_was_kept_is_read((lexical, given) in (plan(), plan())) {
            let plans = Plans { lexical, given };
            prop_assert_eq!(decode(&encode(&plans).unwrap()), Ok(plans));
        }

        #[test]
        fn nothing_else_is_taken_for_one(mut bytes in prop::collection::vec(any::<u8>(), 0..200), version: bool) {
            prop_assert_eq!(decode(&bytes), Err(Damaged));
            // With a right sum it is one, or damage, and no panic.
            if let (true, Some(first)) = (version, bytes.first_mut()) {
                *first = VERSION;
            }
            if let Ok(plans) = decode(&seal(bytes)) {
                prop_assert_eq!(decode(&encode(&plans).unwrap()), Ok(plans));
            }
        }
    }
}
