//! Bytes of one connection: read into a buffer that is empty while idle, written in batches.
//!
//! Invariants: an idle connection owns no buffer; reading takes at most [`CHUNK`] bytes at once. Not here: packets.
//! Tests: `tests/it/mqtt.rs`.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, timeout},
};

/// Most bytes taken in one read.
const CHUNK: usize = 16 * 1024;

/// A byte stream with its buffers.
#[derive(Debug)]
pub struct Wire<S> {
    stream: S,
    /// Bytes that came and are not decoded yet.
    pub input: BytesMut,
    /// Bytes to be written.
    pub output: BytesMut,
    /// When bytes came last.
    pub last_read: Instant,
    /// Since when the client takes no bytes though there are some.
    pub blocked_since: Option<Instant>,
    needs_flush: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// A stream without bytes.
    pub fn new(stream: S) -> Self {
        let (input, output) = (BytesMut::new(), BytesMut::new());
        Self { stream, input, output, last_read: Instant::now(), blocked_since: None, needs_flush: false }
    }

    /// Reads what is there; 0 is the end.
    pub fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut chunk = [MaybeUninit::<u8>::uninit(); CHUNK];
        let mut chunk = ReadBuf::uninit(&mut chunk);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut chunk))?;
        let read = chunk.filled();
        if self.input.is_empty() {
            // Decoded packets may still hold the old buffer: it is theirs now.
            self.input = BytesMut::with_capacity(read.len());
        }
        self.input.extend_from_slice(read);
        self.last_read = Instant::now();
        Poll::Ready(Ok(read.len()))
    }

    /// Writes what there is to write; ready when nothing is left.
    pub fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(context, &self.output) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    self.output.advance(written);
                    self.blocked_since = None;
                    self.needs_flush = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
        }
        if self.needs_flush {
            ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            self.needs_flush = false;
            self.output = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Waits for bytes; 0 is the end. Cancel safe.
    pub async fn read(&mut self) -> io::Result<usize> {
        std::future::poll_fn(|context| self.poll_read(context)).await
    }

    /// Writes everything and says goodbye, as far as that goes within the time.
    pub async fn close(&mut self, within: Duration) {
        let goodbye = async {
            std::future::poll_fn(|context| self.poll_write(context)).await?;
            self.stream.shutdown().await
        };
        if !matches!(timeout(within, goodbye).await, Ok(Ok(()))) {
            tracing::trace!("an MQTT client did not wait for the goodbye");
        }
    }
}
