//! An entry: in memory, and written down for the tiers below.
//!
//! Not here: when it may be served (`states`, the facade). Invariants: a written form that is damaged, cut or of another build
//! reads as nothing; the first 16 bytes are the version in hexadecimal, so that a server can compare two without reading them.
//! Tests: at the foot.

use std::{
    any::Any,
    sync::{Arc, RwLock},
};

use super::slot::{Slot, Value};
use crate::types::Millis;

/// What an entry takes beside its key's text and its value: the tables of the cache, the entry itself and the allocator's
/// headers. Measured with `sophont load --scenario cache-memory`.
pub const OVERHEAD: usize = 608;
/// What counts the handles of a value, before it.
const COUNTS: usize = 16;
/// The form of what is written.
const FORM: u8 = 1;
/// Values below this size are not worth compressing.
const SMALL: usize = 128;
/// Largest value that is written down, before compression.
pub const MOST_BYTES: usize = 4 * 1024 * 1024;

/// What an allocator takes for so many bytes: four sizes between two powers of two, and multiples of 16 at least. An eighth
/// more than what was asked for, on average, at the most a quarter.
pub const fn granted(bytes: usize) -> usize {
    const LEAST: usize = 16;
    if bytes <= 8 * LEAST {
        return bytes.next_multiple_of(LEAST);
    }
    match bytes.checked_next_power_of_two() {
        Some(above) => bytes.next_multiple_of(above / 8),
        None => bytes,
    }
}

/// Under which right and at which point of history a state was the newest: while nothing was committed since, it still is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seal {
    /// The life of the process; 0: nobody vouches for it.
    pub life: u64,
    /// The shard's epoch.
    pub epoch: u64,
    /// Commits so far in the instance's stripe.
    pub commits: u32,
}

impl Seal {
    /// What was read from elsewhere.
    pub const NONE: Seal = Seal { life: 0, epoch: 0, commits: 0 };

    /// Whether this process vouched for it.
    pub const fn is_some(&self) -> bool {
        self.life != 0
    }
}

/// An entry in memory. Cheap to clone.
#[derive(Clone)]
pub struct Entry {
    /// The version of what it was made from; 0 where the key says it all.
    pub version: u64,
    /// When it was made.
    pub made: Millis,
    /// Until when it is fresh.
    pub fresh: Millis,
    /// Until when it may be served.
    pub usable: Millis,
    /// Of states: who vouches for it.
    pub seal: Seal,
    /// Whether a tier below has it, too.
    pub below: bool,
    /// Bytes it is weighed with.
    pub weight: u32,
    /// None: there is nothing under this key.
    value: Option<Arc<dyn Any + Send + Sync>>,
    write: fn(&Entry) -> Option<Vec<u8>>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { version, made, fresh, seal, weight, .. } = self;
        write!(f, "version {version} of {made:?} until {fresh:?} by {seal:?}, {weight} bytes")
    }
}

impl Entry {
    /// Of a value, or of nothing.
    pub fn new<V: Value>(
        slot: &Slot,
        version: u64,
        value: Option<Arc<V>>,
        made: Millis,
        until: (Millis, Millis),
    ) -> Self {
        let bytes = value.as_ref().map_or(0, |value| granted(value.weight()) + granted(size_of::<V>() + COUNTS));
        let weight = u32::try_from(bytes + granted(slot.id.len() + COUNTS) + OVERHEAD).unwrap_or(u32::MAX);
        let value = value.map(|value| value as Arc<dyn Any + Send + Sync>);
        let write = |entry: &Entry| entry.value::<V>()?.and_then(|value| value.encode());
        Self { version, made, fresh: until.0, usable: until.1, seal: Seal::NONE, below: false, weight, value, write }
    }

    /// Vouched for so.
    pub const fn sealed(mut self, seal: Seal) -> Self {
        self.seal = seal;
        self
    }

    /// Which a tier below has, too, or is about to have.
    pub const fn below(mut self) -> Self {
        self.below = true;
        self
    }

    /// The value, or that there is none; nothing when it is of another type.
    pub fn value<V: Value>(&self) -> Option<Option<Arc<V>>> {
        match &self.value {
            None => Some(None),
            Some(value) => value.clone().downcast::<V>().ok().map(Some),
        }
    }

    /// As [`Entry::value`], without another handle on it; none also when it is of another type.
    pub fn into_value<V: Value>(self) -> Option<Arc<V>> {
        self.value?.downcast::<V>().ok()
    }

