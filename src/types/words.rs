//! The words of a text, as recall and answers from memory see them.
//!
//! Owns: cutting into words, the words that carry no meaning, and a light stem, so that "lamps" finds "lamp".
//! Not here: ranking (`cognition::answer`), search (`store`).
//! Tests: at the foot.

/// The words of a text in order, in lower case, without punctuation.
pub fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

/// Whether a word (in lower case) says nothing about what a text is about. English; words of other languages all count.
pub fn is_filler(word: &str) -> bool {
    FILLERS.binary_search(&word).is_ok()
}

/// Sorted, for the binary search.
const FILLERS: [&str; 108] = [
    "a", "about", "all", "am", "an", "and", "any", "are", "as", "at", "be", "been", "being", "but", "by", "can",
    "could", "d", "did", "do", "does", "doing", "for", "from", "had", "has", "have", "having", "he", "her", "here",
    "hers", "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "just", "know", "ll", "m", "may", "me",
    "might", "must", "my", "no", "nor", "not", "of", "on", "or", "our", "please", "re", "recall", "remember", "s",
    "shall", "she", "should", "so", "some", "t", "tell", "than", "that", "the", "their", "them", "then", "there",
    "these", "they", "this", "those", "to", "too", "until", "up", "us", "ve", "very", "was", "we", "were", "what",
    "when", "where", "whether", "which", "while", "who", "whom", "whose", "why", "will", "with", "would", "yes", "you",
    "your", "yours",
];

/// A word (in lower case) without the commonest English endings. Two forms of one word mostly share it; it is no dictionary
/// form.
pub fn stem(word: &str) -> &str {
    let cut = |ending: &str, least: usize| word.strip_suffix(ending).filter(|rest| rest.chars().count() >= least);
    if word.ends_with("ss") {
        return word;
    }
    cut("ing", 3).or_else(|| cut("ed", 3)).or_else(|| cut("es", 3)).or_else(|| cut("s", 3)).map_or(word, |rest| {
        // "stopped" and "stop", "lamps" and "lamp", "closes" and "close" meet without their last doubled or silent letter.
        rest.strip_suffix('e').unwrap_or(rest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fillers_are_sorted() {
        assert!(FILLERS.is_sorted());
    }

    #[test]
    fn words_are_lower_case_and_bare() {
        assert_eq!(words("The lamp's ÉTAGE-3, ok?").collect::<Vec<_>>(), ["the", "lamp", "s", "étage", "3", "ok"]);
        assert_eq!(words("?! ").count(), 0);
    }

    #[test]
    fn forms_of_a_word_meet() {
        for (one, other) in [("lamps", "lamp"), ("opened", "opening"), ("closes", "closed"), ("glass", "glass")] {
            assert_eq!(stem(one), stem(other), "{one} {other}");
        }
        assert_ne!(stem("bus"), stem("bug"));
        assert_eq!(stem("is"), "is");
    }
}
