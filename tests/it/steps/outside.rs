//! What a turn of steps meets outside: a model that calls tools as a plan says, and the tools, which write down each call.
//!
//! At a chosen point it stops answering, so that a test can kill the node just there.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::support::{PATIENCE, wait_until};

/// A moment of a turn as it is seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The model is asked for the answer after so many rounds.
    Model(usize),
    /// The tool is called with this number.
    Tool(usize),
}

/// What happens at the chosen point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// No answer comes.
    Before(Point),
    /// The answer was sent.
    After(Point),
    /// No tool answers.
    Tools,
}

/// What the model says to a round.
#[derive(Debug, Clone)]
pub enum Said {
    /// Words, and calls of tools.
    Answer(&'static str, Vec<(&'static str, Value)>),
    /// Words that end before their end, for this reason.
    Cut(&'static str, &'static str),
    /// An HTTP status.
    Status(u16),
    /// A refusal in the server's words.
    Refused(&'static str),
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct Called {
    pub tool: String,
    pub key: String,
    pub number: usize,
}

#[derive(Default)]
struct Seen {
    asked: Vec<(usize, Value)>,
    called: Vec<Called>,
    given_up: Vec<String>,
    stop: Option<Stop>,
    stopped: bool,
}

type Plan = dyn Fn(usize, usize) -> Said + Send + Sync;

/// The outside.
#[derive(Clone)]
pub struct Outside {
    pub url: String,
    seen: Arc<Mutex<Seen>>,
    gone_on: Arc<Notify>,
    plan: Arc<Plan>,
}

impl Outside {
    /// A model that answers the n-th round, asked the m-th time for it, as `plan` says.
    pub async fn start(plan: impl Fn(usize, usize) -> Said + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let outside = Self { url, seen: Arc::default(), gone_on: Arc::default(), plan: Arc::new(plan) };
        let served = outside.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let served = served.clone();
                tokio::spawn(async move { served.serve(stream).await });
            }
        });
        outside
    }

    /// The settings of a node that thinks with it.
    pub fn config(&self) -> String {
        format!(
            "[faults]\ntools_url = \"{0}\"\n[cognition]\ndefault_engine = \"llm\"\n[cognition.providers.outside]\n\
             base_url = \"{0}/v1\"\nmodel = \"plan\"\n",
            self.url
        )
    }

    /// The rounds the model was asked for, in order.
    pub fn asked(&self) -> Vec<usize> {
        self.seen.lock().unwrap().asked.iter().map(|(round, _)| *round).collect()
    }

    /// What it was asked, in order.
    pub fn bodies(&self) -> Vec<Value> {
        self.seen.lock().unwrap().asked.iter().map(|(_, body)| body.clone()).collect()
    }

    /// The calls of tools, in order.
    pub fn called(&self) -> Vec<Called> {
        self.seen.lock().unwrap().called.clone()
    }

    /// The last words of a user in each question, in order.
    pub fn heard(&self) -> Vec<String> {
        self.bodies().iter().map(last_said).collect()
    }

    /// The same of the questions that hung when whoever asked closed the connection.
    pub fn given_up(&self) -> Vec<String> {
        self.seen.lock().unwrap().given_up.clone()
    }

    /// Lets what waits now go on, and only that.
    pub fn pass(&self) {
        self.gone_on.notify_waiters();
    }

    /// Stops at this moment.
    pub fn stop(&self, stop: Stop) {
        let mut seen = self.seen.lock().unwrap();
        (seen.stop, seen.stopped) = (Some(stop), false);
    }

    /// Waits until it is there.
    pub async fn until_stopped(&self) {
        let what = format!("{:?}", self.seen.lock().unwrap().stop);
        wait_until(&what, PATIENCE, async || self.seen.lock().unwrap().stopped).await;
    }

    /// Goes on, also with what was not answered and still waits.
    pub fn go(&self) {
        let mut seen = self.seen.lock().unwrap();
        (seen.stop, seen.stopped) = (None, false);
        self.gone_on.notify_waiters();
    }

    /// Whether nothing is answered any more.
    fn has_stopped(&self) -> bool {
        self.seen.lock().unwrap().stopped
    }

    /// Whether it stops here, which it does once.
    fn stops(&self, stop: Stop) -> bool {
        let mut seen = self.seen.lock().unwrap();
        let stops = seen.stop == Some(stop) && !seen.stopped;
        seen.stopped |= stops;
        stops
    }

    async fn serve(&self, mut stream: TcpStream) {
        let Some((path, key, body)) = read(&mut stream).await else { return };
        // Told from here on, also before it is waited for.
        let gone_on = self.gone_on.notified();
        let (point, answer) = if path == "/v1/chat/completions" {
            let messages = body["messages"].as_array().unwrap();
            let round = messages.iter().filter(|message| message["tool_calls"].is_array()).count();
            let again = self.asked().iter().filter(|asked| **asked == round).count();
            self.seen.lock().unwrap().asked.push((round, body.clone()));
            (Point::Model(round), spelled(&(self.plan)(round, again)))
        } else {
            let number = usize::try_from(body["n"].as_u64().unwrap_or_default()).unwrap();
            let called = Called { tool: path.trim_start_matches('/').into(), key, number };
            self.seen.lock().unwrap().called.push(called);
            (Point::Tool(number), plain("200 OK", "text/plain", &format!("done {number}")))
        };
        let holds = matches!(point, Point::Tool(_)) && self.seen.lock().unwrap().stop == Some(Stop::Tools);
        if holds || self.has_stopped() || self.stops(Stop::Before(point)) {
            let mut nothing = [0; 64];
            tokio::select! {
                _ = stream.read(&mut nothing) => {
                    if let Point::Model(_) = point {
                        self.seen.lock().unwrap().given_up.push(last_said(&body));
                    }
                    return;
                }
                () = gone_on => {}
            }
        }
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.flush().await;
        self.stops(Stop::After(point));
    }
}

