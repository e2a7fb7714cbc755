//! The `reflex` engine: what answers without a model when no rule matched.
//!
//! A question is answered from memory, extractively: the sentences that fit best, each with the episode it comes from. A
//! statement is remembered, so that a later question finds it. Structured data alone is neither answered nor remembered:
//! that is what rules and state are for.
//! Not here: the rules themselves (`reflex.rs`), the search that hands the episodes in (`memory`).
//! Invariants: the same question over the same episodes gets the same answer; every sentence it says stands in an episode.
//! Tests: at the foot.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use serde_json::json;

use super::{Action, Engine, Error, Pace, Progress, Question, Thought};
use crate::{
    store::Episode,
    types::{EpisodeDraft, EpisodeId, Priority, Profile, RawJson, Reply, Stimulus, words},
};

/// Episodes a question is answered from.
const EPISODES: usize = 8;
/// Most sentences of one answer.
const SENTENCES: usize = 3;
/// Most sentences looked at in one episode, and most characters of each.
const SENTENCES_PER_EPISODE: usize = 64;
const SENTENCE_CHARS: usize = 400;
/// A sentence is said only if it fits at least so well, relative to the best.
const FIT: f64 = 0.4;

/// Answers from memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extractive;

#[async_trait]
impl Engine for Extractive {
    fn name(&self) -> &'static str {
        "reflex"
    }

    fn pace(&self, _: &Profile) -> Pace {
        Pace::Instant
    }

    fn wants(&self, _: &Profile) -> (usize, usize) {
        (EPISODES, 0)
    }

    fn wants_for(&self, profile: &Profile, stimulus: &Stimulus) -> (usize, usize) {
        match stimulus.content.as_deref() {
            Some(text) if is_question(text) => self.wants(profile),
            _ => (0, 0),
        }
    }

    async fn think(&self, question: Question, _: &dyn Progress) -> Result<Thought, Error> {
        Ok(Thought { actions: decide(&question.stimulus, &question.recollection), ..Thought::default() })
    }
}

fn decide(stimulus: &Stimulus, recollection: &[Episode]) -> Vec<Action> {
    match stimulus.content.as_deref() {
        Some(text) if is_question(text) => vec![Action::Reply(answer(text, recollection))],
        Some(text) => {
            let noted = Reply { content: Some(String::from("Noted.")), data: None };
            // A person waits for a sign; a device that reports does not want one for every message.
            let reply = (stimulus.priority == Priority::Human).then_some(Action::Reply(noted));
            remember(text).into_iter().chain(reply).collect()
        }
        None => Vec::new(),
    }
}

/// What an instance keeps of a text it is told: the text, unless it is a question or blank.
pub(super) fn remember(text: &str) -> Option<Action> {
    if text.trim().is_empty() || is_question(text) {
        return None;
    }
    let content = text.to_owned();
    Some(Action::Remember(EpisodeDraft { content, data: None, tags: Vec::new(), reward: None, occurred_at: None }))
}

/// Whether a text asks rather than tells: it ends with a question mark, or begins like a question or a request to recall.
pub(super) fn is_question(text: &str) -> bool {
    const ASKING: [&str; 36] = [
        "who", "whom", "whose", "what", "when", "where", "why", "which", "how", "is", "are", "was", "were", "do",
        "does", "did", "can", "could", "will", "would", "should", "shall", "may", "has", "have", "had", "tell", "show",
        "list", "find", "recall", "whats", "whos", "wheres", "hows", "explain",
    ];
    text.trim_end().ends_with(['?', '？', '؟'].as_slice())
        || words::words(text).next().is_some_and(|first| ASKING.contains(&first.as_str()))
}

struct Sentence<'a> {
    episode: &'a Episode,
    text: &'a str,
    stems: Vec<String>,
}

/// The sentences that fit the question, with the episodes they come from.
fn answer(question: &str, recollection: &[Episode]) -> Reply {
    let chosen = choose(question, recollection);
    if chosen.is_empty() {
        let content = Some(String::from("I remember nothing about that."));
        return Reply { content, data: Some(RawJson::of(&json!({"episodes": []}))) };
    }
    let said: Vec<String> = chosen
        .iter()
        .map(|(episode, text)| format!("\u{201c}{text}\u{201d} (episode {})", EpisodeId(episode.id)))
        .collect();
    let ids: BTreeSet<u64> = chosen.iter().map(|(episode, _)| episode.id).collect();
    let ids: Vec<String> = ids.into_iter().map(|id| EpisodeId(id).to_string()).collect();
    let extracts: Vec<_> = chosen
        .iter()
        .map(|(episode, text)| json!({"episode": EpisodeId(episode.id).to_string(), "turn": episode.turn, "text": text, "occurred_at": episode.occurred_at}))
        .collect();
    Reply {
        content: Some(format!("I remember: {}.", said.join("; "))),
        data: Some(RawJson::of(&json!({"episodes": ids, "extracts": extracts}))),
    }
}

