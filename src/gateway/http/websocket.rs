//! MQTT over WebSocket: `/mqtt` with the subprotocol `mqtt`, bridged to the MQTT door's broker.
//!
//! Owns: the upgrade and the bytes of frames. Not here: MQTT itself, which sees one more byte stream (`gateway::mqtt`).
//!
//! Invariants: at most `BUFFER` bytes wait in each direction, then the slower side is waited for; without configured
//! tokens a web page of another site cannot connect through the browser of somebody on this machine.
//! Tests: `tests/it/mqtt.rs`.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use actix_ws::{AggregatedMessage, AggregatedMessageStream, CloseCode, CloseReason, Session};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

use super::{
    Extra, admission,
    problem::{Problem, Refusal},
};
use crate::gateway::{auth::Authenticator, mqtt::embedded::Broker};

/// Bytes between the WebSocket and the broker, in each direction.
const BUFFER: usize = 32 * 1024;
/// Most bytes of one frame to the client, and what an idle connection keeps for it.
const CHUNK: usize = 4096;
/// Largest frame and message taken. MQTT packets may span several.
const MAX_FRAME: usize = 1024 * 1024;

/// The route, for [`super::Parts::extra`].
pub fn route(broker: Arc<Broker>, auth: Arc<Authenticator>) -> Extra {
    Arc::new(move |routes| {
        let (broker, auth) = (broker.clone(), auth.clone());
        let open = move |request: HttpRequest, body: web::Payload| {
            let answer = open(&broker, &auth, &request, body);
            async move { answer }
        };
        routes.route("/mqtt", web::get().to(open));
    })
}

fn open(
    broker: &Arc<Broker>,
    auth: &Authenticator,
    request: &HttpRequest,
    body: web::Payload,
) -> Result<HttpResponse, actix_web::Error> {
    let checked = if auth.has_tokens() { Ok(()) } else { admission::identify(auth, request).map(drop) };
    let peer = checked.and_then(|()| request.peer_addr().ok_or(Refusal::NoCredentials));
    let peer = match peer {
        Ok(peer) => peer,
        Err(refusal) => return Ok(Problem::from(refusal).answer(request.path(), "", false)),
    };
    let (response, session, messages) = actix_ws::handle_with_protocols(request, body, &["mqtt", "mqttv3.1"])?;
    let messages = messages.max_frame_size(MAX_FRAME).aggregate_continuations().max_continuation_size(MAX_FRAME);
    let (near, far) = tokio::io::duplex(BUFFER);
    drop(broker.serve_stream(far, peer));
    let (from_broker, to_broker) = tokio::io::split(near);
    actix_web::rt::spawn(outward(from_broker, session.clone()));
    actix_web::rt::spawn(inward(messages, session, to_broker));
    Ok(response)
}

/// Frames of the client, to the broker. Dropping the writer tells the broker that the client is gone.
async fn inward(mut messages: AggregatedMessageStream, mut session: Session, mut broker: WriteHalf<DuplexStream>) {
    let reason = loop {
        match messages.recv().await {
            Some(Ok(AggregatedMessage::Binary(bytes))) => {
                if broker.write_all(&bytes).await.is_err() {
                    break None;
                }
            }
            Some(Ok(AggregatedMessage::Ping(bytes))) => {
                if session.pong(&bytes).await.is_err() {
                    break None;
                }
            }
            Some(Ok(AggregatedMessage::Pong(_))) => {}
            Some(Ok(AggregatedMessage::Text(_))) => break Some(CloseCode::Unsupported),
            Some(Ok(AggregatedMessage::Close(_))) | None => break None,
            Some(Err(_)) => break Some(CloseCode::Protocol),
        }
    };
    // The broker may have closed already, and the client too: then there is nobody to tell.
    let _ = broker.shutdown().await;
    let _ = session.close(reason.map(CloseReason::from)).await;
}

/// Bytes of the broker, to the client, one frame for what is there at once.
async fn outward(mut broker: ReadHalf<DuplexStream>, mut session: Session) {
    let mut buffer = bytes::BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        match broker.read_buf(&mut buffer).await {
            Ok(read) if read > 0 => {
                if session.binary(buffer.split().freeze()).await.is_err() {
                    return;
                }
            }
            _ => {
                let _ = session.close(None).await;
                return;
            }
        }
    }
}
