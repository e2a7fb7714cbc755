//! What can be held: data types, keys, and how a value is weighed and written down.
//!
//! Not here: how long (`policy`), where (`l1`, `l2`, `l3`). Invariants: a key begins with the tenant, then the type, then the
//! id, in every tier. Tests: at the foot.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use bytes::Bytes;
use equivalent::Equivalent;

use crate::types::{InstanceKey, RawJson, StateSnapshot, TenantId, memory::Vector};

/// A data type: what decides how long something is held, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Committed states of instances.
    State,
    /// Profiles made ready: rules compiled. The key is the profile's hash.
    Profile,
    /// Instances as they left memory. The head of their history says whether they still are so.
    Snapshot,
    /// Results of recall. The version is that of the memory, so that a new episode makes them void.
    Recall,
    /// Embeddings. The key is the content's hash and the model.
    Embedding,
    /// Answers of models to identical requests. The key is the request's hash.
    Answer,
    /// Results of tools that said that they may be kept.
    Tool,
}

impl Kind {
    /// All of them, by number.
    pub const ALL: [Kind; 7] =
        [Kind::State, Kind::Profile, Kind::Snapshot, Kind::Recall, Kind::Embedding, Kind::Answer, Kind::Tool];

    /// Its name in settings, figures and keys.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::State => "state",
            Kind::Profile => "profile",
            Kind::Snapshot => "snapshot",
            Kind::Recall => "recall",
            Kind::Embedding => "embedding",
            Kind::Answer => "answer",
            Kind::Tool => "tool",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A key. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Slot {
    /// The tenant.
    pub tenant: TenantId,
    /// The type.
    pub kind: Kind,
    /// The id: an instance's, or a hash of what the value is a function of.
    pub id: Arc<str>,
}

impl Slot {
    /// Puts the three together. The best id is one that never becomes wrong: with the version, or the hash of the content.
    pub fn new(kind: Kind, tenant: &TenantId, id: impl Into<Arc<str>>) -> Self {
        Self { tenant: tenant.clone(), kind, id: id.into() }
    }

    /// That of something an instance has one of.
    pub fn of(kind: Kind, key: &InstanceKey) -> Self {
        Self { tenant: key.tenant.clone(), kind, id: Arc::from(&key.instance) }
    }

    /// As text, the same on every node: `TENANT/TYPE/ID`.
    pub fn text(&self) -> String {
        format!("{}/{}/{}", self.tenant, self.kind.name(), self.id)
    }

    /// A hash that is the same on every node.
    pub fn stable_hash(&self) -> u64 {
        let (tenant, id) = (self.tenant.as_str().bytes(), self.id.bytes());
        crate::types::id::stable_hash(tenant.chain([0, self.kind as u8]).chain(id))
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.tenant, self.kind.name(), self.id)
    }
}

impl Hash for Slot {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hash(hasher, self.kind, self.tenant.as_str(), &self.id);
    }
}

fn hash(hasher: &mut impl Hasher, kind: Kind, tenant: &str, id: &str) {
    (kind as u8).hash(hasher);
    tenant.hash(hasher);
    id.hash(hasher);
}

/// The slot of an instance's state without making one: what a hit costs must not be an allocation.
pub(super) struct StateOf<'a>(pub &'a InstanceKey);

impl Hash for StateOf<'_> {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hash(hasher, Kind::State, self.0.tenant.as_str(), self.0.instance.as_str());
    }
}

impl Equivalent<Slot> for StateOf<'_> {
    fn equivalent(&self, slot: &Slot) -> bool {
        slot.kind == Kind::State && *slot.id == *self.0.instance.as_str() && slot.tenant == self.0.tenant
    }
}

/// Something that can be held.
pub trait Value: Send + Sync + Sized + 'static {
    /// Bytes it takes in memory beside its own size.
    fn weight(&self) -> usize;
    /// Its form in the tiers below; none when it only lives in this process.
    fn encode(&self) -> Option<Vec<u8>>;
    /// Reads that form; none when it is another one.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

impl Value for Bytes {
    fn weight(&self) -> usize {
        self.len()
    }
    fn encode(&self) -> Option<Vec<u8>> {
        Some(self.to_vec())
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Bytes::copy_from_slice(bytes))
    }
}

impl Value for String {
    fn weight(&self) -> usize {
        self.capacity()
    }
    fn encode(&self) -> Option<Vec<u8>> {
        Some(self.clone().into_bytes())
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }
}

