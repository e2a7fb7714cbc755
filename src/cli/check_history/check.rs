//! The check itself, pure: what senders were promised, held against what an instance says happened.
//!
//! Not here: the log (`log.rs`), reading what is stored (`truth.rs`). Tests: at the foot each kind of violation is planted by
//! hand, and `planted.rs` plants them at random into random histories; the crash and chaos tests use it against real servers.
//!
//! | violation | promise | meaning |
//! |---|---|---|
//! | lost | 1 | accepted, and neither decided nor waiting nor a dead letter |
//! | doubled | 2 | in more than one turn, or decided and still waiting or dead; whether accepted or not |
//! | moved | 2 | an answer named another turn than the one that holds it |
//! | altered | 2 | an answer told another reply than the turn holds |
//! | disordered | 3 | decided after one of the same sender and priority that was sent when it was accepted already |
//! | gaps | 3 | turn numbers that do not grow by one |
//! | interleaved | 4 | a turn of an older epoch after one of a newer |
//! | diverged | 4 | another node tells another history of the same instance |
//!
//! A stimulus that was sent and never accepted may be there once or not at all. Order is judged by what a sender can know:
//! what it sent after an earlier one was accepted comes later. Over MQTT the session keeps order, so there the accepted ones
//! follow each other as they were sent, several in flight or not; except those that were refused once, which came again
//! later. Turns whose stimulus is not in the log are counted as foreign, and judged by their number and id only.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use serde::Serialize;

use super::log::{By, Door, Sent, Told};
use crate::types::Priority;

/// Most violations kept word for word in a [`Verdict`]; the counts go on.
pub const MAX_EXAMPLES: usize = 20;

/// One turn as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// Its number.
    pub turn: u64,
    /// The id of its stimulus.
    pub id: String,
    /// The text of its stimulus.
    pub content: Option<String>,
    /// The text of its reply.
    pub reply: Option<String>,
    /// The epoch under which it was committed, where that is stored.
    pub epoch: Option<u64>,
}

/// A stimulus that is stored and not decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Undecided {
    /// Its id.
    pub id: String,
    /// Its text.
    pub content: Option<String>,
}

/// All that is stored of an instance, as far as the check needs it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stored {
    /// Its turns, oldest first and complete.
    pub turns: Vec<Seen>,
    /// What waits in its inbox.
    pub waiting: Vec<Undecided>,
    /// Its dead letters.
    pub dead: Vec<Undecided>,
}

/// A kind of violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Breach {
    /// Accepted and not there.
    Lost,
    /// There more than once.
    Doubled,
    /// Told another turn's number.
    Moved,
    /// Told another reply.
    Altered,
    /// Out of its sender's order.
    Disordered,
    /// Turn numbers that do not grow by one.
    Gaps,
    /// An older epoch after a newer one.
    Interleaved,
    /// Two nodes, two histories.
    Diverged,
}

impl Breach {
    /// All kinds, in the order of the promises.
    pub const ALL: [Breach; 8] = [
        Breach::Lost,
        Breach::Doubled,
        Breach::Moved,
        Breach::Altered,
        Breach::Disordered,
        Breach::Gaps,
        Breach::Interleaved,
        Breach::Diverged,
    ];

    /// The promise it breaks, by its number in `docs/SEMANTICS.md`.
    pub const fn promise(self) -> u8 {
        match self {
            Breach::Lost => 1,
            Breach::Doubled | Breach::Moved | Breach::Altered => 2,
            Breach::Disordered | Breach::Gaps => 3,
            Breach::Interleaved | Breach::Diverged => 4,
        }
    }

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Breach::Lost => "lost",
            Breach::Doubled => "doubled",
            Breach::Moved => "moved",
            Breach::Altered => "altered",
            Breach::Disordered => "disordered",
            Breach::Gaps => "gaps",
            Breach::Interleaved => "interleaved",
            Breach::Diverged => "diverged",
        }
    }

    /// In a sentence.
    pub const fn meaning(self) -> &'static str {
        match self {
            Breach::Lost => "accepted and neither decided, waiting nor dead",
            Breach::Doubled => "one stimulus in more than one place",
            Breach::Moved => "an answer named another turn",
            Breach::Altered => "an answer told another reply",
            Breach::Disordered => "decided out of its sender's order",
            Breach::Gaps => "turn numbers that do not grow by one",
            Breach::Interleaved => "an older epoch after a newer one",
            Breach::Diverged => "two nodes tell two histories",
        }
    }
}

