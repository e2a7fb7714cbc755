//! Staying until the end of one stimulus: the wait of a caller, and the loop that two kinds of streams have in common
//! (`follow.rs`, `chat/stream.rs`).
//!
//! Owns: who says that the client listens, and that it left. Not here: what a client is told, and how.
//! Invariants: events of the hub are hints, and the store is asked now and then, so that a lost one delays but loses nothing; a
//! client has left when its connection ended or took nothing, not when the node ends the wait.
//! Tests: `tests/it/http.rs`, `tests/it/openai.rs`, `tests/it/unheard.rs`.

use std::{rc::Rc, sync::Arc, time::Duration};

use tokio::{pin, sync::broadcast::error::RecvError, time};

use super::{
    Caller, Shared,
    follow::dead_letter,
    line::Line,
    problem::{Problem, Refusal},
    sse::{Gone, KEEP_ALIVE, Sink},
};
use crate::{
    instance::{
        ears::Ear,
        events::{Event, Watch},
    },
    store::Known,
    types::{
        InstanceKey, StimulusId, TurnRecord,
        limits::{STREAM_KEEP_ALIVE_SECONDS, STREAM_SECONDS},
    },
};

/// Most waits are over before; a longer one is worth telling.
const SOON: Duration = Duration::from_millis(50);

/// Waits for an end on behalf of the one who sent a stimulus, at most so long. A client that leaves meanwhile is said to have left, also
/// by dropping this; one whose time is over is told to come back.
pub async fn wait<T>(
    caller: &Caller<'_>,
    key: &InstanceKey,
    stimulus: &StimulusId,
    longest: Duration,
    end: impl Future<Output = T>,
) -> Option<T> {
    let mut ear = Some(caller.shared.router.ears().prick(key, stimulus, true));
    let (soon, until, left) = (time::sleep(SOON), time::sleep(longest), left(caller.request.conn_data::<Rc<Line>>()));
    pin!(end, soon, until, left);
    let mut told = false;
    let end = loop {
        tokio::select! {
            biased;
            end = &mut end => break Some(end),
            () = &mut left, if ear.is_some() => drop(ear.take()),
            () = &mut soon, if !told => {
                told = true;
                ear.iter_mut().for_each(Ear::sit);
            }
            () = &mut until => break None,
        }
    };
    match ear {
        Some(ear) if end.is_some() => ear.ended(),
        Some(ear) => ear.keep(),
        None => {}
    }
    end
}

/// Returns when the client's side of a connection has ended. Cancel safe.
async fn left(line: Option<&Rc<Line>>) {
    match line {
        Some(line) => line.ended().await,
        None => std::future::pending().await,
    }
}

/// What a stream about one stimulus stands on.
pub struct Thread {
    /// The door.
    pub shared: Arc<Shared>,
    /// Whose.
    pub key: InstanceKey,
    /// Which.
    pub stimulus: StimulusId,
    /// Where errors are reported to have happened.
    pub path: String,
    /// For the log.
    pub request_id: String,
    /// The way to the client.
    pub sink: Sink,
    /// That it listens; none once it left.
    pub ear: Option<Ear>,
}

impl Thread {
    /// For one call.
    pub fn new(caller: &Caller<'_>, key: InstanceKey, stimulus: StimulusId, sink: Sink, ear: Ear) -> Self {
        Self {
            shared: Arc::clone(caller.shared),
            key,
            stimulus,
            path: caller.request.path().to_owned(),
            request_id: caller.request_id.to_owned(),
            sink,
            ear: Some(ear),
        }
    }

    /// Watches from now on.
    pub fn watch(&self) -> Watch {
        self.shared.router.hub().watch(&self.key)
    }
}

/// Why a stream ends.
pub enum End {
    /// Everything was said.
    Done,
    /// Nobody listens.
    Gone,
}

impl From<Gone> for End {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// Whether a stream goes on.
pub type Flow = Result<(), End>;

/// A stream about one stimulus.
pub trait Tail {
    /// What it stands on.
    fn thread(&mut self) -> &mut Thread;
    /// Something happened to the instance.
    async fn event(&mut self, event: Event, watch: &mut Watch) -> Flow;
    /// Brings the words of the draft that the client does not have.
    async fn catch_up(&mut self, watch: &Watch) -> Flow;
    /// Brings the turn, and with it the end.
    async fn turn(&mut self, turn: &TurnRecord) -> Flow;
    /// Says that there is no turn, which is the end.
    async fn problem(&mut self, problem: Problem) -> Flow;

    /// What is known of the stimulus: its end, if it has one.
    async fn settle(&mut self, known: Option<Known>) -> Flow {
        match known {
            Some(Known::Waiting(_)) => Ok(()),
            Some(Known::Decided(turn)) => self.turn(&turn).await,
            Some(Known::Dead(dead)) => {
                let refusal = dead_letter(&self.thread().key, &dead);
                self.problem(refusal.into()).await
            }
            None => self.problem(Refusal::NoStimulus.into()).await,
        }
    }

    /// Asks the store what became of it.
    async fn ask(&mut self) -> Flow {
        let thread = self.thread();
        match thread.shared.router.store().find(&thread.key, &thread.stimulus).await {
            Ok(known) => self.settle(known).await,
            Err(error) => self.problem(error.into()).await,
        }
    }

    /// Events were missed: watches anew, then sees what became of it in the meantime.
    async fn look_again(&mut self, watch: &mut Watch) -> Flow {
        *watch = self.thread().watch();
        self.ask().await?;
        self.catch_up(watch).await
    }

    /// Now and then: says that the stream lives, and asks the store in case a hint was lost.
    async fn still_there(&mut self) -> Flow {
        self.thread().sink.send(KEEP_ALIVE).await?;
        self.ask().await
    }

    /// Goes on to the end from what is known. The watch began before that was asked for, so nothing lies between them.
    async fn go_on(&mut self, mut watch: Watch, known: Known) {
        let end = match self.follow(&mut watch, known).await {
            Err(End::Gone) => None,
            Ok(()) | Err(End::Done) => self.thread().ear.take(),
        };
        // Who is gone has left with the thread.
        end.into_iter().for_each(Ear::ended);
    }

    /// As [`Tail::go_on`]. Well when the node ends the stream.
    async fn follow(&mut self, watch: &mut Watch, known: Known) -> Flow {
        self.settle(Some(known)).await?;
        self.catch_up(watch).await?;
        let drain = self.thread().shared.drain.clone();
        let end = time::sleep(Duration::from_secs(STREAM_SECONDS));
        pin!(end);
        let mut tick = time::interval(Duration::from_secs(STREAM_KEEP_ALIVE_SECONDS));
        tick.reset();
        loop {
            let thread = self.thread();
            let listens = thread.ear.is_some();
            tokio::select! {
                event = watch.events.recv() => match event {
                    Ok(event) => self.event(event, watch).await?,
                    Err(RecvError::Lagged(_)) => self.look_again(watch).await?,
                    Err(RecvError::Closed) => self.problem(Refusal::Draining.into()).await?,
                },
                _ = tick.tick() => self.still_there().await?,
                () = drain.draining() => self.problem(Refusal::Draining.into()).await?,
                () = left(thread.sink.line()), if listens => drop(self.thread().ear.take()),
                () = thread.sink.gone() => return Err(End::Gone),
                () = &mut end => return Ok(()),
            }
        }
    }
}
