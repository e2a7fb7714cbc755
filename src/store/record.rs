//! Stored forms: the row of a turn, and the blobs of waiting, dead and pending things. Each begins with its version.
//!
//! A turn's `rec` is: version (1 byte), flags (1 byte), turn number (varint), the back links as distances from the row's own
//! position (4 varints, 8 where [`COARSE`] is set, 0 = none), decided-at (8 bytes, little endian), then the record's own
//! versioned form. The flags stand in the column too, where a scan sees them without loading the blob.
//!
//! Not here: the record's form (`types::turn`). Tests: at the foot; `tests/golden/store` holds one of each version.

use serde::{Deserialize, Serialize};

use super::{
    Error, Pending,
    links::{self, LEVELS, LOW, Place},
};
use crate::types::{Effect, InstanceKey, Millis, Reply, Stimulus, StimulusId, TurnRecord};

/// The newest row version.
const ROW_VERSION: u8 = 1;
/// The newest version of a waiting or dead stimulus and of a pending effect.
const BLOB_VERSION: u8 = 1;

/// The versions that are written, for the test that holds them against the cluster's protocol.
#[cfg(test)]
pub(crate) const WRITTEN: [u8; 2] = [ROW_VERSION, BLOB_VERSION];

/// The turn has effects.
pub(crate) const EFFECTS: u8 = 1;
/// The turn has episodes, or forgot some.
pub(crate) const EPISODES: u8 = 1 << 1;
/// The stimulus id is found through the index: it may come again, or it waited in the inbox.
pub(crate) const INDEXED: u8 = 1 << 2;
/// The row holds the coarse links.
pub(crate) const COARSE: u8 = 1 << 3;

/// The head of a turn's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// What the row has.
    pub flags: u8,
    /// Its number and links.
    pub place: Place,
    /// When it was decided.
    pub decided_at: Millis,
}

impl Row {
    /// Whether a flag is set.
    pub(crate) const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The flags of a turn at `place`.
pub(crate) fn flags(record: &TurnRecord, waited: bool) -> u8 {
    let mut flags = 0;
    flags |= if record.effects.is_empty() { 0 } else { EFFECTS };
    flags |= if record.is_memory() { EPISODES } else { 0 };
    flags |= if record.stimulus.repeatable || waited { INDEXED } else { 0 };
    flags | if links::holds_coarse(record.turn) { COARSE } else { 0 }
}

/// The row of a turn at a position, appended to `out`.
///
/// # Errors
/// Only when the record cannot be serialized, which its types rule out.
pub(crate) fn encode(row: &Row, position: i64, record: &TurnRecord, out: Vec<u8>) -> Result<Vec<u8>, Error> {
    let mut out = out;
    out.push(ROW_VERSION);
    out.push(row.flags);
    push_varint(&mut out, row.place.turn);
    let levels = if row.has(COARSE) { LEVELS } else { LOW };
    for link in &row.place.back[..levels] {
        let distance = if *link == 0 { 0 } else { position - link };
        push_varint(&mut out, u64::try_from(distance).unwrap_or(0));
    }
    out.extend_from_slice(&row.decided_at.0.to_le_bytes());
    record.encode(out).map_err(|e| Error::Backend(e.to_string()))
}

/// The head of a stored row, and the bytes of the record.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn decode_row(bytes: &[u8], position: i64) -> Result<(Row, &[u8]), Error> {
    decode_parts(bytes, position).ok_or_else(|| match bytes.first() {
        Some(&version) if version > ROW_VERSION => Error::Corrupt(format!(
            "turn at {position} has row version {version}, this build reads up to {ROW_VERSION}"
        )),
        _ => Error::Corrupt(format!("turn at {position} has a damaged head")),
    })
}

