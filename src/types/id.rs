//! Identifiers: 1 to 128 characters of `A-Z a-z 0-9 . _ ~ -`, cheap to clone, valid by construction.

use std::{borrow::Borrow, fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::limits::{MAX_CHANNEL_BYTES, MAX_ID_BYTES};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Empty or longer than [`MAX_ID_BYTES`].
    #[error("an id has 1 to {MAX_ID_BYTES} characters, this one has {0}")]
    Length(usize),
    /// A character outside the alphabet.
    #[error("'{0}' is not allowed in an id, use A-Z a-z 0-9 . _ ~ -")]
    Character(char),
    /// A channel that is empty, too long, or has an empty level, a wildcard or a control character.
    #[error(
        "a channel has 1 to {MAX_CHANNEL_BYTES} bytes in levels parted by '/', none empty, without '+', '#' or control characters"
    )]
    Channel,
}

fn check_id(text: &str) -> Result<(), IdError> {
    if text.is_empty() || text.len() > MAX_ID_BYTES {
        return Err(IdError::Length(text.chars().count()));
    }
    match text.bytes().position(|b| !(b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'~' | b'-'))) {
        None => Ok(()),
        Some(at) => Err(IdError::Character(text[at..].chars().next().unwrap_or('?'))),
    }
}

fn check_channel(text: &str) -> Result<(), IdError> {
    let bad = text.is_empty()
        || text.len() > MAX_CHANNEL_BYTES
        || text.split('/').any(str::is_empty)
        || text.chars().any(|c| matches!(c, '+' | '#') || c.is_control());
    if bad { Err(IdError::Channel) } else { Ok(()) }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and takes a text.
            ///
            /// # Errors
            /// [`IdError`] says what is wrong with it.
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                let text = text.as_ref();
                $check(text)?;
                Ok(Self(Arc::from(text)))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl From<&$name> for Arc<str> {
            fn from(id: &$name) -> Self {
                id.0.clone()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(stringify!($name))
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::new(text).map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    };
}

text_id!(
    /// The unit of isolation, quota and budget.
    TenantId, check_id
);
text_id!(
    /// One consciousness, within its tenant.
    InstanceId, check_id
);
text_id!(
    /// One stimulus, unique within its instance for at least the deduplication window.
    StimulusId, check_id
);
text_id!(
    /// Where within an instance a stimulus arrives or a publish leaves: levels parted by `/`, as in an MQTT topic.
    Channel, check_channel
);
text_id!(
    /// One life of a node: its name and a number of its own for each start, so that a restarted node is a new one.
    NodeId, check_id
);

impl NodeId {
    /// A new life of the node with this name. What an id cannot hold becomes `-`; ids of later lives are greater.
    pub fn generate(name: &str) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '~' | '-' | '.') { c } else { '-' };
        let name: String = name.chars().map(plain).take(MAX_ID_BYTES - 33).collect();
        let name = if name.is_empty() { "node" } else { &name };
        Self(format!("{name}.{}", uuid::Uuid::now_v7().simple()).into())
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        self.0.rsplit_once('.').map_or(&self.0, |(name, _)| name)
    }
}

impl StimulusId {
    /// How the id of a stimulus begins that an instance sent to another: `fx.` after one hop, `fx2.` after two.
    pub const SENT: &str = "fx";

    /// From how many instances, one after the other, its stimulus comes. The id says so since it goes wherever the stimulus goes:
    /// into the log, into what is put off, and to other nodes. Whoever chooses one that looks like this has so many hops less.
    pub fn hops(&self) -> u32 {
        match self.0.strip_prefix(Self::SENT).and_then(|rest| rest.split_once('.')) {
            Some(("", _)) => 1,
            Some((digits, _)) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().unwrap_or(u32::MAX),
            _ => 0,
        }
    }

    /// A new id in time order, for a stimulus whose sender did not choose one.
    pub fn generate() -> Self {
        let mut buffer = uuid::Uuid::encode_buffer();
        Self(Arc::from(&*uuid::Uuid::now_v7().simple().encode_lower(&mut buffer)))
    }
}

/// A tenant's instance: the key of everything. Tenant comes first in every order and every stored key.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InstanceKey {
    /// The tenant.
    pub tenant: TenantId,
    /// The instance within the tenant.
    pub instance: InstanceId,
}

impl InstanceKey {
    /// Puts the two together.
    pub fn new(tenant: TenantId, instance: InstanceId) -> Self {
        Self { tenant, instance }
    }

    /// Its shard, where there are `count` of them (at least one).
    pub fn shard(&self, count: u32) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // below `count`
        let shard = (self.stable_hash() % u64::from(count.max(1))) as u32;
        shard
    }

    /// A hash that is the same on every node, build and day.
    pub fn stable_hash(&self) -> u64 {
        stable_hash(self.tenant.as_str().bytes().chain([0]).chain(self.instance.as_str().bytes()))
    }
}

/// A hash that is the same on every node, build and day: FNV-1a (Fowler, Noll, Vo), finished with the 64-bit mix of
/// MurmurHash3 (Appleby), because FNV's low bits alone spread badly.
pub fn stable_hash(bytes: impl Iterator<Item = u8>) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(PRIME));
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

impl fmt::Display for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.instance)
    }
}

impl fmt::Debug for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.instance)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_checked() {
        assert!(InstanceId::new("A-z.0_9~").is_ok());
        assert_eq!(InstanceId::new(""), Err(IdError::Length(0)));
        assert_eq!(InstanceId::new("a/b"), Err(IdError::Character('/')));
        assert_eq!(InstanceId::new("aé"), Err(IdError::Character('é')));
        assert!(InstanceId::new("x".repeat(MAX_ID_BYTES)).is_ok());
        assert!(InstanceId::new("x".repeat(MAX_ID_BYTES + 1)).is_err());
    }

    #[test]
    fn a_channel_has_levels_without_wildcards() {
        assert!(Channel::new("room/temperature").is_ok());
        for bad in ["", "/a", "a/", "a//b", "a/+", "#", "a\u{0}b"] {
            assert_eq!(Channel::new(bad), Err(IdError::Channel), "{bad:?}");
        }
    }

    #[test]
    fn each_life_of_a_node_has_an_id_of_its_own() {
        let (one, other) = (NodeId::generate("a.b c"), NodeId::generate("a.b c"));
        assert!(one < other && one.name() == "a.b-c", "{one} {other}");
        for name in ["", &"é".repeat(MAX_ID_BYTES)] {
            let id = NodeId::generate(name);
            assert_eq!(NodeId::new(id.as_str()), Ok(id));
        }
    }

    #[test]
    fn the_stable_hash_never_changes() {
        let key = InstanceKey::new(TenantId::new("default").unwrap(), InstanceId::new("lamp").unwrap());
        assert_eq!(key.stable_hash(), GOLDEN_HASH);
    }

    /// Placement on every node depends on it: a change moves every instance.
    const GOLDEN_HASH: u64 = 0xef4975b5510969a2;
}