/// One violation, in words, with the lines of the log that prove it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Which kind.
    pub what: Breach,
    /// Where.
    pub instance: String,
    /// In words.
    pub detail: String,
    /// Places in the log.
    #[serde(skip)]
    pub places: Vec<u64>,
    /// The lines at these places, when the log was read from files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}: {}", self.what.name(), self.instance, self.detail)
    }
}

/// What a check found. The default is "nothing checked".
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Instances checked.
    pub instances: u64,
    /// Stimuli in the log.
    pub sent: u64,
    /// Accepted ones.
    pub acked: u64,
    /// Not accepted and decided all the same, as is allowed.
    pub unasked: u64,
    /// Accepted and waiting in an inbox.
    pub waiting: u64,
    /// Accepted and given up as dead letters.
    pub dead: u64,
    /// Turns read.
    pub turns: u64,
    /// Turns whose stimulus is not in the log.
    pub foreign: u64,
    /// [`Breach::Lost`].
    pub lost: u64,
    /// [`Breach::Doubled`].
    pub doubled: u64,
    /// [`Breach::Moved`].
    pub moved: u64,
    /// [`Breach::Altered`].
    pub altered: u64,
    /// [`Breach::Disordered`].
    pub disordered: u64,
    /// [`Breach::Gaps`].
    pub gaps: u64,
    /// [`Breach::Interleaved`].
    pub interleaved: u64,
    /// [`Breach::Diverged`].
    pub diverged: u64,
    /// The first [`MAX_EXAMPLES`] violations.
    pub examples: Vec<Violation>,
}

impl Verdict {
    /// Whether every promise checked was kept.
    pub fn is_clean(&self) -> bool {
        self.violations() == 0
    }

    /// How many violations there are.
    pub fn violations(&self) -> u64 {
        Breach::ALL.iter().map(|breach| self.count(*breach)).sum()
    }

    /// How many there are of a kind.
    pub const fn count(&self, breach: Breach) -> u64 {
        match breach {
            Breach::Lost => self.lost,
            Breach::Doubled => self.doubled,
            Breach::Moved => self.moved,
            Breach::Altered => self.altered,
            Breach::Disordered => self.disordered,
            Breach::Gaps => self.gaps,
            Breach::Interleaved => self.interleaved,
            Breach::Diverged => self.diverged,
        }
    }

    const fn counter(&mut self, breach: Breach) -> &mut u64 {
        match breach {
            Breach::Lost => &mut self.lost,
            Breach::Doubled => &mut self.doubled,
            Breach::Moved => &mut self.moved,
            Breach::Altered => &mut self.altered,
            Breach::Disordered => &mut self.disordered,
            Breach::Gaps => &mut self.gaps,
            Breach::Interleaved => &mut self.interleaved,
            Breach::Diverged => &mut self.diverged,
        }
    }

    /// Adds what another check found.
    pub fn merge(&mut self, other: Verdict) {
        self.instances += other.instances;
        self.sent += other.sent;
        self.acked += other.acked;
        self.unasked += other.unasked;
        self.waiting += other.waiting;
        self.dead += other.dead;
        self.turns += other.turns;
        self.foreign += other.foreign;
        for breach in Breach::ALL {
            *self.counter(breach) += other.count(breach);
        }
        self.examples.extend(other.examples);
        self.examples.truncate(MAX_EXAMPLES);
    }

