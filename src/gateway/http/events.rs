//! Everything that happens to an instance, as a stream: turns from the log, then live, without gap and without repeat.
//!
//! Owns: `GET /v1/instances/{id}/events`. Turns carry their number as the event's id; `Last-Event-ID` (or `after`) goes on
//! behind it. All other events are hints without ids and are not replayed.
//! Invariant: turns are sent in order of their numbers, each once. Tests: `tests/it/http.rs`.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use actix_web::{HttpResponse, http::Method};
use serde_json::json;
use tokio::{sync::broadcast::error::RecvError, time};

use super::{
    Caller, Shared,
    follow::{StepView, TokenView},
    problem::{Problem, Refusal},
    sse::{self, Gone, KEEP_ALIVE, Sink},
    view::{self, DeadLetterView},
};
use crate::{
    instance::events::{Draft, Event},
    store,
    types::{
        InstanceKey, StimulusId, TurnRecord,
        limits::{STREAM_KEEP_ALIVE_SECONDS, STREAM_SECONDS},
    },
};

/// Turns read from the log at once.
const READ: usize = 64;
/// Replayed turns whose own events may still come; the hub keeps no more.
const AHEAD: usize = 256;

/// `GET /v1/instances/{id}/events`.
///
/// # Errors
/// [`Problem`] when the instance may not be read or the cursor is no turn.
pub async fn get(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    let query = caller.query(&["after", "consistency"])?;
    let from = match caller.header("last-event-id") {
        Some(id) => {
            Some(id.parse().map_err(|_| Refusal::Header { name: "last-event-id", why: "is no turn's number" })?)
        }
        None => query.after_turn()?,
    };
    let watch = caller.shared.router.hub().watch(&key);
    let newest = caller.shared.router.store().load(&key).await?.head.turn;
    // A cursor beyond the end comes from before the instance was forgotten: its new history begins at the beginning.
    let last = match from {
        Some(turn) if turn > newest => 0,
        Some(turn) => turn,
        None => newest,
    };
    let (sink, response) = sse::open(&caller.shared.meters, caller.request);
    if caller.request.method() == Method::HEAD {
        return Ok(response); // without a sink the stream ends at once
    }
    let stream = Stream {
        shared: caller.shared.clone(),
        key,
        path: caller.request.path().to_owned(),
        request_id: caller.request_id.to_owned(),
        sink,
        last,
        ahead: VecDeque::new(),
    };
    actix_web::rt::spawn(stream.run(watch));
    Ok(response)
}

struct Stream {
    shared: Arc<Shared>,
    key: InstanceKey,
    path: String,
    request_id: String,
    sink: Sink,
    /// The last turn sent.
    last: u64,
    /// Stimuli whose turn was sent from the log: what the hub still says of them is old.
    ahead: VecDeque<StimulusId>,
}

/// Why a stream ends.
enum End {
    Done,
    Gone,
    Store(store::Error),
}

impl From<Gone> for End {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<store::Error> for End {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

impl Stream {
    async fn run(mut self, watch: crate::instance::events::Watch) {
        let end = tokio::select! {
            end = self.follow(watch) => end,
            () = time::sleep(Duration::from_secs(STREAM_SECONDS)) => return,
        };
        let problem = match end {
            Err(End::Store(error)) => Problem::from(error),
            Err(End::Done) if self.shared.drain.is_draining() => Refusal::Draining.into(),
            Ok(()) | Err(End::Done | End::Gone) => return,
        };
        let frame = sse::frame("error", None, &problem.body(&self.path, &self.request_id));
        drop(self.sink.send(frame).await);
    }

    async fn follow(&mut self, mut watch: crate::instance::events::Watch) -> Result<(), End> {
        self.sink.send(KEEP_ALIVE).await?;
        self.replay().await?;
        self.draft(watch.draft.take()).await?;
        let drain = self.shared.drain.clone();
        let mut tick = time::interval(Duration::from_secs(STREAM_KEEP_ALIVE_SECONDS));
        tick.reset();
        loop {
            tokio::select! {
                event = watch.events.recv() => match event {
                    Ok(event) => self.event(event).await?,
                    Err(RecvError::Lagged(_)) => self.replay().await?,
                    Err(RecvError::Closed) => return Err(End::Done),
                },
                _ = tick.tick() => {
                    self.sink.send(KEEP_ALIVE).await?;
                    self.replay().await?;
                }
                () = drain.draining() => return Err(End::Done),
                () = self.sink.gone() => return Err(End::Gone),
            }
        }
    }

    /// Sends what the log has behind the last turn sent.
    async fn replay(&mut self) -> Result<(), End> {
        loop {
            let turns = self.shared.router.store().turns(&self.key, self.last, READ).await?;
            for turn in &turns {
                self.turn(turn).await?;
                if self.ahead.len() == AHEAD {
                    self.ahead.pop_front();
                }
                self.ahead.push_back(turn.stimulus.id.clone());
            }
            if turns.len() < READ {
                return Ok(());
            }
        }
    }

    /// The answer that was being thought when the watch began, unless its turn was already sent.
    async fn draft(&mut self, draft: Option<Draft>) -> Result<(), End> {
        let Some(draft) = draft.filter(|draft| !self.ahead.contains(&draft.stimulus)) else { return Ok(()) };
        self.step(&draft.stimulus, "thinking").await?;
        for (index, text) in (0u64..).zip(&draft.tokens) {
            self.token(&draft.stimulus, index, text).await?;
        }
        Ok(())
    }

    async fn event(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Turn(turn) if turn.turn == self.last + 1 => self.turn(&turn).await,
            Event::Turn(turn) if turn.turn > self.last => self.replay().await,
            Event::Turn(turn) => {
                self.ahead.retain(|id| *id != turn.stimulus.id);
                Ok(())
            }
            Event::Accepted(id) | Event::Thinking(id) | Event::Restart(id) | Event::Token { stimulus: id, .. }
                if self.ahead.contains(&id) =>
            {
                Ok(())
            }
            Event::Accepted(id) => self.send("accepted", &json!({"stimulus": id})).await,
            Event::Thinking(id) => self.step(&id, "thinking").await,
            Event::Restart(id) => self.step(&id, "restart").await,
            Event::Token { stimulus, index, text } => self.token(&stimulus, index, &text).await,
            Event::Dead(dead) => self.send("dead", &DeadLetterView::from(&*dead)).await,
            Event::Missed => self.replay().await,
            Event::Profile => self.send("profile", &json!({})).await,
            Event::Forgotten => {
                self.send("forgotten", &json!({})).await?;
                Err(End::Done)
            }
        }
    }

    async fn turn(&mut self, turn: &TurnRecord) -> Result<(), End> {
        let frame = sse::frame("turn", Some(&turn.turn.to_string()), &view::turn_json(turn));
        self.sink.send(frame).await?;
        self.last = turn.turn;
        Ok(())
    }

    async fn step(&mut self, stimulus: &StimulusId, step: &str) -> Result<(), End> {
        self.send("step", &StepView { stimulus, step }).await
    }

    async fn token(&mut self, stimulus: &StimulusId, index: u64, text: &str) -> Result<(), End> {
        self.send("token", &TokenView { stimulus, index, text }).await
    }

    async fn send<T: serde::Serialize>(&mut self, name: &str, view: &T) -> Result<(), End> {
        Ok(self.sink.send(sse::event(name, None, view)).await?)
    }
}
