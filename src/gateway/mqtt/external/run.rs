//! The shell around the connection: polls the client library, hands messages inward, acknowledges, reconnects.
//!
//! Acknowledgements are queued from the task that polls, between two polls of the same connection: the library takes one for
//! a packet of an earlier connection as a protocol error.
//! Tests: `tests/it/mqtt_external.rs`.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, ManualAck, Packet as Incoming, PubAck, Publish, PublishOptions,
    QoS, RetainForwardRule, SubscribeFilterInput, SubscribeReasonCode,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Inward, Parts,
    intake::{Arrival, Intake, Job},
};
use crate::{
    config,
    gateway::mqtt::inbound::{self, Reason, Refusal, Target},
    instance::{self, Until},
    runtime::{clock::Clock, drain::Drain},
    telemetry::metric,
    types::{AuthContext, Fault, Principal, Scope, Stimulus, StimulusId, TenantId},
};

/// Longest wait for one hand-over; it is tried again under the same id.
const HAND_OVER: Duration = Duration::from_secs(30);
/// The wait before a message is handed over again: doubles from the first to the longest.
const AGAIN_FIRST: Duration = Duration::from_millis(50);
const AGAIN_LONGEST: Duration = Duration::from_secs(2);
/// How long a message waits for an instance whose inbox is full before it is dropped, so that one full instance does not
/// hold up everybody behind the same receive maximum.
const INBOX_PATIENCE: Duration = Duration::from_secs(60);
/// The wait before the next connection: doubles from the first to the longest.
const RECONNECT_FIRST: Duration = Duration::from_millis(200);
const RECONNECT_LONGEST: Duration = Duration::from_secs(30);
/// How long after its acceptance a message without an id is recognised when it comes again to another life of the process,
/// in milliseconds. Short, since brokers use packet ids again.
const RECOGNISED_MS: i64 = 60_000;
/// How many times the receive maximum a broker may send before it is not listened to for a while.
const BEYOND: usize = 4;
/// How long the goodbye waits for what is in flight.
const GOODBYE: Duration = Duration::from_secs(2);
/// Who sent a message, as far as the broker tells.
const SENDER: &str = "mqtt";

/// How a hand-over ended.
enum End {
    /// Durable.
    Accepted,
    /// It never can be.
    Refused(Refusal),
    /// This node takes nothing more. It is not acknowledged, so the broker keeps it for the next start.
    Left,
}

/// The task behind a [`super::Link`].
pub(super) struct Run {
    config: config::Mqtt,
    inward: Arc<dyn Inward>,
    clock: Clock,
    drain: Drain,
    client: AsyncClient,
    tell: watch::Sender<bool>,
    /// Ids of stimuli derived on this session begin so.
    prefix: String,
    intake: Intake,
    under_way: FuturesUnordered<BoxFuture<'static, (Job, End)>>,
    failures: u32,
    /// Whether it takes messages, or only publishes.
    reads: bool,
}

impl Run {
    pub(super) fn new(
        parts: Parts,
        client_id: &str,
        client: AsyncClient,
        tell: watch::Sender<bool>,
        reads: bool,
    ) -> Self {
        let session = blake3::hash(format!("{}\n{client_id}", parts.config.url).as_bytes()).to_hex();
        Self {
            prefix: format!("mx.{}", &session[..16]),
            config: parts.config,
            inward: parts.inward,
            clock: parts.clock,
            drain: parts.drain,
            client,
            tell,
            intake: Intake::default(),
            under_way: FuturesUnordered::new(),
            failures: 0,
            reads,
        }
    }