fn decode_parts(bytes: &[u8], position: i64) -> Option<(Row, &[u8])> {
    let (&version, rest) = bytes.split_first()?;
    let (&flags, mut rest) = rest.split_first()?;
    if version != ROW_VERSION {
        return None;
    }
    let turn = take_varint(&mut rest)?;
    let mut back = [0; LEVELS];
    let levels = if flags & COARSE == 0 { LOW } else { LEVELS };
    for link in &mut back[..levels] {
        let distance = i64::try_from(take_varint(&mut rest)?).ok()?;
        *link = if distance == 0 { 0 } else { position.checked_sub(distance)? };
    }
    let (time, record) = rest.split_first_chunk::<8>()?;
    let decided_at = Millis(i64::from_le_bytes(*time));
    (turn > 0).then_some((Row { flags, place: Place { turn, back }, decided_at }, record))
}

/// The record of a row.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn decode_record(bytes: &[u8], position: i64) -> Result<TurnRecord, Error> {
    TurnRecord::decode(bytes).map_err(|e| Error::Corrupt(format!("turn at {position}: {e}")))
}

/// The row without the content of the episodes at these places; `None` when nothing of it is left already.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn redact(bytes: &[u8], position: i64, places: &[usize]) -> Result<Option<Vec<u8>>, Error> {
    let (row, rest) = decode_row(bytes, position)?;
    let mut record = decode_record(rest, position)?;
    if !record.redact(places) {
        return Ok(None);
    }
    encode(&row, position, &record, Vec::with_capacity(bytes.len())).map(Some)
}

fn push_varint(out: &mut Vec<u8>, value: u64) {
    let mut value = value;
    while value >= 0x80 {
        out.push(0x80 | (value & 0x7f) as u8);
        value >>= 7;
    }
    #[allow(clippy::cast_possible_truncation)] // below 0x80
    out.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn encode_blob<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    postcard::to_extend(value, vec![BLOB_VERSION]).map_err(|e| Error::Backend(e.to_string()))
}

fn decode_blob<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, Error> {
    match bytes.split_first() {
        Some((&BLOB_VERSION, rest)) => postcard::from_bytes(rest).map_err(|e| Error::Corrupt(format!("{what}: {e}"))),
        Some((version, _)) => {
            Err(Error::Corrupt(format!("{what} has version {version}, this build reads up to {BLOB_VERSION}")))
        }
        None => Err(Error::Corrupt(format!("{what} is empty"))),
    }
}

/// The stored form of a waiting or dead stimulus.
///
/// # Errors
/// As [`encode`].
pub(crate) fn encode_stimulus(stimulus: &Stimulus) -> Result<Vec<u8>, Error> {
    encode_blob(stimulus)
}

/// Reads the stored form.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn decode_stimulus(bytes: &[u8]) -> Result<Stimulus, Error> {
    decode_blob("a stored stimulus", bytes)
}

/// The stored form of what is pending; key, effect id, tries and due time are columns.
///
/// # Errors
/// As [`encode`].
pub(crate) fn encode_pending(pending: &Pending) -> Result<Vec<u8>, Error> {
    encode_blob(&(&pending.effect, &pending.reply, &pending.stimulus))
}

