//! One vocabulary of packets over the codec's two protocol versions.
//!
//! Owns: framing, decoding into [`Packet`], encoding of what the broker sends. Not here: what a packet means.
//!
//! Invariants: a frame is handed to the codec only when all of it has arrived, so memory grows with bytes received and
//! never with bytes announced; nothing a client sends panics. Publishes and plain acks are encoded here, without copying
//! topic or properties; a test reads them back with the codec. Tests: at the foot.

use std::num::NonZeroU16;

use bytes::{BufMut, Bytes, BytesMut};
use rmqtt_codec::{
    error::DecodeError,
    types::{Publish, QoS},
    v3,
    v5::{self, RetainHandling, SubscriptionOptions, ToReasonCode},
};
use tokio_util::codec::{Decoder, Encoder};

use super::record::{Message, Will};
use crate::types::Millis;

/// A packet id.
pub type Id = NonZeroU16;

/// Reason codes the broker uses outside publish refusals.
pub mod code {
    #![allow(missing_docs)]
    pub const SUCCESS: u8 = 0x00;
    pub const NO_SUBSCRIPTION: u8 = 0x11;
    pub const UNSPECIFIED: u8 = 0x80;
    pub const MALFORMED: u8 = 0x81;
    pub const PROTOCOL_ERROR: u8 = 0x82;
    pub const IMPLEMENTATION: u8 = 0x83;
    pub const UNSUPPORTED_VERSION: u8 = 0x84;
    pub const CLIENT_ID_INVALID: u8 = 0x85;
    pub const BAD_LOGIN: u8 = 0x86;
    pub const NOT_AUTHORIZED: u8 = 0x87;
    pub const UNAVAILABLE: u8 = 0x88;
    pub const BUSY: u8 = 0x89;
    pub const SHUTTING_DOWN: u8 = 0x8b;
    pub const BAD_AUTH_METHOD: u8 = 0x8c;
    pub const KEEP_ALIVE: u8 = 0x8d;
    pub const TAKEN_OVER: u8 = 0x8e;
    pub const FILTER_INVALID: u8 = 0x8f;
    pub const RECEIVE_MAXIMUM: u8 = 0x93;
    pub const ALIAS_INVALID: u8 = 0x94;
    pub const TOO_LARGE: u8 = 0x95;
    pub const QUOTA: u8 = 0x97;
}

/// Why a connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("protocol error {code:#04x}: {what}")]
pub struct Broken {
    /// Reason code for a DISCONNECT or CONNACK of MQTT 5.
    pub code: u8,
    /// For the log.
    pub what: &'static str,
}

impl Broken {
    /// A reason and its words.
    pub const fn new(code: u8, what: &'static str) -> Self {
        Self { code, what }
    }
}

/// Protocol version of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 3.1 and 3.1.1.
    V3,
    /// 5.0.
    V5,
}

/// CONNECT.
#[derive(Debug, Clone)]
pub struct Connect {
    /// Protocol.
    pub version: Version,
    /// Forget what was there.
    pub clean_start: bool,
    /// Seconds, 0 = none.
    pub keep_alive: u16,
    /// Session life after the connection, in seconds; `u32::MAX` = for ever.
    pub expiry_seconds: u32,
    /// Most unacknowledged publishes the client takes.
    pub receive_max: u16,
    /// Largest packet the client takes.
    pub max_packet: u32,
    /// Whether it wants response information.
    pub wants_response_info: bool,
    /// Whether it asks for an enhanced authentication.
    pub has_auth_method: bool,
    /// Client id, may be empty.
    pub client_id: String,
    /// Will.
    pub will: Option<Will>,
    /// User name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<Bytes>,
}

/// One filter of a SUBSCRIBE.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The filter.
    pub filter: String,
    /// Highest QoS.
    pub qos: u8,
    /// No local.
    pub no_local: bool,
    /// Retain as published.
    pub retain_as_published: bool,
    /// Retain handling: 0 always, 1 when the subscription is new, 2 never.
    pub retain_handling: u8,
}