    /// Holds what is stored of one instance against what was sent to it.
    pub fn check_instance(&mut self, instance: &str, sent: &[Sent], stored: &Stored) {
        self.instances += 1;
        self.sent += sent.len() as u64;
        self.acked += sent.iter().filter(|s| s.is_accepted()).count() as u64;
        self.turns += stored.turns.len() as u64;
        self.check_numbers(instance, &stored.turns);
        self.check_epochs(instance, &stored.turns);
        let known = Known::of(sent, stored);
        self.check_doubles(instance, &known, &stored.turns);
        for sent in sent {
            self.check_fate(instance, sent, &known);
        }
        self.check_order(instance, sent, &known, &stored.turns);
    }

    /// Holds the history one node tells against the same as another tells it. Turns that one of them does not have yet are
    /// no difference.
    pub fn check_alike(&mut self, instance: &str, one: &[Seen], other: &[Seen]) {
        for (a, b) in one.iter().zip(other) {
            if a != b {
                self.breach(Breach::Diverged, instance, &[], || {
                    format!("turn {} is '{}' here and turn {} is '{}' there", a.turn, a.id, b.turn, b.id)
                });
                return; // what follows differs too
            }
        }
    }

    fn check_numbers(&mut self, instance: &str, turns: &[Seen]) {
        let mut before = 0;
        for seen in turns {
            if seen.turn != before + 1 {
                self.breach(Breach::Gaps, instance, &[], || format!("turn {} follows turn {before}", seen.turn));
            }
            before = seen.turn;
        }
    }

    fn check_epochs(&mut self, instance: &str, turns: &[Seen]) {
        let mut newest = 0;
        for seen in turns {
            let epoch = seen.epoch.unwrap_or(newest);
            if epoch < newest {
                self.breach(Breach::Interleaved, instance, &[], || {
                    format!("turn {} is of epoch {epoch}, after one of epoch {newest}", seen.turn)
                });
            }
            newest = newest.max(epoch);
        }
    }

    fn check_doubles(&mut self, instance: &str, known: &Known<'_>, turns: &[Seen]) {
        for seen in turns {
            for first in [known.ids.get(&*seen.id), known.text(seen)].into_iter().flatten() {
                if first.turn != seen.turn {
                    let sent = known.sent(seen).map_or_else(Vec::new, |sent| vec![sent.place]);
                    self.breach(Breach::Doubled, instance, &sent, || {
                        format!("'{}' decided in turn {} and again in turn {}", seen.id, first.turn, seen.turn)
                    });
                    break;
                }
            }
        }
    }

    fn check_fate(&mut self, instance: &str, sent: &Sent, known: &Known<'_>) {
        let (seen, waits, dead) = (known.turn_of(sent), known.waiting.has(sent), known.dead.has(sent));
        let places = || [Some(sent.place), sent.accepted].into_iter().flatten().collect::<Vec<_>>();
        if usize::from(seen.is_some()) + usize::from(waits) + usize::from(dead) > 1 {
            let name = |there, name| if there { name } else { "" };
            self.breach(Breach::Doubled, instance, &places(), || {
                let all = [name(seen.is_some(), "decided"), name(waits, "waiting"), name(dead, "a dead letter")];
                let all: Vec<&str> = all.into_iter().filter(|name| !name.is_empty()).collect();
                format!("'{}' is {}", sent.id, all.join(" and "))
            });
        }
        if !sent.is_accepted() {
            self.unasked += u64::from(seen.is_some());
        } else if seen.is_none() {
            self.waiting += u64::from(waits);
            self.dead += u64::from(dead);
            if !waits && !dead {
                self.breach(Breach::Lost, instance, &places(), || {
                    format!("'{}' was accepted and is not there", sent.id)
                });
            }
        }
        for told in &sent.told {
            self.check_told(instance, sent, told, seen, waits || dead);
        }
    }

    fn check_told(&mut self, instance: &str, sent: &Sent, told: &Told, seen: Option<&Seen>, undecided: bool) {
        let places = [sent.place, told.place];
        match (told.turn, seen) {
            (Some(named), Some(seen)) if seen.turn != named => {
                self.breach(Breach::Moved, instance, &places, || {
                    format!("'{}' was told to be turn {named} and is turn {}", sent.id, seen.turn)
                });
            }
            (Some(named), None) if undecided => {
                self.breach(Breach::Moved, instance, &places, || {
                    format!("'{}' was told to be turn {named} and is not decided", sent.id)
                });
            }
            _ => {}
        }
        if let (Some(content), Some(seen)) = (&told.content, seen)
            && seen.reply.as_ref() != Some(content)
        {
            self.breach(Breach::Altered, instance, &places, || {
                format!("'{}' was told {content:?} and turn {} holds {:?}", sent.id, seen.turn, seen.reply)
            });
        }
    }

