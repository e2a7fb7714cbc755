//! What the broker keeps in the store: sessions, queued messages and retained values as versioned bytes.
//!
//! A record is one version byte, then postcard. Never change a published version's fields: add a version and a conversion.
//! Not here: when a record is written (`registry`, `session`). Tests: at the foot, with one golden record of each kind.

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::types::Millis;

/// The newest version this build writes.
pub(crate) const VERSION: u8 = 1;

/// A message as it travels and as it is stored. Shared by all its receivers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Message {
    /// Topic name.
    pub topic: String,
    /// Payload.
    pub payload: Bytes,
    /// QoS it was published with, 0 to 2.
    pub qos: u8,
    /// Whether it was published as a retained value.
    pub retain: bool,
    /// Payload format indicator.
    pub is_utf8: bool,
    /// MIME type.
    pub content_type: Option<String>,
    /// Where an answer goes.
    pub response_topic: Option<String>,
    /// Returned with an answer.
    pub correlation: Option<Bytes>,
    /// User properties, in order.
    pub properties: Vec<(String, String)>,
    /// When it is worth nothing any more.
    pub expires_at: Option<Millis>,
}

impl Message {
    /// Roughly how many bytes it occupies.
    pub fn weight(&self) -> usize {
        let properties: usize = self.properties.iter().map(|(name, value)| name.len() + value.len() + 48).sum();
        self.topic.len() + self.payload.len() + properties + 200
    }

    /// Whether it is worth nothing any more.
    pub fn is_expired(&self, now: Millis) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// One subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// The filter, with its `$share` prefix.
    pub filter: String,
    /// Highest QoS it is served with.
    pub qos: u8,
    /// Do not send it what the same client published.
    pub no_local: bool,
    /// Keep the retain flag as it was published.
    pub retain_as_published: bool,
    /// Subscription identifier.
    pub id: Option<u32>,
}

/// A will, and the delay after which it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Will {
    /// What is published.
    pub message: Message,
    /// Seconds between the end of the connection and the publish.
    pub delay_seconds: u32,
}

/// A session that outlives its connection, or one with a will.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Tells this session from earlier ones under the same client id.
    pub uid: u64,
    /// Number of connections so far.
    pub epoch: u64,
    /// Life after a disconnect, in seconds; 0 for a session that ends with its connection.
    pub expiry_seconds: u32,
    /// When its connection ended; `None` while connected.
    pub disconnected_at: Option<Millis>,
    /// Who its wills and stimuli come from.
    pub sender: String,
    /// Subscriptions.
    pub subscriptions: Vec<Subscription>,
    /// The will in force.
    pub will: Option<Will>,
}

/// A message waiting for a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Queued {
    /// To be published.
    Publish {
        /// What.
        message: Box<Message>,
        /// QoS it is sent with.
        qos: u8,
        /// The retain flag it is sent with.
        retain: bool,
        /// Subscription identifiers.
        ids: Vec<u32>,
    },
    /// QoS 2: the receiver has it (PUBREC), its release (PUBREL) is not confirmed.
    Release,
}

/// Why stored bytes are no record.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No bytes.
    #[error("empty MQTT record")]
    Empty,
    /// Written by a newer build.
    #[error("MQTT record of version {0}, this build reads up to {VERSION}: upgrade before opening this store")]
    Newer(u8),
    /// Not what a version says it is.
    #[error("corrupt MQTT record: {0}")]
    Corrupt(#[from] postcard::Error),
}

/// The stored form.
///
/// # Errors
/// Only when a value cannot be serialized, which the types rule out.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, Error> {
    Ok(Bytes::from(postcard::to_extend(value, vec![VERSION])?))
}

/// Reads the stored form.
///
/// # Errors
/// [`Error`] when it is empty, newer than this build, or damaged.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    match bytes.split_first() {
        None => Err(Error::Empty),
        Some((&VERSION, rest)) => Ok(postcard::from_bytes(rest)?),
        Some((&version, _)) => Err(Error::Newer(version)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> Message {
        Message {
            topic: "a/b".into(),
            payload: Bytes::from_static(b"hi"),
            qos: 1,
            retain: true,
            is_utf8: true,
            content_type: Some("text/plain".into()),
            response_topic: None,
            correlation: Some(Bytes::from_static(&[1, 2])),
            properties: vec![("k".into(), "v".into())],
            expires_at: Some(Millis(1_795_237_853_120)),
        }
    }

    fn session() -> Session {
        Session {
            uid: 7,
            epoch: 3,
            expiry_seconds: 60,
            disconnected_at: None,
            sender: "lamp".into(),
            subscriptions: vec![Subscription {
                filter: "$share/g/a/#".into(),
                qos: 2,
                no_local: false,
                retain_as_published: true,
                id: Some(5),
            }],
            will: Some(Will { message: Message { topic: "w".into(), ..Message::default() }, delay_seconds: 9 }),
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A change here means stores in the field cannot be read: add a version instead.
    #[test]
    fn golden_records_never_change() {
        let queued = Queued::Publish { message: Box::new(message()), qos: 1, retain: false, ids: vec![5] };
        for (bytes, golden) in [
            (encode(&message()).unwrap(), GOLDEN_MESSAGE),
            (encode(&session()).unwrap(), GOLDEN_SESSION),
            (encode(&queued).unwrap(), GOLDEN_QUEUED),
            (encode(&Queued::Release).unwrap(), "0101"),
        ] {
            assert_eq!(hex(&bytes), golden);
        }
    }
    const GOLDEN_MESSAGE: &str = "0103612f62026869010101010a746578742f706c61696e000102010201016b01760180df9dc8bf68";
    const GOLDEN_SESSION: &str = "0107033c00046c616d70010c2473686172652f672f612f23020001010501017700000000000000000009";
    const GOLDEN_QUEUED: &str =
        "010003612f62026869010101010a746578742f706c61696e000102010201016b01760180df9dc8bf6801000105";

    #[test]
    fn records_come_back_as_they_were_and_others_are_refused() {
        assert_eq!(decode::<Message>(&encode(&message()).unwrap()).unwrap(), message());
        assert_eq!(decode::<Session>(&encode(&session()).unwrap()).unwrap(), session());
        assert!(matches!(decode::<Message>(&[]), Err(Error::Empty)));
        assert!(matches!(decode::<Message>(&[9, 1]), Err(Error::Newer(9))));
        assert!(matches!(decode::<Session>(&[1, 1]), Err(Error::Corrupt(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = (decode::<Message>(&bytes), decode::<Session>(&bytes), decode::<Queued>(&bytes));
        }
    }
}
