//! A turn as it is stored: the one record that carries a stimulus, what was decided and what changed.
//!
//! The stored form is one version byte, then postcard. Never change a published version's fields: add a version and a
//! conversion. `tests/golden` holds one record of each version.

use serde::{Deserialize, Serialize};

use super::{Channel, InstanceId, Millis, RawJson, ReplyTo, Stimulus};

/// The newest record version this build writes.
pub const RECORD_VERSION: u8 = 1;

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// There is a reply.
    Replied,
    /// Decided, nothing to say.
    Silent,
    /// It could not be decided; the stimulus is in the dead letters.
    Failed,
}

/// What the instance says to the sender.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Reply {
    /// Text.
    pub content: Option<String>,
    /// Structured answer.
    pub data: Option<RawJson>,
}

/// What a turn asks of the world. Its id within the instance is `TURN-INDEX`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Position within the turn.
    pub index: u32,
    /// What is asked.
    pub kind: EffectKind,
}

/// The kinds of effect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EffectKind {
    /// Send the turn's reply over MQTT, to the response topic or, without one, to `out/reply`.
    Reply {
        /// The response topic of the stimulus.
        to: Option<ReplyTo>,
    },
    /// Publish on `out/{channel}` of the instance.
    Publish {
        /// Below `out/`.
        channel: Channel,
        /// Text.
        content: Option<String>,
        /// Structured payload.
        data: Option<RawJson>,
        /// Keep as the topic's retained value.
        retain: bool,
    },
    /// The twin changed: publish `state/desired` and `state/delta`, retained.
    Twin {
        /// State version.
        version: u64,
        /// The desired state, when it changed.
        desired: Option<RawJson>,
        /// What still differs.
        delta: RawJson,
    },
    /// A stimulus for another instance of the same tenant.
    Send {
        /// The other instance.
        instance: InstanceId,
        /// Its channel there.
        channel: Channel,
        /// Text.
        content: Option<String>,
        /// Structured content.
        data: Option<RawJson>,
    },
    /// A stimulus for this instance, later.
    Remind {
        /// When.
        due: Millis,
        /// Text.
        content: Option<String>,
        /// Structured content.
        data: Option<RawJson>,
    },
    /// An HTTP POST.
    Webhook {
        /// Where to.
        url: String,
        /// The JSON body.
        body: RawJson,
    },
}

/// An experience to remember.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpisodeDraft {
    /// What is remembered.
    pub content: String,
    /// Structured part.
    pub data: Option<RawJson>,
    /// Labels to filter by.
    pub tags: Vec<String>,
    /// How good it was.
    pub reward: Option<f32>,
    /// When it happened, when that is not when it was recorded.
    pub occurred_at: Option<Millis>,
}

/// How a turn changed the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum StateChange {
    /// It did not; the version stays.
    None,
    /// A merge patch (RFC 7396) over `{"desired":…,"reported":…}`.
    Patch(RawJson),
    /// The whole document after the turn: a snapshot from which activation starts.
    Full(RawJson),
}

/// What a model call consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub input_tokens: u64,
    /// Tokens of the answer.
    pub output_tokens: u64,
}

impl Usage {
    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
        }
    }
}

/// Why an answer ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cut {
    /// At the most tokens it may have.
    Length,
    /// By what the model's server lets nobody say.
    Filter,
}

impl Cut {
    /// As servers of models spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Cut::Length => "length",
            Cut::Filter => "content_filter",
        }
    }
}

/// How the error of a turn begins whose answer is not all that was to be said; behind it stands why.
const CUT_SHORT: &str = "the answer was cut short: ";

