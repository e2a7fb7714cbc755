//! A stimulus: one durable input to an instance.

use serde::{Deserialize, Serialize};

use super::{Channel, Millis, RawJson, StimulusId};

/// Which door or part of the node a stimulus came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The HTTP door.
    Http,
    /// The MQTT door, embedded or external.
    Mqtt,
    /// A signed webhook.
    Webhook,
    /// A reminder that came due.
    Timer,
    /// Another instance.
    Instance,
}

/// How urgent a stimulus is, most urgent first. Within one priority, arrival order holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// A person waits.
    Human,
    /// A device reports.
    Device,
    /// A clock fired.
    Timer,
    /// Nobody waits.
    Background,
}

impl Priority {
    /// All of them, most urgent first.
    pub const ALL: [Priority; 4] = [Priority::Human, Priority::Device, Priority::Timer, Priority::Background];

    /// What a stimulus from a source has when its sender does not say.
    pub const fn default_for(source: Source) -> Self {
        match source {
            Source::Http => Priority::Human,
            Source::Mqtt => Priority::Device,
            Source::Timer => Priority::Timer,
            Source::Webhook | Source::Instance => Priority::Background,
        }
    }
}

/// Where the sender of an MQTT stimulus wants its reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// The response topic, already checked against the sender's rights.
    pub topic: String,
    /// Correlation data, returned as it came. Absent data must be written too: the stored form knows fields by their place.
    #[serde(default)]
    pub correlation: Option<Vec<u8>>,
}

/// One input to an instance. Serialized with postcard inside [`super::TurnRecord`]: a change of fields is a new record version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stimulus {
    /// Its id, chosen by the sender or generated at the door.
    pub id: StimulusId,
    /// Whether the id must be remembered so that a repeat is recognised: the sender chose it, or it derives from something
    /// the sender repeats. A generated id cannot come twice and is not remembered.
    pub repeatable: bool,
    /// The door it came through.
    pub source: Source,
    /// Where within the instance it arrives.
    pub channel: Channel,
    /// Who sent it, for order and history.
    pub sender: Option<String>,
    /// Its urgency.
    pub priority: Priority,
    /// How much attention it deserves, 0 to 1, when the sender says.
    pub salience: Option<f32>,
    /// Text content.
    pub content: Option<String>,
    /// Structured content.
    pub data: Option<RawJson>,
    /// MIME type of the payload as the sender gave it.
    pub content_type: Option<String>,
    /// Where the reply goes, when the door's own answer is not enough.
    pub reply_to: Option<ReplyTo>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// When the door took it.
    pub accepted_at: Millis,
}

impl Stimulus {
    /// A text stimulus with a generated id and the defaults of its source; doors and tests start from it.
    pub fn text(source: Source, channel: Channel, content: impl Into<String>, now: Millis) -> Self {
        Self { content: Some(content.into()), ..Self::empty(source, channel, now) }
    }

    /// A stimulus without content, with a generated id and the defaults of its source.
    pub fn empty(source: Source, channel: Channel, now: Millis) -> Self {
        Self {
            id: StimulusId::generate(),
            repeatable: false,
            source,
            channel,
            sender: None,
            priority: Priority::default_for(source),
            salience: None,
            content: None,
            data: None,
            content_type: None,
            reply_to: None,
            traceparent: None,
            accepted_at: now,
        }
    }

    /// The same stimulus under an id that must be recognised when it comes again.
    #[must_use]
    pub fn with_repeatable_id(mut self, id: StimulusId) -> Self {
        self.id = id;
        self.repeatable = true;
        self
    }

    /// Roughly how many bytes it occupies, for limits.
    pub fn weight(&self) -> usize {
        self.content.as_ref().map_or(0, String::len) + self.data.as_ref().map_or(0, |d| d.get().len()) + 256
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_response_topic_without_correlation_data_can_be_read_again() {
        for correlation in [None, Some(vec![1, 2])] {
            let mut stimulus =
                Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), "hi", Millis(1_795_237_853_120));
            stimulus.reply_to = Some(ReplyTo { topic: "answers".into(), correlation });
            let bytes = postcard::to_stdvec(&stimulus).unwrap();
            assert_eq!(postcard::from_bytes::<Stimulus>(&bytes).unwrap(), stimulus);
        }
    }
}
