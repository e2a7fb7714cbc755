//! One message and its answer: sent under an id of its own, streamed, and resumed when the stream breaks.
//!
//! Invariant: however often the stream breaks, the message is decided at most once, because every try carries the same id.
//! Tests: at the foot (what events mean), `tests/it/cli.rs` (against a real node).

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};

use super::sse::{Event, Parser};
use crate::{
    cli::{
        Failure,
        door::{self, Door},
    },
    types::{InstanceId, StimulusId},
};

/// For how long a broken stream is taken up again after its last sign of life.
const PATIENCE: Duration = Duration::from_secs(60);
/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Who is shown the answer while it comes.
pub(super) trait View {
    /// The next piece of the answer.
    fn token(&mut self, text: &str);
    /// The pieces so far are void; the answer begins anew.
    fn restart(&mut self);
    /// Something about the connection, such as a broken stream that is taken up again.
    fn notice(&mut self, text: &str);
}

/// What an event of the stream means.
#[derive(Debug, PartialEq)]
enum Meaning {
    Token(String),
    Restart,
    Turn(Value),
    /// A problem, with its status.
    Problem(StatusCode),
    Nothing,
}

fn meaning(event: &Event) -> Meaning {
    let data = || serde_json::from_str::<Value>(&event.data).unwrap_or(Value::Null);
    match event.name.as_str() {
        "token" => Meaning::Token(data()["text"].as_str().unwrap_or_default().to_owned()),
        "step" if data()["step"] == "restart" => Meaning::Restart,
        "turn" => Meaning::Turn(data()),
        "error" => {
            let status = data()["status"].as_u64().and_then(|status| u16::try_from(status).ok());
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            Meaning::Problem(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
        }
        _ => Meaning::Nothing,
    }
}

/// Why one try ended without the answer.
enum Break {
    /// The message cannot be decided; trying again is of no use.
    Final(Failure),
    /// The connection failed or the node asks to come again.
    Again { error: door::Error, after: Option<Duration> },
}

/// Sends a message and returns the turn that answers it.
///
/// Cancel safe in that dropping the future only stops listening: a message that was accepted is decided all the same.
pub(super) async fn ask(door: &Door, instance: &InstanceId, text: &str, view: &mut dyn View) -> Result<Value, Failure> {
    let id = StimulusId::generate();
    let mut last_event = None;
    let mut heard = false;
    let mut since = Instant::now();
    let mut pause = PAUSES.0;
    loop {
        let before = last_event.clone();
        let (error, after) = match one_try(door, instance, text, &id, &mut last_event, &mut heard, view).await {
            Ok(turn) => return Ok(turn),
            Err(Break::Final(failure)) => return Err(failure),
            Err(Break::Again { error, after }) => (error, after),
        };
        if before != last_event {
            (since, pause) = (Instant::now(), PAUSES.0);
        }
        // Nobody there at all is told at once; a stream that was there is waited for.
        let refused = matches!(error, door::Error::Refused { .. });
        if !(heard || refused) || since.elapsed() > PATIENCE {
            return Err(error.into());
        }
        view.notice(&format!("{error}; trying again"));
        tokio::time::sleep(after.unwrap_or(pause).min(PAUSES.1)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn one_try(
    door: &Door,
    instance: &InstanceId,
    text: &str,
    id: &StimulusId,
    last_event: &mut Option<String>,
    heard: &mut bool,
    view: &mut dyn View,
) -> Result<Value, Break> {
    let mut request = door
        .request(Method::POST, &format!("v1/instances/{instance}/stimuli"))
        .header(header::ACCEPT, "text/event-stream")
        .header("idempotency-key", id.as_str())
        .json(&json!({"content": text, "channel": "chat"}));
    if let Some(last) = last_event.as_deref() {
        request = request.header("last-event-id", last);
    }
    let answer = door.send(request).await.map_err(refused)?;
    *heard = true;
    let mut parser = Parser::default();
    let mut bytes = answer.bytes_stream();
    while let Some(part) = bytes.next().await {
        let part = part.map_err(|error| Break::Again { error: door.unreachable(&error), after: None })?;
        let events = parser.feed(&part).map_err(|error| Break::Final(door.strange(error.to_string()).into()))?;
        for event in events {
            match meaning(&event) {
                Meaning::Token(text) => view.token(&text),
                Meaning::Restart => view.restart(),
                Meaning::Turn(turn) => return Ok(turn),
                Meaning::Problem(status) => return Err(refused(door.refusal(status, None, &event.data))),
                Meaning::Nothing => {}
            }
            if event.id.is_some() {
                *last_event = event.id;
            }
        }
    }
    let reason = String::from("the stream ended before the answer");
    Err(Break::Again { error: door::Error::Unreachable { url: door.url().to_owned(), reason }, after: None })
}

fn refused(error: door::Error) -> Break {
    match &error {
        door::Error::Refused { status, retry_after, .. } => {
            let again = matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
            let after = *retry_after;
            if again { Break::Again { error, after } } else { Break::Final(error.into()) }
        }
        door::Error::Unreachable { .. } => Break::Again { error, after: None },
        door::Error::Strange { .. } => Break::Final(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::cli::door::DoorArgs;

    #[test]
    fn events_mean_what_the_door_says() {
        let event = |name: &str, data: &str| Event { id: None, name: name.into(), data: data.into() };
        assert_eq!(meaning(&event("token", r#"{"text":"a"}"#)), Meaning::Token("a".into()));
        assert_eq!(meaning(&event("turn", r#"{"turn":1}"#)), Meaning::Turn(json!({"turn": 1})));
        let draining = Meaning::Problem(StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(meaning(&event("error", r#"{"status":503,"code":"DRAINING"}"#)), draining);
        assert_eq!(meaning(&event("step", r#"{"step":"restart"}"#)), Meaning::Restart);
        assert_eq!(meaning(&event("step", r#"{"step":"thinking"}"#)), Meaning::Nothing);
        assert_eq!(meaning(&event("accepted", "{}")), Meaning::Nothing);
    }

    /// What a view was shown, in order.
    #[derive(Default)]
    struct Seen(Vec<String>);

    impl View for Seen {
        fn token(&mut self, text: &str) {
            self.0.push(text.into());
        }
        fn restart(&mut self) {
            self.0.push("<restart>".into());
        }
        fn notice(&mut self, _text: &str) {
            self.0.push("<notice>".into());
        }
    }

    /// A door that answers one request after the other with these texts, closing the connection after each; it returns the
    /// requests' heads in lower case.
    async fn serve(listener: TcpListener, answers: Vec<String>) -> Vec<String> {
        let mut heads = Vec::new();
        for answer in answers {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.windows(4).any(|four| four == b"\r\n\r\n") {
                assert_ne!(socket.read_buf(&mut head).await.unwrap(), 0);
            }
            heads.push(String::from_utf8_lossy(&head).to_lowercase());
            socket.write_all(answer.as_bytes()).await.unwrap();
            socket.shutdown().await.unwrap();
            // Whatever is left of the request is read, so that closing does not reset the connection.
            let _ = socket.read_to_end(&mut head).await;
        }
        heads
    }

    async fn conversation(answers: &[&str]) -> (Result<Value, Failure>, Vec<String>, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let door = Door::new(&DoorArgs { url, token_env: None }).unwrap();
        let served = tokio::spawn(serve(listener, answers.iter().map(|text| String::from(*text)).collect()));
        let mut seen = Seen::default();
        let answer = ask(&door, &InstanceId::new("i").unwrap(), "hello", &mut seen).await;
        (answer, seen.0, served.await.unwrap())
    }

    fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
        head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

    #[tokio::test]
    async fn a_broken_stream_goes_on_where_it_broke_under_the_same_id() {
        let first = format!(
            "{STREAM}event: accepted\nid: s:0\ndata: {{}}\n\nevent: token\nid: s:1\ndata: {{\"text\":\"he\"}}\n\n"
        );
        let second = format!(
            "{STREAM}event: token\nid: s:2\ndata: {{\"text\":\"llo\"}}\n\nevent: turn\ndata: {{\"turn\":7}}\n\n"
        );
        let (turn, seen, heads) = conversation(&[&first, &second]).await;
        assert_eq!(turn.unwrap()["turn"], 7);
        assert_eq!(seen, ["he", "<notice>", "llo"]);
        let key = |head: &str| header(head, "idempotency-key").unwrap().to_owned();
        assert_eq!(key(&heads[0]), key(&heads[1]));
        assert_eq!(header(&heads[0], "last-event-id"), None);
        assert_eq!(header(&heads[1], "last-event-id"), Some("s:1"));
    }

    #[tokio::test]
    async fn a_refusal_that_may_be_repeated_is_repeated_and_others_end_it() {
        let problem = |status: u16, code: &str| {
            let body = format!("{{\"status\":{status},\"code\":\"{code}\",\"detail\":\"no\"}}");
            format!(
                "HTTP/1.1 {status} X\r\nretry-after: 0\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            )
        };
        let done = format!("{STREAM}event: turn\ndata: {{\"turn\":1}}\n\n");
        let (turn, _, heads) = conversation(&[&problem(503, "DRAINING"), &problem(429, "INBOX_FULL"), &done]).await;
        assert_eq!((turn.unwrap()["turn"].as_u64(), heads.len()), (Some(1), 3));
        let (refused, _, heads) = conversation(&[&problem(403, "FORBIDDEN")]).await;
        assert_eq!((refused.unwrap_err().message.as_str(), heads.len()), ("no (FORBIDDEN)", 1));
        let dead = format!("{STREAM}event: error\ndata: {{\"status\":422,\"code\":\"DEAD\",\"detail\":\"gone\"}}\n\n");
        let (dead, _, _) = conversation(&[&dead]).await;
        assert_eq!(dead.unwrap_err().message, "gone (DEAD)");
    }
}
