//! What the generator sent and was told, as the log the history checker reads: judged at once, or written to a file.
//!
//! Not here: the rules (`check_history`). Tests: at the foot; `tests/it/load.rs` against a stand-in and a real node.

use std::{
    io::{self, BufWriter, Write},
    net::SocketAddr,
    path::Path,
    time::Instant,
};

use reqwest::Url;
use secrecy::SecretString;

use super::{
    super::{
        check_history::{
            self,
            check::Verdict,
            log::{Answer, Event, Log, Send},
            truth::Truth,
        },
        door::Door,
    },
    Error,
    record::{Entry, stimulus_id},
};
use crate::types::Millis;

/// What the generator sent in all runs against one server: the nonce of each run and its entries.
pub type Logs = Vec<(String, Vec<Entry>)>;

/// Holds the log against what the server has stored.
///
/// # Errors
/// When turns cannot be read.
pub async fn check(addr: SocketAddr, token: Option<&str>, prefix: &str, logs: &Logs) -> Result<Verdict, Error> {
    let mut log = Log::default();
    for event in events(logs, prefix, (Instant::now(), Millis(0))) {
        log.push(event);
    }
    let url = Url::parse(&format!("http://{addr}")).map_err(|e| Error::Argument(e.to_string()))?;
    let door = Door::with_token(url, token.map(SecretString::from)).map_err(|e| Error::Server(e.message))?;
    let verdict = check_history::judge(&log, &[Truth::Node(door)]).await;
    verdict.map_err(|e| Error::Server(format!("reading turns back: {e}")))
}

/// Writes the log. `now` is the present on both clocks.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, logs: &Logs, prefix: &str, now: (Instant, Millis)) -> Result<(), Error> {
    let whole = || -> io::Result<()> {
        let mut out = BufWriter::new(std::fs::File::create(path)?);
        for event in events(logs, prefix, now) {
            event.write(&mut out)?;
        }
        out.flush()
    };
    whole().map_err(|e| Error::io(format!("writing {}", path.display()), e))
}

/// The entries as events in the order of time.
fn events<'a>(logs: &'a Logs, prefix: &'a str, now: (Instant, Millis)) -> impl Iterator<Item = Event> + 'a {
    // Entries of one sender are in order, so at one instant the answer to one comes before the next is sent.
    let mut order: Vec<(Instant, usize, usize, bool)> = Vec::new();
    for (run, (_, log)) in logs.iter().enumerate() {
        for (at, entry) in log.iter().enumerate() {
            order.push((entry.sent, run, at, false));
            order.extend(entry.answer.map(|(answered, _)| (answered, run, at, true)));
        }
    }
    order.sort_unstable();
    order.into_iter().filter_map(move |(time, run, at, answered)| {
        let (nonce, entry) = logs.get(run).and_then(|(nonce, log)| Some((nonce, log.get(at)?)))?;
        let ago = i64::try_from(now.0.saturating_duration_since(time).as_millis()).unwrap_or(i64::MAX);
        let (at, client) = (Some(now.1.0.saturating_sub(ago)), Some(nonce.clone()));
        let (instance, id) = (format!("{prefix}{:07}", entry.instance), stimulus_id(nonce, entry.sender, entry.seq));
        let turn = (entry.turn > 0).then_some(u64::from(entry.turn));
        Some(match entry.answer {
            Some((_, what)) if answered => {
                Event::Answer(Answer { at, client, instance, id, what, turn, content: None, code: None })
            }
            _ => {
                let (sender, seq) = (format!("{nonce}-{:05}", entry.sender), u64::from(entry.seq));
                Event::Sent(Send { at, client, sender, instance, id, seq, door: entry.door, ..Send::default() })
            }
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::{
        super::super::check_history::log::{Door, What},
        *,
    };

    #[test]
    fn events_stand_in_the_order_of_time() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let entry = |sender, seq, sent, answer| Entry {
            instance: 7,
            sender,
            seq,
            turn: 3,
            sent: at(sent),
            answer,
            door: Door::Http,
        };
        let first = entry(1, 1, 0, Some((at(5), What::Decided)));
        let logs = vec![("r".into(), vec![first, entry(1, 2, 5, None), entry(2, 1, 2, Some((at(9), What::Refused)))])];
        let all: Vec<Event> = events(&logs, "load-", (at(10), Millis(1010))).collect();
        let short: Vec<(i64, String)> = all
            .iter()
            .map(|event| match event {
                Event::Sent(send) => (send.at.unwrap(), format!("sent {}", send.id)),
                Event::Answer(answer) => (answer.at.unwrap(), format!("{:?} {}", answer.what, answer.id)),
            })
            .collect();
        let (a1, a2, b1) = ("r-00001-000000001", "r-00001-000000002", "r-00002-000000001");
        let expected = [
            (1000, format!("sent {a1}")),
            (1002, format!("sent {b1}")),
            (1005, format!("Decided {a1}")),
            (1005, format!("sent {a2}")),
            (1009, format!("Refused {b1}")),
        ];
        assert_eq!(short, expected);
        let mut log = Log::default();
        assert!(all.into_iter().all(|event| log.push(event)));
        assert_eq!(log.sent("load-0000007").len(), 3);
    }
}
