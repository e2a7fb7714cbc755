//! Properties of the check: random honest histories are clean, and a violation of each kind planted at random is found.

use proptest::{prelude::*, sample::Index, test_runner::TestCaseError};

use super::{
    check::{Breach, Seen, Stored, Undecided, Verdict},
    log::{Answer, Door, Event, Log, Send, What},
};

/// What a sender does with one stimulus.
#[derive(Debug, Clone, Copy)]
struct Act {
    sender: usize,
    /// How it ends: decided with the turn told, accepted only, no answer but decided, no answer and lost on the way.
    end: u8,
}

/// A history of one instance, with the log its senders wrote. Senders 0 and 1 speak HTTP and wait for each answer; sender 2
/// is a device with up to three in flight.
#[derive(Debug, Clone)]
struct History {
    log: Vec<Event>,
    stored: Stored,
}

const DEVICE: usize = 2;

fn send(sender: usize, seq: u64) -> Event {
    let door = if sender == DEVICE { Door::Mqtt } else { Door::Http };
    let (id, sender) = (format!("s{sender}-{seq}"), format!("s{sender}"));
    Event::Sent(Send { sender, instance: "lamp".into(), id, seq, door, ..Send::default() })
}

fn answer(id: &str, what: What, turn: Option<u64>) -> Event {
    let content = turn.map(|_| format!("reply to {id}"));
    let (instance, id) = ("lamp".into(), id.to_owned());
    Event::Answer(Answer { at: None, client: None, instance, id, what, turn, content, code: None })
}

/// Lets an honest instance decide: at once over HTTP, in order of sending over MQTT. The last few accepted ones may wait.
fn honest(acts: &[Act], waiting: usize) -> History {
    let (mut log, mut stored, mut next) = (Vec::new(), Stored::default(), [1u64; 3]);
    let mut in_flight: Vec<(String, u8)> = Vec::new();
    let last = acts.len().saturating_sub(waiting);
    for (at, act) in acts.iter().enumerate() {
        let seq = next[act.sender];
        next[act.sender] += 1;
        log.push(send(act.sender, seq));
        let id = format!("s{}-{seq}", act.sender);
        if act.sender == DEVICE {
            in_flight.push((id, act.end));
            if in_flight.len() == 3 {
                in_flight.drain(..).for_each(|(id, end)| end_of(&id, end, true, &mut log, &mut stored));
            }
        } else {
            end_of(&id, act.end, at < last, &mut log, &mut stored);
        }
    }
    in_flight.drain(..).for_each(|(id, end)| end_of(&id, end, true, &mut log, &mut stored));
    History { log, stored }
}

fn end_of(id: &str, end: u8, may_decide: bool, log: &mut Vec<Event>, stored: &mut Stored) {
    // What comes after one that waits would have to wait too, whatever its end; here nothing decided follows.
    let open = stored.waiting.is_empty() && may_decide;
    let (decided, told) = match end {
        0 | 1 => (open, Some(end == 0 && open)),
        2 => (open, None),
        _ => (false, None),
    };
    if decided {
        let turn = stored.turns.len() as u64 + 1;
        let (id, reply, epoch) = (id.to_owned(), Some(format!("reply to {id}")), Some(turn / 7));
        stored.turns.push(Seen { turn, id, content: None, reply, epoch });
    }
    if let Some(told) = told {
        let turn = told.then_some(stored.turns.len() as u64);
        log.push(answer(id, if told { What::Decided } else { What::Accepted }, turn));
        if !decided {
            stored.waiting.push(Undecided { id: id.to_owned(), content: None });
        }
    }
}

fn judge(history: &History) -> Verdict {
    let mut log = Log::default();
    assert!(history.log.iter().cloned().all(|event| log.push(event)));
    let mut verdict = Verdict::default();
    verdict.check_instance("lamp", log.sent("lamp"), &history.stored);
    verdict
}