/// The best sentences, best first. Ties go to the newer episode, then to the earlier sentence.
fn choose<'a>(question: &str, recollection: &'a [Episode]) -> Vec<(&'a Episode, &'a str)> {
    let asked: BTreeSet<String> = words::words(question)
        .filter(|word| !words::is_filler(word))
        .map(|word| words::stem(&word).to_owned())
        .collect();
    let sentences: Vec<Sentence<'a>> = recollection
        .iter()
        .take(EPISODES)
        .flat_map(|episode| sentences(&episode.content).take(SENTENCES_PER_EPISODE).map(move |text| (episode, text)))
        .map(|(episode, text)| {
            let stems = words::words(text).map(|word| words::stem(&word).to_owned()).collect();
            Sentence { episode, text, stems }
        })
        .collect();
    let scores = rank(&asked, &sentences);
    let best = scores.iter().copied().fold(0.0, f64::max);
    if best <= 0.0 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..sentences.len()).filter(|&index| scores[index] >= best * FIT).collect();
    order.sort_by(|&a, &b| {
        let newer = sentences[b].episode.id.cmp(&sentences[a].episode.id);
        scores[b].total_cmp(&scores[a]).then(newer).then(a.cmp(&b))
    });
    let mut chosen: Vec<(&Episode, &str)> = Vec::with_capacity(SENTENCES);
    for index in order {
        let sentence = &sentences[index];
        if chosen.len() < SENTENCES && chosen.iter().all(|(_, text)| *text != sentence.text) {
            chosen.push((sentence.episode, sentence.text));
        }
    }
    chosen
}

/// BM25 (Robertson, Walker) of each sentence for the asked stems, over these sentences alone.
#[allow(clippy::cast_precision_loss)] // counts of a few hundred
fn rank(asked: &BTreeSet<String>, sentences: &[Sentence<'_>]) -> Vec<f64> {
    const K1: f64 = 1.2;
    const B: f64 = 0.75;
    let total = sentences.len() as f64;
    let mean = sentences.iter().map(|sentence| sentence.stems.len()).sum::<usize>() as f64 / total.max(1.0);
    let having: BTreeMap<&str, f64> = asked
        .iter()
        .map(|stem| (stem.as_str(), sentences.iter().filter(|sentence| sentence.stems.contains(stem)).count() as f64))
        .collect();
    let score = |sentence: &Sentence<'_>| -> f64 {
        let length = K1 * (1.0 - B + B * sentence.stems.len() as f64 / mean.max(1.0));
        having
            .iter()
            .map(|(stem, &with)| {
                let times = sentence.stems.iter().filter(|own| own == stem).count() as f64;
                let rarity = ((total - with + 0.5) / (with + 0.5)).ln_1p();
                rarity * times * (K1 + 1.0) / (times + length)
            })
            .sum()
    };
    sentences.iter().map(score).collect()
}

/// Whether a text ends with a title or the like whose full stop ends no sentence.
fn is_shortened(text: &str) -> bool {
    let word = text.rsplit(char::is_whitespace).next().unwrap_or_default();
    ["Mr.", "Mrs.", "Ms.", "Dr.", "Prof.", "St.", "e.g.", "i.e.", "vs."].contains(&word)
}