/// What a client sends.
#[derive(Debug)]
pub enum Packet {
    /// CONNECT.
    Connect(Box<Connect>),
    /// PUBLISH.
    Publish(Box<Publish>),
    /// PUBACK.
    PubAck(Id),
    /// PUBREC, and whether the client took it.
    PubRec(Id, bool),
    /// PUBREL.
    PubRel(Id),
    /// PUBCOMP.
    PubComp(Id),
    /// SUBSCRIBE.
    Subscribe {
        /// Packet id.
        id: Id,
        /// Subscription identifier.
        subscription: Option<u32>,
        /// Filters.
        wishes: Vec<Wish>,
    },
    /// UNSUBSCRIBE.
    Unsubscribe {
        /// Packet id.
        id: Id,
        /// Filters.
        filters: Vec<String>,
    },
    /// PINGREQ.
    Ping,
    /// DISCONNECT.
    Disconnect {
        /// Whether the will is to be sent nevertheless.
        with_will: bool,
        /// A new session life.
        expiry_seconds: Option<u32>,
    },
}

/// Decoder and encoder of one connection.
#[derive(Debug)]
pub struct Codec {
    inner: Inner,
    max_packet: usize,
}

#[derive(Debug)]
enum Inner {
    Unknown,
    V3(v3::Codec),
    V5(Box<v5::Codec>),
}

/// Length of the first frame, header included, when its header has arrived.
fn frame_len(buffer: &[u8]) -> Result<Option<usize>, Broken> {
    let (mut length, mut shift) = (0_usize, 0_u32);
    for (at, byte) in buffer.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return Ok(Some(length + at + 2));
        }
    }
    if buffer.len() >= 5 { Err(Broken::new(code::MALFORMED, "packet length")) } else { Ok(None) }
}

impl Codec {
    /// A codec that learns its version from CONNECT and takes packets up to a size.
    pub fn new(max_packet: usize) -> Self {
        Self { inner: Inner::Unknown, max_packet }
    }

