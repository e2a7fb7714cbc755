//! Settings on their way into the structs of [`super`]: a tree whose leaves are typed (from TOML) or text that takes its
//! type from where it is put (from the environment and `--set`).
//!
//! Not here: where a setting came from, layering (`load.rs`). Tests: at the foot.

use std::collections::BTreeMap;

use serde::{
    Deserializer,
    de::{
        Error as _, IntoDeserializer, Visitor,
        value::{Error, MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use toml::de::{DeTable, DeValue};

/// A value that is not yet what its setting wants it to be.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Tree {
    /// A section.
    Table(BTreeMap<String, Tree>),
    /// A list.
    List(Vec<Tree>),
    /// A TOML string, date or time.
    Str(String),
    /// A TOML integer.
    Int(i64),
    /// A TOML float.
    Float(f64),
    /// A TOML boolean.
    Bool(bool),
    /// Untyped text: becomes whatever is asked for, or says why it cannot.
    Text(String),
}

impl Tree {
    /// Takes over what the TOML parser found.
    pub(super) fn of(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Tree::Str(text.to_string()),
            // A number beyond 64 bits stays text, and is refused as out of range where it is put.
            DeValue::Integer(int) => i64::from_str_radix(int.as_str(), int.radix())
                .map_or_else(|_| Tree::Text(int.as_str().to_owned()), Tree::Int),
            DeValue::Float(float) => float.as_str().parse().map_or_else(|_| Tree::Str(float.to_string()), Tree::Float),
            DeValue::Boolean(bool) => Tree::Bool(*bool),
            DeValue::Datetime(time) => Tree::Str(time.to_string()),
            DeValue::Array(items) => Tree::List(items.iter().map(|item| Tree::of(item.get_ref())).collect()),
            DeValue::Table(table) => Tree::of_table(table),
        }
    }

    /// Takes over a whole table.
    pub(super) fn of_table(table: &DeTable<'_>) -> Self {
        Tree::Table(table.iter().map(|(key, value)| (key.get_ref().to_string(), Tree::of(value.get_ref()))).collect())
    }

    /// What stands at a path, list positions written as numbers.
    pub(super) fn at(&self, path: &[String]) -> Option<&Tree> {
        path.iter().try_fold(self, |tree, name| match tree {
            Tree::Table(table) => table.get(name),
            Tree::List(items) => items.get(name.parse::<usize>().ok()?),
            _ => None,
        })
    }

    /// Puts a value at a path and makes the sections on the way.
    ///
    /// # Errors
    /// The part of the path that is a value and no section.
    pub(super) fn put(&mut self, path: &[String], value: Tree) -> Result<(), Vec<String>> {
        let Some((name, rest)) = path.split_first() else {
            *self = value;
            return Ok(());
        };
        let Tree::Table(table) = self else { return Err(Vec::new()) };
        let below = table.entry(name.clone()).or_insert_with(|| Tree::Table(BTreeMap::new()));
        below.put(rest, value).map_err(|mut at| {
            at.insert(0, name.clone());
            at
        })
    }

    /// Removes what stands at a path; says whether anything did.
    pub(super) fn remove(&mut self, path: &[String]) -> bool {
        match (path, self) {
            ([last], Tree::Table(table)) => table.remove(last).is_some(),
            ([name, rest @ ..], Tree::Table(table)) => table.get_mut(name).is_some_and(|below| below.remove(rest)),
            _ => false,
        }
    }

    /// Lays another tree over this one: sections merge, everything else is replaced.
    pub(super) fn merge(&mut self, over: Tree) {
        match (self, over) {
            (Tree::Table(under), Tree::Table(over)) => {
                for (name, value) in over {
                    match under.get_mut(&name) {
                        Some(below) => below.merge(value),
                        None => drop(under.insert(name, value)),
                    }
                }
            }
            (under, over) => *under = over,
        }
    }
}

/// Text as TOML would read it, for lists and tables given as text.
fn parse_text(text: &str) -> Result<Tree, Error> {
    match DeValue::parse(text) {
        Ok(value) => Ok(Tree::of(value.get_ref())),
        Err(error) => Err(Error::custom(format!("not a TOML value: {}", error.message()))),
    }
}

/// The text itself, or what stands between its quotes when it was written as a TOML string.
fn unquoted(text: String) -> String {
    let quoted = text.len() >= 2 && (text.starts_with('"') || text.starts_with('\''));
    match quoted.then(|| parse_text(&text)) {
        Some(Ok(Tree::Str(inner))) => inner,
        _ => text,
    }
}

/// `[1, 2]` as TOML, anything else as items parted by commas; an empty text is an empty list.
fn list_of(text: &str) -> Result<Vec<Tree>, Error> {
    if text.trim_start().starts_with('[') {
        return match parse_text(text)? {
            Tree::List(items) => Ok(items),
            _ => Err(Error::custom("not a list")),
        };
    }
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    Ok(items.map(|item| Tree::Text(item.to_owned())).collect())
}

macro_rules! whole_numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self {
                Tree::Text(text) => match text.trim().replace('_', "").parse::<$type>() {
                    Ok(number) => visitor.$visit(number),
                    Err(_) => Err(Error::custom(format!("'{text}' is not {}", friendly(stringify!($type)).unwrap_or("a number")))),
                },
                other => other.deserialize_any(visitor),
            }
        }
    )*};
}

