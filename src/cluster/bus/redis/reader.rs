//! The task that reads: keeps the node's mailbox, takes what stands in it and in the broadcasts, trims behind itself.
//!
//! Invariants: a position only grows, but for a stream that was made anew; what cannot be read is counted and passed over.
//! Tests: at the foot; `tests/it/bus.rs`.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use redis::{ErrorKind, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use tokio::sync::mpsc::WeakSender;

use super::{End, MAILBOX_SECONDS, Outgoing, Shared, order::Seen, pauses};
use crate::{
    cluster::{
        PROTOCOL,
        bus::{
            Inbound, Message,
            frame::{self, Unreadable},
            message::Unread,
        },
    },
    types::NodeId,
};

/// Longest wait of Redis for something to read.
const BLOCK: Duration = Duration::from_secs(1);
/// Most entries read at once.
const COUNT: usize = 256;
/// The mailbox is trimmed after so many bytes were read, or
const TRIM_BYTES: usize = 4 * 1024 * 1024;
/// after this long, when its life is prolonged as well.
const UPKEEP: Duration = Duration::from_secs(5);
/// Most nodes that speak otherwise that are remembered.
const STRANGERS: usize = 1024;
/// Broadcasts are kept so long for nodes that are behind, in milliseconds.
const BROADCASTS_MS: u64 = 30_000;

/// Where an entry stands in a stream: milliseconds of Redis' clock, and a number among those of one millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Position(u64, u64);

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

impl Position {
    fn parse(text: &[u8]) -> Option<Self> {
        let (ms, number) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(Self(ms.parse().ok()?, number.parse().ok()?))
    }
}

/// What the reader remembers over connections.
struct Reading {
    mailbox: Position,
    /// `None` until the first connection: only what is said from then on matters.
    everybody: Option<Position>,
    seen: Seen,
    /// Lives of nodes that said what this one cannot read, or cannot read what this one says; each is logged once.
    strangers: BTreeSet<NodeId>,
    queue: WeakSender<Outgoing>,
    /// Redis' clock in milliseconds at an instant of ours.
    clock: (u64, Instant),
    unread: usize,
    kept: Instant,
}

pub(super) async fn run(shared: Arc<Shared>, queue: WeakSender<Outgoing>) {
    let now = Instant::now();
    let mut reading = Reading {
        mailbox: Position::default(),
        everybody: None,
        seen: Seen::default(),
        strangers: BTreeSet::new(),
        queue,
        clock: (0, now),
        unread: 0,
        kept: now,
    };
    let mut tries = pauses();
    while !shared.closing.is_cancelled() {
        let error = match shared.connect(BLOCK + shared.options.timeout).await {
            Err(error) => error,
            Ok(mut connection) => {
                let (mut stood, mut end) = (false, reading.begin(&shared, &mut connection).await);
                if end.is_ok() {
                    (tries, stood) = (pauses(), true);
                    shared.report(End::Reader, Ok(()));
                    end = serve(&shared, &mut connection, &mut reading).await;
                }
                match end {
                    Ok(()) => return,
                    // Positions are kept: one that stood is tried again before anybody is told.
                    Err(_) if stood => continue,
                    Err(error) => error,
                }
            }
        };
        shared.report(End::Reader, Err(&error));
        shared.pause(tries.next()).await;
    }
}

/// Reads until the connection breaks; `Ok` when the bus closes.
async fn serve(shared: &Shared, connection: &mut MultiplexedConnection, reading: &mut Reading) -> RedisResult<()> {
    let (mailbox, everybody) = (shared.mailbox(&shared.node), shared.everybody());
    loop {
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(COUNT).arg("BLOCK").arg(BLOCK.as_millis() as u64).arg("STREAMS");
        read.arg(&mailbox).arg(&everybody);
        read.arg(reading.mailbox.to_string()).arg(reading.everybody.unwrap_or_default().to_string());
        let answer: Value = tokio::select! {
            answer = read.query_async(connection) => answer?,
            () = shared.closing.cancelled() => {
                // The connection waits for what is read: leave by another.
                if let Ok(mut last) = shared.connect(shared.options.timeout).await {
                    let _ = redis::cmd("UNLINK").arg(&mailbox).exec_async(&mut last).await;
                }
                return Ok(());
            }
        };
        for (stream, entries) in streams(answer) {
            let to_all = stream == everybody.as_bytes();
            for (position, bytes) in entries {
                match to_all {
                    true => reading.everybody = Some(position),
                    false => reading.mailbox = position,
                }
                reading.unread += bytes.len();
                reading.take(shared, position, to_all, &bytes).await;
            }
        }
        if reading.unread > TRIM_BYTES || reading.kept.elapsed() > UPKEEP {
            reading.keep(shared, connection).await?;
        }
    }
}