fn histories() -> impl Strategy<Value = History> {
    let act = (0usize..3, 0u8..4).prop_map(|(sender, end)| Act { sender, end });
    (prop::collection::vec(act, 4..60), 0usize..4).prop_map(|(acts, waiting)| honest(&acts, waiting))
}

fn renumber(turns: &mut [Seen]) {
    (1..).zip(turns).for_each(|(turn, seen)| (seen.turn, seen.epoch) = (turn, None));
}

/// The ids that were accepted and decided, with the sender's number.
fn accepted(history: &History) -> Vec<String> {
    let answered = |event: &Event| match event {
        Event::Answer(answer) => Some(answer.id.clone()),
        Event::Sent(_) => None,
    };
    let decided = |id: &String| history.stored.turns.iter().any(|seen| seen.id == *id);
    history.log.iter().filter_map(answered).filter(decided).collect()
}

/// Plants a violation; `false` where this history has no room for it.
fn plant(history: &mut History, breach: Breach, which: Index, other: Index) -> bool {
    let accepted = accepted(history);
    let turns = &mut history.stored.turns;
    let Some(id) = (!accepted.is_empty()).then(|| which.get(&accepted)) else { return false };
    let Some(at) = turns.iter().position(|seen| seen.id == *id) else { return false };
    match breach {
        Breach::Lost => {
            turns.remove(at);
            renumber(turns);
            for event in &mut history.log {
                let Event::Answer(answer) = event else { continue };
                answer.turn = None;
            }
        }
        Breach::Doubled => {
            let again = Seen { turn: turns.len() as u64 + 1, epoch: None, ..turns[at].clone() };
            turns.push(again);
        }
        Breach::Moved | Breach::Altered => {
            let told = history.log.iter_mut().filter_map(|event| match event {
                Event::Answer(answer) if answer.turn.is_some() => Some(answer),
                _ => None,
            });
            let mut told: Vec<&mut Answer> = told.collect();
            if told.is_empty() {
                return false;
            }
            let at = other.index(told.len());
            let told = &mut told[at];
            match breach {
                Breach::Moved => told.turn = told.turn.map(|turn| turn + 1),
                _ => told.content = Some("never said".into()),
            }
        }
        Breach::Disordered => {
            // Two accepted ones of one sender change places.
            let sender = id.split('-').next();
            let kin: Vec<usize> = (0..turns.len())
                .filter(|at| turns[*at].id.split('-').next() == sender && accepted.contains(&turns[*at].id))
                .collect();
            let [first, .., last] = kin[..] else { return false };
            let (one, two) = (turns[first].id.clone(), turns[last].id.clone());
            (turns[first].id, turns[last].id) = (two, one);
        }
        Breach::Gaps => {
            if at + 1 == turns.len() {
                return false;
            }
            turns[at + 1..].iter_mut().for_each(|seen| seen.turn += 1);
        }
        Breach::Interleaved => {
            turns[at].epoch = Some(u64::MAX);
            if at + 1 == turns.len() {
                return false;
            }
        }
        Breach::Diverged => return false,
    }
    true
}

proptest! {
    #[test]
    fn an_honest_history_is_clean(history in histories()) {
        let verdict = judge(&history);
        prop_assert!(verdict.is_clean(), "{verdict:#?}");
    }

    #[test]
    fn what_is_planted_is_found(history in histories(), which: Index, other: Index) {
        for breach in Breach::ALL {
            let mut broken = history.clone();
            if plant(&mut broken, breach, which, other) {
                let verdict = judge(&broken);
                if verdict.count(breach) == 0 {
                    return Err(TestCaseError::fail(format!("{breach:?} was not found: {verdict:#?}\n{broken:#?}")));
                }
            }
        }
    }

    #[test]
    fn what_one_node_tells_differently_is_found(history in histories(), which: Index) {
        let turns = &history.stored.turns;
        prop_assume!(!turns.is_empty());
        let mut other = turns.clone();
        let at = which.index(other.len());
        other[at].id.push('x');
        let mut verdict = Verdict::default();
        verdict.check_alike("lamp", turns, &other);
        prop_assert_eq!(verdict.diverged, 1);
    }
}