/// One committed turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TurnRecord {
    /// Its number within the instance, from 1 without gaps.
    pub turn: u64,
    /// State version after it.
    pub version: u64,
    /// What was decided on.
    pub stimulus: Stimulus,
    /// How it ended.
    pub outcome: Outcome,
    /// What was said.
    pub reply: Option<Reply>,
    /// What was asked of the world.
    pub effects: Vec<Effect>,
    /// How the state changed.
    pub state: StateChange,
    /// What was remembered.
    pub episodes: Vec<EpisodeDraft>,
    /// Journaled steps.
    pub steps: u32,
    /// Who decided: `reflex`, `scripted`, `llm`.
    pub engine: String,
    /// The model, when one was asked.
    pub model: Option<String>,
    /// What it consumed.
    pub usage: Option<Usage>,
    /// Why it failed, when it did, or why its answer is cut short.
    pub error: Option<String>,
    /// When it was decided.
    pub decided_at: Millis,
    /// Under which epoch of its shard it was committed; 0 where the store has one owner, and before it was read again. Stored
    /// beside the record, not in it.
    #[serde(skip)]
    pub epoch: u64,
}

/// Why stored bytes are not a turn.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No bytes.
    #[error("empty turn record")]
    Empty,
    /// Written by a newer build.
    #[error("turn record of version {0}, this build reads up to {RECORD_VERSION}: upgrade before opening this store")]
    Newer(u8),
    /// Not what a version says it is.
    #[error("corrupt turn record: {0}")]
    Corrupt(#[from] postcard::Error),
}

/// The engine of a turn whose stimulus shared the thought of an earlier one. Stored with that one's number.
pub const MERGED: &str = "merged";

impl TurnRecord {
    /// Who decided, without what is stored beside it.
    pub fn engine(&self) -> &str {
        self.engine.strip_prefix(MERGED).and_then(|rest| rest.strip_prefix(':')).map_or(&self.engine, |_| MERGED)
    }

    /// Notes that this turn shared the thought of an earlier one.
    pub fn share(&mut self, turn: u64) {
        self.engine = format!("{MERGED}:{turn}");
    }

    /// Notes that the answer was cut short.
    pub fn cut_short(&mut self, cut: Cut) {
        self.error = Some(format!("{CUT_SHORT}{}", cut.as_str()));
    }

    /// Why the answer was cut short, if it was.
    pub fn cut(&self) -> Option<Cut> {
        let why = self.error.as_deref()?.strip_prefix(CUT_SHORT)?;
        [Cut::Length, Cut::Filter].into_iter().find(|cut| cut.as_str() == why)
    }

    /// The turn whose thought this one shared. Builds before did not note it: it is the nearest one before this that is not
    /// merged.
    pub fn decided_with(&self) -> Option<u64> {
        self.engine.strip_prefix(MERGED)?.strip_prefix(':')?.parse().ok()
    }

    /// The stored form, appended to `out`.
    ///
    /// # Errors
    /// Only when a value cannot be serialized, which the types rule out.
    pub fn encode(&self, out: Vec<u8>) -> Result<Vec<u8>, RecordError> {
        let mut out = out;
        out.push(RECORD_VERSION);
        Ok(postcard::to_extend(self, out)?)
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// [`RecordError`] when it is empty, newer than this build, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        match bytes.split_first() {
            None => Err(RecordError::Empty),
            Some((&RECORD_VERSION, rest)) => Ok(postcard::from_bytes(rest)?),
            Some((&version, _)) => Err(RecordError::Newer(version)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_names_what_it_shared_and_why_it_was_cut_short() {
        let stimulus = Stimulus::text(super::super::Source::Http, Channel::new("c").unwrap(), "hi", Millis(0));
        let mut turn = TurnRecord {
            turn: 9,
            version: 0,
            stimulus,
            outcome: Outcome::Silent,
            reply: None,
            effects: vec![],
            state: StateChange::None,
            episodes: vec![],
            steps: 0,
            engine: String::from(MERGED),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(0),
            epoch: 0,
        };
        assert_eq!((turn.engine(), turn.decided_with()), (MERGED, None), "by a build before");
        turn.share(7);
        assert_eq!((turn.engine(), turn.decided_with()), (MERGED, Some(7)));
        assert_eq!(turn.cut(), None);
        for cut in [Cut::Length, Cut::Filter] {
            turn.cut_short(cut);
            assert_eq!(turn.cut(), Some(cut));
        }
        for engine in ["llm", "mergedx", "mergers:7"] {
            turn.engine = String::from(engine);
            assert_eq!((turn.engine(), turn.decided_with()), (engine, None));
        }
    }
}