    /// The next whole packet of the buffer.
    ///
    /// # Errors
    /// [`Broken`]: the connection cannot go on.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Packet>, Broken> {
        let Some(length) = frame_len(buffer)? else { return Ok(None) };
        if length > self.max_packet {
            return Err(Broken::new(code::TOO_LARGE, "packet larger than mqtt.max_packet_kb"));
        }
        if matches!(self.inner, Inner::Unknown) {
            // Refuse what is no CONNECT before waiting for the rest of it.
            if buffer.first() != Some(&0x10) {
                return Err(Broken::new(code::PROTOCOL_ERROR, "the first packet is not CONNECT"));
            }
        }
        if buffer.len() < length {
            return Ok(None);
        }
        if matches!(self.inner, Inner::Unknown) {
            self.inner = detect(&buffer[..length])?;
        }
        match &mut self.inner {
            Inner::Unknown => Ok(None),
            Inner::V3(codec) => match codec.decode(buffer).map_err(|error| broken(&error))? {
                Some((packet, _)) => from_v3(packet).map(Some),
                None => Ok(None),
            },
            Inner::V5(codec) => match codec.decode(buffer).map_err(|error| broken(&error))? {
                Some((packet, _)) => from_v5(packet).map(Some),
                None => Ok(None),
            },
        }
    }

    fn put(&mut self, v3: v3::Packet, v5: impl FnOnce() -> Option<v5::Packet>, out: &mut BytesMut) {
        // Encoding fails only for packets without a form, which these are not; a failure writes nothing.
        match &mut self.inner {
            Inner::Unknown => {}
            Inner::V3(codec) => drop(codec.encode(v3, out)),
            Inner::V5(codec) => {
                if let Some(packet) = v5() {
                    drop(codec.encode(packet, out));
                }
            }
        }
    }

    /// CONNACK of a connection that is taken.
    pub fn connack(&mut self, session_present: bool, ack: v5::ConnectAck, out: &mut BytesMut) {
        let v3 = v3::ConnectAck { return_code: v3::ConnectAckReason::ConnectionAccepted, session_present };
        let v5 = || Some(v5::ConnectAck { session_present, ..ack }.into());
        self.put(v3::Packet::ConnectAck(v3), v5, out);
    }

    /// CONNACK of a connection that is refused.
    pub fn refuse(&mut self, reason: u8, out: &mut BytesMut) {
        let return_code = match reason {
            code::UNSUPPORTED_VERSION => v3::ConnectAckReason::UnacceptableProtocolVersion,
            code::CLIENT_ID_INVALID => v3::ConnectAckReason::IdentifierRejected,
            code::BAD_LOGIN => v3::ConnectAckReason::BadUserNameOrPassword,
            code::NOT_AUTHORIZED => v3::ConnectAckReason::NotAuthorized,
            _ => v3::ConnectAckReason::ServiceUnavailable,
        };
        let v3 = v3::Packet::ConnectAck(v3::ConnectAck { return_code, session_present: false });
        let v5 = || {
            let reason_code = v5::ConnectAckReason::try_from(reason).ok()?;
            Some(v5::ConnectAck { reason_code, ..v5::ConnectAck::default() }.into())
        };
        self.put(v3, v5, out);
    }

    /// PUBACK or PUBREC. On MQTT 3 there is only success.
    pub fn ack(&mut self, is_qos2: bool, id: Id, reason: u8, detail: Option<&str>, out: &mut BytesMut) {
        if reason == code::SUCCESS || matches!(self.inner, Inner::V3(_)) {
            return short(if is_qos2 { 0x50 } else { 0x40 }, id, out);
        }
        if let Inner::V5(codec) = &mut self.inner
            && let Ok(reason_code) = v5::PublishAckReason::try_from(reason)
        {
            let ack = v5::PublishAck {
                packet_id: id,
                reason_code,
                properties: Vec::new(),
                reason_string: detail.map(Into::into),
            };
            let packet = if is_qos2 { v5::Packet::PublishReceived(ack) } else { v5::Packet::PublishAck(ack) };
            drop(codec.encode(packet, out));
        }
    }

    /// PUBREL.
    pub fn pubrel(&self, id: Id, out: &mut BytesMut) {
        short(0x62, id, out);
    }

    /// PUBCOMP; MQTT 5 is told when the id was unknown.
    pub fn pubcomp(&mut self, id: Id, was_known: bool, out: &mut BytesMut) {
        if let (false, Inner::V5(codec)) = (was_known, &mut self.inner) {
            let ack = v5::PublishAck2 {
                packet_id: id,
                reason_code: v5::PublishAck2Reason::PacketIdNotFound,
                ..v5::PublishAck2::default()
            };
            return drop(codec.encode(v5::Packet::PublishComplete(ack), out));
        }
        short(0x70, id, out);
    }

    /// SUBACK.
    pub fn suback(&mut self, id: Id, codes: &[u8], out: &mut BytesMut) {
        let granted = |&code: &u8| match code {
            0 => v3::SubscribeReturnCode::Success(QoS::AtMostOnce),
            1 => v3::SubscribeReturnCode::Success(QoS::AtLeastOnce),
            2 => v3::SubscribeReturnCode::Success(QoS::ExactlyOnce),
            _ => v3::SubscribeReturnCode::Failure,
        };
        let v3 = v3::Packet::SubscribeAck { packet_id: id, status: codes.iter().map(granted).collect() };
        let v5 = || {
            let status = codes.iter().map(|&code| v5::SubscribeAckReason::try_from(code)).collect::<Result<_, _>>();
            let (properties, reason_string) = (Vec::new(), None);
            Some(v5::SubscribeAck { packet_id: id, properties, reason_string, status: status.ok()? }.into())
        };
        self.put(v3, v5, out);
    }

    /// UNSUBACK.
    pub fn unsuback(&mut self, id: Id, codes: &[u8], out: &mut BytesMut) {
        let v5 = || {
            let status = codes.iter().map(|&code| v5::UnsubscribeAckReason::try_from(code)).collect::<Result<_, _>>();
            let (properties, reason_string) = (Vec::new(), None);
            Some(v5::UnsubscribeAck { packet_id: id, properties, reason_string, status: status.ok()? }.into())
        };
        self.put(v3::Packet::UnsubscribeAck { packet_id: id }, v5, out);
    }

    /// PINGRESP.
    pub fn pong(&self, out: &mut BytesMut) {
        out.put_slice(&[0xd0, 0]);
    }

    /// DISCONNECT with a reason. MQTT 3 has none from the server: nothing is written.
    pub fn disconnect(&mut self, reason: u8, out: &mut BytesMut) {
        if let Inner::V5(codec) = &mut self.inner
            && let Ok(reason) = v5::DisconnectReasonCode::try_from(reason)
        {
            drop(codec.encode(v5::Disconnect::new(reason).into(), out));
        }
    }

    /// PUBLISH, unless it would be larger than `limit`; false then, and nothing is written.
    pub fn publish(&self, outgoing: &Outgoing<'_>, limit: u32, now: Millis, out: &mut BytesMut) -> bool {
        let message = outgoing.message;
        let is_v5 = matches!(self.inner, Inner::V5(_));
        let properties = if is_v5 { properties_len(outgoing) } else { 0 };
        let properties_total = if is_v5 { properties + varint_len(properties) } else { 0 };
        let id = outgoing.id.map_or(0, |_| 2);
        let remaining = 2 + message.topic.len() + id + properties_total + message.payload.len();
        let total = 1 + varint_len(remaining) + remaining;
        if total > limit as usize || remaining > MAX_REMAINING {
            return false;
        }
        out.reserve(total);
        out.put_u8(0x30 | u8::from(outgoing.dup) << 3 | outgoing.qos << 1 | u8::from(outgoing.retain));
        put_varint(remaining, out);
        put_text(&message.topic, out);
        if let Some(id) = outgoing.id {
            out.put_u16(id.get());
        }
        if is_v5 {
            put_varint(properties, out);
            put_properties(outgoing, now, out);
        }
        out.put_slice(&message.payload);
        true
    }
}

