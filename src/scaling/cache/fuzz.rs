//! What the fuzzer throws at the cache: entries as the tiers below this process hold them.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;

use super::{
    entry::{self, Frozen},
    slot::{Kind, Packed, Slot, Value},
};
use crate::types::{RawJson, StateSnapshot, TenantId, fuzz::settles, memory::Vector};

/// An entry, once as it is and once with the right sum.
pub fn entries(bytes: &[u8]) {
    let _ = (Frozen::read(bytes), entry::version(bytes));
    let Some(sealed) = entry::seal(bytes) else { return };
    thaw::<String>(&sealed);
    thaw::<Bytes>(&sealed);
    thaw::<RawJson>(&sealed);
    thaw::<Vector>(&sealed);
    thaw::<StateSnapshot>(&sealed);
    thaw::<Packed<Vec<(u64, f32)>>>(&sealed);
}

fn thaw<V: Value>(bytes: &[u8]) {
    let slot = Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), "abc");
    let read = |bytes: &[u8]| Frozen::read(bytes)?.thaw::<V>(&slot);
    settles(read(bytes), |entry| entry.freeze().unwrap(), read);
}
