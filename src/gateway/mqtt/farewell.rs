//! The end of a connection: the last answers, the goodbye, and the session handed on.
//!
//! Not here: why a connection ends (`connection`), what becomes of its session later (`will`).
//!
//! Invariants: the next connection of the session begins only when everything this one took is settled, so that a publish
//! that comes again finds what became of its first copy. Tests: `tests/it/mqtt.rs`.

use std::{task::Poll, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    connection::{Connection, End},
    packet::code,
    roam::follow::presence,
    session::State,
    will,
};

/// Longest goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// Longest wait for what is unsettled when the connection is gone or the node drains.
const SETTLE: Duration = Duration::from_secs(10);

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Ends the connection.
    pub(super) async fn finish(mut self, end: End) {
        if end == End::Told(code::SHUTTING_DOWN) {
            // What was taken is answered before the goodbye.
            let settled = std::future::poll_fn(|context| {
                while self.settle(context).is_some() {}
                let is_written = self.wire.poll_write(context).is_ready();
                if self.slots.is_empty() && is_written { Poll::Ready(()) } else { Poll::Pending }
            });
            drop(timeout(SETTLE, settled).await);
        }
        if let End::Told(reason) = end {
            self.codec.disconnect(reason, &mut self.wire.output);
        }
        self.wire.close(GOODBYE).await;
        let unsettled = std::mem::take(&mut self.slots);
        let rest = async {
            for mut slot in unsettled {
                std::future::poll_fn(|context| slot.wait.poll(context).map(drop)).await;
            }
        };
        drop(timeout(SETTLE, rest).await);
        self.tell_presence(false);
        if self.let_go(end) {
            will::tend(&self.broker, &self.space, &self.session).await;
        }
        self.link.end();
    }

    /// Presence of a device that is bound to an instance: told when its first connection begins and its last one ends.
    pub(super) fn tell_presence(&mut self, is_online: bool) {
        let Some(instance) = &self.auth.instance else { return };
        if let Some(roam) = &self.broker.roam {
            // The coming was told before the session was taken.
            if !is_online {
                roam.miss(&self.space, instance);
            }
            return;
        }
        let is_change = if is_online { self.space.arrive(instance) } else { self.space.leave(instance) };
        if !is_change {
            return;
        }
        let message = presence(&self.space.tenant, instance, is_online);
        drop(self.broker.distribute(&self.space, message, None));
    }

    /// Gives the session back; true when its will or end is to be looked after.
    fn let_go(&mut self, end: End) -> bool {
        let now = self.broker.clock.now();
        let mut state = self.session.lock();
        state.link = None;
        state.inbound = std::mem::take(&mut self.inbound);
        state.outbox.drop_weak();
        if state.gone && self.broker.roam.is_some() {
            // Another node took it: what is remembered waits here, in case its client comes back.
            let mut before = State { uid: state.uid, inbound: std::mem::take(&mut state.inbound), ..State::default() };
            drop(state);
            if let Some(session) = self.space.find(&self.session.client) {
                session.lock().inherit(&mut before);
            }
            return false;
        }
        if end == End::Told(code::SHUTTING_DOWN) {
            // The row still says "connected": the next start finds the session as it was and treats will and expiry.
            return false;
        }
        state.disconnected_at = Some(now);
        if let End::Goodbye { with_will, expiry_seconds } = end {
            if let Some(seconds) = expiry_seconds {
                state.expiry_seconds = seconds.min(self.broker.config.max_session_expiry_seconds);
            }
            if !with_will {
                state.will = None;
            }
        }
        state.will_at = state.will.as_ref().map(|will| now.plus(i64::from(will.delay_seconds) * 1000));
        let put = (state.stored && state.is_persistent()).then(|| self.session.put(&state));
        drop(state);
        self.broker.write_unwatched(put.and_then(Result::ok).into_iter().collect());
        true
    }
}
