//! The external MQTT door: a client of a broker you run.
//!
//! Devices talk to the broker, this node to the broker. Topics, payloads and properties mean what they mean at the embedded
//! door. The broker logs devices in and its access rules are the walls between tenants: here the tenant comes from the topic.
//!
//! Owns: [`Link`], one connection that is kept up; taking stimuli and acknowledging them after they are durable; publishing
//! for `delivery`. Not here: what topics mean (`inbound`), sessions of devices, presence and retained values (the broker's).
//!
//! Invariants: a message is acknowledged to the broker only after it was durably accepted (or can never be); one that was not
//! acknowledged comes again, also to the next life of this process; at most `receive_maximum` are in hand.
//! Tests: at the foot of `intake` and `wire`; `tests/it/mqtt_external.rs` against a real Mosquitto.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rumqttc::{AsyncClient, PublishNoticeError, PublishOptions, PublishProperties, PublishResult, QoS};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::Router,
    config,
    delivery::{Message, Publisher},
    instance::{self, Until},
    runtime::{clock::Clock, drain::Drain},
    store::{self, Known},
    telemetry::metric,
    types::{Fault, InstanceKey, Kind, Millis, Stimulus},
};

mod intake;
mod reader;
mod run;
mod wire;

pub use reader::Turn;

/// How often a publish is sent anew because the broker lost the session, before `delivery` is told.
const RESENDS: u32 = 3;

/// Why the link cannot be set up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// `mqtt.url` is wrong.
    #[error("mqtt.url {0}")]
    Url(String),
    /// The environment variable is not set.
    #[error("mqtt.password_env names {0}, which is not set")]
    Password(String),
    /// The CA cannot be used.
    #[error("mqtt.ca_file {0}")]
    Ca(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// Port: the way to instances, as far as this door needs it. The router is the real one.
#[async_trait]
pub trait Inward: Send + Sync + 'static {
    /// Returns when the stimulus is durable (or decided, as `until` says), now or earlier under the same id.
    ///
    /// # Errors
    /// As [`Router::deliver`].
    async fn deliver(&self, key: &InstanceKey, stimulus: Stimulus, until: Until) -> Result<(), instance::Error>;

    /// Whether a stimulus whose id begins with `prefix` was accepted at or after `since`.
    ///
    /// # Errors
    /// While the store cannot say.
    async fn knows(&self, key: &InstanceKey, prefix: &str, since: Millis) -> Result<bool, store::Error>;
}

#[async_trait]
impl Inward for Router {
    async fn deliver(&self, key: &InstanceKey, stimulus: Stimulus, until: Until) -> Result<(), instance::Error> {
        Self::deliver(self, key, stimulus, until).await.map(drop)
    }

    async fn knows(&self, key: &InstanceKey, prefix: &str, since: Millis) -> Result<bool, store::Error> {
        let is_it = |stimulus: &Stimulus| stimulus.id.as_str().starts_with(prefix) && stimulus.accepted_at >= since;
        let decided = match self.store().find_prefix(key, prefix).await? {
            Some(Known::Decided(turn)) => is_it(&turn.stimulus),
            Some(Known::Waiting(stimulus)) => is_it(&stimulus),
            Some(Known::Dead(letter)) => is_it(&letter.stimulus),
            None => false,
        };
        Ok(decided || self.store().load(key).await?.inbox.iter().any(|waiting| is_it(waiting)))
    }
}

/// What a link is made of.
#[derive(Clone)]
pub struct Parts {
    /// `[mqtt]`.
    pub config: config::Mqtt,
    /// The node's name, for the client id when the configuration has none.
    pub node: String,
    /// The way to instances.
    pub inward: Arc<dyn Inward>,
    /// Time.
    pub clock: Clock,
    /// Once it begins, nothing more is taken; publishing goes on until it stops or [`Link::close`].
    pub drain: Drain,
    /// The runtime it runs on.
    pub handle: tokio::runtime::Handle,
    /// When it is this node's turn to read, for `readers = "one"`.
    pub turn: Option<Turn>,
}

/// The connection to the broker.
#[derive(Debug)]
pub struct Link {
    client: AsyncClient,
    connected: watch::Receiver<bool>,
    close: CancellationToken,
    tasks: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Link {
    /// Starts to connect, and keeps connecting. Returns before the broker answered: a node starts without its broker.
    ///
    /// # Errors
    /// [`Error`]: the settings are wrong.
    pub fn start(parts: Parts) -> Result<Arc<Self>, Error> {
        let client_id = match parts.config.client_id.as_str() {
            "" => format!("sophont-{}", parts.node),
            id => id.to_owned(),
        };
        let turn = parts.turn.clone().filter(|_| parts.config.readers == config::Readers::One);
        let link = Self::connect(&parts, &client_id, turn.is_none())?;
        if let Some(turn) = turn {
            let task = parts.handle.spawn(reader::follow(parts.clone(), turn, link.close.clone()));
            link.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        }
        Ok(Arc::new(link))
    }

    /// One connection; `reads`: it takes messages.
    fn connect(parts: &Parts, client_id: &str, reads: bool) -> Result<Self, Error> {
        let options = wire::options(&parts.config, client_id)?;
        // Room for every acknowledgement that can be due, so that queueing one never waits.
        let capacity = usize::from(parts.config.receive_maximum) + 64;
        let (client, events) = AsyncClient::builder(options).capacity(capacity).build();
        let (tell, connected) = watch::channel(false);
        let close = CancellationToken::new();
        let run = run::Run::new(parts.clone(), client_id, client.clone(), tell, reads);
        let task = parts.handle.spawn(run.run(events, close.clone()));
        Ok(Self { client, connected, close, tasks: Mutex::new(vec![task]) })
    }

    /// Whether the broker is connected at present.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    /// Finishes what is in hand, says goodbye and ends. The session stays with the broker for the next start.
    pub async fn close(&self, deadline: Duration) {
        self.close.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let until = tokio::time::Instant::now() + deadline;
        for mut task in tasks {
            if tokio::time::timeout_at(until, &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close.cancel();
    }
}

fn properties(message: &Message) -> PublishProperties {
    PublishProperties {
        payload_format_indicator: message.json.then_some(1),
        content_type: message.json.then(|| String::from("application/json")),
        correlation_data: message.correlation.clone().map(Bytes::from),
        user_properties: vec![(String::from("effect"), message.effect_id.clone())],
        ..PublishProperties::default()
    }
}

#[async_trait]
impl Publisher for Link {
    async fn publish(&self, message: Message) -> Result<(), String> {
        if !self.is_connected() {
            return Err(String::from("the broker is not connected"));
        }
        for _ in 0..RESENDS {
            let options = PublishOptions::new(QoS::AtLeastOnce).retain(message.retain).properties(properties(&message));
            let sent = self.client.publish_tracked(message.topic.clone(), message.payload.clone(), options).await;
            match sent.map_err(|error| error.to_string())?.wait_async().await {
                Ok(PublishResult::Qos1(ack)) => {
                    use rumqttc::PubAckReason::{NoMatchingSubscribers, Success};
                    metrics::counter!(metric::MQTT_MESSAGES, "direction" => "out").increment(1);
                    return match ack.reason {
                        Success | NoMatchingSubscribers => Ok(()),
                        reason => Err(format!("the broker refused it: {reason:?}")),
                    };
                }
                Ok(_) => return Err(String::from("the broker answered something else")),
                Err(PublishNoticeError::SessionReset) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Err(String::from("the broker keeps losing the session"))
    }
}
