//! Texts and JSON with `{{expression}}` in them, compiled once.
//!
//! Owns: finding the expressions, keeping constant parts constant, and the rule that a text which is nothing but one
//! `{{expression}}` yields the typed value where JSON is wanted.
//! Not here: what the pieces are used for (`action.rs`).
//! Tests: at the foot.

use serde_json::{Map, Value};

use super::expression::{Expression, Flaw, Quotes, Scope};
use crate::types::{
    RawJson,
    limits::{MAX_JSON_DEPTH, MAX_TEMPLATE_BYTES},
};

/// A text with expressions in it.
#[derive(Debug)]
pub(super) struct Template(Vec<Piece>);

#[derive(Debug)]
enum Piece {
    Text(String),
    Value(Expression),
}

impl Template {
    /// Finds and compiles the expressions. `{{'{{'}}` writes two braces.
    pub(super) fn compile(source: &str) -> Result<Self, Flaw> {
        let mut pieces = Vec::new();
        let mut rest = source;
        let mut at = 0;
        while let Some(open) = rest.find("{{") {
            let (text, tail) = rest.split_at(open);
            if !text.is_empty() {
                pieces.push(Piece::Text(text.to_owned()));
            }
            at += text.chars().count() + 2;
            let body = &tail[2..];
            let close = closing(body).ok_or_else(|| Flaw::new(at - 2, "this '{{' has no '}}'"))?;
            let expression = &body[..close];
            let compiled = Expression::compile(expression).map_err(|flaw| Flaw::new(at + flaw.at, flaw.reason))?;
            pieces.push(Piece::Value(compiled));
            at += expression.chars().count() + 2;
            rest = &body[close + 2..];
        }
        if !rest.is_empty() || pieces.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The text, when no expression is in it.
    pub(super) fn fixed(&self) -> Option<&str> {
        match self.0.as_slice() {
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The constant text it begins with.
    pub(super) fn prefix(&self) -> &str {
        match self.0.first() {
            Some(Piece::Text(text)) => text,
            _ => "",
        }
    }

    /// Estimated steps of one rendering.
    pub(super) fn cost(&self) -> u64 {
        self.0.iter().map(|piece| if let Piece::Value(expression) = piece { expression.cost } else { 1 }).sum()
    }

    /// The finished text.
    pub(super) fn text(&self, scope: &Scope<'_>) -> Result<String, String> {
        let mut out = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Value(expression) => expression.text(scope, &mut out)?,
            }
            if out.len() > MAX_TEMPLATE_BYTES {
                return Err(format!("the text is longer than {MAX_TEMPLATE_BYTES} bytes"));
            }
        }
        Ok(out)
    }

    /// The typed value of a lone expression, else the finished text.
    fn value(&self, scope: &Scope<'_>) -> Result<Value, String> {
        match self.0.as_slice() {
            [Piece::Value(expression)] => expression.json(scope),
            _ => self.text(scope).map(Value::String),
        }
    }
}

/// Bytes before the `}}` that ends an expression: not within a text and not one that closes a map literal.
fn closing(body: &str) -> Option<usize> {
    let mut quotes = Quotes::default();
    let mut braces = 0_usize;
    for (at, c) in body.char_indices() {
        if quotes.inside(c) {
            continue;
        }
        match c {
            '{' => braces += 1,
            '}' if braces > 0 => braces -= 1,
            '}' if body[at + 1..].starts_with('}') => return Some(at),
            _ => {}
        }
    }
    None
}

/// JSON with templates in its texts.
#[derive(Debug)]
pub(super) enum Pattern {
    /// No template anywhere.
    Fixed(Value),
    /// A text with expressions.
    Text(Template),
    /// An object some of whose values have expressions.
    Object(Vec<(String, Pattern)>),
    /// An array some of whose items have expressions.
    Array(Vec<Pattern>),
}

impl Pattern {
    /// Compiles every text of a JSON value.
    pub(super) fn compile(source: &Value) -> Result<Self, Flaw> {
        Self::compile_within(source, MAX_JSON_DEPTH)
    }

