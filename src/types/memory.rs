//! Changes of an instance's memory as stimuli, and what a turn keeps of them.
//!
//! Who writes or forgets through the API sends a stimulus on a channel of its own; the turn that decides it is silent. Its record
//! keeps what was remembered where every turn does (`episodes`), and what has no place there (vectors, what is superseded, the
//! line an import took it from) as the stimulus' data. What is forgotten is named there too: the log tells the whole history
//! of a memory, and no content that is gone.
//!
//! Not here: who may send them (`gateway`), what is done with them (`instance::turn`, `store`, `memory`).
//! Invariants: only [`Source::Http`] makes a stimulus one of these, and that door lets nobody choose their channels; an
//! episode's id is its turn and its place in it. Tests: at the foot.

use std::{borrow::Cow, fmt, str::FromStr};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{EpisodeDraft, Millis, RawJson, Source, Stimulus, TurnRecord};

/// The channel of stimuli that write episodes.
pub const WRITE_CHANNEL: &str = "memory/write";
/// The channel of stimuli that forget episodes.
pub const FORGET_CHANNEL: &str = "memory/forget";
/// The channel of stimuli that bring vectors of a model for episodes that are there.
pub const EMBED_CHANNEL: &str = "memory/embed";
/// Who decides such a stimulus, for the record.
pub const ENGINE: &str = "memory";

/// Bits of an episode's number that say its place within its turn.
const PLACE_BITS: u32 = 16;

/// An episode within its instance: the turn that recorded it, and its place there. Numbers are below 2^53 for the first 2^37
/// turns. Outside it is written `TURN-PLACE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EpisodeId(pub u64);

impl EpisodeId {
    /// The episode at a place of a turn.
    pub fn new(turn: u64, place: usize) -> Self {
        let place = u64::try_from(place).unwrap_or(u64::MAX).min((1 << PLACE_BITS) - 1);
        Self((turn << PLACE_BITS) | place)
    }

    /// The turn.
    pub const fn turn(self) -> u64 {
        self.0 >> PLACE_BITS
    }

    /// The place.
    pub const fn place(self) -> usize {
        (self.0 & ((1 << PLACE_BITS) - 1)) as usize
    }

    /// Stands for a turn that forgot something, where turns are found by their episodes.
    pub const fn marker(turn: u64) -> Self {
        Self((turn << PLACE_BITS) | ((1 << PLACE_BITS) - 1))
    }

    /// Whether it is a [`EpisodeId::marker`].
    pub const fn is_marker(self) -> bool {
        self.place() == (1 << PLACE_BITS) - 1
    }
}

impl fmt::Display for EpisodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.turn(), self.place())
    }
}

/// A text that names no episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an episode's id is TURN-PLACE, as in 12-0")]
pub struct NoEpisode;

impl FromStr for EpisodeId {
    type Err = NoEpisode;
    fn from_str(text: &str) -> Result<Self, NoEpisode> {
        let (turn, place) = text.split_once('-').ok_or(NoEpisode)?;
        let turn: u64 = turn.parse().map_err(|_| NoEpisode)?;
        let place: u16 = place.parse().map_err(|_| NoEpisode)?;
        let known = turn > 0 && turn < 1 << 47 && place < u16::MAX;
        if known { Ok(Self::new(turn, place.into())) } else { Err(NoEpisode) }
    }
}

impl Serialize for EpisodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EpisodeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A unit vector in 16 bits for each number, as two planes of bytes: the coarse one orders, both together are exact to about
/// one part in thirty thousand of the largest number.
#[derive(Debug, Clone, PartialEq)]
pub struct Vector {
    /// What one step of the coarse plane is worth.
    pub scale: f32,
    /// The coarse plane.
    pub high: Box<[i8]>,
    /// What the coarse plane leaves, in steps of `scale / 254`.
    pub low: Box<[i8]>,
}

impl Vector {
    /// Of these numbers, made one long. `None` when they have no direction: none of them, only zeros, or one that is no number.
    pub fn of(numbers: &[f32]) -> Option<Self> {
        let length = numbers.iter().map(|n| f64::from(*n) * f64::from(*n)).sum::<f64>().sqrt();
        if !length.is_finite() || length <= f64::from(f32::MIN_POSITIVE) {
            return None;
        }
        #[allow(clippy::cast_possible_truncation)] // between -1 and 1
        let unit: Vec<f32> = numbers.iter().map(|n| (f64::from(*n) / length) as f32).collect();
        let scale = unit.iter().fold(0f32, |most, n| most.max(n.abs())) / 127.0;
        #[allow(clippy::cast_possible_truncation)] // between -127 and 127
        let planes = unit.iter().map(|n| {
            let steps = n / scale;
            let coarse = steps.round();
            (coarse as i8, ((steps - coarse) * 254.0).round() as i8)
        });
        let (high, low): (Vec<i8>, Vec<i8>) = planes.unzip();
        Some(Self { scale, high: high.into(), low: low.into() })
    }