    pub(super) async fn run(mut self, mut events: EventLoop, close: CancellationToken) {
        let drain = self.drain.clone();
        // A broker that sends more than the receive maximum meets a connection that is not read.
        let most = usize::from(self.config.receive_maximum).saturating_mul(BEYOND);
        let mut closing = false;
        loop {
            let polled = {
                let mut poll = pin!(events.poll());
                loop {
                    self.start_jobs(closing || close.is_cancelled());
                    if close.is_cancelled() && !closing && self.under_way.is_empty() {
                        closing = true;
                        if !*self.tell.borrow() || self.client.try_disconnect_with_timeout(GOODBYE).is_err() {
                            return;
                        }
                    }
                    tokio::select! {
                        biased;
                        () = drain.stopped() => return,
                        Some((job, end)) = self.under_way.next(), if !self.under_way.is_empty() => self.end(&job, end),
                        polled = &mut poll, if self.intake.len() < most => break polled,
                        () = close.cancelled(), if !closing && self.under_way.is_empty() => {}
                    }
                }
            };
            match polled {
                Ok(Event::Incoming(Incoming::ConnAck(answer))) => {
                    events.options.clear_session_store();
                    self.connected(answer.session_present);
                }
                Ok(Event::Incoming(Incoming::Publish(publish))) => self.arrived(publish),
                Ok(Event::Incoming(Incoming::SubAck(answer))) => {
                    let granted = |code: &SubscribeReasonCode| matches!(code, SubscribeReasonCode::Success(_));
                    if !answer.return_codes.iter().all(granted) {
                        tracing::error!("the MQTT broker refuses the subscriptions: {:?}", answer.return_codes);
                    }
                }
                Ok(_) => {}
                Err(ConnectionError::RequestsDone) => return,
                Err(error) => {
                    self.disconnected(&error);
                    if closing {
                        return;
                    }
                    self.pause(&close).await;
                }
            }
        }
    }

    fn connected(&mut self, session_present: bool) {
        self.failures = 0;
        self.intake.connected(session_present);
        let group = self.config.share_group.as_str();
        let filter = |rest: &str| match group {
            "" => format!("sophont/+/+/{rest}"),
            group => format!("$share/{group}/sophont/+/+/{rest}"),
        };
        let filters = ["in/#", "state/reported"].map(|rest| {
            SubscribeFilterInput::new(filter(rest), QoS::AtLeastOnce).retain_forward_rule(RetainForwardRule::Never)
        });
        if self.reads
            && let Err(error) = self.client.try_subscribe_many(filters)
        {
            tracing::error!("cannot subscribe at the MQTT broker: {error}");
        }
        tracing::info!(session_present, "connected to the MQTT broker {}", self.config.url);
        metrics::gauge!(metric::MQTT_CONNECTIONS).set(1.0);
        self.tell.send_replace(true);
    }

    fn disconnected(&mut self, error: &ConnectionError) {
        self.intake.disconnected();
        metrics::gauge!(metric::MQTT_CONNECTIONS).set(0.0);
        if self.tell.send_replace(false) || self.failures == 0 {
            tracing::warn!("no connection to the MQTT broker {}, trying again: {error}", self.config.url);
        } else {
            tracing::debug!("no connection to the MQTT broker {}: {error}", self.config.url);
        }
    }

    /// Waits before the next connection; what is under way goes on meanwhile.
    async fn pause(&mut self, close: &CancellationToken) {
        let wait = backoff(RECONNECT_FIRST, RECONNECT_LONGEST, self.failures, uuid::Uuid::new_v4().as_u128());
        self.failures = self.failures.saturating_add(1);
        let drain = self.drain.clone();
        let mut until = pin!(tokio::time::sleep(wait));
        loop {
            tokio::select! {
                () = &mut until => return,
                () = close.cancelled() => return,
                () = drain.stopped() => return,
                Some((job, end)) = self.under_way.next(), if !self.under_way.is_empty() => {
                    self.end(&job, end);
                    self.start_jobs(false);
                }
            }
        }
    }

    fn start_jobs(&mut self, closing: bool) {
        if closing || self.drain.is_draining() {
            return;
        }
        while let Some(job) = self.intake.next() {
            let (inward, clock, drain) = (self.inward.clone(), self.clock.clone(), self.drain.clone());
            self.under_way.push(Box::pin(async move {
                let end = hand_over(&job, inward.as_ref(), &clock, &drain).await;
                (job, end)
            }));
        }
    }

    fn end(&mut self, job: &Job, end: End) {
        if matches!(end, End::Left) {
            return; // its lane stays as it is: what comes after it stays too
        }
        if let End::Refused(refusal) = end {
            let topic = match job.until {
                Until::Decided => format!("sophont/{}/{}/state/reported", job.key.tenant, job.key.instance),
                Until::Accepted => {
                    format!("sophont/{}/{}/in/{}", job.key.tenant, job.key.instance, job.stimulus.channel)
                }
            };
            self.refuse(&topic, &refusal);
        }
        if let Some(packet) = self.intake.done(job) {
            self.acknowledge(packet.id);
        }
    }