/// An embedding.
impl Value for Vector {
    fn weight(&self) -> usize {
        2 * self.dimension()
    }
    fn encode(&self) -> Option<Vec<u8>> {
        let planes = self.high.iter().chain(&self.low).map(|step| step.cast_unsigned());
        Some(self.scale.to_le_bytes().into_iter().chain(planes).collect())
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (scale, planes) = bytes.split_first_chunk()?;
        let planes: Vec<i8> = planes.iter().map(|byte| byte.cast_signed()).collect();
        let (high, low) = planes.split_at(planes.len() / 2);
        let whole = high.len() == low.len();
        whole.then(|| Self { scale: f32::from_le_bytes(*scale), high: high.into(), low: low.into() })
    }
}

impl Value for RawJson {
    fn weight(&self) -> usize {
        self.get().len() + 16
    }
    fn encode(&self) -> Option<Vec<u8>> {
        Some(self.get().as_bytes().to_vec())
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        Self::parse(std::str::from_utf8(bytes).ok()?).ok()
    }
}

/// Weighed with the body that doors render of it, which lives as long.
impl Value for StateSnapshot {
    fn weight(&self) -> usize {
        2 * self.doc.get().len() + 128
    }
    fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.doc.get().len() + 16);
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.turn.to_le_bytes());
        bytes.extend(self.doc.get().as_bytes());
        Some(bytes)
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (turn, doc) = rest.split_first_chunk()?;
        let doc = RawJson::parse(std::str::from_utf8(doc).ok()?).ok()?;
        Some(Self::new(u64::from_le_bytes(*version), u64::from_le_bytes(*turn), doc))
    }
}

/// Anything that serializes, with what it takes in memory as told by whoever holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed<T> {
    /// The value.
    pub value: T,
    /// Bytes it takes in memory, about.
    pub bytes: usize,
}

impl<T: serde::Serialize + serde::de::DeserializeOwned + Send + Sync + 'static> Packed<T> {
    /// A value that takes about twice its serialized form.
    pub fn new(value: T) -> Self {
        let bytes = postcard::to_stdvec(&value).map_or(0, |bytes| 2 * bytes.len());
        Self { value, bytes }
    }
}

impl<T: serde::Serialize + serde::de::DeserializeOwned + Send + Sync + 'static> Value for Packed<T> {
    fn weight(&self) -> usize {
        self.bytes
    }
    fn encode(&self) -> Option<Vec<u8>> {
        postcard::to_stdvec(&self.value).ok()
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self { value: postcard::from_bytes(bytes).ok()?, bytes: 2 * bytes.len() })
    }
}

/// Something that only lives in this process, with what it takes there as told by whoever holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local<T> {
    /// The value.
    pub value: T,
    /// Bytes it takes, about.
    pub bytes: usize,
}

impl<T: Send + Sync + 'static> Value for Local<T> {
    fn weight(&self) -> usize {
        self.bytes
    }
    fn encode(&self) -> Option<Vec<u8>> {
        None
    }
    fn decode(_: &[u8]) -> Option<Self> {
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::InstanceId;

    #[test]
    fn a_state_is_found_by_its_instance_alone() {
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let slot = Slot::of(Kind::State, &key);
        let hasher = ahash::RandomState::new();
        assert_eq!(hasher.hash_one(&slot), hasher.hash_one(StateOf(&key)));
        assert!(StateOf(&key).equivalent(&slot));
        assert!(!StateOf(&key).equivalent(&Slot::of(Kind::Profile, &key)));
        assert_eq!(slot.text(), "t/state/i");
    }

    #[test]
    fn what_is_written_down_reads_the_same() {
        fn there_and_back<V: Value + PartialEq + std::fmt::Debug>(value: &V) {
            assert_eq!(V::decode(&value.encode().unwrap()).as_ref(), Some(value));
        }
        there_and_back(&Bytes::from_static(b"x"));
        there_and_back(&String::from("é"));
        there_and_back(&Vector::of(&[1.5f32, -0.5, 0.1]).unwrap());
        there_and_back(&RawJson::parse("{\"a\":1}").unwrap());
        there_and_back(&StateSnapshot::new(7, 9, RawJson::parse("{}").unwrap()));
        there_and_back(&Packed::new(vec![(1u8, String::from("a"))]));
        assert_eq!(Vector::decode(&[0; 5]), None);
        assert_eq!(Local { value: 1u8, bytes: 1 }.encode(), None);
        assert_eq!(StateSnapshot::decode(b"short"), None);
    }

    #[test]
    fn kinds_have_names_of_their_own() {
        for (number, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number);
            assert_eq!(Kind::named(kind.name()), Some(kind));
        }
    }
}