/// Reads the stored form.
///
/// # Errors
/// [`Error::Corrupt`].
pub(crate) fn decode_pending(
    key: InstanceKey,
    effect_id: String,
    tries: u32,
    due: Millis,
    bytes: &[u8],
) -> Result<Pending, Error> {
    let (effect, reply, stimulus): (Effect, Option<Reply>, StimulusId) = decode_blob("a pending effect", bytes)?;
    Ok(Pending { key, effect_id, effect, reply, stimulus, tries, due })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{
        Channel, EffectKind, EpisodeDraft, InstanceId, Outcome, RawJson, Source, StateChange, TenantId, Usage,
    };

    fn sample(turn: u64) -> TurnRecord {
        let id = StimulusId::new("order-7").unwrap();
        let channel = Channel::new("room/temperature").unwrap();
        let stimulus = Stimulus::text(Source::Mqtt, channel.clone(), "30 °C", Millis(1_795_237_853_000));
        let effect =
            EffectKind::Publish { channel, content: None, data: Some(RawJson::parse("[1]").unwrap()), retain: true };
        TurnRecord {
            turn,
            version: 3,
            stimulus: stimulus.with_repeatable_id(id),
            outcome: Outcome::Replied,
            reply: Some(Reply { content: Some(String::from("fan on")), data: None }),
            effects: vec![Effect { index: 0, kind: effect }],
            state: StateChange::Patch(RawJson::parse(r#"{"reported":{"hot":true}}"#).unwrap()),
            episodes: vec![EpisodeDraft {
                content: String::from("it was hot"),
                data: None,
                tags: vec![String::from("heat")],
                reward: Some(0.5),
                occurred_at: None,
            }],
            steps: 1,
            engine: String::from("reflex"),
            model: None,
            usage: Some(Usage { input_tokens: 3, output_tokens: 4 }),
            error: None,
            decided_at: Millis(1_795_237_853_120),
            epoch: 0,
        }
    }

    fn row(record: &TurnRecord) -> Row {
        let mut back = [0; LEVELS];
        back[..LOW].copy_from_slice(&[4990, 4000, 300, 2]);
        if links::holds_coarse(record.turn) {
            back[LOW] = 1;
        }
        Row { flags: flags(record, false), place: Place { turn: record.turn, back }, decided_at: record.decided_at }
    }

    /// Compares with the file of that version. A new version gets a file of its own; an old file never changes.
    fn golden(name: &str, bytes: &[u8]) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store").join(name);
        let stored =
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; it should hold {bytes:02x?}", path.display()));
        assert_eq!(stored, bytes, "{name}: a stored format changed; old stores could not be read");
    }

    #[test]
    fn stored_forms_are_as_published() {
        let record = sample(7);
        golden("turn-row-1.bin", &encode(&row(&record), 5000, &record, Vec::new()).unwrap());
        let record = sample(8192);
        golden("turn-row-1-coarse.bin", &encode(&row(&record), 5000, &record, Vec::new()).unwrap());
        let record = sample(7);
        golden("stimulus-1.bin", &encode_stimulus(&record.stimulus).unwrap());
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let pending = Pending {
            key: key.clone(),
            effect_id: String::from("7-0"),
            effect: record.effects[0].clone(),
            reply: record.reply.clone(),
            stimulus: record.stimulus.id.clone(),
            tries: 2,
            due: Millis(9),
        };
        let bytes = encode_pending(&pending).unwrap();
        golden("pending-1.bin", &bytes);
        assert_eq!(decode_pending(key, String::from("7-0"), 2, Millis(9), &bytes).unwrap(), pending);
        assert_eq!(decode_stimulus(&encode_stimulus(&record.stimulus).unwrap()).unwrap(), record.stimulus);
    }

    #[test]
    fn a_row_reads_back() {
        for turn in [7, 4096 * 3] {
            let record = sample(turn);
            let bytes = encode(&row(&record), 5000, &record, Vec::new()).unwrap();
            let (head, rest) = decode_row(&bytes, 5000).unwrap();
            assert_eq!(head, row(&record));
            assert_eq!(decode_record(rest, 5000).unwrap(), record);
        }
    }

    #[test]
    fn damage_and_newer_versions_are_told_apart() {
        let record = sample(7);
        let mut bytes = encode(&row(&record), 5000, &record, Vec::new()).unwrap();
        assert!(matches!(decode_row(&bytes[..5], 5000), Err(Error::Corrupt(text)) if text.contains("damaged")));
        bytes[0] = 9;
        assert!(matches!(decode_row(&bytes, 5000), Err(Error::Corrupt(text)) if text.contains("version 9")));
        assert!(matches!(decode_stimulus(&[9, 1]), Err(Error::Corrupt(text)) if text.contains("version 9")));
        assert!(matches!(decode_stimulus(&[]), Err(Error::Corrupt(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((_, rest)) = decode_row(&bytes, 5000) {
                let _ = decode_record(rest, 5000);
            }
            let _ = decode_stimulus(&bytes);
        }

        #[test]
        fn a_varint_reads_back(value in any::<u64>()) {
            let mut out = Vec::new();
            push_varint(&mut out, value);
            prop_assert_eq!(take_varint(&mut out.as_slice()), Some(value));
        }
    }
}
