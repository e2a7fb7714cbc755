//! How many tokens a text has, guessed so that it is rather too many: servers count with vocabularies of their own.
//!
//! The guess: a word of up to [`WORD`] letters is a token for each three of them, a longer run of letters one for each letter
//! (no vocabulary has it), every other sign one, every byte beyond ASCII one, white space between words none, further white
//! space one each. English prose is guessed at about 1.3 times what vocabularies of today make of it, JSON at about 1.5.
//! Pure. Tests: at the foot.

use super::wire::Tool;
use crate::types::{Message, ToolCall};

/// Longest word that a vocabulary may know in pieces of three letters.
const WORD: usize = 16;
/// What a message costs beside its text, and a call or a tool beside its texts.
const AROUND: usize = 8;

/// Reads a text sign by sign.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    tokens: usize,
    /// Letters of the word being read.
    letters: usize,
    spaces: usize,
}

impl Count {
    fn take(&mut self, sign: char) {
        if sign.is_ascii_alphabetic() {
            self.letters += 1;
            self.spaces = 0;
            return;
        }
        self.end();
        if sign == ' ' {
            self.spaces += 1;
            self.tokens += usize::from(self.spaces > 1);
        } else {
            self.spaces = 0;
            self.tokens += sign.len_utf8();
        }
    }

    fn end(&mut self) {
        self.tokens = self.total();
        self.letters = 0;
    }

    fn total(&self) -> usize {
        self.tokens + if self.letters > WORD { self.letters } else { self.letters.div_ceil(3) }
    }
}

/// Tokens of a text.
pub(super) fn of(text: &str) -> usize {
    let mut count = Count::default();
    text.chars().for_each(|sign| count.take(sign));
    count.total()
}

/// As much of a text, from its beginning, as so many tokens hold.
pub(super) fn cut(text: &str, tokens: usize) -> &str {
    let mut count = Count::default();
    for (at, sign) in text.char_indices() {
        count.take(sign);
        if count.total() > tokens {
            return &text[..at];
        }
    }
    text
}

fn of_call(call: &ToolCall) -> usize {
    AROUND + of(&call.id) + of(&call.name) + of(&call.arguments)
}

/// Tokens of a message.
pub(super) fn of_message(message: &Message) -> usize {
    let call = message.call.as_deref().map_or(0, of);
    AROUND + of(&message.content) + call + message.calls.iter().map(of_call).sum::<usize>()
}

/// Tokens of all messages.
pub(super) fn of_all(messages: &[Message]) -> usize {
    messages.iter().map(of_message).sum()
}

/// Tokens of a tool's description.
pub(super) fn of_tool(tool: &Tool) -> usize {
    AROUND + of(&tool.name) + of(&tool.description) + of(tool.parameters.get())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_guess_is_rather_too_many() {
        // What cl100k_base, the vocabulary of a widely used family of models, makes of them.
        for (text, real) in [
            ("The quick brown fox jumps over the lazy dog.", 10),
            (r#"{"reported":{"celsius":21.5,"on":true}}"#, 15),
            ("Donaudampfschifffahrtsgesellschaft", 11),
            ("温度は二十一度です", 10),
            ("https://example.com/a/b?c=1", 10),
        ] {
            assert!((real..=4 * real).contains(&of(text)), "{text}: {} for {real}", of(text));
        }
    }

    proptest! {
        #[test]
        fn a_cut_text_fits_and_is_a_beginning(text in ".{0,300}", tokens in 0usize..100) {
            let kept = cut(&text, tokens);
            prop_assert!(of(kept) <= tokens && text.starts_with(kept));
        }

        #[test]
        fn no_text_is_guessed_above_its_bytes(text in ".{0,300}") {
            prop_assert!(of(&text) <= text.len());
        }
    }
}
