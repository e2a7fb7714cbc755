//! What a turn is asked to do: the common word of rules, engines and tools, which do not know each other.
//!
//! Not here: what becomes of it (`instance::turn` makes one record of all), and how a rule or a tool comes to it.

use serde::{Deserialize, Serialize};

use super::{Channel, EpisodeDraft, InstanceId, Millis, RawJson, Reply};

/// A decision's building block. Rules, engines and tools yield these; `instance::turn` turns them into one record. As JSON it
/// stands in the journal of a turn under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Answer the sender. A later reply in the same turn replaces an earlier one.
    Reply(Reply),
    /// Publish below `out/`.
    Publish {
        /// Channel below `out/`.
        channel: Channel,
        /// Text.
        content: Option<String>,
        /// Structured payload.
        data: Option<RawJson>,
        /// Keep as retained value.
        retain: bool,
    },
    /// A stimulus for another instance of the tenant.
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
    /// A merge patch over `{"desired":…,"reported":…}`.
    Set(serde_json::Value),
    /// Remember an episode.
    Remember(EpisodeDraft),
    /// A stimulus for oneself, later.
    Remind {
        /// When.
        due: Millis,
        /// Text.
        content: Option<String>,
        /// Structured content.
        data: Option<RawJson>,
    },
    /// An HTTP POST to an allowed host.
    Webhook {
        /// Where to.
        url: String,
        /// JSON body.
        body: RawJson,
    },
}