    fn compile_within(source: &Value, depth: usize) -> Result<Self, Flaw> {
        if depth == 0 {
            return Err(Flaw::new(0, format!("the JSON nests deeper than {MAX_JSON_DEPTH}")));
        }
        match source {
            Value::String(text) => {
                let template = Template::compile(text)?;
                Ok(if template.fixed().is_some() { Self::Fixed(source.clone()) } else { Self::Text(template) })
            }
            Value::Object(map) => {
                let entries = map
                    .iter()
                    .map(|(name, value)| Ok((name.clone(), Self::compile_within(value, depth - 1)?)))
                    .collect::<Result<Vec<_>, Flaw>>()?;
                let fixed = entries.iter().all(|(_, pattern)| matches!(pattern, Self::Fixed(_)));
                Ok(if fixed { Self::Fixed(source.clone()) } else { Self::Object(entries) })
            }
            Value::Array(items) => {
                let items =
                    items.iter().map(|item| Self::compile_within(item, depth - 1)).collect::<Result<Vec<_>, Flaw>>()?;
                let fixed = items.iter().all(|pattern| matches!(pattern, Self::Fixed(_)));
                Ok(if fixed { Self::Fixed(source.clone()) } else { Self::Array(items) })
            }
            other => Ok(Self::Fixed(other.clone())),
        }
    }

    /// Estimated steps of one rendering.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Fixed(_) => 1,
            Self::Text(template) => template.cost(),
            Self::Object(entries) => entries.iter().map(|(_, pattern)| pattern.cost()).sum(),
            Self::Array(items) => items.iter().map(Self::cost).sum(),
        }
    }

    /// The finished JSON.
    pub(super) fn value(&self, scope: &Scope<'_>) -> Result<Value, String> {
        match self {
            Self::Fixed(value) => Ok(value.clone()),
            Self::Text(template) => template.value(scope),
            Self::Object(entries) => entries
                .iter()
                .map(|(name, pattern)| Ok((name.clone(), pattern.value(scope)?)))
                .collect::<Result<Map<_, _>, String>>()
                .map(Value::Object),
            Self::Array(items) => {
                items.iter().map(|pattern| pattern.value(scope)).collect::<Result<Vec<_>, _>>().map(Value::Array)
            }
        }
    }
}

/// JSON that is handed on as text: written once when it is constant.
#[derive(Debug)]
pub(super) enum Payload {
    /// Constant.
    Fixed(RawJson),
    /// With expressions.
    Rendered(Pattern),
}

impl Payload {
    /// Compiles a JSON value.
    pub(super) fn compile(source: &Value) -> Result<Self, Flaw> {
        Ok(match Pattern::compile(source)? {
            Pattern::Fixed(value) => Self::Fixed(RawJson::of(&value)),
            pattern => Self::Rendered(pattern),
        })
    }

    /// Estimated steps of one rendering.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Fixed(_) => 1,
            Self::Rendered(pattern) => pattern.cost(),
        }
    }

    /// The finished JSON.
    pub(super) fn json(&self, scope: &Scope<'_>) -> Result<RawJson, String> {
        match self {
            Self::Fixed(raw) => Ok(raw.clone()),
            Self::Rendered(pattern) => {
                let raw = RawJson::of(&pattern.value(scope)?);
                if raw.get().len() > MAX_TEMPLATE_BYTES {
                    return Err(format!("the JSON is longer than {MAX_TEMPLATE_BYTES} bytes"));
                }
                Ok(raw)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_may_contain_braces_and_quotes() {
        assert_eq!(closing("{'a': {'b': 1}}.a }} rest"), Some("{'a': {'b': 1}}.a ".len()));
        assert_eq!(closing("'}}' }}"), Some(5));
        assert_eq!(closing("'it\\'s }}'"), None);
    }

    #[test]
    fn a_flaw_is_placed_within_the_whole_text() {
        let flaw = Template::compile("é {{stimulus.id}} and {{wrong}}").unwrap_err();
        assert_eq!(flaw.at, "é {{stimulus.id}} and {{".chars().count(), "{flaw:?}");
        assert_eq!(Template::compile("a {{b").unwrap_err().at, 2);
    }

    #[test]
    fn constant_texts_and_payloads_stay_constant() {
        assert_eq!(Template::compile("plain }} text").unwrap().fixed(), Some("plain }} text"));
        assert_eq!(Template::compile("").unwrap().fixed(), Some(""));
        let payload = Payload::compile(&serde_json::json!({"a": [1, "b"]})).unwrap();
        assert!(matches!(payload, Payload::Fixed(raw) if raw.get() == r#"{"a":[1,"b"]}"#));
    }
}
