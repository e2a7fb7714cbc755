//! The task that writes: takes what waits, makes frames of it, sends them in one pipeline, looks at the answers.
//!
//! Invariant: one pipeline is under way at a time, so that order is kept; a pipeline that fails is not sent again.
//! Tests: `tests/it/bus.rs`.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use redis::{RedisError, RedisResult, Value, aio::MultiplexedConnection};
use tokio::sync::mpsc;

use super::{
    End, Outgoing, Shared,
    order::{Numbers, Sealed},
    pauses,
};

/// Most messages of one pipeline.
const BATCH: usize = 1024;
/// A connection nobody uses is asked this often whether it lives.
const PING: Duration = Duration::from_secs(1);

pub(super) async fn run(shared: Arc<Shared>, mut queue: mpsc::Receiver<Outgoing>) {
    let mut numbers = Numbers::default();
    let mut tries = pauses();
    while !shared.closing.is_cancelled() {
        let end = match shared.connect(shared.options.timeout).await {
            Ok(mut connection) => {
                tries = pauses();
                shared.report(End::Writer, Ok(()));
                serve(&shared, &mut connection, &mut queue, &mut numbers).await
            }
            Err(error) => Err(error),
        };
        let Err(error) = end else { break };
        shared.report(End::Writer, Err(&error));
        let mut dropped = 0;
        while let Ok(outgoing) = queue.try_recv() {
            shared.queued.fetch_sub(outgoing.message.len(), Ordering::AcqRel);
            dropped += 1;
        }
        shared.counts.lost_by_connection.increment(dropped);
        shared.lost(None).await;
        shared.pause(tries.next()).await;
    }
}

/// Sends what waits until the connection breaks; `Ok` when the bus closes and all is sent.
async fn serve(
    shared: &Shared,
    connection: &mut MultiplexedConnection,
    queue: &mut mpsc::Receiver<Outgoing>,
    numbers: &mut Numbers,
) -> RedisResult<()> {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let closing = shared.closing.is_cancelled();
        let taken = tokio::select! {
            biased;
            taken = queue.recv_many(&mut batch, BATCH) => taken,
            () = shared.closing.cancelled(), if !closing => continue,
            // Whoever closes waits no longer than it takes to find the queue empty.
            () = std::future::ready(()), if closing => 0,
            () = tokio::time::sleep(PING) => {
                redis::cmd("PING").exec_async(connection).await?;
                continue;
            }
        };
        if taken == 0 {
            return Ok(());
        }
        let bytes: usize = batch.iter().map(|outgoing| outgoing.message.len()).sum();
        shared.queued.fetch_sub(bytes, Ordering::AcqRel);
        shared.counts.queue.set(queue.len() as f64);
        let Ok(frames) = numbers.seal(&shared.node, batch.drain(..)) else { continue };
        if let Err(error) = write(shared, connection, &frames).await {
            shared.counts.lost_by_connection.increment(frames.iter().map(|sealed| sealed.messages).sum());
            return Err(error);
        }
    }
}

async fn write(shared: &Shared, connection: &mut MultiplexedConnection, frames: &[Sealed]) -> RedisResult<()> {
    let mut pipeline = redis::pipe();
    for Sealed { to, bytes, .. } in frames {
        let command = pipeline.cmd("XADD");
        match to {
            // Without a mailbox there is nobody to read it.
            Some(to) => command.arg(shared.mailbox(to)).arg("NOMKSTREAM"),
            None => command.arg(shared.everybody()),
        };
        command.arg("MAXLEN").arg("~").arg(shared.options.mailbox_entries).arg("*").arg("f").arg(&bytes[..]);
    }
    let answers: Vec<Value> = pipeline.query_async(connection).await?;
    for (sealed, answer) in frames.iter().zip(answers) {
        match answer {
            Value::Nil => {
                shared.counts.lost_by_mailbox.increment(sealed.messages);
                shared.lost(sealed.to.clone()).await;
            }
            Value::ServerError(error) => return Err(RedisError::from(error)),
            _ => {}
        }
    }
    Ok(())
}