    /// Whether it is of this type, or says that there is nothing.
    pub fn is<V: Value>(&self) -> bool {
        self.value.as_ref().is_none_or(|value| (**value).is::<V>())
    }

    /// Whether it says that there is nothing.
    pub const fn is_negative(&self) -> bool {
        self.value.is_none()
    }

    /// Its written form; none for values that only live in this process, and for those too large.
    pub fn freeze(&self) -> Option<Vec<u8>> {
        let plain = match &self.value {
            None => Vec::new(),
            Some(_) => (self.write)(self)?,
        };
        if plain.len() > MOST_BYTES {
            return None;
        }
        let packed = (plain.len() >= SMALL).then(|| lz4_flex::block::compress(&plain));
        let packed = packed.filter(|packed| packed.len() < plain.len());
        let flags = u8::from(self.value.is_none()) | u8::from(packed.is_some()) << 1;
        let mut bytes = format!("{:016x}", self.version).into_bytes();
        bytes.extend([FORM, flags]);
        for ms in [self.made, self.fresh, self.usable] {
            bytes.extend(ms.0.to_le_bytes());
        }
        bytes.extend(self.seal.life.to_le_bytes());
        bytes.extend(self.seal.epoch.to_le_bytes());
        bytes.extend(self.seal.commits.to_le_bytes());
        bytes.extend(u32::try_from(plain.len()).ok()?.to_le_bytes());
        let body = packed.unwrap_or(plain);
        bytes.extend(sum(&bytes, &body));
        bytes.extend(body);
        Some(bytes)
    }
}

/// An entry as the first tier's table has it. What leaves a table that is read without locks is freed some time later, many
/// of them at once; so the value can be taken out, and only the rest waits for that.
#[derive(Clone)]
pub struct Kept {
    /// Without its value.
    entry: Entry,
    /// None: there is nothing under this key.
    value: Option<Arc<Cell>>,
}

/// Holds a value until it is taken out. Only whoever takes it out locks others out, and they take that for a miss.
type Cell = RwLock<Option<Arc<dyn Any + Send + Sync>>>;

impl Kept {
    /// Of an entry.
    pub fn new(mut entry: Entry) -> Self {
        let value = entry.value.take().map(|value| Arc::new(RwLock::new(Some(value))));
        Self { entry, value }
    }

    /// The entry; none when its value was taken out.
    pub fn entry(&self) -> Option<Entry> {
        let Some(cell) = &self.value else { return Some(self.entry.clone()) };
        let value = cell.try_read().ok()?.clone()?;
        Some(Entry { value: Some(value), ..self.entry.clone() })
    }

    /// Bytes it is weighed with.
    pub const fn weight(&self) -> u32 {
        self.entry.weight
    }

    /// Takes the value out for good; none when it was before.
    pub fn take(&self) -> Option<Entry> {
        let Some(cell) = &self.value else { return Some(self.entry.clone()) };
        let value = cell.write().unwrap_or_else(std::sync::PoisonError::into_inner).take()?;
        Some(Entry { value: Some(value), ..self.entry.clone() })
    }
}

fn sum(head: &[u8], body: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head).update(body);
    let mut sum = [0; 8];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    sum
}

/// The bytes with the sum that makes them readable, for the fuzzer, which will not guess it.
#[cfg(any(test, fuzzing))]
pub(super) fn seal(bytes: &[u8]) -> Option<Vec<u8>> {
    let (head, body) = bytes.split_at_checked(HEAD)?;
    Some([head, &sum(head, body), body].concat())
}

/// Where the version, form, flags, times, seal and length end, and the sum begins.
const HEAD: usize = 16 + 2 + 3 * 8 + 8 + 8 + 4 + 4;

/// A written entry, its head read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen<'a> {
    /// As [`Entry::version`].
    pub version: u64,
    /// As [`Entry::made`].
    pub made: Millis,
    /// As [`Entry::fresh`].
    pub fresh: Millis,
    /// As [`Entry::usable`].
    pub usable: Millis,
    /// As [`Entry::seal`].
    pub seal: Seal,
    negative: bool,
    packed: bool,
    len: usize,
    body: &'a [u8],
}

impl<'a> Frozen<'a> {
    /// Whether it says that there is nothing.
    pub const fn is_negative(&self) -> bool {
        self.negative
    }