    fn acknowledge(&self, packet: u16) {
        metrics::counter!(metric::MQTT_ACKS, "reason" => "success").increment(1);
        if let Err(error) = self.client.try_manual_ack(ManualAck::PubAck(PubAck::new(packet, None))) {
            tracing::error!("an acknowledgement could not be queued; the broker will send the message again: {error}");
        }
    }

    fn arrived(&mut self, publish: Publish) {
        metrics::counter!(metric::MQTT_MESSAGES, "direction" => "in").increment(1);
        let packet = (publish.qos != QoS::AtMostOnce).then_some(publish.pkid);
        let fingerprint = fingerprint(&publish);
        if let Some(packet) = packet {
            match self.intake.arrival(packet, publish.dup, fingerprint) {
                Arrival::New => {}
                Arrival::InHand => return,
                Arrival::Accepted => return self.acknowledge(packet),
            }
        } else if self.intake.len() >= usize::from(self.config.receive_maximum) {
            metrics::counter!(metric::MQTT_DROPPED, "reason" => "overload").increment(1);
            return;
        }
        let topic = String::from_utf8_lossy(&publish.topic).into_owned();
        match self.job(&topic, &publish, fingerprint) {
            Ok(job) => self.intake.take(job, fingerprint),
            Err(refusal) => {
                self.refuse(&topic, &refusal);
                if let Some(packet) = packet {
                    self.acknowledge(packet);
                }
            }
        }
    }

    fn job(&self, topic: &str, publish: &Publish, fingerprint: u64) -> Result<Job, Refusal> {
        let auth = caller(topic)?;
        let (now, plain) = (self.clock.now(), self.config.plain_topics);
        let incoming = incoming(publish);
        let (key, mut stimulus, until): (_, Stimulus, _) = match inbound::target(&auth, topic, plain)? {
            Target::Stimulus(key, channel) => {
                let stimulus = inbound::stimulus(&auth, channel, &incoming, SENDER, plain, now)?;
                (key, stimulus, Until::Accepted)
            }
            Target::Reported(key) => (key, inbound::reported(&auth, &incoming, SENDER, now)?, Until::Decided),
            Target::Presence(_) | Target::Plain => {
                return Err(Refusal::new(Reason::TopicName, "not a topic this door subscribes to"));
            }
        };
        let packet = (publish.qos != QoS::AtMostOnce).then_some(publish.pkid);
        let mut earlier = None;
        if let (Some(packet), false) = (packet, stimulus.repeatable) {
            let prefix = format!("{}.{packet}.{fingerprint:016x}.", self.prefix);
            let id = StimulusId::new(format!("{prefix}{}", stimulus.id))
                .map_err(|error| Refusal::new(Reason::Unspecified, error.to_string()))?;
            stimulus = stimulus.with_repeatable_id(id);
            earlier = publish.dup.then_some(prefix);
        }
        Ok(Job { key, stimulus, until, earlier, packet, ticket: 0 })
    }

    /// A message that can never be taken is reported on `out/errors`: the broker has told the device already that it has it.
    fn refuse(&self, topic: &str, refusal: &Refusal) {
        metrics::counter!(metric::MQTT_DROPPED, "reason" => refusal.reason.name()).increment(1);
        tracing::debug!(topic, "MQTT message refused: {refusal}");
        let mut levels = topic.splitn(4, '/').skip(1);
        if let (Some(tenant), Some(instance)) = (levels.next(), levels.next()) {
            let report = inbound::report(topic, refusal);
            let to = format!("sophont/{tenant}/{instance}/out/errors");
            drop(self.client.try_publish(to, report, PublishOptions::at_most_once()));
        }
    }
}

/// Whoever may publish on a topic at the broker speaks for the tenant in it.
fn caller(topic: &str) -> Result<AuthContext, Refusal> {
    let tenant = topic.split('/').nth(1).unwrap_or_default();
    let tenant = TenantId::new(tenant).map_err(|error| Refusal::new(Reason::TopicName, error.to_string()))?;
    let scopes = vec![Scope::Read, Scope::Write];
    Ok(AuthContext { tenant, principal: Principal::System, scopes, instance: None })
}

fn incoming(publish: &Publish) -> inbound::Incoming<'_> {
    let mut incoming = inbound::Incoming { payload: &publish.payload, ..inbound::Incoming::default() };
    if let Some(properties) = &publish.properties {
        incoming.is_utf8 = properties.payload_format_indicator == Some(1);
        incoming.content_type = properties.content_type.as_deref();
        incoming.response_topic = properties.response_topic.as_deref();
        incoming.correlation = properties.correlation_data.as_deref();
        properties.user_properties.iter().for_each(|(name, value)| incoming.property(name, value));
    }
    incoming
}