/// What a type of number is called when it is asked of a person.
pub(super) fn friendly(name: &str) -> Option<&'static str> {
    Some(match name {
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number of 0 or more",
        "i64" | "i32" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "socket address" => "an address such as 127.0.0.1:8080 or [::1]:8080",
        "path string" | "a string" => "a text",
        "a sequence" => "a list",
        _ => return None,
    })
}

impl<'de> Deserializer<'de> for Tree {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Table(table) => visitor.visit_map(MapDeserializer::new(table.into_iter())),
            Tree::List(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter())),
            Tree::Str(text) => visitor.visit_string(text),
            Tree::Int(number) => match u64::try_from(number) {
                Ok(number) => visitor.visit_u64(number),
                Err(_) => visitor.visit_i64(number),
            },
            Tree::Float(number) => visitor.visit_f64(number),
            Tree::Bool(bool) => visitor.visit_bool(bool),
            Tree::Text(text) => visitor.visit_string(unquoted(text)),
        }
    }

    whole_numbers!(
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i64 visit_i64 i64, deserialize_i32 visit_i32 i32,
        deserialize_f32 visit_f32 f32, deserialize_f64 visit_f64 f64
    );

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Text(text) => match text.trim() {
                "true" => visitor.visit_bool(true),
                "false" => visitor.visit_bool(false),
                _ => Err(Error::custom(format!("'{text}' is not true or false"))),
            },
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Text(text) if text.is_empty() => visitor.visit_none(),
            other => visitor.visit_some(other),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Text(text) => visitor.visit_seq(SeqDeserializer::new(list_of(&text)?.into_iter())),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Text(text) => parse_text(&text)?.deserialize_any(visitor),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Tree::Str(text) => visitor.visit_enum(text.into_deserializer()),
            Tree::Text(text) => visitor.visit_enum(unquoted(text).into_deserializer()),
            other => other.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u128 char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, Error> for Tree {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize;

    use super::*;

    fn text(text: &str) -> Tree {
        Tree::Text(text.to_owned())
    }

    #[test]
    fn text_takes_the_type_it_is_asked_for() {
        assert_eq!(u16::deserialize(text("1_883")).unwrap(), 1883);
        assert!(bool::deserialize(text("true")).unwrap());
        assert_eq!(String::deserialize(text("123")).unwrap(), "123");
        assert_eq!(String::deserialize(text("\"a b\"")).unwrap(), "a b");
        assert_eq!(Vec::<String>::deserialize(text("a, b")).unwrap(), ["a", "b"]);
        assert_eq!(Vec::<u8>::deserialize(text("[1, 2]")).unwrap(), [1, 2]);
        assert_eq!(Vec::<u8>::deserialize(text("")).unwrap(), [0_u8; 0]);
        assert_eq!(Option::<String>::deserialize(text("")).unwrap(), None);
        assert_eq!(BTreeMap::<String, u8>::deserialize(text("{a = 1}")).unwrap()["a"], 1);
    }

    #[test]
    fn text_that_cannot_says_what_was_wanted() {
        let error = u16::deserialize(text("70000")).unwrap_err().to_string();
        assert_eq!(error, "'70000' is not a whole number from 0 to 65535");
        assert_eq!(bool::deserialize(text("yes")).unwrap_err().to_string(), "'yes' is not true or false");
        assert!(
            BTreeMap::<String, u8>::deserialize(text("{a")).unwrap_err().to_string().starts_with("not a TOML value")
        );
    }

    #[test]
    fn sections_merge_and_values_are_replaced() {
        let parse = |text| Tree::of_table(DeTable::parse(text).unwrap().get_ref());
        let mut tree = parse("[a]\nx = 1\ny = [1, 2]\n[b]\nz = 1");
        tree.merge(parse("[a]\ny = [3]\n[c]\nw = true"));
        assert_eq!(tree, parse("[a]\nx = 1\ny = [3]\n[b]\nz = 1\n[c]\nw = true"));
    }

    #[test]
    fn a_value_is_no_section() {
        let mut tree = Tree::of_table(DeTable::parse("[a]\nx = 1").unwrap().get_ref());
        let path = |names: [&str; 3]| names.map(String::from);
        assert_eq!(tree.put(&path(["a", "x", "y"]), text("1")), Err(vec!["a".into(), "x".into()]));
        assert!(tree.put(&path(["n", "e", "w"]), text("1")).is_ok());
        assert_eq!(tree.at(&path(["n", "e", "w"])), Some(&text("1")));
    }
}
