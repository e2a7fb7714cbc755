//! What the embedded brokers of a cluster say to each other over the bus: hints, and messages for sessions that do not last.
//!
//! A note is one version byte, then postcard. Never change a published version's fields: add a version. Nothing here is the
//! only copy of anything that was acknowledged for a lasting session. Tests: at the foot.

use serde::{Deserialize, Serialize};

use crate::{
    gateway::mqtt::record::{self, Message},
    types::{Millis, StimulusId, TenantId},
};

/// What [`crate::cluster::bus::message::Relay::kind`] says.
pub const KIND: &str = "mqtt";

/// One note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Note {
    /// The sender lives; `told` is the number of its last [`Note::Wants`].
    Here {
        /// Of its last change.
        told: u64,
    },
    /// Say all that your sessions want.
    TellAll,
    /// What sessions that do not last subscribe to at the sender, or no longer.
    Wants {
        /// Number of this change; they follow each other without gaps.
        told: u64,
        /// Whether it begins anew: what was told before is void.
        anew: bool,
        /// Tenant, filter, whether it is wanted.
        changes: Vec<(TenantId, String, bool)>,
    },
    /// Rows of sessions changed: look, and answer when you have, and have heard all wants up to `told`.
    Look {
        /// What [`Note::Looked`] repeats; 0 when no answer is wanted.
        call: u64,
        /// As in [`Note::Here`].
        told: u64,
    },
    /// The answer to [`Note::Look`].
    Looked {
        /// Which.
        call: u64,
    },
    /// There is mail for sessions the receiver has.
    Mail,
    /// A message for sessions at the receiver.
    Publish(Box<Publish>),
    /// A client connected at the sender: a session that does not last ends elsewhere.
    Came {
        /// Tenant.
        tenant: TenantId,
        /// The session's key.
        client: String,
        /// When, by the sender's clock.
        at: Millis,
    },
    /// Let go of a session: its client is at the sender.
    Yield {
        /// What [`Note::Yielded`] repeats.
        call: u64,
        /// Tenant.
        tenant: TenantId,
        /// The session's key.
        client: String,
    },
    /// It is let go of; everything it took is settled and written.
    Yielded {
        /// Which.
        call: u64,
        /// QoS 2 ids that were received and not released.
        unreleased: Vec<u16>,
        /// Newest publishes taken: packet id, hash of the content, the stimulus it became.
        taken: Vec<(u16, u32, StimulusId)>,
        /// Queued messages up to this position may have been sent to the client.
        sent: i64,
    },
}

/// A message that another node's sessions want.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// Tenant.
    pub tenant: TenantId,
    /// The message.
    pub message: Message,
    /// The session it came from.
    pub from: Option<String>,
    /// For whom.
    pub aim: Aim,
}

/// Through which subscriptions a message comes to another node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Aim {
    /// Those that are not shared.
    pub plain: bool,
    /// Shared ones, with their prefix, of which a member there was chosen.
    pub shared: Vec<String>,
}

/// A message left in the store for a session that another node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letter {
    /// The message.
    pub message: Message,
    /// The session it came from.
    pub from: Option<String>,
    /// Through which of the session's subscriptions.
    pub aim: Aim,
}

impl Note {
    /// The bytes of a note; `None` when it cannot be encoded, which the types rule out.
    pub fn encode(&self) -> Option<bytes::Bytes> {
        record::encode(self).ok()
    }

    /// Reads a note.
    ///
    /// # Errors
    /// `record::Error` when it is damaged or from a newer build.
    pub fn decode(bytes: &[u8]) -> Result<Self, record::Error> {
        record::decode(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples() -> Vec<Note> {
        let tenant = TenantId::new("t").unwrap();
        let message = Message { topic: "a".into(), qos: 1, ..Message::default() };
        let aim = Aim { plain: true, shared: vec!["$share/g/a".into()] };
        let publish = Publish { tenant: tenant.clone(), message, from: Some("c".into()), aim };
        vec![
            Note::Here { told: 1 },
            Note::TellAll,
            Note::Wants { told: 2, anew: true, changes: vec![(tenant.clone(), "a/#".into(), true)] },
            Note::Look { call: 3, told: 2 },
            Note::Looked { call: 3 },
            Note::Mail,
            Note::Publish(Box::new(publish)),
            Note::Came { tenant: tenant.clone(), client: "/c".into(), at: Millis(5) },
            Note::Yield { call: 4, tenant, client: "/c".into() },
            Note::Yielded { call: 4, unreleased: vec![7], taken: vec![(8, 9, StimulusId::new("s").unwrap())], sent: 3 },
        ]
    }

    /// A change here means that nodes of two builds misread each other: add a version instead.
    #[test]
    fn golden_notes_never_change() {
        let hex = |note: &Note| note.encode().unwrap().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let all: Vec<String> = samples().iter().map(hex).collect();
        assert_eq!(all, GOLDEN);
        for note in samples() {
            assert_eq!(Note::decode(&note.encode().unwrap()).unwrap(), note);
        }
        assert!(Note::decode(&[1, 99]).is_err() && Note::decode(&[]).is_err());
    }

    const GOLDEN: [&str; 10] = [
        "010001",
        "0101",
        "0102020101017403612f2301",
        "01030302",
        "010403",
        "0105",
        "01060174016100010000000000000001016301010a2473686172652f672f61",
        "01070174022f630a",
        "0108040174022f63",
        "0109040107010809017306",
    ];

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Note::decode(&bytes);
        }

        #[test]
        fn damaged_notes_are_read_or_refused(of in 0_usize..10, at in any::<prop::sample::Index>(), with: u8, cut: prop::sample::Index) {
            let mut bytes = samples()[of].encode().unwrap().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = with;
            bytes.truncate(cut.index(bytes.len() + 1));
            let _ = Note::decode(&bytes);
        }
    }
}