    fn check_order(&mut self, instance: &str, all: &[Sent], known: &Known<'_>, turns: &[Seen]) {
        let mut lanes: HashMap<(&str, Option<Priority>), Lane<'_>> = HashMap::new();
        let decided = turns.iter().filter_map(|seen| {
            let sent = known.sent(seen);
            self.foreign += u64::from(sent.is_none());
            // Of two turns of one stimulus the first counts for order.
            sent.filter(|sent| known.turn_of(sent).is_some_and(|first| first.turn == seen.turn))
        });
        // What was accepted and still waits comes after all that is decided.
        let waiting = all.iter().filter(|s| s.is_accepted() && known.turn_of(s).is_none() && known.waiting.has(s));
        let in_order: Vec<(&Sent, bool)> =
            decided.map(|sent| (sent, true)).chain(waiting.map(|sent| (sent, false))).collect();
        for (sent, decided) in in_order {
            let lane = lanes.entry((&sent.sender, sent.priority)).or_default();
            if let Some(later) = lane.overtaken_by(sent) {
                let places: Vec<u64> =
                    [Some(sent.place), sent.accepted, Some(later.place)].into_iter().flatten().collect();
                self.breach(Breach::Disordered, instance, &places, || {
                    let verb = if decided { "was decided" } else { "waits" };
                    format!(
                        "'{}' ({} of sender {}) {verb} after '{}', its number {}",
                        sent.id, sent.seq, sent.sender, later.id, later.seq
                    )
                });
            }
            if decided {
                lane.take(sent);
            }
        }
    }

    fn breach(&mut self, what: Breach, instance: &str, places: &[u64], detail: impl FnOnce() -> String) {
        *self.counter(what) += 1;
        if self.examples.len() < MAX_EXAMPLES {
            let (instance, places) = (instance.to_owned(), places.to_vec());
            self.examples.push(Violation { what, instance, detail: detail(), places, lines: Vec::new() });
        }
    }
}

/// What of one sender and priority was decided so far.
#[derive(Default)]
struct Lane<'a> {
    /// The one that was sent last.
    latest: Option<&'a Sent>,
    /// The accepted one over MQTT with the highest number.
    streamed: Option<&'a Sent>,
}

impl<'a> Lane<'a> {
    /// One that is decided already and should have come after `sent`.
    fn overtaken_by(&self, sent: &Sent) -> Option<&'a Sent> {
        let after = |later: &&Sent| sent.accepted.is_some_and(|accepted| accepted < later.place);
        let in_stream = |later: &&Sent| streams(sent) && sent.seq < later.seq;
        self.latest.filter(after).or_else(|| self.streamed.filter(in_stream))
    }

    fn take(&mut self, sent: &'a Sent) {
        if self.latest.is_none_or(|latest| latest.place < sent.place) {
            self.latest = Some(sent);
        }
        if streams(sent) && self.streamed.is_none_or(|highest| highest.seq < sent.seq) {
            self.streamed = Some(sent);
        }
    }
}

/// Whether the place of a stimulus in its session is its place in order.
fn streams(sent: &Sent) -> bool {
    sent.door == Door::Mqtt && sent.is_accepted() && !sent.refused
}

/// What is stored, found by how the log names it.
struct Known<'a> {
    sent: HashMap<(By, &'a str), &'a Sent>,
    /// First turn of each id.
    ids: HashMap<&'a str, &'a Seen>,
    /// First turn of each text that the log names; empty when it names none.
    texts: HashMap<&'a str, &'a Seen>,
    waiting: Names<'a>,
    dead: Names<'a>,
}

struct Names<'a> {
    ids: HashSet<&'a str>,
    texts: HashSet<&'a str>,
}

