//! Which effect becomes which call: topics, payloads, ids, targets. Pure.
//!
//! Invariants: a stimulus made from an effect has the same id however often the effect is delivered, and an id no other
//! effect has; what is kept for later yields the same call as what comes fresh from the log.
//! Tests: at the foot.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use serde::Serialize;

use super::{Message, reply_topic};
use crate::{
    store::{Feed, Outgoing, Pending},
    types::{
        Channel, Effect, EffectKind, InstanceId, InstanceKey, Millis, Priority, RawJson, Reply, Source, Stimulus,
        StimulusId, TurnRecord, limits::MAX_ID_BYTES,
    },
};

/// The channel on which a reminder reaches its instance.
pub(super) const REMINDER_CHANNEL: &str = "reminder";

/// The place of an effect among those of its instance: turn, then index. Written `TURN-INDEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Seq(pub u64, pub u32);

impl Seq {
    /// Reads `TURN-INDEX`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (turn, index) = text.split_once('-')?;
        Some(Self(turn.parse().ok()?, index.parse().ok()?))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

/// What takes an effect. Effects of one instance reach one target in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Target {
    /// The MQTT door.
    Mqtt,
    /// Another instance of the tenant.
    Instance(InstanceId),
    /// A web host, with its port.
    Host(String),
    /// The instance itself, when a reminder is due; each reminder stands alone.
    Reminder(Seq),
}

/// What the limits on work under way are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    /// Publishes.
    Mqtt,
    /// Stimuli for instances.
    Router,
    /// Webhooks.
    Web,
}

impl Target {
    /// Through which door it is reached.
    pub(super) fn door(&self) -> Door {
        match self {
            Target::Mqtt => Door::Mqtt,
            Target::Instance(_) | Target::Reminder(_) => Door::Router,
            Target::Host(_) => Door::Web,
        }
    }
}

/// Where an effect was found.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// In the log.
    Log {
        /// In which feed.
        feed: Feed,
        /// At which position.
        position: i64,
        /// In which turn.
        turn: Arc<TurnRecord>,
        /// At which place of its effects.
        at: usize,
    },
    /// Among what was put off.
    Row(Box<Pending>),
}

/// One effect to deliver.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// Whose.
    pub(super) key: InstanceKey,
    /// Its place.
    pub(super) seq: Seq,
    /// Where to.
    pub(super) target: Target,
    /// Where it was found.
    pub(super) origin: Origin,
}

/// What is to be done for an effect.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Call {
    /// Publish these, one after the other.
    Publish(Vec<Message>),
    /// Hand a stimulus to an instance.
    Accept(InstanceKey, Box<Stimulus>),
    /// POST a body.
    Post {
        /// Where to.
        url: String,
        /// What.
        body: RawJson,
        /// The effect, for receivers that must not act twice.
        effect: String,
    },
}

