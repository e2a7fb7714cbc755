//! One connection between CONNACK and its end: packets in, acks in order, messages out, deadlines.
//!
//! Not here: the first packet (`handshake`), what a publish (`publish`) or a subscription (`subscribe`) means, what is left
//! to do at the end (`farewell`).
//!
//! Invariants: acknowledgements leave in the order of the publishes, each after its commit, while later publishes are
//! already on their way; at most `mqtt.receive_maximum` publishes are unsettled; nothing waits without a deadline. The
//! session is handed on only when everything this connection took is settled. Tests: `tests/it/mqtt.rs`.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rmqtt_codec::types::Publish;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
    time::{Instant, Sleep},
};

use super::{
    embedded::{Broker, Settled, count_dropped},
    handshake::Admitted,
    inbound::{self, Reason, Refusal},
    lines::Lines,
    outbox::{Item, Wrote},
    packet::{Broken, Codec, Id, Packet, Version, code},
    record::Message,
    registry::Space,
    session::{Inbound, Link, Session},
    wire::Wire,
};
use crate::{
    instance::{self, Receipt},
    store::MqttWrite,
    telemetry::metric,
    types::{AuthContext, Fault, InstanceId, Kind},
};

/// Output that may wait for the client before no more is put behind it.
const HIGH_WATER: usize = 64 * 1024;
/// A client that takes no bytes for so long is gone.
const STALLED: Duration = Duration::from_secs(20);
/// A publish that is not settled for so long will be sent again on another connection.
const UNSETTLED: Duration = Duration::from_secs(60);
/// Most packets decoded before what they caused is sent.
const BATCH: usize = 256;
/// Retained values moved into the outbox at once.
const REPLAY: usize = 64;
/// Most unacknowledged messages sent to a client that takes more.
const WINDOW: usize = 1024;

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client said goodbye.
    Goodbye { with_will: bool, expiry_seconds: Option<u32> },
    /// The stream broke.
    Lost,
    /// The client is told a reason (MQTT 5) and let go.
    Told(u8),
}

/// How an unsettled publish ends.
pub(super) enum Verdict {
    Accepted,
    Refused(Refusal),
    /// The node drains: no answer, the client sends it again elsewhere.
    Stop,
}

/// What an unsettled publish waits for.
pub(super) enum Wait {
    Now(Option<Verdict>),
    /// With the instance in whose line it stands.
    Stimulus(oneshot::Receiver<Result<Receipt, instance::Error>>, Option<InstanceId>),
    Rows(oneshot::Receiver<bool>),
}

/// What is owed when it is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owed {
    Nothing,
    PubAck(Id),
    PubRec(Id),
    /// PUBREL, when the row that says "released" is durable.
    PubRel(Id),
}

pub(super) struct Slot {
    pub owed: Owed,
    pub wait: Wait,
    /// The topic for a report, where there is no other way to tell.
    pub publish: Option<Box<Publish>>,
    pub since: Instant,
}

enum Event {
    Input,
    End(End),
}

pub(super) struct Connection<S> {
    pub broker: Arc<Broker>,
    pub space: Arc<Space>,
    pub session: Arc<Session>,
    pub auth: AuthContext,
    pub client: Arc<str>,
    pub version: Version,
    pub uid: u64,
    pub epoch: u64,
    /// The number under which this node has the session.
    pub hold: u64,
    pub is_persistent: bool,
    /// Publishes turned into stimuli on this connection.
    pub counter: u64,
    pub codec: Codec,
    pub wire: Wire<S>,
    pub inbound: Inbound,
    pub aliases: HashMap<u16, String>,
    /// Retained values for new subscriptions: message, QoS, subscription identifier.
    pub replay: VecDeque<(Arc<Message>, u8, Option<u32>)>,
    /// Publishes of QoS 1 and 2 the client waits for.
    pub quota: usize,
    pub slots: VecDeque<Slot>,
    /// What is in flight inward.
    pub lines: Lines,
    pub link: Arc<Link>,
    expiry_seconds: u32,
    /// Rows of acknowledged messages, removed together.
    rows: Vec<MqttWrite>,
    /// Whether packets wait in the input until slots are settled or output is taken.
    is_gated: bool,
    window: usize,
    max_packet: u32,
    keep_alive: Option<Duration>,
    timer: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    #[allow(clippy::too_many_arguments, reason = "what the handshake agreed on")]
    pub(super) fn new(
        broker: Arc<Broker>,
        admitted: Admitted,
        wire: Wire<S>,
        codec: Codec,
        version: Version,
        keep_alive: u16,
        receive_max: u16,
        max_packet: u32,
    ) -> Self {
        let mut connection = Self {
            broker,
            space: admitted.space,
            hold: admitted.session.hold(),
            session: admitted.session,
            auth: admitted.auth,
            client: admitted.client,
            version,
            uid: admitted.uid,
            epoch: admitted.epoch,
            is_persistent: admitted.expiry_seconds > 0,
            counter: 0,
            codec,
            wire,
            inbound: admitted.inbound,
            aliases: HashMap::new(),
            replay: VecDeque::new(),
            quota: 0,
            slots: VecDeque::new(),
            lines: Lines::new(version),
            link: admitted.link,
            expiry_seconds: admitted.expiry_seconds,
            rows: Vec::new(),
            is_gated: false,
            window: usize::from(receive_max).min(WINDOW),
            max_packet,
            keep_alive: (keep_alive > 0).then(|| Duration::from_millis(u64::from(keep_alive) * 1500)),
            timer: Box::pin(tokio::time::sleep(STALLED)),
        };
        for id in admitted.released {
            connection.codec.pubrel(id, &mut connection.wire.output);
        }
        connection
    }