/// Of topic and payload.
fn fingerprint(publish: &Publish) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&publish.topic).update(&[0]).update(&publish.payload);
    let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// The wait after `failures` failures before this one: doubling from `first` to `longest`, half of it by chance.
fn backoff(first: Duration, longest: Duration, failures: u32, chance: u128) -> Duration {
    let full = first.saturating_mul(1 << failures.min(16)).min(longest);
    let half = u64::try_from(full.as_millis() / 2).unwrap_or(u64::MAX);
    let off = u64::try_from(chance % (u128::from(half) + 1)).unwrap_or(0);
    full - Duration::from_millis(off)
}

/// Hands a message to its instance until it is taken, never can be, or the node drains. A message without a packet id is
/// tried once.
async fn hand_over(job: &Job, inward: &dyn Inward, clock: &Clock, drain: &Drain) -> End {
    if let Some(prefix) = &job.earlier
        && let Some(end) = recognised(job, prefix, inward, clock, drain).await
    {
        return end;
    }
    let started = Instant::now();
    let mut tries = 0;
    loop {
        let tried = inward.deliver(&job.key, job.stimulus.clone(), job.until);
        let error = match tokio::time::timeout(HAND_OVER, tried).await {
            Ok(Ok(())) => return End::Accepted,
            Ok(Err(error)) => error,
            Err(_) => instance::Error::Timeout(HAND_OVER),
        };
        let reason = Reason::of(error.kind());
        let is_full = matches!(error, instance::Error::InboxFull(_));
        let may_pass = error.kind().is_retryable() || matches!(error, instance::Error::Crashed);
        if job.packet.is_none() || !may_pass || is_full && started.elapsed() >= INBOX_PATIENCE {
            return End::Refused(Refusal::new(reason, error.to_string()));
        }
        if tries == 0 {
            tracing::debug!(tenant = %job.key.tenant, instance = %job.key.instance, "MQTT message waits: {error}");
        }
        let wait = backoff(AGAIN_FIRST, AGAIN_LONGEST, tries, u128::from(job.ticket));
        if tokio::time::timeout(wait, drain.draining()).await.is_ok() {
            return End::Left;
        }
        tries += 1;
    }
}

/// How a message ends that may have been accepted in an earlier life; `None` when it was not. While the store cannot say, it
/// waits: taken as unknown it might be decided twice.
async fn recognised(job: &Job, prefix: &str, inward: &dyn Inward, clock: &Clock, drain: &Drain) -> Option<End> {
    let since = clock.now().plus(-RECOGNISED_MS);
    let mut tries = 0;
    loop {
        match inward.knows(&job.key, prefix, since).await {
            Ok(known) => return known.then_some(End::Accepted),
            Err(error) => tracing::debug!(instance = %job.key.instance, "a repeat cannot be looked up: {error}"),
        }
        let wait = backoff(AGAIN_FIRST, AGAIN_LONGEST, tries, u128::from(job.ticket));
        if tokio::time::timeout(wait, drain.draining()).await.is_ok() {
            return Some(End::Left);
        }
        tries += 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_comes_from_the_topic() {
        let auth = caller("sophont/acme/lamp/in/x").unwrap();
        assert_eq!(auth.tenant.as_str(), "acme");
        let target = inbound::target(&auth, "sophont/acme/lamp/in/x", true).unwrap();
        assert!(matches!(target, Target::Stimulus(key, _) if key.to_string() == "acme/lamp"));
        assert!(caller("sophont/a b/lamp/in/x").is_err());
        assert!(caller("sophont").is_err());
    }

    #[test]
    fn a_wait_doubles_up_to_its_longest_and_half_of_it_is_chance() {
        let of = |failures, chance| backoff(RECONNECT_FIRST, RECONNECT_LONGEST, failures, chance);
        assert_eq!(of(0, 0), RECONNECT_FIRST);
        assert_eq!(of(1, 0), RECONNECT_FIRST * 2);
        assert_eq!(of(60, 0), RECONNECT_LONGEST);
        for chance in [1, 99, u128::MAX] {
            assert!(of(3, chance) >= RECONNECT_FIRST * 4 && of(3, chance) <= RECONNECT_FIRST * 8);
        }
    }
}