/// Largest remaining length MQTT can express.
const MAX_REMAINING: usize = 268_435_455;

/// A publish on its way out.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// What.
    pub message: &'a Message,
    /// QoS of this delivery.
    pub qos: u8,
    /// Packet id for QoS 1 and 2.
    pub id: Option<Id>,
    /// Retain flag of this delivery.
    pub retain: bool,
    /// Sent before.
    pub dup: bool,
    /// Subscription identifiers.
    pub ids: &'a [u32],
}

fn short(kind: u8, id: Id, out: &mut BytesMut) {
    let [high, low] = id.get().to_be_bytes();
    out.put_slice(&[kind, 2, high, low]);
}

fn varint_len(value: usize) -> usize {
    match value {
        0..=0x7f => 1,
        0x80..=0x3fff => 2,
        0x4000..=0x1f_ffff => 3,
        _ => 4,
    }
}

fn put_varint(mut value: usize, out: &mut BytesMut) {
    while value > 0x7f {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// Texts here came in with a 16-bit length or are bounded by it.
fn put_text(text: &str, out: &mut BytesMut) {
    put_binary(text.as_bytes(), out);
}

fn put_binary(bytes: &[u8], out: &mut BytesMut) {
    let bytes = &bytes[..bytes.len().min(usize::from(u16::MAX))];
    out.put_u16(bytes.len() as u16);
    out.put_slice(bytes);
}

fn properties_len(outgoing: &Outgoing<'_>) -> usize {
    let message = outgoing.message;
    let text = |text: &Option<String>| text.as_ref().map_or(0, |text| 3 + text.len());
    usize::from(message.is_utf8) * 2
        + message.expires_at.map_or(0, |_| 5)
        + text(&message.content_type)
        + text(&message.response_topic)
        + message.correlation.as_ref().map_or(0, |data| 3 + data.len())
        + outgoing.ids.iter().map(|&id| 1 + varint_len(id as usize)).sum::<usize>()
        + message.properties.iter().map(|(name, value)| 5 + name.len() + value.len()).sum::<usize>()
}

fn put_properties(outgoing: &Outgoing<'_>, now: Millis, out: &mut BytesMut) {
    let message = outgoing.message;
    if message.is_utf8 {
        out.put_slice(&[0x01, 1]);
    }
    if let Some(at) = message.expires_at {
        let seconds = u32::try_from((at.0 - now.0 + 999) / 1000).unwrap_or(0);
        out.put_u8(0x02);
        out.put_u32(seconds);
    }
    if let Some(text) = &message.content_type {
        out.put_u8(0x03);
        put_text(text, out);
    }
    if let Some(text) = &message.response_topic {
        out.put_u8(0x08);
        put_text(text, out);
    }
    if let Some(data) = &message.correlation {
        out.put_u8(0x09);
        put_binary(data, out);
    }
    for &id in outgoing.ids {
        out.put_u8(0x0b);
        put_varint(id as usize, out);
    }
    for (name, value) in &message.properties {
        out.put_u8(0x26);
        put_text(name, out);
        put_text(value, out);
    }
}

/// The codec for a whole CONNECT frame.
fn detect(frame: &[u8]) -> Result<Inner, Broken> {
    let header = 1 + frame.iter().skip(1).take_while(|&&byte| byte & 0x80 != 0).count() + 1;
    let body = frame.get(header..).unwrap_or_default();
    match body {
        [0, 4, b'M', b'Q', b'T', b'T', 4, ..] | [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', 3, ..] => {
            Ok(Inner::V3(v3::Codec::new(0)))
        }
        [0, 4, b'M', b'Q', b'T', b'T', 5, ..] => Ok(Inner::V5(Box::new(v5::Codec::new(0, 0)))),
        [0, 4, b'M', b'Q', b'T', b'T', ..] | [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', ..] => {
            Err(Broken::new(code::UNSUPPORTED_VERSION, "protocol version"))
        }
        _ => Err(Broken::new(code::PROTOCOL_ERROR, "not MQTT")),
    }
}

/// The answer to a CONNECT of a version nobody speaks here, in the form every version understands.
pub const UNSUPPORTED_VERSION_ANSWER: [u8; 4] = [0x20, 2, 0, 1];

fn broken(error: &DecodeError) -> Broken {
    let what = match error {
        DecodeError::InvalidClientId => return Broken::new(code::CLIENT_ID_INVALID, "client id"),
        DecodeError::Utf8Error => return Broken::new(code::MALFORMED, "not UTF-8"),
        DecodeError::InvalidLength => "a length that is wrong",
        DecodeError::UnsupportedPacketType => return Broken::new(code::MALFORMED, "packet type or flags"),
        DecodeError::InvalidTopicName => "topic name",
        DecodeError::InvalidTopicFilter => return Broken::new(code::PROTOCOL_ERROR, "topic filter"),
        _ => "malformed packet",
    };
    Broken::new(error.to_reason_code().into(), what)
}

fn qos(value: QoS) -> u8 {
    value.value()
}

fn from_v3(packet: v3::Packet) -> Result<Packet, Broken> {
    Ok(match packet {
        v3::Packet::Connect(connect) => {
            let will = connect.last_will.map(|will| Will {
                message: Message {
                    topic: will.topic.to_string(),
                    payload: Bytes::copy_from_slice(&will.message),
                    qos: qos(will.qos),
                    retain: will.retain,
                    ..Message::default()
                },
                delay_seconds: 0,
            });
            Packet::Connect(Box::new(Connect {
                version: Version::V3,
                clean_start: connect.clean_session,
                keep_alive: connect.keep_alive,
                expiry_seconds: if connect.clean_session { 0 } else { u32::MAX },
                receive_max: u16::MAX,
                max_packet: u32::MAX,
                wants_response_info: false,
                has_auth_method: false,
                client_id: connect.client_id.to_string(),
                will,
                username: connect.username.map(|name| name.to_string()),
                password: connect.password,
            }))
        }
        v3::Packet::Publish(publish) => publish_in(publish)?,
        v3::Packet::PublishAck { packet_id } => Packet::PubAck(packet_id),
        v3::Packet::PublishReceived { packet_id } => Packet::PubRec(packet_id, true),
        v3::Packet::PublishRelease { packet_id } => Packet::PubRel(packet_id),
        v3::Packet::PublishComplete { packet_id } => Packet::PubComp(packet_id),
        v3::Packet::Subscribe { packet_id, topic_filters } => Packet::Subscribe {
            id: packet_id,
            subscription: None,
            wishes: topic_filters
                .into_iter()
                .map(|(filter, level)| {
                    let options = SubscriptionOptions { qos: level, ..SubscriptionOptions::default() };
                    wish(&filter, options)
                })
                .collect(),
        },
        v3::Packet::Unsubscribe { packet_id, topic_filters } => {
            Packet::Unsubscribe { id: packet_id, filters: topic_filters.iter().map(ToString::to_string).collect() }
        }
        v3::Packet::PingRequest => Packet::Ping,
        v3::Packet::Disconnect => Packet::Disconnect { with_will: false, expiry_seconds: None },
        v3::Packet::ConnectAck(_)
        | v3::Packet::SubscribeAck { .. }
        | v3::Packet::UnsubscribeAck { .. }
        | v3::Packet::PingResponse => return Err(Broken::new(code::PROTOCOL_ERROR, "a packet only servers send")),
    })
}

fn from_v5(packet: v5::Packet) -> Result<Packet, Broken> {
    Ok(match packet {
        v5::Packet::Connect(connect) => Packet::Connect(Box::new(connect_v5(*connect))),
        v5::Packet::Publish(publish) => {
            if publish.properties.as_ref().is_some_and(|properties| !properties.subscription_ids.is_empty()) {
                return Err(Broken::new(code::PROTOCOL_ERROR, "subscription identifier in a client's publish"));
            }
            publish_in(publish)?
        }
        v5::Packet::PublishAck(ack) => Packet::PubAck(ack.packet_id),
        v5::Packet::PublishReceived(ack) => Packet::PubRec(ack.packet_id, u8::from(ack.reason_code) < 0x80),
        v5::Packet::PublishRelease(ack) => Packet::PubRel(ack.packet_id),
        v5::Packet::PublishComplete(ack) => Packet::PubComp(ack.packet_id),
        v5::Packet::Subscribe(subscribe) => Packet::Subscribe {
            id: subscribe.packet_id,
            subscription: subscribe.id.map(std::num::NonZero::get),
            wishes: subscribe.topic_filters.into_iter().map(|(filter, options)| wish(&filter, options)).collect(),
        },
        v5::Packet::Unsubscribe(unsubscribe) => Packet::Unsubscribe {
            id: unsubscribe.packet_id,
            filters: unsubscribe.topic_filters.iter().map(ToString::to_string).collect(),
        },
        v5::Packet::PingRequest => Packet::Ping,
        v5::Packet::Disconnect(disconnect) => Packet::Disconnect {
            with_will: u8::from(disconnect.reason_code) != 0,
            expiry_seconds: disconnect.session_expiry_interval_secs,
        },
        v5::Packet::Auth(_) => return Err(Broken::new(code::PROTOCOL_ERROR, "AUTH without an authentication method")),
        v5::Packet::ConnectAck(_)
        | v5::Packet::SubscribeAck(_)
        | v5::Packet::UnsubscribeAck(_)
        | v5::Packet::PingResponse => return Err(Broken::new(code::PROTOCOL_ERROR, "a packet only servers send")),
    })
}

fn connect_v5(connect: v5::Connect) -> Connect {
    let will = connect.last_will.map(|will| Will {
        delay_seconds: will.will_delay_interval_sec.unwrap_or(0),
        message: Message {
            topic: will.topic.to_string(),
            payload: Bytes::copy_from_slice(&will.message),
            qos: qos(will.qos),
            retain: will.retain,
            is_utf8: will.is_utf8_payload.unwrap_or(false),
            content_type: will.content_type.map(|text| text.to_string()),
            response_topic: will.response_topic.map(|text| text.to_string()),
            correlation: will.correlation_data.map(|data| Bytes::copy_from_slice(&data)),
            properties: will
                .user_properties
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
            // A duration until the will is sent, a time from then on.
            expires_at: will.message_expiry_interval.map(|seconds| Millis(i64::from(seconds.get()) * 1000)),
        },
    });
    Connect {
        version: Version::V5,
        clean_start: connect.clean_start,
        keep_alive: connect.keep_alive,
        expiry_seconds: connect.session_expiry_interval_secs,
        receive_max: connect.receive_max.map_or(u16::MAX, NonZeroU16::get),
        max_packet: connect.max_packet_size.map_or(u32::MAX, std::num::NonZero::get),
        wants_response_info: connect.request_response_info,
        has_auth_method: connect.auth_method.is_some() || connect.auth_data.is_some(),
        client_id: connect.client_id.to_string(),
        will,
        username: connect.username.map(|name| name.to_string()),
        password: connect.password,
    }
}

fn publish_in(publish: Box<Publish>) -> Result<Packet, Broken> {
    if publish.qos == QoS::AtMostOnce && publish.dup {
        return Err(Broken::new(code::MALFORMED, "DUP with QoS 0"));
    }
    Ok(Packet::Publish(publish))
}

fn wish(filter: &str, options: SubscriptionOptions) -> Wish {
    Wish {
        filter: String::from(filter),
        qos: qos(options.qos),
        no_local: options.no_local,
        retain_as_published: options.retain_as_published,
        retain_handling: match options.retain_handling {
            RetainHandling::AtSubscribe => 0,
            RetainHandling::AtSubscribeNew => 1,
            RetainHandling::NoAtSubscribe => 2,
        },
    }
}

/// The message of a publish, with its payload copied out of the read buffer.
pub fn message_of(publish: &Publish, now: Millis) -> Message {
    let mut message = Message {
        topic: publish.topic.to_string(),
        payload: Bytes::copy_from_slice(&publish.payload),
        qos: qos(publish.qos),
        retain: publish.retain,
        ..Message::default()
    };
    if let Some(properties) = &publish.properties {
        message.is_utf8 = properties.is_utf8_payload;
        message.content_type = properties.content_type.as_ref().map(ToString::to_string);
        message.response_topic = properties.response_topic.as_ref().map(ToString::to_string);
        message.correlation = properties.correlation_data.as_ref().map(|data| Bytes::copy_from_slice(data));
        let text = |(name, value): &v5::UserProperty| (name.to_string(), value.to_string());
        message.properties = properties.user_properties.iter().map(text).collect();
        message.expires_at =
            properties.message_expiry_interval.map(|seconds| now.plus(i64::from(seconds.get()) * 1000));
    }
    message
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v5_codec() -> Codec {
        Codec { inner: Inner::V5(Box::new(v5::Codec::new(0, 0))), max_packet: 1 << 20 }
    }

    fn v3_codec() -> Codec {
        Codec { inner: Inner::V3(v3::Codec::new(0)), max_packet: 1 << 20 }
    }

    const CONNECT_311: &[u8] = b"\x10\x11\0\x04MQTT\x04\x02\0\x3c\0\x05abcde";

    #[test]
    fn the_version_is_learned_from_connect() {
        let mut codec = Codec::new(1000);
        let mut buffer = BytesMut::from(&CONNECT_311[..10]);
        assert!(codec.decode(&mut buffer).unwrap().is_none());
        buffer.extend_from_slice(&CONNECT_311[10..]);
        let Some(Packet::Connect(connect)) = codec.decode(&mut buffer).unwrap() else { panic!("a CONNECT") };
        assert_eq!((connect.client_id.as_str(), connect.keep_alive, connect.version), ("abcde", 60, Version::V3));
        assert!(buffer.is_empty());
    }

    #[test]
    fn what_is_no_connect_is_refused_at_its_first_bytes() {
        let first = |bytes: &[u8]| Codec::new(1000).decode(&mut BytesMut::from(bytes)).unwrap_err().code;
        assert_eq!(first(b"GET / HTTP/1.1\r\n"), code::PROTOCOL_ERROR);
        assert_eq!(first(b"\x10\x0c\0\x04MQTT\x09\x02\0\x3c\0\0"), code::UNSUPPORTED_VERSION);
        assert_eq!(first(b"\x10\xff\xff\xff\xff\xff"), code::MALFORMED);
        assert_eq!(first(b"\x10\xff\xff\x7f"), code::TOO_LARGE);
    }

    #[test]
    fn an_announced_size_reserves_nothing() {
        let mut codec = v3_codec();
        let mut buffer = BytesMut::from(&b"\x30\x80\x80\x20\0\x01a"[..]);
        assert!(codec.decode(&mut buffer).unwrap().is_none());
        assert!(buffer.capacity() < 1024);
    }

    fn text() -> impl Strategy<Value = String> {
        proptest::string::string_regex("[a-zé/]{1,150}").unwrap()
    }

    proptest! {
        #[test]
        fn publishes_read_back_as_they_were(
            topic in text(), payload in proptest::collection::vec(any::<u8>(), 0..300), qos in 0_u8..3, retain: bool,
            dup: bool, content_type in proptest::option::of(text()), response in proptest::option::of(text()),
            is_utf8: bool, expires in proptest::option::of(1_i64..100_000), props in proptest::collection::vec((text(), text()), 0..3),
            ids in proptest::collection::vec(1_u32..268_435_455, 0..3),
        ) {
            let now = Millis(5000);
            let message = Message {
                topic, payload: payload.into(), qos, retain, is_utf8, content_type, response_topic: response,
                correlation: Some(Bytes::from_static(b"c")), properties: props,
                expires_at: expires.map(|seconds| now.plus(seconds * 1000)),
            };
            let dup = dup && qos > 0;
            let id = (qos > 0).then(|| Id::new(77).unwrap());
            let outgoing = Outgoing { message: &message, qos, id, retain, dup, ids: &ids };
            for (mut codec, is_v5) in [(v5_codec(), true), (v3_codec(), false)] {
                let mut out = BytesMut::new();
                prop_assert!(codec.publish(&outgoing, u32::MAX, now, &mut out));
                let size = u32::try_from(out.len()).unwrap();
                let mut none = BytesMut::new();
                prop_assert!(!codec.publish(&outgoing, size - 1, now, &mut none) && none.is_empty());
                prop_assert!(codec.publish(&outgoing, size, now, &mut none));
                let back = match &mut codec.inner {
                    Inner::V3(codec) => match codec.decode(&mut out).unwrap().unwrap().0 {
                        v3::Packet::Publish(publish) => publish,
                        other => panic!("{other:?}"),
                    },
                    Inner::V5(codec) => match codec.decode(&mut out).unwrap().unwrap().0 {
                        v5::Packet::Publish(publish) => publish,
                        other => panic!("{other:?}"),
                    },
                    Inner::Unknown => panic!("no codec"),
                };
                prop_assert!(out.is_empty());
                prop_assert_eq!((back.dup, back.packet_id), (dup, id));
                if is_v5 {
                    prop_assert_eq!(&back.properties.as_ref().unwrap().subscription_ids.iter().map(|id| id.get()).collect::<Vec<_>>(), &ids);
                    prop_assert_eq!(message_of(&back, now), message.clone());
                } else {
                    prop_assert_eq!((&*back.topic, &back.payload), (message.topic.as_str(), &message.payload));
                }
            }
        }

        #[test]
        fn no_bytes_panic(first: u8, bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let length = u8::try_from(bytes.len()).unwrap();
            let mut frame = vec![first, length];
            frame.extend_from_slice(&bytes);
            for mut codec in [Codec::new(500), v3_codec(), v5_codec()] {
                let mut buffer = BytesMut::from(&frame[..]);
                while let Ok(Some(_)) = codec.decode(&mut buffer) {}
            }
        }

        #[test]
        fn no_connect_panics(level in 3_u8..7, flags: u8, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut frame = vec![0x10, u8::try_from(bytes.len() + 8).unwrap(), 0, 4, b'M', b'Q', b'T', b'T', level, flags];
            frame.extend_from_slice(&bytes);
            let _ = Codec::new(500).decode(&mut BytesMut::from(&frame[..]));
        }
    }
}
