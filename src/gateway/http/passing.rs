//! Streams end when their caller's right to be here ends.
//!
//! Owns: the body that looks after that. Not here: when a right ends (`gateway::auth`), answers that are whole at once: those
//! are given to whoever was let in when asking.
//!
//! Invariant: a stream cut short does not look whole: it ends with an error, so the connection is closed without the last chunk.
//! Tests: `tests/it/tokens.rs`.

use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll},
};

use actix_web::{
    HttpResponse,
    body::{BodySize, BoxBody, MessageBody},
};
use bytes::Bytes;

use crate::gateway::auth::Pass;

/// The caller's token was taken away.
#[derive(Debug, thiserror::Error)]
#[error("the caller's token was taken away")]
struct TokenTakenAway;

/// Ties a stream to its caller's right; other answers are as they were.
pub fn bound(response: HttpResponse, pass: &Pass) -> HttpResponse {
    if response.body().size() != BodySize::Stream {
        return response;
    }
    let over = Box::pin(pass.over());
    response.map_body(|_, body| BoxBody::new(Passing { body, over }))
}

struct Passing {
    body: BoxBody,
    over: Pin<Box<dyn Future<Output = ()>>>,
}

impl MessageBody for Passing {
    type Error = Box<dyn Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        if self.over.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(TokenTakenAway.into())));
        }
        Pin::new(&mut self.body).poll_next(context)
    }
}
