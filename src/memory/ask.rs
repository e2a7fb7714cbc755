//! What a recall asks: the words that carry meaning, vectors, and which episodes count at all.
//!
//! Not here: the search (`shelf`). Invariant: bounded in words and time, whatever the text. Tests: at the foot.

use crate::types::{Millis, memory::Vector, words};

/// Most meaningful words of a text that are searched for; each stands for itself and two more forms.
const MAX_WORDS: usize = 10;
/// Most bytes of a text that are looked at for them.
const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Which episodes count.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    /// At least this reward; those without one do not count then.
    pub min_reward: Option<f32>,
    /// With one of these tags, if there are any.
    pub tags_any: Vec<String>,
    /// With all of these tags.
    pub tags_all: Vec<String>,
    /// That happened then or later.
    pub after: Option<Millis>,
    /// That happened earlier.
    pub before: Option<Millis>,
    /// That were known then: recorded, and neither forgotten nor superseded yet.
    pub as_of: Option<Millis>,
}

impl Known {
    /// Whether it asks for less than all that is known now.
    pub(crate) fn narrows(&self) -> bool {
        *self != Self::default()
    }
}

/// What a caller wants to recall.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// By text.
    pub query: Option<String>,
    /// By a vector.
    pub embedding: Option<Vector>,
    /// At most so many.
    pub limit: usize,
    /// Among which.
    pub known: Known,
}

/// An [`Ask`] made ready.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asked {
    pub words: Vec<String>,
    pub lexical: Option<Vector>,
    pub given: Option<Vector>,
    /// Whether the vector is the model server's, and not the caller's.
    pub ours: bool,
    pub limit: usize,
    pub known: Known,
    pub now: Millis,
}

/// The words to search for: letters and digits only, so no backend can take one for syntax. Empty for a text without meaning.
pub(crate) fn meaning(text: &str) -> Vec<String> {
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
    let mut all = kept.clone();
    for word in &kept {
        // "lamps" was perhaps told as "lamp", "lamp" as "lamps". The forms come last: a backend that cuts cuts them first.
        let stem = words::stem(word);
        let form = if stem != word {
            stem.to_owned()
        } else if word.chars().count() > 2 && !word.ends_with('s') && !word.ends_with(|c: char| c.is_numeric()) {
            format!("{word}s")
        } else {
            continue;
        };
        if !all.contains(&form) {
            all.push(form);
        }
    }
    all
}

/// The words of a text that has none with a meaning.
pub(crate) fn literal(text: &str) -> Vec<String> {
    words::words(&text[..text.floor_char_boundary(MAX_TEXT_BYTES)]).take(MAX_WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_the_words_that_matter_and_their_forms() {
        assert_eq!(meaning("Which of the LAMPS is broken?"), ["lamps", "broken", "lamp", "brokens"]);
        assert_eq!(meaning("Room 42"), ["room", "42", "rooms"]);
        assert!(meaning("why is it so?").is_empty() && meaning("").is_empty());
        assert_eq!(literal("why is it so?"), ["why", "is", "it", "so"]);
    }

    #[test]
    fn nothing_of_a_query_language_survives() {
        let hostile = "\"lamp\" OR NOT (content:x*) NEAR/3 ^a -b + {c} ; -- \u{0} ' \\";
        assert!(meaning(hostile).iter().all(|word| word.chars().all(char::is_alphanumeric)));
    }

    #[test]
    fn a_query_is_bounded() {
        let long: String = (0..10_000).map(|n| format!("word{n} ")).collect();
        assert!(meaning(&long).len() <= 2 * MAX_WORDS);
        assert!(meaning(&"é".repeat(100_000)).concat().len() <= 2 * MAX_TEXT_BYTES + 2);
    }
}