    /// Reads and checks a written form.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(HEAD)?;
        let (found, body) = rest.split_first_chunk::<8>()?;
        if head[16] != FORM || *found != sum(head, body) {
            return None;
        }
        let number = |at: usize| head[at..].first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
        let small = |at: usize| head[at..].first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        #[allow(clippy::cast_possible_wrap)] // as it was written
        let ms = |at: usize| number(at).map(|ms| Millis(ms as i64));
        Some(Self {
            version: version(bytes)?,
            made: ms(18)?,
            fresh: ms(26)?,
            usable: ms(34)?,
            seal: Seal { life: number(42)?, epoch: number(50)?, commits: small(58)? },
            negative: head[17] & 1 != 0,
            packed: head[17] & 2 != 0,
            len: small(62)? as usize,
            body,
        })
    }

    /// The entry; none when it is of another type.
    pub fn thaw<V: Value>(&self, slot: &Slot) -> Option<Entry> {
        if self.len > MOST_BYTES {
            return None;
        }
        let value = if self.negative {
            None
        } else if self.packed {
            Some(V::decode(&lz4_flex::block::decompress(self.body, self.len).ok()?)?)
        } else {
            Some(V::decode(self.body)?)
        };
        let entry = Entry::new(slot, self.version, value.map(Arc::new), self.made, (self.fresh, self.usable));
        Some(Entry { seal: self.seal, below: true, ..entry })
    }
}

/// The version of a written entry, without reading the rest.
pub fn version(bytes: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(bytes.get(..16)?).ok()?, 16).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{scaling::cache::slot::Kind, types::TenantId};

    fn slot() -> Slot {
        Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), "abc")
    }

    fn entry(text: Option<&str>) -> Entry {
        let value = text.map(|text| Arc::new(text.to_owned()));
        Entry {
            seal: Seal { life: 7, epoch: 8, commits: 9 },
            ..Entry::new(&slot(), 5, value, Millis(1), (Millis(2), Millis(3)))
        }
    }

    #[test]
    fn an_entry_reads_as_it_was_written() {
        for text in [None, Some(""), Some("short"), Some(&*"long ".repeat(1000))] {
            let entry = entry(text);
            let bytes = entry.freeze().unwrap();
            assert!(bytes.len() < 1000, "it is compressed");
            assert_eq!(version(&bytes), Some(5));
            let thawed = Frozen::read(&bytes).unwrap().thaw::<String>(&slot()).unwrap();
            assert_eq!(thawed.value::<String>().unwrap().map(|text| (*text).clone()).as_deref(), text);
            assert_eq!(
                (thawed.version, thawed.made, thawed.fresh, thawed.usable),
                (5, Millis(1), Millis(2), Millis(3))
            );
            assert_eq!((thawed.seal, thawed.below), (entry.seal, true));
        }
    }

    #[test]
    fn a_damaged_one_is_nothing() {
        let bytes = entry(Some(&"long ".repeat(100))).freeze().unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert_eq!(Frozen::read(&damaged), None, "byte {at}");
            assert_eq!(Frozen::read(&bytes[..at]), None, "cut at {at}");
        }
    }

    #[test]
    fn a_value_that_was_taken_out_is_freed_and_no_negative_entry() {
        let text = Arc::new(String::from("text"));
        let entry = Entry::new(&slot(), 5, Some(text.clone()), Millis(1), (Millis(2), Millis(3)));
        let (kept, weight) = (Kept::new(entry.clone()), entry.weight);
        drop(entry);
        assert_eq!(kept.entry().and_then(|entry| entry.value::<String>()), Some(Some(text.clone())));
        let (table, taken) = (kept.clone(), kept.take());
        assert_eq!(taken.and_then(Entry::into_value::<String>), Some(text.clone()));
        assert_eq!(Arc::strong_count(&text), 1, "whatever the table still keeps");
        assert!(table.entry().is_none() && table.take().is_none() && table.weight() == weight);
        let nothing = Kept::new(Entry::new::<String>(&slot(), 5, None, Millis(1), (Millis(2), Millis(3))));
        assert!(nothing.entry().is_some_and(|entry| entry.is_negative()) && nothing.take().is_some());
    }

    #[test]
    fn what_an_allocator_takes_is_at_least_what_was_asked_for() {
        for (asked, taken) in [(0, 0), (1, 16), (128, 128), (129, 160), (257, 320), (4096, 4096), (4097, 5120)] {
            assert_eq!(granted(asked), taken, "{asked}");
        }
        for asked in (1..100_000).chain([usize::MAX]) {
            let taken = granted(asked);
            assert!(taken >= asked && taken <= asked.saturating_add((asked / 4).max(15)), "{asked}: {taken}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(frozen) = Frozen::read(&bytes) {
                drop(frozen.thaw::<String>(&slot()));
            }
        }
    }
}