impl Reading {
    /// Makes the mailbox if there is none, and finds where to go on.
    async fn begin(&mut self, shared: &Shared, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        self.keep(shared, connection).await?;
        let everybody = last(connection, &shared.everybody()).await?.unwrap_or_default();
        // A stream that ends before what was read of it was made anew: all of it is new.
        self.everybody = Some(match self.everybody {
            None => everybody,
            Some(read) if everybody < read => Position::default(),
            Some(read) => read,
        });
        if last(connection, &shared.mailbox(&shared.node)).await?.is_none_or(|last| last < self.mailbox) {
            self.mailbox = Position::default();
        }
        Ok(())
    }

    /// Trims what was read and broadcasts that are old, prolongs the life of the streams, makes the mailbox if it is gone,
    /// reads Redis' clock.
    async fn keep(&mut self, shared: &Shared, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let (mailbox, everybody) = (shared.mailbox(&shared.node), shared.everybody());
        let old = self.now().saturating_sub(BROADCASTS_MS);
        let (_, there, _, _, (seconds, micros)): (Value, u64, Value, Value, (u64, u64)) = redis::pipe()
            .cmd("XTRIM")
            .arg(&mailbox)
            .arg("MINID")
            .arg(self.mailbox.to_string())
            .cmd("EXPIRE")
            .arg(&mailbox)
            .arg(MAILBOX_SECONDS)
            .cmd("XTRIM")
            .arg(&everybody)
            .arg("MINID")
            .arg("~")
            .arg(old)
            .cmd("EXPIRE")
            .arg(&everybody)
            .arg(MAILBOX_SECONDS)
            .cmd("TIME")
            .query_async(connection)
            .await?;
        self.clock = (seconds * 1000 + micros / 1000, Instant::now());
        self.unread = 0;
        self.kept = Instant::now();
        if there == 0 {
            let was_there = self.mailbox != Position::default();
            redis::pipe()
                .cmd("XADD")
                .arg(&mailbox)
                .arg("*")
                .arg("f")
                .arg("")
                .cmd("EXPIRE")
                .arg(&mailbox)
                .arg(MAILBOX_SECONDS)
                .exec_async(connection)
                .await?;
            self.mailbox = Position::default();
            if was_there {
                // What others sent meanwhile, answers among it, went nowhere.
                shared.lost(None).await;
            }
        }
        Ok(())
    }

    /// A node speaks a newer version: it is told, so that it need not wait for what this one will never answer.
    fn answer_newer(&mut self, shared: &Shared, version: u8, bytes: &[u8]) {
        unreadable(shared, &Unreadable::Newer(version));
        let Some(from) = frame::sender(bytes).filter(|from| *from != shared.node) else { return };
        if self.is_stranger(&from) {
            tracing::warn!(%from, version, reads = %PROTOCOL, "it speaks a newer bus than this build reads: upgrade this node");
        }
        let said = Message::Unread(Unread { version, reads: PROTOCOL });
        if let Some(queue) = self.queue.upgrade() {
            // Refused: the other one has deadlines.
            let _ = shared.queue(&queue, Some(&from), &said);
        }
    }

    /// What this node sent was not read: whoever waits for an answer to it goes another way at once.
    async fn hear_unread(&mut self, shared: &Shared, from: &NodeId, Unread { version, reads }: Unread) {
        if self.is_stranger(from) {
            tracing::warn!(%from, version, %reads, "it cannot read what this build says on the bus: upgrade that node");
        }
        shared.lost(Some(from.clone())).await;
    }

    /// Whether it is news that this life of a node speaks otherwise.
    fn is_stranger(&mut self, node: &NodeId) -> bool {
        if self.strangers.len() >= STRANGERS {
            self.strangers.clear();
        }
        self.strangers.insert(node.clone())
    }

    /// Redis' clock in milliseconds.
    fn now(&self) -> u64 {
        self.clock.0 + u64::try_from(self.clock.1.elapsed().as_millis()).unwrap_or(0)
    }