    /// How many numbers.
    pub fn dimension(&self) -> usize {
        self.high.len()
    }

    /// The numbers.
    pub fn numbers(&self) -> impl Iterator<Item = f32> + '_ {
        self.high.iter().zip(&self.low).map(|(high, low)| self.scale * (f32::from(*high) + f32::from(*low) / 254.0))
    }
}

impl Serialize for Vector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = self.scale.to_le_bytes().to_vec();
        bytes.extend(self.high.iter().chain(&self.low).map(|n| n.cast_unsigned()));
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Vector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let bytes = BASE64_STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)?;
        let Some((scale, planes)) = bytes.split_first_chunk::<4>().filter(|(_, planes)| planes.len().is_multiple_of(2))
        else {
            return Err(D::Error::custom("not a vector"));
        };
        let planes: Vec<i8> = planes.iter().map(|byte| byte.cast_signed()).collect();
        let (high, low) = planes.split_at(planes.len() / 2);
        Ok(Self { scale: f32::from_le_bytes(*scale), high: high.into(), low: low.into() })
    }
}

/// What an episode carries beside its draft. All of it may be absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Extra {
    /// What it looks like to a model, as the client said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Vector>,
    /// Episodes that hold no longer since this one does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supersedes: Vec<EpisodeId>,
    /// The line of an import it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<String>,
    /// The episode all this is about, where it is an earlier turn's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<EpisodeId>,
}

/// An episode on its way to the instance that shall remember it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// What is remembered.
    pub content: String,
    /// Structured part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<RawJson>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// How good it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<f32>,
    /// When it happened, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub occurred_at: Option<i64>,
    /// What else it carries.
    #[serde(default)]
    pub extra: Extra,
}

impl Written {
    fn split(self) -> (EpisodeDraft, Extra) {
        let Self { content, data, tags, reward, occurred_at, extra } = self;
        (EpisodeDraft { content, data, tags, reward, occurred_at: occurred_at.map(Millis) }, extra)
    }
}

/// The data of a stimulus that writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Writing {
    /// What is to be remembered, in the order of their places.
    pub episodes: Vec<Written>,
}

/// What the record of such a turn keeps as the data of its stimulus; and what a stimulus that embeds brings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// By place.
    #[serde(default)]
    pub extras: Vec<Extra>,
}

/// The data of a stimulus that forgets: runs of episodes, first and last. It stands in the record as it came.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Forgetting {
    /// The runs.
    pub runs: Vec<(EpisodeId, EpisodeId)>,
}

impl Forgetting {
    /// The runs of these episodes, which are in order and each there once.
    pub fn of(ids: &[EpisodeId]) -> Self {
        let mut runs: Vec<(EpisodeId, EpisodeId)> = Vec::new();
        for &id in ids {
            match runs.last_mut() {
                Some((_, last)) if last.0 + 1 == id.0 && last.turn() == id.turn() => *last = id,
                _ => runs.push((id, id)),
            }
        }
        Self { runs }
    }

    /// The episodes. A run stays within its turn, so what is named is bounded by what the stimulus may weigh.
    pub fn ids(&self) -> impl Iterator<Item = EpisodeId> + '_ {
        let within = self.runs.iter().filter(|(first, last)| first <= last && first.turn() == last.turn());
        within.flat_map(|(first, last)| (first.0..=last.0).map(EpisodeId))
    }
}

/// Whether a stimulus writes to the memory.
pub fn writes(stimulus: &Stimulus) -> bool {
    stimulus.source == Source::Http && stimulus.channel.as_str() == WRITE_CHANNEL
}

/// Whether a stimulus forgets.
pub fn forgets(stimulus: &Stimulus) -> bool {
    stimulus.source == Source::Http && stimulus.channel.as_str() == FORGET_CHANNEL
}

/// Whether a stimulus brings vectors.
pub fn embeds(stimulus: &Stimulus) -> bool {
    stimulus.source == Source::Http && stimulus.channel.as_str() == EMBED_CHANNEL
}

/// Whether a stimulus changes the memory in any way.
pub fn changes(stimulus: &Stimulus) -> bool {
    writes(stimulus) || forgets(stimulus) || embeds(stimulus)
}

/// What a stimulus that writes asks to be remembered, and the data its record keeps.
///
/// # Errors
/// The parser's words.
pub fn read_writing(stimulus: &Stimulus) -> Result<(Vec<EpisodeDraft>, Option<RawJson>), serde_json::Error> {
    let text = stimulus.data.as_ref().map_or("null", RawJson::get);
    let writing: Writing = serde_json::from_str(text)?;
    let (drafts, extras): (Vec<_>, Vec<_>) = writing.episodes.into_iter().map(Written::split).unzip();
    let plain = extras.iter().all(|extra| *extra == Extra::default());
    let kept = if plain { None } else { Some(RawJson::from_serialize(&Kept { extras })?) };
    Ok((drafts, kept))
}