/// The sentences of a text, trimmed, none blank; a very long one is cut at a character.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(['.', '!', '?', '\n'].as_slice())
        .scan((text, 0_usize), |(whole, begin), piece| {
            // "3.5" and "example.com" do not end: the mark must be followed by a space or the end.
            let from = *begin;
            let end = from + piece.len();
            let before_space = whole[end..].chars().next().is_none_or(char::is_whitespace);
            let ends = piece.ends_with('\n') || before_space && !is_shortened(&whole[..end]);
            *begin = end;
            Some((from, end, ends))
        })
        .scan(None::<usize>, move |open, (from, end, ends)| {
            let start = open.take().unwrap_or(from);
            if ends {
                Some(Some(&text[start..end]))
            } else {
                *open = Some(start);
                Some(None)
            }
        })
        .flatten()
        .map(|sentence| {
            let sentence = sentence.trim();
            sentence.char_indices().nth(SENTENCE_CHARS).map_or(sentence, |(cut, _)| &sentence[..cut])
        })
        .map(|sentence| sentence.trim_end_matches(['.', '!'].as_slice()))
        .filter(|sentence| !sentence.is_empty())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Millis, Source};

    fn episode(id: u64, content: &str) -> Episode {
        let time = Millis(1_795_237_853_120);
        Episode {
            id,
            turn: id,
            content: content.to_owned(),
            data: None,
            tags: vec![],
            reward: None,
            occurred_at: time,
            recorded_at: time,
            score: 1.0,
        }
    }

    fn said(question: &str, recollection: &[Episode]) -> (String, serde_json::Value) {
        let reply = answer(question, recollection);
        (reply.content.unwrap(), reply.data.unwrap().value())
    }

    #[test]
    fn an_answer_is_made_of_the_fitting_sentences_and_names_their_episodes() {
        let memory = [
            episode(3, "The kitchen lamp is broken. It was bought in May."),
            episode(7, "Anna repaired the garden gate."),
            episode(9, "The cellar lamp needs a new bulb!"),
        ];
        let (text, data) = said("Which lamps are broken?", &memory);
        assert!(text.starts_with("I remember: \u{201c}The kitchen lamp is broken\u{201d} (episode 0-3)"), "{text}");
        assert!(!text.contains("gate") && !text.contains("May"), "{text}");
        assert_eq!(data["episodes"][0], "0-3");
        assert_eq!(data["extracts"][0]["text"], "The kitchen lamp is broken");
        assert_eq!(said("Which lamps are broken?", &memory).0, text, "the same question, the same answer");
    }

    #[test]
    fn nothing_remembered_is_said_plainly() {
        let (text, data) = said("Where is the key?", &[]);
        assert_eq!(text, "I remember nothing about that.");
        assert_eq!(data, json!({"episodes": []}));
        let beside_the_point = [episode(1, "the lamp is where it was")];
        assert_eq!(said("Where is the key?", &beside_the_point).0, text, "fillers in common are no answer");
    }

    #[test]
    fn newer_wins_between_equals_and_nothing_is_said_twice() {
        let memory = [episode(1, "the key is red"), episode(2, "the key is here"), episode(4, "the key is here")];
        let (_, data) = said("where is the key?", &memory);
        let order: Vec<_> = data["extracts"].as_array().unwrap().iter().map(|e| e["episode"].clone()).collect();
        assert_eq!(order, ["0-4", "0-1"]);
    }

    #[test]
    fn questions_are_told_from_statements() {
        for asked in
            ["Is it on?", "where are my keys", "Tell me about the lamp", "the lamp is broken?", "¿qué hora es?"]
        {
            assert!(is_question(asked), "{asked}");
        }
        for told in ["the lamp is broken", "Remember that I like tea.", "42", "", "note: what is done is done;"] {
            assert!(!is_question(told), "{told}");
        }
    }

    #[test]
    fn statements_are_remembered_questions_and_bare_data_are_not() {
        let stimulus = |source, text: Option<&str>| {
            let mut stimulus = Stimulus::empty(source, Channel::new("chat").unwrap(), Millis(0));
            stimulus.content = text.map(str::to_owned);
            stimulus
        };
        let kinds = |stimulus: &Stimulus| -> Vec<&'static str> {
            let name = |action: &Action| match action {
                Action::Remember(_) => "remember",
                Action::Reply(_) => "reply",
                _ => "other",
            };
            decide(stimulus, &[]).iter().map(name).collect()
        };
        assert_eq!(kinds(&stimulus(Source::Http, Some("I like tea"))), ["remember", "reply"]);
        assert_eq!(kinds(&stimulus(Source::Mqtt, Some("door opened"))), ["remember"]);
        assert_eq!(kinds(&stimulus(Source::Http, Some("what do I like?"))), ["reply"]);
        assert_eq!(kinds(&stimulus(Source::Mqtt, Some("where am I?"))), ["reply"]);
        assert!(kinds(&stimulus(Source::Http, None)).is_empty());
        assert_eq!(kinds(&stimulus(Source::Http, Some("  "))), ["reply"]);
        let wants = |text| Extractive.wants_for(&Profile::default(), &stimulus(Source::Http, Some(text)));
        assert_eq!((wants("I like tea"), wants("what do I like?")), ((0, 0), (EPISODES, 0)));
    }

    #[test]
    fn sentences_end_where_people_end_them() {
        let list = |text: &str| sentences(text).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(list("It is 3.5 C. See example.com! Ok?\nNext"), ["It is 3.5 C", "See example.com", "Ok?", "Next"]);
        assert_eq!(list(" .. \n\n"), Vec::<String>::new());
        assert_eq!(list("no end"), ["no end"]);
        let long = "é".repeat(1000);
        assert_eq!(list(&long)[0].chars().count(), SENTENCE_CHARS);
        assert_eq!(list("a.b"), ["a.b"]);
        assert_eq!(list("Ask Mrs. Lund. Not Dr. No."), ["Ask Mrs. Lund", "Not Dr. No"]);
    }
}
