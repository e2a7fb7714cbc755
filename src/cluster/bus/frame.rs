//! A frame: who sent it, the how manyeth it is to this receiver, and some messages, as one piece of bytes.
//!
//! The form is one version byte, the postcard header, then each message with its length (4 bytes, little endian) before it.
//! A build reads the versions it knows. A frame of a newer one is dropped and its sender is told, who then goes another way;
//! so the header keeps its form in all versions.
//! Invariants: reading never panics and takes memory in proportion to the frame; one message that cannot be read spoils no
//! other. Tests: at the foot; `tests/golden/bus` holds one frame of each version.

use serde::{Deserialize, Serialize};

use super::{Error, Message};
use crate::types::{NodeId, limits::MAX_BUS_MESSAGE_BYTES};

/// The version this build writes, and the newest it reads. Golden files hold it.
pub const VERSION: u8 = 1;

const LENGTH: usize = 4;

/// Why a frame, or a message in it, cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// No bytes.
    #[error("an empty frame")]
    Empty,
    /// Written by a newer build.
    #[error("a frame of version {0}, and this build reads up to {VERSION}")]
    Newer(u8),
    /// A message of a kind this build does not know, or damaged bytes.
    #[error("a damaged frame: {0}")]
    Corrupt(#[from] postcard::Error),
    /// A message goes beyond the end of the frame.
    #[error("a frame that ends too early")]
    Short,
    /// A message is larger than any node sends.
    #[error("a message of {0} bytes")]
    TooLarge(usize),
}

/// What stands before the messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Who sent it.
    pub from: NodeId,
    /// Its number among those from this sender to this receiver, growing; broadcasts are counted on their own. 0 where
    /// nothing is counted.
    pub number: u64,
}

/// Encodes one message for [`push`].
///
/// # Errors
/// [`Error::TooLarge`], [`Error::Encoding`].
pub fn encode(message: &Message) -> Result<Vec<u8>, Error> {
    let bytes = postcard::to_stdvec(message).map_err(|_| Error::Encoding)?;
    if bytes.len() > MAX_BUS_MESSAGE_BYTES { Err(Error::TooLarge(bytes.len())) } else { Ok(bytes) }
}

/// A frame without messages.
///
/// # Errors
/// [`Error::Encoding`].
pub fn begin(header: &Header) -> Result<Vec<u8>, Error> {
    postcard::to_extend(header, vec![VERSION]).map_err(|_| Error::Encoding)
}

/// Adds an encoded message to a frame.
pub fn push(frame: &mut Vec<u8>, message: &[u8]) {
    // An encoded message is far below 4 GiB.
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes());
    frame.extend_from_slice(message);
}

/// Reads a frame's header; its messages are read one by one.
///
/// # Errors
/// [`Unreadable`]: nothing of it can be used.
pub fn open(frame: &[u8]) -> Result<(Header, Messages<'_>), Unreadable> {
    match frame.split_first() {
        None => Err(Unreadable::Empty),
        Some((&VERSION, rest)) => {
            let (header, rest) = postcard::take_from_bytes(rest)?;
            Ok((header, Messages(rest)))
        }
        Some((&version, _)) => Err(Unreadable::Newer(version)),
    }
}

/// Who sent a frame that [`open`] does not know the version of.
pub fn sender(frame: &[u8]) -> Option<NodeId> {
    let (_, rest) = frame.split_first()?;
    postcard::take_from_bytes::<Header>(rest).ok().map(|(header, _)| header.from)
}

/// The messages of a frame, in order.
#[derive(Debug)]
pub struct Messages<'a>(&'a [u8]);

impl Messages<'_> {
    fn take(&mut self) -> Result<&[u8], Unreadable> {
        let (length, rest) = self.0.split_first_chunk::<LENGTH>().ok_or(Unreadable::Short)?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_BUS_MESSAGE_BYTES {
            return Err(Unreadable::TooLarge(length));
        }
        let (message, rest) = rest.split_at_checked(length).ok_or(Unreadable::Short)?;
        self.0 = rest;
        Ok(message)
    }
}