/// What a stimulus that forgets names.
///
/// # Errors
/// The parser's words.
pub fn read_forgetting(stimulus: &Stimulus) -> Result<Forgetting, serde_json::Error> {
    serde_json::from_str(stimulus.data.as_ref().map_or("null", RawJson::get))
}

/// What a stimulus that embeds brings.
///
/// # Errors
/// The parser's words.
pub fn read_embedding(stimulus: &Stimulus) -> Result<Kept, serde_json::Error> {
    serde_json::from_str(stimulus.data.as_ref().map_or("null", RawJson::get))
}

impl EpisodeDraft {
    /// What is left of a draft whose content was forgotten: its place.
    pub const fn blank() -> Self {
        Self { content: String::new(), data: None, tags: Vec::new(), reward: None, occurred_at: None }
    }

    /// Whether nothing but the place is left.
    pub fn is_blank(&self) -> bool {
        *self == Self::blank()
    }
}

impl TurnRecord {
    /// The episodes the turn forgot.
    pub fn forgotten(&self) -> Forgetting {
        if self.engine != ENGINE || !forgets(&self.stimulus) {
            return Forgetting::default();
        }
        read_forgetting(&self.stimulus).unwrap_or_default()
    }

    /// Whether the turn changed what the instance remembers.
    pub fn is_memory(&self) -> bool {
        !self.episodes.is_empty() || (self.engine == ENGINE && changes(&self.stimulus))
    }

    /// Whether the turn changed the memory and is not found by an episode of its own, but by its [`EpisodeId::marker`].
    pub fn is_marked(&self) -> bool {
        self.episodes.is_empty() && self.is_memory()
    }

    /// What its episodes carry beside their drafts, by place; fewer than there are places when the rest carries nothing.
    pub fn extras(&self) -> Vec<Extra> {
        if self.engine != ENGINE || !(writes(&self.stimulus) || embeds(&self.stimulus)) {
            return Vec::new();
        }
        let kept = self.stimulus.data.as_ref().and_then(|data| serde_json::from_str::<Kept>(data.get()).ok());
        kept.unwrap_or_default().extras
    }

    /// Takes the content of episodes out of the record; whether anything was there.
    pub fn redact(&mut self, places: &[usize]) -> bool {
        let mut changed = false;
        let mut extras = self.extras();
        for &place in places {
            if let Some(draft) = self.episodes.get_mut(place)
                && !draft.is_blank()
            {
                *draft = EpisodeDraft::blank();
                changed = true;
            }
            if let Some(extra) = extras.get_mut(place)
                && *extra != Extra::default()
            {
                *extra = Extra::default();
                changed = true;
            }
        }
        if changed && !extras.is_empty() {
            let plain = extras.iter().all(|extra| *extra == Extra::default());
            self.stimulus.data = if plain { None } else { RawJson::from_serialize(&Kept { extras }).ok() };
        }
        changed
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Outcome, StateChange};

    fn stimulus(channel: &str, data: &impl Serialize) -> Stimulus {
        let mut stimulus = Stimulus::empty(Source::Http, Channel::new(channel).unwrap(), Millis(5));
        stimulus.data = Some(RawJson::from_serialize(data).unwrap());
        stimulus
    }

    fn record(stimulus: Stimulus, episodes: Vec<EpisodeDraft>) -> TurnRecord {
        TurnRecord {
            turn: 3,
            version: 0,
            stimulus,
            outcome: Outcome::Silent,
            reply: None,
            effects: Vec::new(),
            state: StateChange::None,
            episodes,
            steps: 0,
            engine: String::from(ENGINE),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(6),
            epoch: 0,
        }
    }

    fn written(content: &str, extra: Extra) -> Written {
        Written { content: content.into(), data: None, tags: Vec::new(), reward: None, occurred_at: Some(4), extra }
    }

    #[test]
    fn an_id_reads_back_and_others_are_refused() {
        let id = EpisodeId::new(12, 3);
        assert_eq!((id.to_string().as_str(), id.turn(), id.place()), ("12-3", 12, 3));
        assert_eq!("12-3".parse(), Ok(id));
        assert!(EpisodeId::marker(12).is_marker() && EpisodeId::marker(12).turn() == 12);
        for bad in ["", "12", "12-", "-1", "0-1", "a-1", "1-65535", "1-70000", "999999999999999-1", "1-1-1"] {
            assert!(bad.parse::<EpisodeId>().is_err(), "{bad}");
        }
    }

