//! JSON kept as text: checked once at the door, then carried, stored and sent without being parsed again.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::value::RawValue;

/// Valid JSON text. In JSON it stands as itself; in binary formats as a string.
#[derive(Clone)]
pub struct RawJson(Arc<RawValue>);

impl RawJson {
    /// Checks that a text is JSON.
    ///
    /// # Errors
    /// The parser's error, with line and column.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        Ok(Self(Arc::from(serde_json::from_str::<Box<RawValue>>(text)?)))
    }

    /// The text of a value.
    pub fn of(value: &serde_json::Value) -> Self {
        // A value always has a text; `null` stands for the impossible.
        Self::from_serialize(value).unwrap_or_else(|_| Self(Arc::from(RawValue::NULL.to_owned())))
    }

    /// The text of anything that serializes.
    ///
    /// # Errors
    /// As [`serde_json::to_string`]: a map with keys that are no strings, or a failing `Serialize`.
    pub fn from_serialize<T: Serialize>(value: &T) -> Result<Self, serde_json::Error> {
        Ok(Self(Arc::from(serde_json::value::to_raw_value(value)?)))
    }

    /// The text.
    pub fn get(&self) -> &str {
        self.0.get()
    }

    /// The parsed value. The text was checked, so only a number or nesting beyond the parser's range yields `null`.
    pub fn value(&self) -> serde_json::Value {
        serde_json::from_str(self.get()).unwrap_or_default()
    }
}

impl PartialEq for RawJson {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for RawJson {}

impl fmt::Debug for RawJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.get())
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { self.0.serialize(serializer) } else { serializer.serialize_str(self.get()) }
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = if deserializer.is_human_readable() {
            Box::<RawValue>::deserialize(deserializer)?
        } else {
            RawValue::from_string(String::deserialize(deserializer)?).map_err(D::Error::custom)?
        };
        Ok(Self(Arc::from(raw)))
    }
}