    /// Serves the connection to its end.
    pub(super) async fn run(mut self) {
        self.tell_presence(true);
        let end = self.serve().await;
        self.finish(end).await;
    }

    async fn serve(&mut self) -> End {
        loop {
            let taken = self.take_packets().await;
            let rows = std::mem::take(&mut self.rows);
            self.broker.write_unwatched(rows);
            match taken {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(broken) => {
                    tracing::debug!(client = %self.client, reason = broken.what, "MQTT connection closed");
                    return End::Told(broken.code);
                }
            }
            match std::future::poll_fn(|context| self.poll(context)).await {
                Event::Input => {}
                Event::End(end) => return end,
            }
        }
    }

    /// Whether another packet may be taken.
    fn can_take(&self) -> bool {
        let limit = usize::from(self.broker.config.receive_maximum).max(1);
        // A client of MQTT 5 counts its QoS 1 and 2 itself; the rest is for QoS 0.
        let limit = if self.version == Version::V5 { limit * 2 } else { limit };
        self.slots.len() < limit && self.wire.output.len() < HIGH_WATER
    }

    async fn take_packets(&mut self) -> Result<Option<End>, Broken> {
        self.is_gated = false;
        for _ in 0..BATCH {
            if !self.can_take() {
                self.is_gated = true;
                return Ok(None);
            }
            match self.codec.decode(&mut self.wire.input)? {
                None => return Ok(None),
                Some(packet) => {
                    if let Some(end) = self.take(packet).await? {
                        return Ok(Some(end));
                    }
                }
            }
        }
        self.is_gated = true;
        Ok(None)
    }

    async fn take(&mut self, packet: Packet) -> Result<Option<End>, Broken> {
        match packet {
            Packet::Publish(publish) => {
                self.broker.meters.received.increment(1);
                self.publish(publish).await?;
            }
            Packet::PubAck(id) => {
                let ended = self.session.lock().outbox.acked(id);
                self.dequeue(ended.filter(|ended| ended.stored).map(|ended| ended.order));
            }
            Packet::PubRec(id, is_taken) => self.pubrec(id, is_taken),
            Packet::PubRel(id) => {
                let was_known = self.inbound.unreleased.remove(&id);
                self.quota = self.quota.saturating_sub(1);
                self.codec.pubcomp(id, was_known, &mut self.wire.output);
            }
            Packet::PubComp(id) => {
                let ended = self.session.lock().outbox.completed(id);
                self.dequeue(ended.filter(|ended| ended.stored).map(|ended| ended.order));
            }
            Packet::Subscribe { id, subscription, wishes } => self.subscribe(id, subscription, wishes).await?,
            Packet::Unsubscribe { id, filters } => self.unsubscribe(id, &filters).await,
            Packet::Ping => self.codec.pong(&mut self.wire.output),
            Packet::Disconnect { with_will, expiry_seconds } => {
                if self.expiry_seconds == 0 && expiry_seconds.is_some_and(|seconds| seconds > 0) {
                    return Err(Broken::new(code::PROTOCOL_ERROR, "a session without expiry cannot get one"));
                }
                return Ok(Some(End::Goodbye { with_will, expiry_seconds }));
            }
            Packet::Connect(_) => return Err(Broken::new(code::PROTOCOL_ERROR, "a second CONNECT")),
        }
        Ok(None)
    }

    fn dequeue(&mut self, order: Option<i64>) {
        self.rows.extend(order.map(|order| self.session.dequeue(order)));
    }

