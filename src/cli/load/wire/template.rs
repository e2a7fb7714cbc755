//! Message bytes built once, with fixed-width decimal slots that are overwritten for each message.
//!
//! Tests: at the foot.

use std::ops::Range;

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Number of the instance.
    Instance,
    /// Number of the sender.
    Sender,
    /// Number of the message.
    Seq,
}

/// Digits of an instance's number.
pub const INSTANCE_DIGITS: usize = 7;
/// Digits of a sender's number.
pub const SENDER_DIGITS: usize = 5;
/// Digits of a message's number.
pub const SEQ_DIGITS: usize = 9;

impl Slot {
    /// How many digits it has.
    pub const fn width(self) -> usize {
        match self {
            Slot::Instance => INSTANCE_DIGITS,
            Slot::Sender => SENDER_DIGITS,
            Slot::Seq => SEQ_DIGITS,
        }
    }
}

/// Bytes with slots.
#[derive(Debug, Clone, Default)]
pub struct Template {
    bytes: Vec<u8>,
    slots: Vec<(Slot, usize)>,
}

impl Template {
    /// Appends fixed bytes.
    #[must_use]
    pub fn text(mut self, text: impl AsRef<[u8]>) -> Self {
        self.bytes.extend_from_slice(text.as_ref());
        self
    }

    /// Appends a slot, zeros for now.
    #[must_use]
    pub fn slot(mut self, slot: Slot) -> Self {
        self.slots.push((slot, self.bytes.len()));
        self.bytes.resize(self.bytes.len() + slot.width(), b'0');
        self
    }

    /// Appends another template with its slots.
    #[must_use]
    pub fn template(mut self, other: &Template) -> Self {
        let base = self.bytes.len();
        self.slots.extend(other.slots.iter().map(|&(slot, at)| (slot, base + at)));
        self.bytes.extend_from_slice(&other.bytes);
        self
    }

    /// Overwrites every slot of one kind with a number's last digits.
    pub fn set(&mut self, slot: Slot, value: u64) {
        for &(kind, at) in &self.slots {
            if kind == slot {
                write_digits(&mut self.bytes[at..at + slot.width()], value);
            }
        }
    }

    /// The message.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes of a range, to patch what has no slot (an MQTT packet id).
    pub fn range_mut(&mut self, range: Range<usize>) -> Option<&mut [u8]> {
        self.bytes.get_mut(range)
    }
}

fn write_digits(out: &mut [u8], mut value: u64) {
    for byte in out.iter_mut().rev() {
        *byte = b'0' + u8::try_from(value % 10).unwrap_or(0);
        value /= 10;
    }
}

/// The number in a slot's digits; `None` when they are none.
pub fn read_digits(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits
        .iter()
        .try_fold(0u64, |sum, &b| b.is_ascii_digit().then(|| sum.wrapping_mul(10).wrapping_add(u64::from(b - b'0'))))
}

/// Where `needle` begins in `bytes`.
pub fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|&b| b == first) {
        let at = from + at;
        if bytes.get(at + 1..at + 1 + rest.len()) == Some(rest) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// The unsigned number that follows the first `key` (such as `"turn":`).
pub fn number_after(bytes: &[u8], key: &[u8]) -> Option<u64> {
    let rest = &bytes[find(bytes, key)? + key.len()..];
    let rest = &rest[rest.iter().take_while(|b| **b == b' ').count()..];
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    read_digits(&rest[..digits])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_overwritten_in_place() {
        let tail = Template::default().text("/").slot(Slot::Seq);
        let mut template = Template::default().text("i-").slot(Slot::Instance).template(&tail);
        template.set(Slot::Instance, 42);
        template.set(Slot::Seq, 7);
        assert_eq!(template.bytes(), b"i-0000042/000000007");
        template.set(Slot::Instance, 12_345_678);
        assert_eq!(template.bytes(), b"i-2345678/000000007", "the last digits");
        assert_eq!(template.len(), template.bytes().len());
    }

    #[test]
    fn digits_read_back() {
        assert_eq!(read_digits(b"000000042"), Some(42));
        assert_eq!(read_digits(b""), None);
        assert_eq!(read_digits(b"4x"), None);
    }

    #[test]
    fn a_number_is_found_after_its_key() {
        assert_eq!(number_after(br#"{"turn": 12,"x":1}"#, b"\"turn\":"), Some(12));
        assert_eq!(number_after(br#"{"tturn":1,"turn":3}"#, b"\"turn\":"), Some(3));
        assert_eq!(number_after(b"{}", b"\"turn\":"), None);
        assert_eq!(find(b"aab", b"ab"), Some(1));
        assert_eq!(find(b"a", b"ab"), None);
    }
}
