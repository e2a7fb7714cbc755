//! What a client has of an answer: enough to tell how it goes on, without the words.
//!
//! Written into the ids of events and read back from them, so a stream goes on at any node and after any restart. Pure.
//! Tests: at the foot.

use std::fmt;

/// What a client has: so many bytes of the answer, with this digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    bytes: usize,
    digest: u64,
}

impl Default for Said {
    fn default() -> Self {
        Self { bytes: 0, digest: 0xcbf2_9ce4_8422_2325 }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:x}", self.bytes, self.digest)
    }
}

impl Said {
    /// Reads what was written, in its two parts.
    pub fn parse(bytes: &str, digest: &str) -> Option<Self> {
        Some(Self { bytes: bytes.parse().ok()?, digest: u64::from_str_radix(digest, 16).ok()? })
    }

    /// How many bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes more words.
    pub fn push(&mut self, text: &str) {
        let step = |digest: u64, byte: u8| (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        self.digest = text.bytes().fold(self.digest, step);
        self.bytes += text.len();
    }

    /// What of a text comes behind what was said; none when the text begins otherwise.
    pub fn rest_of<'t>(&self, text: &'t str) -> Option<&'t str> {
        let (begin, rest) = text.split_at_checked(self.bytes)?;
        let mut said = Self::default();
        said.push(begin);
        (said == *self).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_goes_on_is_sent() {
        let mut said = Said::default();
        assert_eq!(said.rest_of("hello"), Some("hello"));
        said.push("hel");
        assert_eq!(said.rest_of("hello"), Some("lo"));
        assert_eq!((said.rest_of("help"), said.rest_of("halo"), said.rest_of("he")), (Some("p"), None, None));
        said.push("é");
        assert_eq!(said.rest_of("helé!"), Some("!"));
        assert_eq!(said.rest_of("hel\u{304}!"), None, "cut between characters only");
    }
}