impl Item {
    /// The effects of a turn, from the log.
    pub(super) fn of_turn(outgoing: &Outgoing) -> impl Iterator<Item = Self> + use<'_> {
        let &Outgoing { feed, position, ref key, ref turn } = outgoing;
        turn.effects.iter().enumerate().map(move |(at, effect)| {
            let seq = Seq(turn.turn, effect.index);
            Self {
                key: key.clone(),
                seq,
                target: target(&effect.kind, seq),
                origin: Origin::Log { feed, position, turn: turn.clone(), at },
            }
        })
    }

    /// What was put off; nothing when its effect id is none.
    pub(super) fn of_row(row: Pending) -> Option<Self> {
        let seq = Seq::parse(&row.effect_id)?;
        Some(Self {
            key: row.key.clone(),
            seq,
            target: target(&row.effect.kind, seq),
            origin: Origin::Row(Box::new(row)),
        })
    }

    /// The effect.
    pub(super) fn effect(&self) -> &Effect {
        match &self.origin {
            Origin::Log { turn, at, .. } => &turn.effects[*at],
            Origin::Row(row) => &row.effect,
        }
    }

    fn reply(&self) -> Option<&Reply> {
        match &self.origin {
            Origin::Log { turn, .. } => turn.reply.as_ref(),
            Origin::Row(row) => row.reply.as_ref(),
        }
    }

    fn stimulus(&self) -> &StimulusId {
        match &self.origin {
            Origin::Log { turn, .. } => &turn.stimulus.id,
            Origin::Row(row) => &row.stimulus,
        }
    }

    /// Failed tries so far.
    pub(super) fn tries(&self) -> u32 {
        match &self.origin {
            Origin::Log { .. } => 0,
            Origin::Row(row) => row.tries,
        }
    }

    /// The name of its kind, for metrics and logs.
    pub(super) fn kind(&self) -> &'static str {
        match self.effect().kind {
            EffectKind::Reply { .. } => "reply",
            EffectKind::Publish { .. } => "publish",
            EffectKind::Twin { .. } => "twin",
            EffectKind::Send { .. } => "send",
            EffectKind::Remind { .. } => "remind",
            EffectKind::Webhook { .. } => "webhook",
        }
    }

    /// When it is put off at once instead of tried: a reminder to its time, a webhook to now, since a web host's slowness
    /// must not hold the position in the log.
    pub(super) fn put_off_to(&self, now: Millis) -> Option<Millis> {
        match (&self.effect().kind, &self.origin) {
            (EffectKind::Remind { due, .. }, Origin::Log { .. }) => Some(*due),
            (EffectKind::Webhook { .. }, Origin::Log { .. }) => Some(now),
            _ => None,
        }
    }

    /// The row that keeps it for later.
    pub(super) fn put_off(&self, tries: u32, due: Millis) -> Pending {
        match &self.origin {
            Origin::Row(row) => Pending { tries, due, ..(**row).clone() },
            Origin::Log { turn, .. } => Pending {
                key: self.key.clone(),
                effect_id: self.seq.to_string(),
                effect: self.effect().clone(),
                reply: match self.effect().kind {
                    EffectKind::Reply { .. } => turn.reply.clone(),
                    _ => None,
                },
                stimulus: turn.stimulus.id.clone(),
                tries,
                due,
            },
        }
    }

    /// What is to be done now.
    ///
    /// # Errors
    /// A sentence when the effect can never be carried out: also when it would be one hop more from instance to instance than
    /// `max_hops` since something came from outside or from a clock.
    pub(super) fn call(&self, now: Millis, max_hops: u32) -> Result<Call, String> {
        Ok(match &self.effect().kind {
            EffectKind::Reply { to } => {
                let silent = Reply::default();
                let reply = self.reply().unwrap_or(&silent);
                let mut message = self.message(
                    reply_topic(&self.key, to.as_ref()),
                    self.payload(reply.content.as_deref(), reply.data.as_ref())?,
                    false,
                );
                message.correlation = to.as_ref().and_then(|to| to.correlation.clone());
                Call::Publish(vec![message])
            }
            EffectKind::Publish { channel, content, data, retain } => Call::Publish(vec![self.message(
                format!("{}/out/{channel}", self.root()),
                self.payload(content.as_deref(), data.as_ref())?,
                *retain,
            )]),
            EffectKind::Twin { version, desired, delta } => {
                let part = |name: &str, value: &RawJson| {
                    self.message(
                        format!("{}/state/{name}", self.root()),
                        Bytes::from(format!(r#"{{"version":{version},"{name}":{}}}"#, value.get())),
                        true,
                    )
                };
                let desired = desired.as_ref().map(|desired| part("desired", desired));
                Call::Publish(desired.into_iter().chain([part("delta", delta)]).collect())
            }
            EffectKind::Send { instance, channel, content, data } => {
                let hops = self.stimulus().hops();
                if hops >= max_hops {
                    return Err(format!("{hops} hops led here, the limit is {max_hops}: instances answer each other"));
                }
                let prefix = if hops == 0 {
                    String::from(StimulusId::SENT)
                } else {
                    format!("{}{}", StimulusId::SENT, hops + 1)
                };
                let id = repeatable_id(&prefix, Some(&self.key.instance), self.seq, self.stimulus())?;
                let stimulus = Stimulus {
                    sender: Some(self.key.instance.to_string()),
                    priority: Priority::default_for(Source::Instance),
                    content: content.clone(),
                    data: data.clone(),
                    traceparent: match &self.origin {
                        Origin::Log { turn, .. } => turn.stimulus.traceparent.clone(),
                        Origin::Row(_) => None,
                    },
                    ..Stimulus::empty(Source::Instance, channel.clone(), now)
                };
                let key = InstanceKey::new(self.key.tenant.clone(), instance.clone());
                Call::Accept(key, Box::new(stimulus.with_repeatable_id(id)))
            }
            EffectKind::Remind { content, data, .. } => {
                let id = repeatable_id("rm", None, self.seq, self.stimulus())?;
                let channel = Channel::new(REMINDER_CHANNEL).map_err(|error| error.to_string())?;
                let stimulus = Stimulus {
                    content: content.clone(),
                    data: data.clone(),
                    ..Stimulus::empty(Source::Timer, channel, now)
                };
                Call::Accept(self.key.clone(), Box::new(stimulus.with_repeatable_id(id)))
            }
            EffectKind::Webhook { url, body } => {
                Call::Post { url: url.clone(), body: body.clone(), effect: format!("{}/{}", self.key, self.seq) }
            }
        })
    }

    fn root(&self) -> String {
        format!("sophont/{}/{}", self.key.tenant, self.key.instance)
    }

    fn message(&self, topic: String, payload: Bytes, retain: bool) -> Message {
        Message {
            tenant: self.key.tenant.clone(),
            topic,
            payload,
            json: true,
            retain,
            correlation: None,
            effect_id: format!("{}/{}", self.key.instance, self.seq),
        }
    }

    fn payload(&self, content: Option<&str>, data: Option<&RawJson>) -> Result<Bytes, String> {
        #[derive(Serialize)]
        struct Payload<'a> {
            stimulus: &'a StimulusId,
            content: Option<&'a str>,
            data: Option<&'a RawJson>,
            turn: u64,
        }
        let payload = Payload { stimulus: self.stimulus(), content, data, turn: self.seq.0 };
        serde_json::to_vec(&payload).map(Bytes::from).map_err(|error| format!("the payload is not JSON: {error}"))
    }
}

