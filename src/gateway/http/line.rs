//! One connection's patience: who holds a connection without asking anything, or takes nothing of its answer, is let go.
//!
//! The HTTP library bounds the first head and idle connections. It does not bound a later head of which only the beginning
//! came, nor an answer that its client does not read; both would hold a connection for ever. Here each thread looks over its
//! connections once a second, so that a request costs no timer of its own.
//!
//! Invariants: a connection with a request in hand, a stream or a WebSocket is never late for its head; time is counted in
//! seconds of the thread. Tests: at the foot; `tests/it/hostile.rs` (`slow_clients_are_let_go`).

use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use actix_web::rt::net::TcpStream;
use slab::Slab;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};

use crate::types::limits::STREAM_STALL_SECONDS;

/// How long a connection may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the head of a request, from its first byte, in seconds.
    pub head: u64,
    /// For taking some of an answer, in seconds.
    pub answer: u64,
}

impl Patience {
    /// With the configured time for heads. The library's own timer of the first head, which answers, comes first.
    pub const fn new(header_seconds: u64) -> Self {
        Self { head: header_seconds.saturating_add(1), answer: STREAM_STALL_SECONDS }
    }
}

/// What is known of one connection.
#[derive(Debug, Default)]
pub struct Line {
    /// Requests, streams and WebSockets in hand.
    busy: Cell<u32>,
    /// When something was heard that is no whole request yet.
    heard: Cell<Option<u64>>,
    /// Since when the client takes nothing.
    stuck: Cell<Option<u64>>,
    late: Cell<bool>,
    /// The client's side has ended: it is gone, or sends nothing more.
    ended: Cell<bool>,
    end: Notify,
    waker: RefCell<Option<Waker>>,
}

impl Line {
    fn is_late(&self, now: u64, patience: Patience) -> bool {
        let passed = |since: Option<u64>, limit: u64| since.is_some_and(|since| now.saturating_sub(since) > limit);
        (self.busy.get() == 0 && passed(self.heard.get(), patience.head)) || passed(self.stuck.get(), patience.answer)
    }

    /// Remembers whom to wake. The task of a connection stays the same, so this seldom clones.
    fn remember(&self, waker: &Waker) {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    /// Returns when the client's side has ended. Cancel safe.
    pub async fn ended(&self) {
        if !self.ended.get() {
            self.end.notified().await;
        }
    }

    fn expire(&self) {
        self.late.set(true);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// A request or stream in hand, for as long as it lives.
pub struct Hold(Rc<Line>);

impl Hold {
    /// Takes hold of a connection.
    pub fn new(line: &Rc<Line>) -> Self {
        line.busy.set(line.busy.get() + 1);
        line.heard.set(None);
        Self(Rc::clone(line))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.busy.set(self.0.busy.get().saturating_sub(1));
    }
}

/// The connections of one thread.
pub struct Ward {
    patience: Patience,
    /// Seconds since the thread began.
    now: Cell<u64>,
    lines: RefCell<Slab<Rc<Line>>>,
}

impl Ward {
    /// Begins to look over connections. Must be called on the thread that serves them.
    pub fn start(patience: Patience) -> Rc<Self> {
        let ward = Rc::new(Self { patience, now: Cell::new(0), lines: RefCell::default() });
        actix_web::rt::spawn(look_over(Rc::downgrade(&ward)));
        ward
    }

    /// Takes a connection.
    pub fn admit(self: &Rc<Self>, io: TcpStream) -> (Patient, Option<SocketAddr>) {
        // A connection that broke before it was admitted is noticed when it is read.
        let _ = io.set_nodelay(true);
        let peer = io.peer_addr().ok();
        let line = Rc::new(Line::default());
        let key = self.lines.borrow_mut().insert(Rc::clone(&line));
        (Patient { io, line, ward: Rc::clone(self), key }, peer)
    }

    fn tick(&self) {
        self.now.set(self.now.get() + 1);
        for (_, line) in &*self.lines.borrow() {
            if line.is_late(self.now.get(), self.patience) {
                line.expire();
            }
        }
    }
}

async fn look_over(ward: Weak<Ward>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        match ward.upgrade() {
            Some(ward) => ward.tick(),
            None => return,
        }
    }
}

/// A connection that is let go when it is late.
pub struct Patient {
    io: TcpStream,
    line: Rc<Line>,
    ward: Rc<Ward>,
    key: usize,
}

impl Patient {
    /// What is known of it.
    pub fn line(&self) -> &Rc<Line> {
        &self.line
    }

    fn check(&self, waker: &Waker) -> io::Result<()> {
        if self.line.late.get() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.line.remember(waker);
        Ok(())
    }
}

impl Drop for Patient {
    fn drop(&mut self) {
        self.ward.lines.borrow_mut().try_remove(self.key);
    }
}

impl AsyncRead for Patient {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check(cx.waker())?;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        if buf.filled().len() > before && this.line.busy.get() == 0 && this.line.heard.get().is_none() {
            this.line.heard.set(Some(this.ward.now.get()));
        }
        let nothing = buf.filled().len() == before && buf.remaining() > 0;
        if matches!(&read, Poll::Ready(read) if read.is_err() || nothing) && !this.line.ended.replace(true) {
            this.line.end.notify_waiters();
        }
        read
    }
}

impl AsyncWrite for Patient {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check(cx.waker())?;
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        match &written {
            Poll::Ready(_) => {
                this.line.stuck.set(None);
                this.line.heard.set(None);
                // From here on the connection speaks another protocol, which keeps its own time.
                if buf.starts_with(b"HTTP/1.1 101") {
                    this.line.busy.set(this.line.busy.get() + 1);
                }
            }
            Poll::Pending if this.line.stuck.get().is_none() => this.line.stuck.set(Some(this.ward.now.get())),
            Poll::Pending => {}
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience { head: 10, answer: 30 };

    fn late_at(line: &Line) -> Option<u64> {
        (0..100).find(|now| line.is_late(*now, PATIENCE))
    }

    #[test]
    fn a_head_that_does_not_end_is_late_and_a_request_in_hand_is_not() {
        let line = Rc::new(Line::default());
        assert_eq!(late_at(&line), None, "who says nothing is the keep-alive's business");
        line.heard.set(Some(5));
        assert_eq!(late_at(&line), Some(16));
        let (request, stream) = (Hold::new(&line), Hold::new(&line));
        line.heard.set(Some(5));
        drop(request);
        assert_eq!(late_at(&line), None, "the stream goes on");
        drop(stream);
        assert_eq!(late_at(&line), Some(16));
        drop(Hold::new(&line));
        assert_eq!(late_at(&line), None, "the head became a request");
    }

    #[test]
    fn a_client_that_takes_nothing_is_late_even_with_a_request_in_hand() {
        let line = Rc::new(Line::default());
        let _hold = Hold::new(&line);
        line.stuck.set(Some(5));
        assert_eq!(late_at(&line), Some(36));
    }
}