impl Iterator for Messages<'_> {
    type Item = Result<Message, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.take() {
            Ok(bytes) => Some(postcard::from_bytes(bytes).map_err(Unreadable::Corrupt)),
            Err(error) => {
                self.0 = &[];
                Some(Err(error))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::bus::message::samples;

    fn header() -> Header {
        Header { from: NodeId::new("a.0123").unwrap(), number: 7 }
    }

    fn frame(messages: &[Message]) -> Vec<u8> {
        let mut frame = begin(&header()).unwrap();
        messages.iter().for_each(|message| push(&mut frame, &encode(message).unwrap()));
        frame
    }

    #[test]
    fn every_message_comes_back_as_it_was_sent() {
        let bytes = frame(&samples());
        let (found, messages) = open(&bytes).unwrap();
        assert_eq!(found, header());
        assert_eq!(messages.collect::<Result<Vec<_>, _>>().unwrap(), samples());
    }

    #[test]
    fn golden_frames_never_change() {
        let newest = samples().iter().map(Message::since).max().unwrap();
        assert_eq!(
            u32::from(newest),
            crate::cluster::PROTOCOL.max,
            "the newest kinds are those of the newest protocol"
        );
        // What came with protocol 1 is in the file that was first.
        let names = [
            "frame-1.bin",
            "frame-1-protocol-2.bin",
            "frame-1-protocol-3.bin",
            "frame-1-protocol-4.bin",
            "frame-1-protocol-5.bin",
        ];
        assert_eq!(usize::from(newest), names.len(), "each protocol has its file");
        for (since, name) in (1..=newest).zip(names) {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bus").join(name);
            let messages: Vec<Message> = samples().into_iter().filter(|message| message.since() == since).collect();
            let bytes = frame(&messages);
            if !path.exists() {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(&path, &bytes).unwrap();
                panic!("{} was missing and is written now: add it to the repository", path.display());
            }
            let golden = std::fs::read(&path).unwrap();
            assert_eq!(
                bytes, golden,
                "a message or a type in it changed: nodes of two builds would misread each other"
            );
            assert_eq!(open(&golden).unwrap().1.collect::<Result<Vec<_>, _>>().unwrap(), messages);
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_and_spoils_nothing_else() {
        let kinds = samples();
        let mut bytes = begin(&header()).unwrap();
        push(&mut bytes, &[250, 1, 2]);
        push(&mut bytes, &encode(&kinds[0]).unwrap());
        let found: Vec<_> = open(&bytes).unwrap().1.collect();
        assert!(matches!(&found[..], [Err(Unreadable::Corrupt(_)), Ok(message)] if *message == kinds[0]), "{found:?}");

        bytes.truncate(bytes.len() - 1);
        assert!(matches!(open(&bytes).unwrap().1.last(), Some(Err(Unreadable::Short))));
        bytes[0] = VERSION + 1;
        assert_eq!(open(&bytes).err(), Some(Unreadable::Newer(VERSION + 1)));
        assert_eq!((sender(&bytes), sender(&[VERSION + 1, 200])), (Some(header().from), None));
        assert_eq!(open(&[]).err(), Some(Unreadable::Empty));
        let mut huge = begin(&header()).unwrap();
        huge.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(open(&huge).unwrap().1.next(), Some(Err(Unreadable::TooLarge(u32::MAX as usize))));
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_sent() {
        let relay = |len| Message::Relay(message::Relay { kind: "k".into(), body: vec![0; len].into() });
        assert!(encode(&relay(MAX_BUS_MESSAGE_BYTES - 16)).is_ok());
        assert!(matches!(encode(&relay(MAX_BUS_MESSAGE_BYTES)), Err(Error::TooLarge(_))));
    }

    use crate::cluster::bus::message;

    proptest! {
        #[test]
        fn reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            if let Ok((_, messages)) = open(&bytes) {
                prop_assert!(messages.count() <= bytes.len() / LENGTH + 1);
            }
        }

        #[test]
        fn damaged_frames_are_read_as_far_as_they_go(at in any::<prop::sample::Index>(), with in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let mut bytes = frame(&samples());
            let spot = at.index(bytes.len());
            bytes[spot] = with;
            bytes.truncate(cut.index(bytes.len() + 1));
            if let Ok((_, messages)) = open(&bytes) {
                prop_assert!(messages.count() <= bytes.len() / LENGTH + 1);
            }
        }
    }
}