impl<'a> Names<'a> {
    fn of(all: &'a [Undecided]) -> Self {
        let texts = all.iter().filter_map(|one| one.content.as_deref()).collect();
        Self { ids: all.iter().map(|one| &*one.id).collect(), texts }
    }

    fn has(&self, sent: &Sent) -> bool {
        match sent.by {
            By::Id => self.ids.contains(&*sent.id),
            By::Content => self.texts.contains(&*sent.id),
        }
    }
}

impl<'a> Known<'a> {
    fn of(sent: &'a [Sent], stored: &'a Stored) -> Self {
        let sent: HashMap<_, _> = sent.iter().map(|sent| ((sent.by, &*sent.id), sent)).collect();
        let (mut ids, mut texts) = (HashMap::with_capacity(stored.turns.len()), HashMap::new());
        for seen in &stored.turns {
            ids.entry(&*seen.id).or_insert(seen);
            if let Some(text) = seen.content.as_deref().filter(|text| sent.contains_key(&(By::Content, *text))) {
                texts.entry(text).or_insert(seen);
            }
        }
        Self { sent, ids, texts, waiting: Names::of(&stored.waiting), dead: Names::of(&stored.dead) }
    }

    fn text(&self, seen: &Seen) -> Option<&&'a Seen> {
        self.texts.get(seen.content.as_deref()?)
    }

    fn turn_of(&self, sent: &Sent) -> Option<&'a Seen> {
        match sent.by {
            By::Id => self.ids.get(&*sent.id).copied(),
            By::Content => self.texts.get(&*sent.id).copied(),
        }
    }

    fn sent(&self, seen: &'a Seen) -> Option<&'a Sent> {
        let by_text = || self.sent.get(&(By::Content, seen.content.as_deref()?));
        self.sent.get(&(By::Id, &*seen.id)).or_else(by_text).copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Sent and, when `acked`, accepted at once, as by a sender that waits for each answer.
    fn sent(sender: &str, seq: u64, acked: bool) -> Sent {
        let place = 10 * seq;
        let (sender, id) = (sender.to_owned(), format!("{sender}-{seq}"));
        Sent { sender, seq, id, place, accepted: acked.then_some(place + 1), ..Sent::default() }
    }

    /// As a device with several in flight sends: accepted when all are sent.
    fn streamed(seq: u64) -> Sent {
        Sent { door: Door::Mqtt, accepted: Some(1000 + seq), ..sent("d", seq, true) }
    }

    fn told(sent: Sent, turn: u64, content: &str) -> Sent {
        let told = Told { place: sent.place + 1, turn: Some(turn), content: Some(content.into()) };
        Sent { told: vec![told], ..sent }
    }

    fn seen(turn: u64, id: &str) -> Seen {
        Seen { turn, id: id.into(), content: Some(format!("text of {id}")), ..Seen::default() }
    }

    fn turns(ids: &[&str]) -> Stored {
        Stored { turns: (1..).zip(ids).map(|(turn, id)| seen(turn, id)).collect(), ..Stored::default() }
    }

    fn undecided(id: &str) -> Vec<Undecided> {
        vec![Undecided { id: id.into(), content: None }]
    }

    fn check(sent: &[Sent], stored: &Stored) -> Verdict {
        let mut verdict = Verdict::default();
        verdict.check_instance("lamp", sent, stored);
        verdict
    }

    #[track_caller]
    fn assert_only(verdict: &Verdict, breach: Breach) {
        assert_eq!((verdict.count(breach), verdict.violations()), (1, 1), "{verdict:#?}");
        assert_eq!(verdict.examples[0].what, breach);
    }

    #[test]
    fn a_kept_promise_is_clean() {
        let log = [sent("a", 1, true), sent("b", 1, true), sent("a", 2, true)];
        let verdict = check(&log, &turns(&["b-1", "a-1", "a-2"]));
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.sent, verdict.acked, verdict.turns, verdict.foreign), (3, 3, 3, 0));
    }

    #[test]
    fn loss_is_found_with_its_lines() {
        let verdict = check(&[sent("a", 1, true), sent("a", 2, true)], &turns(&["a-2"]));
        assert_only(&verdict, Breach::Lost);
        assert!(verdict.examples[0].to_string().contains("a-1"), "{verdict:?}");
        assert_eq!(verdict.examples[0].places, [10, 11]);
    }

    #[test]
    fn what_waits_and_what_was_given_up_is_not_lost() {
        let log = [sent("a", 1, true), sent("a", 2, true)];
        let verdict = check(&log, &Stored { waiting: undecided("a-2"), dead: undecided("a-1"), ..Stored::default() });
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.waiting, verdict.dead), (1, 1));
    }

    #[test]
    fn the_unaccepted_may_be_there_or_not() {
        let log = [sent("a", 1, false), sent("a", 2, false)];
        assert!(check(&log, &turns(&[])).is_clean());
        assert!(check(&log, &turns(&["a-2", "a-1"])).is_clean());
        assert_eq!(check(&log, &turns(&["a-1"])).unasked, 1);
    }

    #[test]
    fn doubles_are_found_even_of_the_unaccepted() {
        for acked in [true, false] {
            assert_only(&check(&[sent("a", 1, acked)], &turns(&["a-1", "x", "a-1"])), Breach::Doubled);
        }
        assert_only(&check(&[], &turns(&["x", "x"])), Breach::Doubled);
    }

    #[test]
    fn decided_and_still_there_is_doubled() {
        let log = [sent("a", 1, true)];
        assert_only(&check(&log, &Stored { waiting: undecided("a-1"), ..turns(&["a-1"]) }), Breach::Doubled);
        assert_only(&check(&log, &Stored { dead: undecided("a-1"), ..turns(&["a-1"]) }), Breach::Doubled);
        let both = Stored { dead: undecided("a-1"), waiting: undecided("a-1"), ..Stored::default() };
        assert_only(&check(&log, &both), Breach::Doubled);
    }

    #[test]
    fn disorder_of_one_sender_is_found_and_of_two_is_none() {
        let log = [sent("a", 1, true), sent("a", 2, true), sent("b", 1, true)];
        let verdict = check(&log, &turns(&["a-2", "b-1", "a-1"]));
        assert_only(&verdict, Breach::Disordered);
        assert_eq!(verdict.examples[0].places, [10, 11, 20]);
        assert!(check(&log, &turns(&["b-1", "a-1", "a-2"])).is_clean());
    }

    #[test]
    fn one_that_was_never_accepted_must_not_overtake_either() {
        let log = [sent("a", 1, true), sent("a", 2, false)];
        assert_only(&check(&log, &turns(&["a-2", "a-1"])), Breach::Disordered);
        let log = [sent("a", 1, false), sent("a", 2, true)];
        assert!(check(&log, &turns(&["a-2", "a-1"])).is_clean(), "the first promised nothing");
    }

    #[test]
    fn one_that_waits_was_overtaken_and_one_that_is_dead_was_not() {
        let log = [sent("a", 1, true), sent("a", 2, true)];
        let overtaken = check(&log, &Stored { waiting: undecided("a-1"), ..turns(&["a-2"]) });
        assert_only(&overtaken, Breach::Disordered);
        assert!(check(&log, &Stored { dead: undecided("a-1"), ..turns(&["a-2"]) }).is_clean());
    }

    #[test]
    fn what_was_in_flight_together_has_an_order_over_mqtt_only() {
        let there = turns(&["d-2", "d-1"]);
        assert_only(&check(&[streamed(1), streamed(2)], &there), Breach::Disordered);
        let http = |seq| Sent { door: Door::Http, ..streamed(seq) };
        assert!(check(&[http(1), http(2)], &there).is_clean());
        let refused = Sent { refused: true, ..streamed(1) };
        assert!(check(&[refused, streamed(2)], &there).is_clean(), "it came again after the other");
    }

    #[test]
    fn a_more_urgent_one_may_overtake() {
        let log = [
            Sent { priority: Some(Priority::Background), ..sent("a", 1, true) },
            Sent { priority: Some(Priority::Human), ..sent("a", 2, true) },
        ];
        assert!(check(&log, &turns(&["a-2", "a-1"])).is_clean());
    }

    #[test]
    fn an_answer_that_named_another_turn_is_found() {
        let log = [told(sent("a", 1, true), 2, "hi")];
        let there = |turn: u64| {
            let before = (1..turn).map(|turn| seen(turn, &format!("x{turn}")));
            let own = Seen { reply: Some("hi".into()), ..seen(turn, "a-1") };
            Stored { turns: before.chain([own]).collect(), ..Stored::default() }
        };
        assert_only(&check(&log, &there(1)), Breach::Moved);
        assert!(check(&log, &there(2)).is_clean());
        assert_only(&check(&log, &Stored { waiting: undecided("a-1"), ..Stored::default() }), Breach::Moved);
    }

    #[test]
    fn an_answer_that_told_another_reply_is_found() {
        let there = |reply: Option<&str>| Stored {
            turns: vec![Seen { reply: reply.map(Into::into), ..seen(1, "a-1") }],
            ..Stored::default()
        };
        let log = [told(sent("a", 1, true), 1, "hi")];
        assert!(check(&log, &there(Some("hi"))).is_clean());
        assert_only(&check(&log, &there(Some("ho"))), Breach::Altered);
        assert_only(&check(&log, &there(None)), Breach::Altered);
    }

    #[test]
    fn gaps_in_the_numbers_are_found() {
        let stored = Stored { turns: vec![seen(1, "x"), seen(3, "y")], ..Stored::default() };
        let verdict = check(&[], &stored);
        assert_eq!((verdict.gaps, verdict.foreign, verdict.violations()), (1, 2, 1));
        let late = Stored { turns: vec![seen(3, "y")], ..Stored::default() };
        assert_only(&check(&[], &late), Breach::Gaps);
    }

    #[test]
    fn epochs_only_grow() {
        let of = |epochs: &[u64]| {
            let turn = |(turn, epoch): (u64, &u64)| Seen { epoch: Some(*epoch), ..seen(turn, &format!("x{turn}")) };
            Stored { turns: (1..).zip(epochs).map(turn).collect(), ..Stored::default() }
        };
        assert!(check(&[], &of(&[1, 1, 3, 4])).is_clean());
        assert_only(&check(&[], &of(&[1, 3, 2, 3])), Breach::Interleaved);
    }

    #[test]
    fn two_histories_of_one_instance_are_found() {
        let (one, other) = (turns(&["a", "b"]).turns, turns(&["a", "c", "d"]).turns);
        let mut verdict = Verdict::default();
        verdict.check_alike("lamp", &one, &one[..1]);
        assert!(verdict.is_clean());
        verdict.check_alike("lamp", &one, &other);
        assert_only(&verdict, Breach::Diverged);
    }

    #[test]
    fn devices_without_ids_are_known_by_their_text() {
        let log = |text: &str| Sent { id: text.into(), by: By::Content, ..sent("d", 1, true) };
        assert!(check(&[log("text of x")], &turns(&["x"])).is_clean());
        assert_only(&check(&[log("text of y")], &turns(&["x"])), Breach::Lost);
        let mut twice = turns(&["x", "y"]);
        twice.turns[1].content = Some("text of x".into());
        assert_only(&check(&[log("text of x")], &twice), Breach::Doubled);
        assert!(check(&[], &twice).is_clean(), "the same words may be said twice");
    }

    #[test]
    fn examples_are_bounded_and_counts_are_not() {
        let log: Vec<_> = (1..=100).map(|n| sent("a", n, true)).collect();
        let verdict = check(&log, &turns(&[]));
        assert_eq!((verdict.lost, verdict.examples.len()), (100, MAX_EXAMPLES));
    }

    #[test]
    fn verdicts_add_up() {
        let mut verdict = check(&[sent("a", 1, true)], &turns(&[]));
        verdict.merge(check(&[sent("a", 1, true)], &turns(&["a-1", "a-1"])));
        assert_eq!((verdict.instances, verdict.lost, verdict.doubled, verdict.examples.len()), (2, 1, 1, 2));
    }
}