    /// The receiver has a QoS 2 message: that must be durable before it is released, or a restart would send it anew.
    fn pubrec(&mut self, id: Id, is_taken: bool) {
        if !is_taken {
            let ended = self.session.lock().outbox.rejected(id);
            return self.dequeue(ended.filter(|ended| ended.stored).map(|ended| ended.order));
        }
        let ended = self.session.lock().outbox.received(id);
        let wait = match ended.filter(|ended| ended.stored).map(|ended| self.broker.release_row(&self.session, ended)) {
            None => Wait::Now(Some(Verdict::Accepted)),
            Some(done) => Wait::Rows(done),
        };
        self.slots.push_back(Slot { owed: Owed::PubRel(id), wait, publish: None, since: Instant::now() });
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        let (_, close) = self.link.poll(context);
        if let Some(reason) = close {
            return Poll::Ready(Event::End(End::Told(reason)));
        }
        loop {
            if let Some(end) = self.settle(context) {
                return Poll::Ready(Event::End(end));
            }
            let has_more = self.pump();
            match self.wire.poll_write(context) {
                Poll::Ready(Ok(())) if has_more => {}
                Poll::Ready(Ok(())) | Poll::Pending => break,
                Poll::Ready(Err(_)) => return Poll::Ready(Event::End(End::Lost)),
            }
        }
        if self.is_gated {
            if self.can_take() {
                return Poll::Ready(Event::Input);
            }
            // Nothing is read, so nothing can be expected to have come.
            self.wire.last_read = Instant::now();
        } else {
            match self.wire.poll_read(context) {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Event::End(End::Lost)),
                Poll::Ready(Ok(_)) => return Poll::Ready(Event::Input),
                Poll::Pending => {}
            }
        }
        self.poll_timer(context).map(Event::End)
    }

    /// Answers what is settled, oldest first.
    pub(super) fn settle(&mut self, context: &mut Context<'_>) -> Option<End> {
        while let Some(slot) = self.slots.front_mut() {
            let Poll::Ready(verdict) = slot.wait.poll(context) else { break };
            let Some(slot) = self.slots.pop_front() else { break };
            if let Some(end) = self.answer(slot, verdict) {
                return Some(end);
            }
        }
        None
    }

    fn answer(&mut self, slot: Slot, verdict: Verdict) -> Option<End> {
        if let Wait::Stimulus(_, Some(instance)) = &slot.wait {
            self.lines.answered(instance);
        }
        let (id, is_qos2) = match slot.owed {
            Owed::PubAck(id) => (Some(id), false),
            Owed::PubRec(id) => (Some(id), true),
            Owed::Nothing => (None, false),
            Owed::PubRel(id) => {
                if !matches!(verdict, Verdict::Accepted) {
                    return Some(End::Told(code::UNSPECIFIED));
                }
                self.codec.pubrel(id, &mut self.wire.output);
                return None;
            }
        };
        let refusal = match verdict {
            Verdict::Stop => return Some(End::Told(code::SHUTTING_DOWN)),
            Verdict::Accepted => None,
            Verdict::Refused(refusal) => Some(refusal),
        };
        let reason = refusal.as_ref().map_or(code::SUCCESS, |refusal| refusal.reason.code());
        if let Some(refusal) = &refusal {
            metrics::counter!(metric::MQTT_ACKS, "reason" => refusal.reason.name()).increment(1);
            tracing::debug!(client = %self.client, reason = refusal.reason.name(), detail = %refusal, "publish refused");
            if self.version == Version::V3 {
                if id.is_some() && !refusal.reason.is_permanent() {
                    // MQTT 3 cannot say no: the client sends it again on its next connection.
                    return Some(End::Told(reason));
                }
                self.report(slot.publish.as_deref(), refusal);
            }
        }
        let Some(id) = id else {
            count_dropped("refused", u64::from(refusal.is_some()));
            return None;
        };
        if refusal.is_none() {
            self.broker.meters.acked.increment(1);
        }
        let is_over = !is_qos2 || (refusal.is_some() && self.version == Version::V5);
        if is_over {
            self.quota = self.quota.saturating_sub(1);
            self.inbound.unreleased.remove(&id);
        }
        let detail = refusal.as_ref().map(|refusal| &*refusal.detail);
        self.codec.ack(is_qos2, id, reason, detail, &mut self.wire.output);
        None
    }

    /// Tells a refusal on `out/errors` of the instance it was meant for, if its sender may read there.
    fn report(&self, publish: Option<&Publish>, refusal: &Refusal) {
        let Some(topic) = publish.map(|publish| &*publish.topic) else { return };
        let instance = inbound::readable_instance(&self.auth, topic).or_else(|| self.auth.instance.clone());
        let Some(instance) = instance else { return };
        let message = Message {
            topic: format!("sophont/{}/{instance}/out/errors", self.space.tenant),
            payload: inbound::report(topic, refusal).into(),
            qos: 1,
            is_utf8: true,
            content_type: Some(String::from("application/json")),
            ..Message::default()
        };
        drop(self.broker.distribute(&self.space, message, None));
    }

    /// Moves messages into the output; true when there are more than it takes now.
    fn pump(&mut self) -> bool {
        let now = self.broker.clock.now();
        let (codec, output, limit) = (&self.codec, &mut self.wire.output, self.max_packet);
        let mut state = self.session.lock();
        while state.outbox.waiting() < REPLAY
            && let Some((message, qos, id)) = self.replay.front()
        {
            let item = Item::new(message.clone(), *qos, true, id.iter().copied().collect());
            if state.outbox.push(item, usize::MAX).is_none() {
                break;
            }
            self.replay.pop_front();
        }
        let done = state.outbox.pump(self.window, now, |outgoing| {
            if output.len() >= HIGH_WATER {
                Wrote::Full
            } else if codec.publish(outgoing, limit, now, output) {
                Wrote::Yes
            } else {
                Wrote::TooLarge
            }
        });
        let has_more = done.is_buffer_full || (!self.replay.is_empty() && done.sent > 0);
        drop(state);
        self.broker.meters.sent.increment(done.sent as u64);
        count_dropped("expired_or_too_large", done.dropped as u64);
        self.broker.write_unwatched(done.rows.iter().map(|&order| self.session.dequeue(order)).collect());
        has_more
    }

    /// The next moment at which something may be overdue.
    fn deadline(&self) -> Instant {
        let keep_alive = self.keep_alive.map(|limit| self.wire.last_read + limit);
        let stalled = self.wire.blocked_since.map(|since| since + STALLED);
        let unsettled = self.slots.front().map(|slot| slot.since + UNSETTLED);
        let known = [keep_alive, stalled, unsettled].into_iter().flatten().min();
        known.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    fn overdue(&self, now: Instant) -> Option<End> {
        let is_over = |since: Option<Instant>, limit| since.is_some_and(|since| now >= since + limit);
        if is_over(self.wire.blocked_since, STALLED) {
            count_dropped("stalled_connection", 1);
            Some(End::Lost)
        } else if is_over(self.slots.front().map(|slot| slot.since), UNSETTLED) {
            Some(End::Told(code::IMPLEMENTATION))
        } else if self.keep_alive.is_some_and(|limit| now >= self.wire.last_read + limit) {
            Some(End::Told(code::KEEP_ALIVE))
        } else {
            None
        }
    }

    fn poll_timer(&mut self, context: &mut Context<'_>) -> Poll<End> {
        loop {
            let wanted = self.deadline();
            if wanted < self.timer.deadline() {
                self.timer.as_mut().reset(wanted);
            }
            if self.timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            if let Some(end) = self.overdue(now) {
                return Poll::Ready(end);
            }
            let next = self.deadline().max(now + Duration::from_millis(10));
            self.timer.as_mut().reset(next);
        }
    }
}

