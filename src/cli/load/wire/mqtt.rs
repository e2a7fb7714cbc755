//! The few MQTT 5 packets a load client sends and reads.
//!
//! Not here: QoS 2, topic aliases, auth exchange, 3.1.1. Layout after the OASIS MQTT 5.0 standard, sections 2 and 3.
//! Tests: at the foot.

use super::template::Template;

/// Largest packet taken from the server.
const MAX_PACKET_BYTES: usize = 16 * 1024 * 1024;

/// A packet that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an MQTT packet: {0}")]
pub struct Malformed(&'static str);

/// A packet from the server, as far as the generator cares.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Connected, or refused when the reason is 0x80 or above.
    ConnAck {
        /// Reason code.
        reason: u8,
        /// How many unacknowledged publishes the server takes.
        receive_maximum: u16,
    },
    /// A message on a topic we subscribed to.
    Publish {
        /// The topic.
        topic: &'a [u8],
        /// 0 for QoS 0.
        packet_id: u16,
        /// The message.
        payload: &'a [u8],
    },
    /// Our publish is durable, or refused when the reason is 0x80 or above.
    PubAck {
        /// Which publish.
        packet_id: u16,
        /// Reason code.
        reason: u8,
    },
    /// Answer to a subscription.
    SubAck {
        /// Which one.
        packet_id: u16,
        /// One per filter; 0x80 or above is a refusal.
        reasons: &'a [u8],
    },
    /// The server ends the connection.
    Disconnect {
        /// Reason code.
        reason: u8,
    },
    /// Something else, skipped.
    Other(u8),
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    loop {
        let byte = u8::try_from(value % 128).unwrap_or(0);
        value /= 128;
        out.push(if value > 0 { byte | 0x80 } else { byte });
        if value == 0 {
            return;
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(text);
}

fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    put_varint(&mut out, body.len());
    out.extend_from_slice(body);
    out
}

/// CONNECT with clean start and no session afterwards.
pub fn connect(client_id: &str, login: Option<(&str, &str)>, keep_alive_seconds: u16) -> Vec<u8> {
    let mut body = Vec::with_capacity(64);
    put_text(&mut body, b"MQTT");
    body.push(5);
    body.push(0x02 | if login.is_some() { 0xc0 } else { 0 });
    body.extend_from_slice(&keep_alive_seconds.to_be_bytes());
    body.push(0); // no properties
    put_text(&mut body, client_id.as_bytes());
    if let Some((name, password)) = login {
        put_text(&mut body, name.as_bytes());
        put_text(&mut body, password.as_bytes());
    }
    framed(0x10, &body)
}

/// SUBSCRIBE to some filters.
pub fn subscribe(packet_id: u16, filters: &[String], qos: u8) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    body.push(0); // no properties
    for filter in filters {
        put_text(&mut body, filter.as_bytes());
        body.push(qos);
    }
    framed(0x82, &body)
}

/// PUBACK of a message the server sent.
pub fn puback(packet_id: u16) -> [u8; 4] {
    let [high, low] = packet_id.to_be_bytes();
    [0x40, 2, high, low]
}

/// DISCONNECT, without a will.
pub const DISCONNECT: [u8; 2] = [0xe0, 0];

/// A QoS 1 PUBLISH with an `id` user property, built once and patched for each message.
#[derive(Debug, Clone)]
pub struct Publish {
    template: Template,
    packet_id_at: usize,
}

impl Publish {
    /// Builds it. Topic, id and payload keep their lengths as their slots change.
    pub fn new(topic: &Template, id: &Template, payload: &Template) -> Self {
        let user_property = 1 + 2 + 2 + 2 + id.len();
        let mut properties = Vec::new();
        put_varint(&mut properties, user_property);
        properties.push(0x26);
        put_text(&mut properties, b"id");
        properties.extend_from_slice(&u16::try_from(id.len()).unwrap_or(u16::MAX).to_be_bytes());
        let length = 2 + topic.len() + 2 + properties.len() + id.len() + payload.len();
        let mut head = vec![0x32];
        put_varint(&mut head, length);
        head.extend_from_slice(&u16::try_from(topic.len()).unwrap_or(u16::MAX).to_be_bytes());
        let packet_id_at = head.len() + topic.len();
        let template = Template::default().text(head).template(topic).text([0, 0]).text(properties);
        Self { template: template.template(id).template(payload), packet_id_at }
    }

