//! JSON text from outside, checked once before anything is built from it.
//!
//! Owns: the walls both doors, and the client of model servers, put before JSON: UTF-8, nesting, and values that look valid but
//! that no parser here can hold (a lone surrogate, a number beyond the range). What passed is stored and sent as it is, and
//! everybody can read it. Not here: what a field may say (wire types of each door).
//! Tests: at the foot; over the wire in `tests/it/hostile.rs`.

use super::{Fault, Kind, RawJson, limits::MAX_JSON_DEPTH};

/// Why bytes are not JSON we take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not UTF-8.
    #[error("the text is not UTF-8 from byte {0} on")]
    Utf8(usize),
    /// Nested too deeply.
    #[error("the JSON is nested deeper than {MAX_JSON_DEPTH} levels at byte {0}")]
    Depth(usize),
    /// Syntax.
    #[error("this is not JSON: {0}")]
    Syntax(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Utf8(_) => "NOT_UTF8",
            Error::Depth(_) => "JSON_TOO_DEEP",
            Error::Syntax(_) => "JSON_INVALID",
        }
    }
}

/// Checks bytes before they are parsed. Most text costs one pass; only text with escapes or numbers that might not be
/// representable is parsed in full.
///
/// # Errors
/// [`Error`]. Syntax is only checked as far as needed: the parser that follows finds the rest.
pub fn check(bytes: &[u8]) -> Result<&str, Error> {
    let text = std::str::from_utf8(bytes).map_err(|error| Error::Utf8(error.valid_up_to()))?;
    if scan(bytes)? {
        serde_json::from_str::<serde_json::Value>(text).map_err(|error| Error::Syntax(error.to_string()))?;
    }
    Ok(text)
}

/// As [`check`], for a text that is JSON as a whole.
///
/// # Errors
/// [`Error`].
pub fn whole(text: &str) -> Result<RawJson, Error> {
    check(text.as_bytes())?;
    RawJson::parse(text).map_err(|error| Error::Syntax(error.to_string()))
}

/// Bounds the nesting; true when the text holds something only a full parse can judge.
fn scan(bytes: &[u8]) -> Result<bool, Error> {
    /// Fewer digits than this cannot leave the range of a double.
    const LONG_NUMBER: usize = 300;
    let (mut depth, mut in_string, mut doubtful, mut digits) = (0usize, false, false, 0usize);
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if in_string {
            match byte {
                b'"' => in_string = false,
                b'\\' => {
                    doubtful |= bytes.get(at + 1) == Some(&b'u');
                    at += 1;
                }
                _ => {}
            }
        } else {
            match byte {
                b'"' => in_string = true,
                b'{' | b'[' => {
                    depth += 1;
                    if depth > MAX_JSON_DEPTH {
                        return Err(Error::Depth(at));
                    }
                }
                b'}' | b']' => depth = depth.saturating_sub(1),
                b'e' | b'E' => doubtful |= digits > 0,
                _ => {}
            }
            digits = if byte.is_ascii_digit() || byte == b'.' { digits + 1 } else { 0 };
            doubtful |= digits > LONG_NUMBER;
        }
        at += 1;
    }
    Ok(doubtful)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_passes() {
        for text in [r#"{"a":[1,2.5,{"b":"c [[[ \" \\"}],"t":true}"#, "3", r#""\u00e9""#, "1e3", "[]"] {
            assert_eq!(check(text.as_bytes()), Ok(text));
        }
    }

    #[test]
    fn nesting_is_bounded_and_brackets_in_strings_do_not_count() {
        let deep = |levels: usize| [vec![b'['; levels], vec![b']'; levels]].concat();
        assert!(check(&deep(MAX_JSON_DEPTH)).is_ok());
        assert_eq!(check(&deep(MAX_JSON_DEPTH + 1)), Err(Error::Depth(MAX_JSON_DEPTH)));
        assert!(check(format!("\"{}\"", "[".repeat(1000)).as_bytes()).is_ok());
        let wide = format!("[{}[]]", "[],".repeat(1000));
        assert!(check(wide.as_bytes()).is_ok());
    }

    #[test]
    fn what_no_parser_can_hold_is_refused() {
        assert_eq!(check(b"{\"a\":\"\xff\"}"), Err(Error::Utf8(6)));
        for bad in [r#"{"a":"\ud800"}"#, "[1e999]", &format!("[{}]", "9".repeat(400))] {
            assert!(matches!(check(bad.as_bytes()), Err(Error::Syntax(_))), "{bad}");
            assert!(whole(bad).is_err() && RawJson::parse(bad).is_ok(), "{bad}: valid JSON, and of no use");
        }
    }
}