    async fn take(&mut self, shared: &Shared, position: Position, to_all: bool, bytes: &[u8]) {
        if bytes.is_empty() {
            return; // the entry a mailbox begins with
        }
        let (header, messages) = match frame::open(bytes) {
            Ok(opened) => opened,
            Err(Unreadable::Newer(version)) => return self.answer_newer(shared, version, bytes),
            Err(error) => return unreadable(shared, &error),
        };
        if header.from == shared.node && to_all {
            return;
        }
        if !self.seen.admits(&header, to_all) {
            return shared.counts.late.increment(1);
        }
        let age_ms = self.now().saturating_sub(position.0);
        for message in messages {
            match message {
                Ok(Message::Unread(unread)) => self.hear_unread(shared, &header.from, unread).await,
                Ok(message) => {
                    shared.counts.received[message.number()].increment(1);
                    let inbound = Inbound::Message { from: header.from.clone(), age_ms, message };
                    // Nobody reads any more when the node stops.
                    let _ = shared.inlet.send(inbound).await;
                }
                Err(error) => unreadable(shared, &error),
            }
        }
    }
}

fn unreadable(shared: &Shared, error: &Unreadable) {
    shared.counts.unreadable.increment(1);
    tracing::debug!(%error, "what another node sent cannot be read");
}

/// The last position ever given in a stream; `None` when there is no such stream.
async fn last(connection: &mut MultiplexedConnection, key: &str) -> RedisResult<Option<Position>> {
    let info: RedisResult<Value> = redis::cmd("XINFO").arg("STREAM").arg(key).query_async(connection).await;
    match info {
        Ok(info) => {
            let items = match info {
                Value::Array(items) => items,
                Value::Map(pairs) => pairs.into_iter().flat_map(|(name, value)| [name, value]).collect(),
                _ => Vec::new(),
            };
            let named = |name: &Value| matches!(text(name), Some(b"last-generated-id"));
            let at = items.iter().step_by(2).position(named).map(|at| at * 2 + 1);
            let position = at.and_then(|at| items.get(at)).and_then(text).and_then(Position::parse);
            position
                .map(Some)
                .ok_or_else(|| RedisError::from((ErrorKind::Parse, "XINFO STREAM without last-generated-id")))
        }
        Err(error) if error.detail().is_some_and(|detail| detail.contains("no such key")) => Ok(None),
        Err(error) => Err(error),
    }
}

fn text(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// The entries of one stream: where each stands, and its frame.
type Entries = Vec<(Position, Vec<u8>)>;

/// What `XREAD` answers: for each stream with something new its key and entries. What has another shape is left out.
fn streams(answer: Value) -> Vec<(Vec<u8>, Entries)> {
    let pairs: Vec<(Value, Value)> = match answer {
        Value::Array(streams) => streams.into_iter().filter_map(pair).collect(),
        Value::Map(streams) => streams,
        _ => Vec::new(),
    };
    let read = |(key, entries)| {
        let (Value::BulkString(key), Value::Array(entries)) = (key, entries) else { return None };
        Some((key, entries.into_iter().filter_map(entry).collect()))
    };
    pairs.into_iter().filter_map(read).collect()
}

fn pair(value: Value) -> Option<(Value, Value)> {
    let Value::Array(items) = value else { return None };
    let [first, second] = <[Value; 2]>::try_from(items).ok()?;
    Some((first, second))
}

fn entry(value: Value) -> Option<(Position, Vec<u8>)> {
    let (id, fields) = pair(value)?;
    let position = Position::parse(text(&id)?)?;
    // One that was trimmed meanwhile has no fields, and passes like the empty one a mailbox begins with.
    let bytes = match pair(fields) {
        Some((_, Value::BulkString(bytes))) => bytes,
        _ => Vec::new(),
    };
    Some((position, bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    #[test]
    fn what_redis_answers_is_read_and_what_is_strange_is_passed_over() {
        let entry = |id: &str, fields| Value::Array(vec![bulk(id), fields]);
        let frame = Value::Array(vec![bulk("f"), bulk("frame")]);
        let entries = Value::Array(vec![
            entry("5-1", frame.clone()),
            entry("5-2", Value::Nil),
            entry("none", frame),
            Value::Int(3),
        ]);
        let expected: Vec<(Vec<u8>, Entries)> =
            vec![(b"box".to_vec(), vec![(Position(5, 1), b"frame".to_vec()), (Position(5, 2), Vec::new())])];
        assert_eq!(streams(Value::Array(vec![Value::Array(vec![bulk("box"), entries.clone()])])), expected);
        assert_eq!(streams(Value::Map(vec![(bulk("box"), entries)])), expected);
        assert_eq!(streams(Value::Nil), []);
    }

    #[test]
    fn positions_are_in_order() {
        let position = |text: &str| Position::parse(text.as_bytes());
        assert!(position("9-2") < position("10-0") && position("10-0") < position("10-1"));
        assert_eq!(position("10-1").unwrap().to_string(), "10-1");
        assert!(position("10").is_none() && position("a-b").is_none());
    }
}