    /// The slots.
    pub fn template(&mut self) -> &mut Template {
        &mut self.template
    }

    /// The packet under a packet id.
    pub fn bytes(&mut self, packet_id: u16) -> &[u8] {
        if let Some(place) = self.template.range_mut(self.packet_id_at..self.packet_id_at + 2) {
            place.copy_from_slice(&packet_id.to_be_bytes());
        }
        self.template.bytes()
    }
}

/// The first packet in `bytes` and its length; `None` while it is incomplete.
///
/// # Errors
/// [`Malformed`]: the connection is of no use any more.
pub fn parse(bytes: &[u8]) -> Result<Option<(Packet<'_>, usize)>, Malformed> {
    let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
    let Some((length, used)) = varint(rest)? else { return Ok(None) };
    if length > MAX_PACKET_BYTES {
        return Err(Malformed("too large"));
    }
    let Some(body) = rest.get(used..used + length) else { return Ok(None) };
    let packet = match first >> 4 {
        2 => connack(body)?,
        3 => publish(first, body)?,
        4 => {
            let packet_id = u16_at(body, 0)?;
            Packet::PubAck { packet_id, reason: body.get(2).copied().unwrap_or(0) }
        }
        9 => {
            let packet_id = u16_at(body, 0)?;
            let reasons = skip_properties(&body[2..])?;
            Packet::SubAck { packet_id, reasons }
        }
        14 => Packet::Disconnect { reason: body.first().copied().unwrap_or(0) },
        other => Packet::Other(other),
    };
    Ok(Some((packet, 1 + used + length)))
}

fn publish(first: u8, body: &[u8]) -> Result<Packet<'_>, Malformed> {
    let length = usize::from(u16_at(body, 0)?);
    let topic = body.get(2..2 + length).ok_or(Malformed("topic"))?;
    let mut rest = &body[2 + length..];
    let mut packet_id = 0;
    if first & 0x06 != 0 {
        packet_id = u16_at(rest, 0)?;
        rest = &rest[2..];
    }
    Ok(Packet::Publish { topic, packet_id, payload: skip_properties(rest)? })
}

fn connack(body: &[u8]) -> Result<Packet<'_>, Malformed> {
    let reason = *body.get(1).ok_or(Malformed("connack"))?;
    let mut receive_maximum = u16::MAX;
    if let Some((length, used)) = varint(body.get(2..).unwrap_or(&[]))? {
        let properties = body.get(2 + used..2 + used + length).ok_or(Malformed("properties"))?;
        receive_maximum = find_receive_maximum(properties).unwrap_or(u16::MAX);
    }
    Ok(Packet::ConnAck { reason, receive_maximum })
}

/// Walks the properties of a CONNACK for identifier 0x21.
fn find_receive_maximum(mut properties: &[u8]) -> Option<u16> {
    while let Some((&id, rest)) = properties.split_first() {
        let text = |from: usize| Some(2 + usize::from(u16_at(rest.get(from..)?, 0).ok()?));
        let length = match id {
            0x21 => return u16_at(rest, 0).ok(),
            0x24 | 0x25 | 0x28 | 0x29 | 0x2a => 1,
            0x13 | 0x22 => 2,
            0x11 | 0x27 => 4,
            0x12 | 0x15 | 0x16 | 0x1a | 0x1c | 0x1f => text(0)?,
            0x26 => {
                let name = text(0)?;
                name + text(name)?
            }
            _ => return None,
        };
        properties = rest.get(length..)?;
    }
    None
}

