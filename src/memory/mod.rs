//! What an instance remembers: recall over its episodes.
//!
//! Owns: turning free text into a query. The words that carry meaning are kept, with the forms they may have been told in;
//! a text without any (a greeting, a lone "why?") asks nothing of the store. Not here: the search and its ranking (`store`),
//! what is said about the result (`cognition`).
//! Invariant: bounded in words, episodes and time, whatever the text.
//! Tests: at the foot.

use std::time::Duration;

use crate::{
    store::{self, Episode, Reader},
    types::{Fault, InstanceKey, Kind, limits::MAX_RECALL, words},
};

/// Most meaningful words of a text that are searched for; each stands for itself and two more forms.
const MAX_WORDS: usize = 10;
/// Most bytes of a text that are looked at for them.
const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Why nothing could be recalled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The search took too long.
    #[error("recall took longer than {0:?}")]
    Timeout(Duration),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Timeout(_) => Kind::Timeout,
            Error::Store(error) => error.kind(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Timeout(_) => "TIMEOUT",
            Error::Store(error) => error.code(),
        }
    }
}

/// The episodes of an instance that fit a text, best first, at most `k` (and [`MAX_RECALL`]). Cancel safe.
///
/// # Errors
/// [`Error::Timeout`] after the deadline, [`Error::Store`] when the store fails.
pub async fn recall(
    reader: &dyn Reader,
    key: &InstanceKey,
    text: &str,
    k: usize,
    deadline: Duration,
) -> Result<Vec<Episode>, Error> {
    let query = query(text);
    if query.is_empty() || k == 0 {
        return Ok(Vec::new());
    }
    let search = reader.recall(key, &query, k.min(MAX_RECALL));
    let found = tokio::time::timeout(deadline, search).await.map_err(|_| Error::Timeout(deadline))?;
    Ok(found?)
}

/// The words to search for, parted by spaces: letters and digits only, so no backend can take one for syntax.
fn query(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
    let mut kept: Vec<String> = Vec::with_capacity(MAX_WORDS);
    for word in words::words(text) {
        if !words::is_filler(&word) && !kept.contains(&word) {
            kept.push(word);
            if kept.len() == MAX_WORDS {
                break;
            }
        }
    }
    let mut query = kept.join(" ");
    for word in &kept {
        // "lamps" was perhaps told as "lamp", "lamp" as "lamps". The forms come last: a backend that cuts cuts them first.
        let stem = words::stem(word);
        if stem != word {
            query.push(' ');
            query.push_str(stem);
        } else if word.chars().count() > 2 && !word.ends_with('s') && !word.ends_with(|c: char| c.is_numeric()) {
            query.push(' ');
            query.push_str(word);
            query.push('s');
        }
    }
    query
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_the_words_that_matter_and_their_forms() {
        assert_eq!(query("Which of the LAMPS is broken?"), "lamps broken lamp brokens");
        assert_eq!(query("Room 42"), "room 42 rooms");
        assert_eq!(query("why is it so?"), "");
        assert_eq!(query(""), "");
    }

    #[test]
    fn nothing_of_a_query_language_survives() {
        let hostile = "\"lamp\" OR NOT (content:x*) NEAR/3 ^a -b + {c} ; -- \u{0} ' \\";
        assert!(query(hostile).chars().all(|c| c.is_alphanumeric() || c == ' '), "{}", query(hostile));
        assert!(!query(hostile).contains("OR") && !query(hostile).contains("NOT"));
    }

    #[test]
    fn a_query_is_bounded() {
        let long: String = (0..10_000).map(|n| format!("word{n} ")).collect();
        assert!(query(&long).split(' ').count() <= 3 * MAX_WORDS);
        assert!(query(&"é".repeat(100_000)).len() <= 2 * MAX_TEXT_BYTES + 2);
    }
}