impl Wait {
    /// Whether it is settled, and how. Not to be asked again then.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Verdict> {
        match self {
            Wait::Now(verdict) => Poll::Ready(verdict.take().unwrap_or(Verdict::Accepted)),
            Wait::Rows(done) => Pin::new(done).poll(context).map(|done| match done {
                Ok(true) => Verdict::Accepted,
                _ => Verdict::Refused(Refusal::new(Reason::Unspecified, "the store did not take the message")),
            }),
            Wait::Stimulus(answer, _) => Pin::new(answer).poll(context).map(|answer| match answer {
                Ok(Ok(_)) => Verdict::Accepted,
                Ok(Err(error)) => Verdict::of(&error),
                Err(_) => Verdict::of(&instance::Error::Crashed),
            }),
        }
    }
}

impl Verdict {
    /// What an instance's refusal means for its sender.
    pub(super) fn of(error: &instance::Error) -> Self {
        match error {
            instance::Error::Draining => Verdict::Stop,
            error => {
                let reason = match error.kind() {
                    Kind::Internal => Reason::Implementation,
                    kind => Reason::of(kind),
                };
                Verdict::Refused(Refusal::new(reason, error.to_string()))
            }
        }
    }
}

impl From<Settled> for Wait {
    fn from(settled: Settled) -> Self {
        match settled {
            Settled::Now => Wait::Now(Some(Verdict::Accepted)),
            Settled::Rows(done) => Wait::Rows(done),
        }
    }
}