    /// What turns keep as the data of their stimuli. A file never changes: old turns are read for ever.
    fn golden<T: Serialize + serde::de::DeserializeOwned + PartialEq + fmt::Debug>(name: &str, value: &T) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/memory").join(name);
        let stored = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(serde_json::to_string(value).unwrap(), stored, "{name}");
        assert_eq!(serde_json::from_str::<T>(&stored).unwrap(), *value, "{name}");
    }

    #[test]
    fn what_turns_keep_is_as_published() {
        let embedding = Vector::of(&[1.0]);
        let line = Some(String::from("l-1"));
        let extra =
            Extra { embedding: embedding.clone(), supersedes: vec![EpisodeId::new(1, 0)], line, ..Extra::default() };
        let tea = Written {
            content: "tea".into(),
            data: Some(RawJson::parse(r#"{"a":1}"#).unwrap()),
            tags: vec!["drinks".into()],
            reward: Some(0.5),
            occurred_at: Some(4),
            extra: extra.clone(),
        };
        let plain = Written {
            content: "plain".into(),
            data: None,
            tags: Vec::new(),
            reward: None,
            occurred_at: None,
            extra: Extra::default(),
        };
        golden("writing-1.json", &Writing { episodes: vec![tea, plain] });
        golden("kept-1.json", &Kept { extras: vec![extra, Extra::default()] });
        let of = |place| Some(EpisodeId::new(3, place));
        let with = Extra { embedding, of: of(2), ..Extra::default() };
        golden("embedding-1.json", &Kept { extras: vec![with, Extra { of: of(3), ..Extra::default() }] });
        let ids = [EpisodeId::new(3, 0), EpisodeId::new(3, 1), EpisodeId::new(4, 5)];
        golden("forgetting-1.json", &Forgetting::of(&ids));
    }

    #[test]
    fn a_vector_keeps_its_direction() {
        let numbers: Vec<f32> = (0..300).map(|n| ((n * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let vector = Vector::of(&numbers).unwrap();
        let text = serde_json::to_string(&vector).unwrap();
        assert_eq!(serde_json::from_str::<Vector>(&text).unwrap(), vector);
        let length = numbers.iter().map(|n| n * n).sum::<f32>().sqrt();
        for (is, was) in vector.numbers().zip(&numbers) {
            assert!((is - was / length).abs() < 1e-5, "{is} {was}");
        }
        for none in [&[][..], &[0.0, 0.0], &[f32::NAN, 1.0], &[f32::INFINITY]] {
            assert_eq!(Vector::of(none), None, "{none:?}");
        }
        assert!(serde_json::from_str::<Vector>("\"AAAA\"").is_err());
    }

    #[test]
    fn what_is_written_is_kept_once() {
        let extra =
            Extra { embedding: Vector::of(&[1.0, 2.0]), supersedes: vec![EpisodeId::new(1, 0)], ..Extra::default() };
        let writing = Writing { episodes: vec![written("a", Extra::default()), written("b", extra.clone())] };
        let stimulus = stimulus(WRITE_CHANNEL, &writing);
        let (drafts, kept) = read_writing(&stimulus).unwrap();
        assert_eq!(drafts.iter().map(|d| d.content.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(!kept.as_ref().unwrap().get().contains("\"a\""));
        let mut record = record(Stimulus { data: kept, ..stimulus }, drafts);
        assert_eq!(record.extras(), [Extra::default(), extra]);
        assert!(record.redact(&[1]));
        assert!(record.episodes[1].is_blank() && !record.episodes[0].is_blank());
        assert_eq!((record.extras(), record.stimulus.data.clone()), (Vec::new(), None));
        assert!(!record.redact(&[1, 7]), "nothing is left to take");
    }

    #[test]
    fn what_is_forgotten_is_named_in_runs() {
        let ids = [EpisodeId::new(3, 0), EpisodeId::new(3, 1), EpisodeId::new(3, 4), EpisodeId::new(4, 5)];
        let forgetting = Forgetting::of(&ids);
        assert_eq!(forgetting.runs.len(), 3);
        let stimulus = stimulus(FORGET_CHANNEL, &forgetting);
        assert_eq!(stimulus.data.as_ref().unwrap().get(), r#"{"runs":[["3-0","3-1"],["3-4","3-4"],["4-5","4-5"]]}"#);
        let record = record(stimulus.clone(), Vec::new());
        assert_eq!(record.forgotten().ids().collect::<Vec<_>>(), ids);
        assert!(record.is_memory());
        let other = TurnRecord { engine: String::from("reflex"), ..record };
        assert!(other.forgotten().runs.is_empty() && !other.is_memory(), "another build took it for something else");
        let mqtt = Stimulus { source: Source::Mqtt, ..stimulus };
        assert!(!forgets(&mqtt) && !writes(&mqtt));
    }
}
