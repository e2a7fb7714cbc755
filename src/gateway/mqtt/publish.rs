//! A publish that came in: where it goes, whether it came before, and what its sender is owed.
//!
//! Not here: what topics and payloads mean (`inbound`), answering (`connection`).
//!
//! A publish without an `id` gets one derived from session, packet id, connection and content, so that the copy a client
//! sends again after a broken connection (DUP) is recognised: in memory while the broker lives, through the store after a
//! crash. When the session comes from a node that cannot say what it took, that is barred before the store is asked.
//! Not told apart are two different publishes that use one packet id one after the other with the same topic and payload, when
//! the second is sent again: `docs/mqtt.md` says what to do about it. Tests: `tests/it/mqtt.rs`, `tests/it/mqtt_cluster.rs`.

use rmqtt_codec::types::{Publish, QoS};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
    time::Instant,
};

use super::{
    connection::{Connection, Owed, Slot, Verdict, Wait},
    handshake::TOPIC_ALIASES,
    inbound::{self, Incoming, Reason, Refusal, Target},
    packet::{Broken, Id, Version, code, message_of},
    session::{NOBODY, Taken},
};
use crate::{
    instance::Until,
    store::{self, Known},
    types::{Channel, Fault, InstanceKey, Stimulus, StimulusId},
};

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Takes a publish and queues what its sender is owed.
    pub(super) async fn publish(&mut self, mut publish: Box<Publish>) -> Result<(), Broken> {
        self.resolve_alias(&mut publish)?;
        let owed = match (publish.qos, publish.packet_id) {
            (QoS::AtLeastOnce, Some(id)) => Owed::PubAck(id),
            (QoS::ExactlyOnce, Some(id)) => Owed::PubRec(id),
            (QoS::AtMostOnce, _) => Owed::Nothing,
            (_, None) => return Err(Broken::new(code::MALFORMED, "no packet id")),
        };
        if owed != Owed::Nothing {
            self.quota += 1;
            if self.version == Version::V5 && self.quota > usize::from(self.broker.config.receive_maximum) {
                return Err(Broken::new(code::RECEIVE_MAXIMUM, "more publishes than the receive maximum"));
            }
        }
        let wait = match owed {
            // Received and not released yet: the same message, whatever it says.
            Owed::PubRec(id) if !self.inbound.unreleased.insert(id) => {
                self.quota = self.quota.saturating_sub(1);
                Wait::Now(Some(Verdict::Accepted))
            }
            _ => self.dispatch(&publish).await.unwrap_or_else(|refusal| Wait::Now(Some(Verdict::Refused(refusal)))),
        };
        let publish = (self.version == Version::V3).then_some(publish);
        self.slots.push_back(Slot { owed, wait, publish, since: Instant::now() });
        Ok(())
    }

    fn resolve_alias(&mut self, publish: &mut Publish) -> Result<(), Broken> {
        let alias = publish.properties.as_ref().and_then(|properties| properties.topic_alias);
        let Some(alias) = alias.map(Id::get) else {
            return if publish.topic.is_empty() {
                Err(Broken::new(code::PROTOCOL_ERROR, "neither topic nor alias"))
            } else {
                Ok(())
            };
        };
        if alias > TOPIC_ALIASES {
            return Err(Broken::new(code::ALIAS_INVALID, "topic alias above the maximum"));
        }
        if publish.topic.is_empty() {
            let topic = self.aliases.get(&alias).ok_or(Broken::new(code::PROTOCOL_ERROR, "unknown topic alias"))?;
            publish.topic = topic.as_str().into();
        } else if publish.topic.len() <= crate::types::limits::MAX_TOPIC_BYTES {
            self.aliases.insert(alias, publish.topic.to_string());
        }
        Ok(())
    }

    async fn dispatch(&mut self, publish: &Publish) -> Result<Wait, Refusal> {
        let plain_topics = self.broker.config.plain_topics;
        let now = self.broker.clock.now();
        match inbound::target(&self.auth, &publish.topic, plain_topics)? {
            target @ (Target::Plain | Target::Presence(_)) => {
                let mut message = message_of(publish, now);
                if matches!(target, Target::Presence(_)) {
                    inbound::presence(&message.payload)?;
                    message.retain = true;
                } else if message.is_utf8 && std::str::from_utf8(&message.payload).is_err() {
                    return Err(Refusal::new(Reason::PayloadFormat, "the payload is not UTF-8 as its properties say"));
                }
                Ok(self.broker.distribute(&self.space, message, Some(&self.session.client))?.into())
            }
            Target::Reported(key) => {
                let stimulus = inbound::reported(&self.auth, &incoming(publish), &self.client, now)?;
                self.deliver(publish, key, stimulus, Until::Decided).await
            }
            Target::Stimulus(key, channel) => {
                let stimulus = self.stimulus(publish, channel)?;
                self.deliver(publish, key, stimulus, Until::Accepted).await
            }
        }
    }

    fn stimulus(&self, publish: &Publish, channel: Channel) -> Result<Stimulus, Refusal> {
        let (plain, now) = (self.broker.config.plain_topics, self.broker.clock.now());
        inbound::stimulus(&self.auth, channel, &incoming(publish), &self.client, plain, now)
    }

    async fn deliver(
        &mut self,
        publish: &Publish,
        key: InstanceKey,
        mut stimulus: Stimulus,
        until: Until,
    ) -> Result<Wait, Refusal> {
        if let Some(id) = publish.packet_id
            && self.is_persistent
            && !stimulus.repeatable
        {
            let hash = content_hash(publish);
            let derived = match publish.dup.then(|| self.taken_before(id, hash)).flatten() {
                Some(before) => before,
                None => {
                    if publish.dup && !self.has_taken(id) {
                        self.bar_earlier().await?;
                        if self.is_committed(&key, id, hash).await? {
                            return Ok(Wait::Now(Some(Verdict::Accepted)));
                        }
                    }
                    self.derive(id, hash)?
                }
            };
            self.remember(Taken { id, hash, stimulus: derived.clone() });
            stimulus = stimulus.with_repeatable_id(derived);
        }
        // What is not sent again holds nobody up.
        let line = publish.packet_id.map(|_| self.lines.join(&key.instance));
        let instance = line.is_some().then(|| key.instance.clone());
        let answer = self.broker.inward.submit(&key, stimulus, until, line.as_ref()).unwrap_or_else(|error| {
            let (refused, answer) = oneshot::channel();
            let _ = refused.send(Err(error));
            answer
        });
        Ok(Wait::Stimulus(answer, instance))
    }

    /// A new id for a publish that has none.
    fn derive(&mut self, id: Id, hash: u32) -> Result<StimulusId, Refusal> {
        self.counter += 1;
        let mut text = format!("{}{}.{hash:08x}.{}", self.id_prefix(id), self.epoch, self.counter);
        if self.hold != NOBODY {
            text.push_str(&format!(".{}", self.hold));
        }
        StimulusId::new(text).map_err(|error| Refusal::new(Reason::Unspecified, error.to_string()))
    }

    /// What nodes took of this client that could not say so is in the store after this, or never will be.
    async fn bar_earlier(&mut self) -> Result<(), Refusal> {
        if self.inbound.forgot
            && let Some(roam) = &self.broker.roam
        {
            roam.bar(&self.session.tenant, self.uid, self.hold).await.map_err(|error| unknown(&error))?;
            self.inbound.forgot = false;
        }
        Ok(())
    }

    /// Ids of stimuli derived from this session and packet id begin so.
    fn id_prefix(&self, id: Id) -> String {
        format!("mq.{:016x}.{id}.", self.uid)
    }

    /// The stimulus the newest publish with this packet id became, if it had the same content.
    fn taken_before(&self, id: Id, hash: u32) -> Option<StimulusId> {
        let newest = self.inbound.taken.iter().rev().find(|taken| taken.id == id)?;
        (newest.hash == hash).then(|| newest.stimulus.clone())
    }

    fn has_taken(&self, id: Id) -> bool {
        self.inbound.taken.iter().any(|taken| taken.id == id)
    }

    fn remember(&mut self, taken: Taken) {
        while self.inbound.taken.len() >= usize::from(self.broker.config.receive_maximum).max(1) {
            self.inbound.taken.pop_front();
        }
        self.inbound.taken.push_back(taken);
    }

    /// Whether the newest stimulus of this session and packet id is known to the store and has the same content. While the
    /// store cannot say, the publish is refused for the moment: taken as unknown it might be decided twice.
    async fn is_committed(&mut self, key: &InstanceKey, id: Id, hash: u32) -> Result<bool, Refusal> {
        let prefix = self.id_prefix(id);
        let same = |found: &StimulusId| {
            found
                .as_str()
                .strip_prefix(&prefix)
                .is_some_and(|rest| rest.split('.').nth(1) == Some(&format!("{hash:08x}")))
        };
        let decided = match self.broker.store.find_prefix(key, &prefix).await {
            Ok(Some(Known::Decided(turn))) => same(&turn.stimulus.id),
            Ok(Some(Known::Waiting(stimulus))) => same(&stimulus.id),
            Ok(Some(Known::Dead(letter))) => same(&letter.stimulus.id),
            Ok(None) => false,
            Err(error) => return Err(unknown(&error)),
        };
        if decided {
            return Ok(true);
        }
        match self.broker.store.load(key).await {
            Ok(loaded) => Ok(loaded.inbox.iter().rev().any(|waiting| same(&waiting.id))),
            Err(error) => Err(unknown(&error)),
        }
    }
}

/// The refusal of a repeat that cannot be looked up at present.
fn unknown(error: &store::Error) -> Refusal {
    Refusal::new(Reason::of(error.kind()), format!("a repeat cannot be looked up: {error}"))
}

/// Of topic and payload, 32 bits.
fn content_hash(publish: &Publish) -> u32 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(publish.topic.as_bytes()).update(&[0]).update(&publish.payload);
    let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

fn incoming(publish: &Publish) -> Incoming<'_> {
    let mut incoming = Incoming { payload: &publish.payload, ..Incoming::default() };
    if let Some(properties) = &publish.properties {
        incoming.is_utf8 = properties.is_utf8_payload;
        incoming.content_type = properties.content_type.as_deref();
        incoming.response_topic = properties.response_topic.as_deref();
        incoming.correlation = properties.correlation_data.as_deref();
        properties.user_properties.iter().for_each(|(name, value)| incoming.property(name, value));
    }
    incoming
}