fn skip_properties(bytes: &[u8]) -> Result<&[u8], Malformed> {
    let (length, used) = varint(bytes)?.ok_or(Malformed("properties"))?;
    bytes.get(used + length..).ok_or(Malformed("properties"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    match bytes.get(at..at + 2) {
        Some(&[high, low]) => Ok(u16::from_be_bytes([high, low])),
        _ => Err(Malformed("cut short")),
    }
}

fn varint(bytes: &[u8]) -> Result<Option<(usize, usize)>, Malformed> {
    let mut value = 0;
    for at in 0..4 {
        let Some(&byte) = bytes.get(at) else { return Ok(None) };
        value |= usize::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    Err(Malformed("length"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cli::load::wire::template::Slot;

    #[test]
    fn a_connect_has_the_bytes_of_the_standard() {
        assert_eq!(connect("a", None, 60), b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01a");
        let login = connect("a", Some(("t", "pw")), 0);
        assert_eq!(login, b"\x10\x15\x00\x04MQTT\x05\xc2\x00\x00\x00\x00\x01a\x00\x01t\x00\x02pw");
    }

    #[test]
    fn a_subscribe_lists_its_filters() {
        let bytes = subscribe(7, &["a/b".into(), "c".into()], 1);
        assert_eq!(bytes, b"\x82\x0d\x00\x07\x00\x00\x03a/b\x01\x00\x01c\x01");
    }

    #[test]
    fn a_publish_is_patched_in_place_and_reads_back() {
        let topic = Template::default().text("in/").slot(Slot::Instance);
        let id = Template::default().text("s-").slot(Slot::Seq);
        let payload = Template::default().text("{}").slot(Slot::Seq);
        let mut publish = Publish::new(&topic, &id, &payload);
        publish.template().set(Slot::Instance, 5);
        publish.template().set(Slot::Seq, 6);
        let bytes = publish.bytes(0x0102).to_vec();
        let expected = Packet::Publish { topic: b"in/0000005", packet_id: 0x0102, payload: b"{}000000006" };
        assert_eq!(parse(&bytes).unwrap(), Some((expected, bytes.len())));
        let property = b"\x26\x00\x02id\x00\x0bs-000000006";
        assert!(bytes.windows(property.len()).any(|w| w == property), "{bytes:?}");
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]).unwrap(), None, "cut at {cut}");
        }
    }

    #[test]
    fn acknowledgements_are_read_short_and_long() {
        let short = Packet::PubAck { packet_id: 9, reason: 0 };
        assert_eq!(parse(&puback(9)).unwrap(), Some((short, 4)));
        let long = Packet::PubAck { packet_id: 9, reason: 0x97 };
        assert_eq!(parse(b"\x40\x04\x00\x09\x97\x00").unwrap(), Some((long, 6)));
        let suback = Packet::SubAck { packet_id: 3, reasons: &[1, 0x87] };
        assert_eq!(parse(b"\x90\x05\x00\x03\x00\x01\x87").unwrap(), Some((suback, 7)));
    }

    #[test]
    fn a_connack_tells_the_receive_maximum() {
        let bytes = b"\x20\x0b\x00\x00\x08\x12\x00\x00\x24\x01\x21\x00\x40";
        assert_eq!(parse(bytes).unwrap().unwrap().0, Packet::ConnAck { reason: 0, receive_maximum: 64 });
        let plain = b"\x20\x03\x00\x87\x00";
        assert_eq!(parse(plain).unwrap().unwrap().0, Packet::ConnAck { reason: 0x87, receive_maximum: u16::MAX });
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(parse(b"\x30\xff\xff\xff\xff").is_err());
        assert!(parse(b"\x30\x02\x00\x09").is_err());
        assert!(parse(b"\x40\x01\x00").is_err());
        assert!(parse(b"\x90\x02\x00\x01").is_err());
        assert_eq!(parse(b"").unwrap(), None);
    }

    #[test]
    fn lengths_above_127_take_more_bytes() {
        let mut out = Vec::new();
        put_varint(&mut out, 321);
        assert_eq!(out, [0xc1, 0x02]);
        assert_eq!(varint(&out).unwrap(), Some((321, 2)));
    }
}
