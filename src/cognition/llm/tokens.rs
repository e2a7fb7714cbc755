//! How many tokens a text has, guessed from above: servers count with vocabularies of their own, and none may find more.
//!
//! The guess: a word is a token for each three letters, and one more for each consonant behind two others, since no vocabulary knows
//! such words; what stands in one word with capitals or digits is a token for each two letters; capitals in a row, the letters
//! of a run that is longer than [`WORD`] and of up to two beside a digit are one each; so is every other sign, every byte beyond ASCII, and
//! every space that no letter follows. A text costs one more, which some vocabularies put before it.
//! Held against what five vocabularies count in texts of many kinds (`tests/golden/tokens.json`, made with
//! `scripts/count-tokens.mjs`): English prose is guessed at up to 1.6 times the largest count, code and JSON at up to 2.3.
//! Pure. Tests: at the foot.

use super::wire::Tool;
use crate::types::{Message, ToolCall};

/// Longest run of letters of one case that a vocabulary may know in pieces.
const WORD: usize = 16;
/// What a message costs beside its text, and a call or a tool beside its texts.
const AROUND: usize = 8;

/// Runs of letters, and every other sign by itself, with what each costs.
fn parts(text: &str) -> impl Iterator<Item = (&str, usize)> {
    let mut before = ' ';
    let mut rest = text;
    std::iter::from_fn(move || {
        let sign = rest.chars().next()?;
        let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (part, after) = rest.split_at(letters.max(sign.len_utf8()));
        let next = after.chars().next();
        let cost = match sign {
            _ if letters > 0 => {
                of_word(part.as_bytes(), before.is_ascii_digit() || next.is_some_and(|next| next.is_ascii_digit()))
            }
            ' ' => usize::from(!next.is_some_and(|next| next.is_ascii_alphabetic())),
            sign => sign.len_utf8(),
        };
        (before, rest) = (sign, after);
        Some((part, cost))
    })
}

/// Tokens of a run of letters, never more than it has. `by_digit`: a digit stands right before or behind it.
fn of_word(word: &[u8], by_digit: bool) -> usize {
    let mut tokens = 0;
    let mut rest = word;
    while !rest.is_empty() {
        let capitals = rest.iter().take_while(|letter| letter.is_ascii_uppercase()).count();
        let small = rest[capitals..].iter().take_while(|letter| letter.is_ascii_lowercase()).count();
        // The last of several capitals goes with the small letters behind it.
        let alone = if small == 0 { capitals } else { capitals.saturating_sub(1) };
        let (piece, after) = rest[alone..].split_at(capitals + small - alone);
        let plain = rest.len() == word.len() && after.is_empty() && alone == 0 && !by_digit;
        tokens += alone + of_piece(piece, plain, by_digit);
        rest = after;
    }
    tokens
}

/// Tokens of small letters with at most one capital before them.
fn of_piece(piece: &[u8], plain: bool, by_digit: bool) -> usize {
    let letters = piece.len();
    if letters > WORD || by_digit && letters <= 2 {
        return letters;
    }
    let (mut run, mut extra) = (0, 0);
    for letter in piece {
        run = if b"aeiouy".contains(&letter.to_ascii_lowercase()) { 0 } else { run + 1 };
        extra += usize::from(run > 2);
    }
    let pieces = if plain { letters.div_ceil(3) } else { letters / 2 + 1 };
    (pieces + extra).min(letters)
}

/// Tokens of a text.
pub(super) fn of(text: &str) -> usize {
    usize::from(!text.is_empty()) + parts(text).map(|(_, cost)| cost).sum::<usize>()
}

/// As much of a text, from its beginning, as so many tokens hold.
pub(super) fn cut(text: &str, tokens: usize) -> &str {
    let mut left = tokens.saturating_sub(1);
    let mut at = 0;
    for (part, cost) in parts(text) {
        if cost > left || tokens == 0 {
            // A letter is a token at most. A space is one where no letter follows.
            at += if part.as_bytes()[0].is_ascii_alphabetic() { left.min(part.len()) } else { 0 };
            let kept = &text[..at];
            return if left == 0 { kept.strip_suffix(' ').unwrap_or(kept) } else { kept };
        }
        left -= cost;
        at += part.len();
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(serde::Deserialize)]
    struct Counted {
        name: String,
        text: String,
        counts: BTreeMap<String, usize>,
    }

    #[test]
    fn no_vocabulary_counts_more() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokens.json");
        let counted: Vec<Counted> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(counted.len() > 60);
        let mut close = (usize::MAX, String::new());
        for Counted { name, text, counts } in counted {
            let (guess, most) = (of(&text), counts.values().copied().max().unwrap());
            assert!(counts.len() >= 5 && guess >= most, "{name}: {guess} for {counts:?}");
            assert!(guess <= 6 * most, "{name}: {guess} for {counts:?}");
            close = close.min((guess * 100 / most, name.clone()));
            println!("{:4} {name}: {guess} for {counts:?}", guess * 100 / most);
        }
        println!("closest: {close:?}");
    }

    proptest! {
        #[test]
        fn a_cut_text_fits_and_is_a_beginning(text in "[a-zA-Z0-9 .é漢]{0,200}|.{0,300}", tokens in 0usize..100) {
            let kept = cut(&text, tokens);
            prop_assert!(of(kept) <= tokens && text.starts_with(kept), "{} > {tokens}: {kept:?}", of(kept));
        }

        #[test]
        fn what_fits_is_not_cut(text in "[a-zA-Z0-9 .é漢]{0,200}|.{0,300}") {
            prop_assert_eq!(cut(&text, of(&text)), &text);
        }

        #[test]
        fn no_text_is_guessed_above_its_bytes(text in ".{0,300}") {
            prop_assert!(of(&text) <= text.len() + 1);
        }
    }
}
