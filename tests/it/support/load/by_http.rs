//! Senders over HTTP.

use std::{sync::Arc, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use sophont::cli::check_history::log::{By, Send, What};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::{
    super::{Http, wait_for},
    Book, Shape, UNTIL_ACCEPTED,
};

/// Of so many stimuli one goes through another door than the last, even if that one answers.
const HOPS: u64 = 4;

/// One sender to one instance.
pub struct Sender {
    book: Arc<Book>,
    doors: Vec<Http>,
    door: usize,
    patience: Duration,
    pace: Option<Interval>,
    instance: String,
    name: String,
}

/// What came of one try.
enum Try {
    Decided(Value),
    Accepted,
    /// Not taken, or nobody knows; to be repeated.
    Again(What),
}

impl Sender {
    pub fn new(book: Arc<Book>, doors: Vec<Http>, shape: &Shape, instance: String, name: String) -> Self {
        let pace = (!shape.pace.is_zero()).then(|| {
            let mut pace = interval(shape.pace);
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            pace
        });
        // Senders begin at different doors.
        let door = name.bytes().map(usize::from).sum::<usize>() % doors.len().max(1);
        Self { book, doors, door, patience: shape.patience, pace, instance, name }
    }

    /// Waits until it may send its next one; `false` when the load ends.
    async fn may_go_on(&mut self) -> bool {
        if let Some(pace) = &mut self.pace {
            pace.tick().await;
        }
        !self.book.is_stopping()
    }

    fn sends(&self, seq: u64, by: By) -> String {
        let id = format!("{}-{seq}", self.name);
        let (sender, instance) = (self.name.clone(), self.instance.clone());
        self.book.sends(Send { sender, instance, id: id.clone(), seq, by, ..Send::default() });
        id
    }

    fn accepted(&self, id: &str, turn: Option<&Value>) {
        let what = if turn.is_some() { What::Decided } else { What::Accepted };
        let content = turn.and_then(|turn| turn["reply"]["content"].as_str()).map(str::to_owned);
        let number = turn.map(|turn| turn["turn"].as_u64().expect("the turn's number"));
        self.book.served_now(&self.instance);
        self.book.answered(&self.instance, id, what, number, content);
    }

    /// One in flight, repeated until accepted.
    pub async fn ordered(mut self, wait: &'static str) {
        for seq in 1.. {
            if !self.may_go_on().await {
                return;
            }
            if seq % HOPS == 0 {
                self.door += 1;
            }
            let id = self.sends(seq, By::Id);
            let turn = self.until_accepted(&id, wait).await;
            self.accepted(&id, turn.as_ref());
        }
    }

    /// One in flight, without an id: sent once, and if there is no answer nobody knows.
    pub async fn nameless(mut self) {
        for seq in 1.. {
            if !self.may_go_on().await {
                return;
            }
            let text = self.sends(seq, By::Content);
            match self.try_once(&json!({"content": text}), "?wait=5").await {
                Try::Decided(turn) => self.accepted(&text, Some(&turn)),
                Try::Accepted => self.accepted(&text, None),
                Try::Again(what) => {
                    self.door += 1;
                    self.book.answered(&self.instance, &text, what, None, None);
                }
            }
        }
    }

    /// The same over two connections at once.
    pub async fn twins(mut self) {
        for seq in 1.. {
            if !self.may_go_on().await {
                return;
            }
            let id = self.sends(seq, By::Id);
            let mut other = self.twin();
            let (one, two) = tokio::join!(self.until_accepted(&id, "?wait=5"), other.until_accepted(&id, "?wait=5"));
            self.accepted(&id, one.as_ref());
            self.accepted(&id, two.as_ref());
        }
    }

    /// The same sender at the next door.
    fn twin(&self) -> Self {
        let (book, doors) = (Arc::clone(&self.book), self.doors.clone());
        let (instance, name) = (self.instance.clone(), self.name.clone());
        Self { book, doors, door: self.door + 1, patience: self.patience, pace: None, instance, name }
    }

    /// Repeats a stimulus until it is accepted; the turn, when the answer tells it.
    async fn until_accepted(&mut self, id: &str, wait: &str) -> Option<Value> {
        let body = json!({"id": id, "content": id});
        wait_for(&format!("{id} is accepted"), UNTIL_ACCEPTED, async || match self.try_once(&body, wait).await {
            Try::Decided(turn) => {
                assert_eq!(turn["stimulus"]["id"], id, "{} answered with another one's turn: {turn}", self.instance);
                Some(Some(turn))
            }
            Try::Accepted => Some(None),
            Try::Again(_) => {
                self.door += 1;
                None
            }
        })
        .await
    }

    async fn try_once(&self, body: &Value, wait: &str) -> Try {
        let http = &self.doors[self.door % self.doors.len()];
        let path = format!("/v1/instances/{}/stimuli{wait}", self.instance);
        let request = http.request(Method::POST, &path).timeout(self.patience).json(body);
        let Ok(answer) = Http::try_send(request).await else { return Try::Again(What::Timeout) };
        match answer.status.as_u16() {
            200 => Try::Decided(answer.json()),
            202 => Try::Accepted,
            429 | 503 => Try::Again(What::Refused),
            504 => Try::Again(What::Timeout),
            _ => {
                self.book.is_surprised(format!("{body}: {} {}", answer.status, answer.text));
                Try::Again(What::Timeout)
            }
        }
    }
}
