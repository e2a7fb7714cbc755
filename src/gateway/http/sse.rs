//! Server-sent events: how one is spelled, and the bounded way to a client that may be slow or gone.
//!
//! Invariants: a frame is never split; at most [`FRAMES`] frames wait for a client; a client that takes nothing for
//! [`STREAM_STALL_SECONDS`] loses the stream, and resumes. Tests: at the foot; `tests/it/http.rs`.

use std::{rc::Rc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{
        StatusCode,
        header::{self, HeaderValue},
    },
};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    line::{Hold, Line},
    meters::{Meters, StreamGuard},
    view,
};
use crate::types::limits::STREAM_STALL_SECONDS;

/// Frames that may wait for a slow client.
const FRAMES: usize = 32;

/// A comment, which says that the stream lives.
pub const KEEP_ALIVE: Bytes = Bytes::from_static(b":\n\n");

/// The client is gone or takes nothing.
#[derive(Debug)]
pub struct Gone;

/// The way to one client.
pub struct Sink {
    frames: mpsc::Sender<Bytes>,
    line: Option<Rc<Line>>,
    _open: StreamGuard,
}

impl Sink {
    /// Hands a frame to the client's connection, waiting while too many are in hand. Cancel safe.
    ///
    /// # Errors
    /// [`Gone`] ends the stream.
    pub async fn send(&self, frame: Bytes) -> Result<(), Gone> {
        self.frames.send_timeout(frame, Duration::from_secs(STREAM_STALL_SECONDS)).await.map_err(|_| Gone)
    }

    /// Its connection.
    pub const fn line(&self) -> Option<&Rc<Line>> {
        self.line.as_ref()
    }

    /// Returns when the client is gone. Cancel safe.
    pub async fn gone(&self) {
        self.frames.closed().await;
    }
}

/// Begins a stream: the answer, and the way to fill it.
pub fn open(meters: &Meters, request: &HttpRequest) -> (Sink, HttpResponse) {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(FRAMES);
    let line = request.conn_data::<Rc<Line>>().cloned();
    let in_hand = line.as_ref().map(Hold::new);
    let body = stream::poll_fn(move |context| {
        let _ = &in_hand; // lives as long as the body does
        receiver.poll_recv(context).map(|frame| frame.map(Ok::<_, actix_web::Error>))
    });
    let mut response = HttpResponse::build(StatusCode::OK);
    response
        .insert_header((header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")))
        .insert_header((header::CACHE_CONTROL, HeaderValue::from_static("no-store")))
        .insert_header(("x-accel-buffering", "no"));
    (Sink { frames: sender, line, _open: meters.stream() }, response.streaming(body))
}

/// One event with a view as its data.
pub fn event<T: Serialize>(name: &str, id: Option<&str>, view: &T) -> Bytes {
    frame(name, id, &view::to_json(view))
}

/// One event. Line breaks between the values of stored JSON become lines of the same event.
pub fn frame(name: &str, id: Option<&str>, data: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(name.len() + id.map_or(0, str::len) + data.len() + 32);
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    if let Some(id) = id {
        out.extend_from_slice(b"\nid: ");
        out.extend_from_slice(id.as_bytes());
    }
    for line in data.split(|byte| matches!(byte, b'\n' | b'\r')) {
        out.extend_from_slice(b"\ndata: ");
        out.extend_from_slice(line);
    }
    out.extend_from_slice(b"\n\n");
    out.into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_spelled_line_by_line() {
        assert_eq!(frame("turn", Some("7"), b"{}"), "event: turn\nid: 7\ndata: {}\n\n");
        assert_eq!(frame("step", None, b"[1,\r\n2]"), "event: step\ndata: [1,\ndata: \ndata: 2]\n\n");
    }
}