fn target(kind: &EffectKind, seq: Seq) -> Target {
    match kind {
        EffectKind::Reply { .. } | EffectKind::Publish { .. } | EffectKind::Twin { .. } => Target::Mqtt,
        EffectKind::Send { instance, .. } => Target::Instance(instance.clone()),
        EffectKind::Remind { .. } => Target::Reminder(seq),
        EffectKind::Webhook { url, .. } => Target::Host(super::webhook::host_of(url)),
    }
}

/// `PREFIX.INSTANCE.TURN-INDEX.MARK`, or `PREFIX.h.HASH` where that would be too long for an id. The mark comes from the
/// stimulus of the turn: an instance that was forgotten and lives again counts its turns anew, but not over the same stimuli.
fn repeatable_id(
    prefix: &str,
    instance: Option<&InstanceId>,
    seq: Seq,
    stimulus: &StimulusId,
) -> Result<StimulusId, String> {
    let mark = blake3::hash(stimulus.as_str().as_bytes()).to_hex();
    let mut text = String::from(prefix);
    if let Some(instance) = instance {
        text.push('.');
        text.push_str(instance.as_str());
    }
    text.push_str(&format!(".{seq}.{}", &mark[..12]));
    if text.len() > MAX_ID_BYTES {
        text = format!("{prefix}.h.{}", blake3::hash(text.as_bytes()).to_hex());
    }
    StimulusId::new(text).map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{Outcome, ReplyTo, StateChange, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("acme").unwrap(), InstanceId::new("lamp").unwrap())
    }

    fn turn(kinds: Vec<EffectKind>) -> Arc<TurnRecord> {
        let now = Millis(1_000);
        let stimulus = Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "hi", now)
            .with_repeatable_id(StimulusId::new("s1").unwrap());
        Arc::new(TurnRecord {
            turn: 7,
            version: 3,
            stimulus,
            outcome: Outcome::Replied,
            reply: Some(Reply { content: Some("hello \"you\"".into()), data: Some(RawJson::parse("[1]").unwrap()) }),
            effects: kinds.into_iter().zip(0..).map(|(kind, index)| Effect { index, kind }).collect(),
            state: StateChange::None,
            episodes: Vec::new(),
            steps: 0,
            engine: "reflex".into(),
            model: None,
            usage: None,
            error: None,
            decided_at: now,
            epoch: 0,
        })
    }

    fn outgoing(turn: &Arc<TurnRecord>) -> Outgoing {
        Outgoing { feed: Feed(0), position: 40, key: key(), turn: turn.clone() }
    }

    fn calls(kinds: Vec<EffectKind>) -> Vec<Call> {
        let turn = turn(kinds);
        Item::of_turn(&outgoing(&turn)).map(|item| item.call(Millis(2_000), 16).unwrap()).collect()
    }

    fn published(call: &Call) -> &[Message] {
        match call {
            Call::Publish(messages) => messages,
            other => panic!("{other:?} is no publish"),
        }
    }

    #[test]
    fn a_reply_goes_to_the_response_topic_or_to_out_reply() {
        let to = ReplyTo { topic: "sophont/acme/app/out/x".into(), correlation: Some(vec![1, 2]) };
        let calls = calls(vec![EffectKind::Reply { to: None }, EffectKind::Reply { to: Some(to) }]);
        let plain = &published(&calls[0])[0];
        assert_eq!(plain.topic, "sophont/acme/lamp/out/reply");
        assert_eq!(&plain.payload[..], br#"{"stimulus":"s1","content":"hello \"you\"","data":[1],"turn":7}"#);
        assert_eq!((plain.json, plain.retain, plain.correlation.is_none()), (true, false, true));
        let asked = &published(&calls[1])[0];
        assert_eq!(
            (asked.topic.as_str(), asked.correlation.as_deref()),
            ("sophont/acme/app/out/x", Some(&[1u8, 2][..]))
        );
        assert_eq!(asked.effect_id, "lamp/7-1");
    }

    #[test]
    fn a_publish_goes_below_out() {
        let channel = Channel::new("fan/speed").unwrap();
        let calls = calls(vec![EffectKind::Publish { channel, content: Some("on".into()), data: None, retain: true }]);
        let message = &published(&calls[0])[0];
        assert_eq!(message.topic, "sophont/acme/lamp/out/fan/speed");
        assert_eq!(&message.payload[..], br#"{"stimulus":"s1","content":"on","data":null,"turn":7}"#);
        assert!(message.retain);
    }

    #[test]
    fn the_twin_is_published_retained_with_its_version() {
        let delta = RawJson::parse(r#"{"on":true}"#).unwrap();
        let calls = calls(vec![
            EffectKind::Twin { version: 3, desired: Some(delta.clone()), delta: delta.clone() },
            EffectKind::Twin { version: 4, desired: None, delta },
        ]);
        let both = published(&calls[0]);
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].topic, "sophont/acme/lamp/state/desired");
        assert_eq!(&both[0].payload[..], br#"{"version":3,"desired":{"on":true}}"#);
        assert_eq!(&both[1].payload[..], br#"{"version":3,"delta":{"on":true}}"#);
        assert!(both.iter().all(|message| message.retain));
        assert_eq!(published(&calls[1]).len(), 1);
    }

    #[test]
    fn a_send_is_a_stimulus_whose_id_repeats() {
        let send = EffectKind::Send {
            instance: InstanceId::new("fan").unwrap(),
            channel: Channel::new("orders").unwrap(),
            content: Some("spin".into()),
            data: None,
        };
        let (first, second) = (calls(vec![send.clone()]), calls(vec![send.clone(), send]));
        let Call::Accept(to, stimulus) = &first[0] else { panic!("a send is accepted by an instance") };
        assert_eq!(to.to_string(), "acme/fan");
        assert!(stimulus.repeatable && stimulus.id.as_str().starts_with("fx.lamp.7-0."), "{}", stimulus.id);
        assert_eq!((stimulus.source, stimulus.sender.as_deref()), (Source::Instance, Some("lamp")));
        assert_eq!(first[0], second[0]);
        let Call::Accept(_, other) = &second[1] else { panic!("a send is accepted by an instance") };
        assert_ne!(other.id, stimulus.id);
    }

    #[test]
    fn two_that_answer_each_other_come_to_an_end() {
        const LIMIT: u32 = 5;
        let send = |to: &str| EffectKind::Send {
            instance: InstanceId::new(to).unwrap(),
            channel: Channel::new("c").unwrap(),
            content: None,
            data: None,
        };
        let names = ["lamp", "fan"];
        let mut record = turn(vec![send(names[1])]);
        let (mut ids, mut at) = (Vec::new(), 0);
        let refused = loop {
            let key = InstanceKey::new(TenantId::new("acme").unwrap(), InstanceId::new(names[at % 2]).unwrap());
            let outgoing = Outgoing { feed: Feed(0), position: 40, key, turn: record.clone() };
            let item = Item::of_turn(&outgoing).next().unwrap();
            let kept = Item::of_row(item.put_off(1, Millis(5))).unwrap();
            let call = item.call(Millis(5), LIMIT);
            assert_eq!(
                kept.call(Millis(5), LIMIT).map_err(|e| e.len()),
                call.clone().map_err(|e| e.len()),
                "kept or not"
            );
            match call {
                Ok(Call::Accept(_, stimulus)) => {
                    ids.push(stimulus.id.to_string());
                    at += 1;
                    let (turn, effect) = (record.turn, Effect { index: 0, kind: send(names[(at + 1) % 2]) });
                    let next = TurnRecord { turn, stimulus: *stimulus, effects: vec![effect], ..(*record).clone() };
                    record = Arc::new(next);
                }
                Ok(other) => panic!("{other:?} is no send"),
                Err(reason) => break reason,
            }
        };
        assert!(refused.starts_with("5 hops led here"), "{refused}");
        let begins: Vec<_> = ids.iter().map(|id| id.split('.').next().unwrap()).collect();
        assert_eq!(begins, ["fx", "fx2", "fx3", "fx4", "fx5"]);
        for (id, known) in
            [("s1", 0), ("fx", 0), ("fxy.1", 0), ("fx.a.1-0.x", 1), ("fx007.a", 7), ("fx99999999999.a", u32::MAX)]
        {
            assert_eq!(StimulusId::new(id).unwrap().hops(), known, "{id}");
        }
    }

    #[test]
    fn a_reminder_waits_for_its_time_and_then_is_a_stimulus_of_its_own_instance() {
        let turn = turn(vec![EffectKind::Remind { due: Millis(9_000), content: Some("tea".into()), data: None }]);
        let item = Item::of_turn(&outgoing(&turn)).next().unwrap();
        assert_eq!(item.put_off_to(Millis(1)), Some(Millis(9_000)));
        let row = Item::of_row(item.put_off(0, Millis(9_000))).unwrap();
        assert_eq!(row.put_off_to(Millis(1)), None);
        let Call::Accept(to, stimulus) = row.call(Millis(9_001), 16).unwrap() else { panic!("a stimulus was due") };
        assert_eq!(to, key());
        assert_eq!((stimulus.source, stimulus.priority), (Source::Timer, Priority::Timer));
        assert_eq!((stimulus.channel.as_str(), stimulus.content.as_deref()), ("reminder", Some("tea")));
        assert!(stimulus.repeatable);
    }

    #[test]
    fn what_is_kept_for_later_yields_the_same_call() {
        let delta = RawJson::parse("{}").unwrap();
        let turn = turn(vec![
            EffectKind::Reply { to: None },
            EffectKind::Publish { channel: Channel::new("a").unwrap(), content: None, data: None, retain: false },
            EffectKind::Twin { version: 3, desired: None, delta },
            EffectKind::Send {
                instance: InstanceId::new("fan").unwrap(),
                channel: Channel::new("orders").unwrap(),
                content: None,
                data: None,
            },
            EffectKind::Webhook { url: "https://example.org/x".into(), body: RawJson::parse("1").unwrap() },
        ]);
        for item in Item::of_turn(&outgoing(&turn)) {
            let row = Item::of_row(item.put_off(2, Millis(5))).unwrap();
            assert_eq!(row.call(Millis(5), 16).unwrap(), item.call(Millis(5), 16).unwrap());
            assert_eq!((row.target.clone(), row.seq, row.tries()), (item.target.clone(), item.seq, 2));
        }
    }

    proptest! {
        #[test]
        fn repeatable_ids_are_ids_and_differ(
            instances in prop::collection::hash_set("[A-Za-z0-9._~-]{1,128}", 2),
            turn in any::<u64>(),
            index in any::<u32>(),
        ) {
            let stimulus = StimulusId::new("s").unwrap();
            let ids: std::collections::HashSet<String> = instances
                .iter()
                .map(|instance| {
                    let instance = InstanceId::new(instance).unwrap();
                    repeatable_id("fx", Some(&instance), Seq(turn, index), &stimulus).unwrap().to_string()
                })
                .collect();
            prop_assert_eq!(ids.len(), instances.len());
        }

        #[test]
        fn a_place_reads_back(turn in any::<u64>(), index in any::<u32>()) {
            prop_assert_eq!(Seq::parse(&Seq(turn, index).to_string()), Some(Seq(turn, index)));
        }
    }
}