fn last_said(body: &Value) -> String {
    let said = body["messages"].as_array().unwrap().iter().rfind(|message| message["role"] == "user");
    said.and_then(|message| message["content"].as_str()).unwrap_or_default().to_owned()
}

fn plain(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}")
}

/// An answer as an event stream: words in two pieces, calls in three.
fn spelled(said: &Said) -> String {
    let (words, calls, cut) = match said {
        Said::Status(status) => return plain(&format!("{status} No"), "text/plain", "the plan says so"),
        Said::Refused(words) => return plain("400 No", "text/plain", words),
        Said::Answer(words, calls) => (words, calls.as_slice(), None),
        Said::Cut(words, reason) => (words, &[][..], Some(*reason)),
    };
    let mut body = String::new();
    let mut delta = |delta: Value| body += &format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": delta}]}));
    let (first, second) = words.split_at(words.len() / 2);
    for piece in [first, second].into_iter().filter(|piece| !piece.is_empty()) {
        delta(json!({"content": piece}));
    }
    for (index, (name, arguments)) in calls.iter().enumerate() {
        let text = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
        let (first, second) = text.split_at(text.len() / 2);
        let id = format!("call-{index}");
        delta(json!({"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name}}]}));
        for piece in [first, second] {
            delta(json!({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}));
        }
    }
    let reason = cut.unwrap_or(if calls.is_empty() { "stop" } else { "tool_calls" });
    body += &format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}));
    body += "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":10}}\n\ndata: [DONE]\n\n";
    plain("200 OK", "text/event-stream", &body)
}

/// A request: path, idempotency key and body.
async fn read(stream: &mut TcpStream) -> Option<(String, String, Value)> {
    let mut bytes = Vec::new();
    let mut portion = [0; 4096];
    loop {
        let read = stream.read(&mut portion).await.ok()?;
        if read == 0 {
            return None;
        }
        bytes.extend_from_slice(&portion[..read]);
        let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        let header = |name: &str| {
            let line = text
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(field, _)| field.eq_ignore_ascii_case(name));
            line.map(|(_, value)| value.trim().to_owned())
        };
        let length: usize = header("content-length")?.parse().ok()?;
        if bytes.len() >= head + 4 + length {
            let body = serde_json::from_slice(&bytes[head + 4..head + 4 + length]).ok()?;
            let path = text.split(' ').nth(1)?.to_owned();
            return Some((path, header("idempotency-key").unwrap_or_default(), body));
        }
    }
}
