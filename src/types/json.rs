//! JSON kept as text: checked once at the door, then carried, stored and sent without being parsed again.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::value::RawValue;

/// Valid JSON text. In JSON it stands as itself; in binary formats as a string.
#[derive(Clone, PartialEq, Eq)]
pub struct RawJson(Arc<str>);

impl RawJson {
    /// Checks that a text is JSON.
    ///
    /// # Errors
    /// The parser's error, with line and column.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let raw: &RawValue = serde_json::from_str(text)?;
        Ok(Self(Arc::from(raw.get())))
    }

    /// The text of a value.
    pub fn of(value: &serde_json::Value) -> Self {
        Self(Arc::from(value.to_string()))
    }

    /// The text of anything that serializes.
    ///
    /// # Errors
    /// As [`serde_json::to_string`]: a map with keys that are no strings, or a failing `Serialize`.
    pub fn from_serialize<T: Serialize>(value: &T) -> Result<Self, serde_json::Error> {
        Ok(Self(Arc::from(serde_json::to_string(value)?)))
    }

    /// The text.
    pub fn get(&self) -> &str {
        &self.0
    }

    /// The parsed value. The text was checked, so only a number or nesting beyond the parser's range yields `null`.
    pub fn value(&self) -> serde_json::Value {
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

impl fmt::Debug for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            let raw: &RawValue = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
            raw.serialize(serializer)
        } else {
            serializer.serialize_str(&self.0)
        }
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let raw = Box::<RawValue>::deserialize(deserializer)?;
            Ok(Self(Arc::from(raw.get())))
        } else {
            // Stored text was checked before it was stored; a corrupt row is caught by the record's own framing.
            let text = String::deserialize(deserializer)?;
            if text.is_empty() {
                return Err(D::Error::custom("empty JSON text"));
            }
            Ok(Self(Arc::from(text)))
        }
    }
}
