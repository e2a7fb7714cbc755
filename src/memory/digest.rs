//! What a turn amounts to for a shelf: words, vectors, tags and short texts of its episodes, and what it forgot.
//!
//! A function of the record alone, so a digest may be stored and followed later in place of its turn (`part`). Not here: how
//! episodes relate to others, which is for the shelf that follows. Tests: `shelf/tests.rs`, `part.rs`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::lexical;
use crate::{
    store::rank,
    types::{
        EpisodeDraft, EpisodeId, TurnRecord,
        id::stable_hash,
        memory::{Extra, Vector},
        words,
    },
};

/// Below so many words of meaning an episode without data is junk.
const MEANING: usize = 2;
/// Texts, data included, are held up to so many bytes; longer ones are read from the log when they are found.
const MAX_HELD: usize = 2048;

/// A turn that changed what is remembered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Digest<'a> {
    /// Its number.
    pub turn: u64,
    /// When it was decided.
    pub at: i64,
    /// Its episodes by place; nothing of those that were forgotten.
    #[serde(borrow)]
    pub traces: Vec<Option<Trace<'a>>>,
    /// Vectors it brought for earlier episodes.
    #[serde(borrow)]
    pub late: Vec<Late<'a>>,
    /// Runs of episodes it forgot.
    pub forgot: Vec<(u64, u64)>,
}

/// An episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trace<'a> {
    pub occurred_at: Option<i64>,
    pub reward: Option<f32>,
    #[serde(borrow)]
    pub tags: Vec<&'a str>,
    /// The hashes of its words and how often each is said.
    pub words: Vec<(u64, u16)>,
    /// How many words it has.
    pub length: u32,
    /// The hash of its words in their order.
    pub same: u64,
    pub junk: bool,
    /// Of the built-in embedder, where it is on: the coarse plane.
    #[serde(borrow)]
    pub lexical: Option<Planes<'a>>,
    /// Of the client's or a model's: both planes.
    #[serde(borrow)]
    pub given: Option<Planes<'a>>,
    pub supersedes: Vec<u64>,
    /// The hash of the line of an import it came from.
    pub line: Option<u64>,
    #[serde(borrow)]
    pub text: Option<Text<'a>>,
}

/// Content and data of an episode.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Text<'a> {
    pub content: &'a str,
    pub data: Option<&'a str>,
}

/// A vector for an earlier episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Late<'a> {
    /// Whose.
    pub of: u64,
    /// Where it stands in this turn.
    pub place: u32,
    /// Nothing where the model had none.
    #[serde(borrow)]
    pub given: Option<Planes<'a>>,
}

/// A vector as bytes: one plane, or one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Planes<'a> {
    pub scale: f32,
    #[serde(borrow, with = "bytes")]
    pub planes: Cow<'a, [u8]>,
}

pub(super) mod bytes {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer, Serializer};

    #[allow(clippy::ptr_arg)] // what serde hands over
    pub(in super::super) fn serialize<S: Serializer>(bytes: &Cow<'_, [u8]>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Cow<'de, [u8]>, D::Error> {
        <&'de [u8]>::deserialize(deserializer).map(Cow::Borrowed)
    }
}

impl Planes<'_> {
    fn coarse(vector: &Vector) -> Planes<'static> {
        let planes: Vec<u8> = vector.high.iter().map(|n| n.cast_unsigned()).collect();
        Planes { scale: vector.scale, planes: planes.into() }
    }

    fn both(vector: &Vector) -> Planes<'static> {
        let planes: Vec<u8> = vector.high.iter().chain(&vector.low).map(|n| n.cast_unsigned()).collect();
        Planes { scale: vector.scale, planes: planes.into() }
    }

    /// The bytes as numbers.
    pub(crate) fn numbers(&self) -> &[i8] {
        numbers(&self.planes)
    }
}

/// Bytes as numbers, without copying them.
pub(super) fn numbers(bytes: &[u8]) -> &[i8] {
    pulp::bytemuck::cast_slice(bytes)
}

impl<'a> Digest<'a> {
    /// Of a record; with the vectors of the built-in embedder, or without.
    pub(crate) fn of(record: &'a TurnRecord, lexical: bool) -> Self {
        let mut extras = record.extras().into_iter();
        let late = if record.is_marked() {
            (0..).zip(extras.by_ref()).filter_map(|(place, extra)| late(place, &extra)).collect()
        } else {
            Vec::new()
        };
        let traces = record.episodes.iter().map(|draft| trace(draft, &extras.next().unwrap_or_default(), lexical));
        Self {
            turn: record.turn,
            at: record.decided_at.0,
            traces: traces.collect(),
            late,
            forgot: record.forgotten().runs.iter().map(|(first, last)| (first.0, last.0)).collect(),
        }
    }

    /// The episodes it forgot. A run stays within its turn.
    pub(crate) fn forgotten(&self) -> impl Iterator<Item = EpisodeId> {
        let within = |(first, last): &&(u64, u64)| first <= last && EpisodeId(*first).turn() == EpisodeId(*last).turn();
        self.forgot.iter().filter(within).flat_map(|(first, last)| (*first..=*last).map(EpisodeId))
    }
}

fn late(place: u32, extra: &Extra) -> Option<Late<'static>> {
    Some(Late { of: extra.of?.0, place, given: extra.embedding.as_ref().map(Planes::both) })
}

fn trace<'a>(draft: &'a EpisodeDraft, extra: &Extra, lexical: bool) -> Option<Trace<'a>> {
    if draft.is_blank() {
        return None;
    }
    let (counts, length) = rank::count_words(&draft.content, &draft.tags);
    let mut words: Vec<(u64, u16)> = counts
        .iter()
        .map(|(word, count)| (stable_hash(word.bytes()), u16::try_from(*count).unwrap_or(u16::MAX)))
        .collect();
    words.sort_unstable();
    let meaning = words::words(&draft.content).filter(|word| !words::is_filler(word)).take(MEANING).count();
    let lexical = if lexical { lexical::embed(&draft.content) } else { None };
    let data = draft.data.as_ref().map(crate::types::RawJson::get);
    let held = draft.content.len() + data.map_or(0, str::len) <= MAX_HELD;
    Some(Trace {
        occurred_at: draft.occurred_at.map(|at| at.0),
        reward: draft.reward,
        tags: draft.tags.iter().map(String::as_str).collect(),
        words,
        length,
        same: same(&draft.content, data),
        junk: meaning < MEANING && data.is_none(),
        lexical: lexical.as_ref().map(Planes::coarse),
        given: extra.embedding.as_ref().map(Planes::both),
        supersedes: extra.supersedes.iter().map(|id| id.0).collect(),
        line: extra.line.as_ref().map(|line| stable_hash(line.bytes())),
        text: held.then_some(Text { content: &draft.content, data }),
    })
}

/// What tells the same has the same: its words in their order, or all of it where there are none.
fn same(content: &str, data: Option<&str>) -> u64 {
    let mut any = false;
    let hash = words::words(content).fold(0u64, |hash, word| {
        any = true;
        hash.rotate_left(9) ^ stable_hash(word.bytes())
    });
    if any { hash } else { stable_hash(content.bytes().chain(data.unwrap_or_default().bytes())) }
}
