//! What the fuzzer throws at the MQTT door: packets, topics, payloads, and what the broker stores.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use bytes::BytesMut;

use super::{
    inbound::{self, Incoming, Target},
    packet::{Broken, Codec, Id, Outgoing, Packet, message_of},
    record::{self, Message, Queued, Session},
    roam::note::Note,
    topic::{self, Filter, Trie},
};
use crate::types::{AuthContext, Channel, InstanceId, Millis, TenantId, fuzz::settles};

/// CONNECT of 3.1.1 and of 5, with an empty client id.
const CONNECTS: [&[u8]; 2] = [b"\x10\x0c\0\x04MQTT\x04\x02\0\0\0\0", b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0"];
const NOW: Millis = Millis(5000);
const MAX_PACKET: usize = 4096;

/// All packets of some bytes that come in portions, and why no more can follow.
fn read<'b>(portions: impl Iterator<Item = &'b [u8]>) -> (Codec, Vec<Packet>, Option<Broken>) {
    let (mut codec, mut buffer, mut packets) = (Codec::new(MAX_PACKET), BytesMut::new(), Vec::new());
    for portion in portions {
        buffer.extend_from_slice(portion);
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(broken) => return (codec, packets, Some(broken)),
            }
        }
    }
    (codec, packets, None)
}

/// A connection's bytes: as they are, and behind a CONNECT of each version. The portions they come in do not matter, and a publish
/// goes out as it came in.
pub fn packets(bytes: &[u8]) {
    for connect in [&[], CONNECTS[0], CONNECTS[1]] {
        let all = [connect, bytes].concat();
        let (codec, packets, broken) = read(std::iter::once(&all[..]));
        let (_, again, broken_again) = read(all.chunks(bytes.len() % 7 + 1));
        assert_eq!((format!("{packets:?}"), broken), (format!("{again:?}"), broken_again), "the portions matter");
        for packet in packets {
            let Packet::Publish(publish) = packet else { continue };
            let message = message_of(&publish, NOW);
            let name = |topic: &Option<String>| topic.as_ref().is_none_or(|topic| topic::is_name(topic));
            if topic::is_name(&message.topic) && name(&message.response_topic) {
                goes_out(&codec, connect, &message);
            }
        }
    }
}

fn goes_out(codec: &Codec, connect: &[u8], message: &Message) {
    let id = (message.qos > 0).then_some(Id::MIN);
    let outgoing = Outgoing { message, qos: message.qos, id, retain: message.retain, dup: false, ids: &[] };
    let mut out = BytesMut::new();
    assert!(codec.publish(&outgoing, u32::MAX, NOW, &mut out));
    let connect = if connect.is_empty() { CONNECTS[1] } else { connect };
    let all = [connect, &out].concat();
    let (mut codec, mut buffer) = (Codec::new(2 * MAX_PACKET), BytesMut::from(&all[..]));
    codec.decode(&mut buffer).unwrap();
    match codec.decode(&mut buffer) {
        Ok(Some(Packet::Publish(back))) if connect == CONNECTS[1] => assert_eq!(message_of(&back, NOW), *message),
        Ok(Some(Packet::Publish(back))) => {
            let back = message_of(&back, NOW);
            assert_eq!(
                (back.topic, back.payload, back.qos),
                (message.topic.clone(), message.payload.clone(), message.qos)
            );
        }
        other => panic!("{other:?} for {message:?}"),
    }
}

/// Lines, each a filter or a name. The trie finds what the plain rule finds; nobody reaches another tenant, and a bound device no other
/// instance.
pub fn topics(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.split('\n').take(24).collect();
    let filters: Vec<Filter<'_>> = lines.iter().filter_map(|line| Filter::parse(line)).collect();
    let names: Vec<&str> = lines.iter().copied().filter(|line| topic::is_name(line)).collect();
    let mut trie = Trie::default();
    for (key, filter) in filters.iter().enumerate() {
        trie.insert(filter.path, key, key);
    }
    for name in &names {
        let mut found = Vec::new();
        trie.visit(name, |key| found.push(*key));
        found.sort_unstable();
        let all = filters.iter().enumerate();
        let wanted: Vec<usize> = all.filter(|(_, filter)| topic::matches(filter.path, name)).map(|all| all.0).collect();
        assert_eq!(found, wanted, "{name}");
        for key in found {
            assert!(name.starts_with(topic::literal_prefix(filters[key].path)));
        }
    }
    for (key, filter) in filters.iter().enumerate() {
        assert_eq!(trie.remove(filter.path, &key), Some(key));
    }
    assert!(trie.is_empty());
    rights(&filters, &names);
}

fn rights(filters: &[Filter<'_>], names: &[&str]) {
    let tenant = AuthContext::loopback(TenantId::new("t").unwrap());
    let bound = AuthContext { instance: Some(InstanceId::new("lamp").unwrap()), ..tenant.clone() };
    for (who, own) in [(&tenant, "sophont/t/"), (&bound, "sophont/t/lamp/")] {
        let foreign: Vec<&&str> =
            names.iter().filter(|name| name.starts_with("sophont/") && !name.starts_with(own)).collect();
        for name in &foreign {
            assert!(inbound::target(who, name, true).is_err() || **name == own.trim_end_matches('/'), "{name}");
            assert!(inbound::may_be_answered_on(who, name, true).is_err(), "{name}");
        }
        for filter in filters.iter().filter(|filter| inbound::may_subscribe(who, filter.path, true).is_ok()) {
            // Wildcards of plain topics reach `sophont/…` too; what is delivered is checked again by instance.
            let Some(rest) = filter.path.strip_prefix("sophont/") else { continue };
            let reached = foreign.iter().find(|name| topic::matches(filter.path, name) && name.len() > own.len());
            assert_eq!(reached, None, "{rest}");
        }
    }
}

/// A topic in the first line, user properties in the next lines, and a payload behind an empty one.
pub fn payloads(bytes: &[u8]) {
    let end = bytes.windows(2).position(|two| two == b"\n\n").unwrap_or(bytes.len());
    let (head, payload) = (String::from_utf8_lossy(&bytes[..end]), bytes.get(end + 2..).unwrap_or_default());
    let mut lines = head.lines();
    let topic = lines.next().unwrap_or_default();
    let mut incoming = Incoming { payload, ..Incoming::default() };
    for line in lines {
        match line.split_once(':') {
            Some(("type", value)) => incoming.content_type = Some(value),
            Some(("answer", value)) => incoming.response_topic = Some(value),
            Some((name, value)) => incoming.property(name, value),
            None => incoming.is_utf8 = true,
        }
    }
    let who = AuthContext::loopback(TenantId::new("t").unwrap());
    let channel = match inbound::target(&who, topic, true) {
        Ok(Target::Stimulus(key, channel)) => {
            assert_eq!(key.tenant, who.tenant);
            channel
        }
        _ => Channel::new("c").unwrap(),
    };
    let made = inbound::stimulus(&who, channel, &incoming, "client", true, NOW).ok();
    let patch = inbound::reported(&who, &incoming, "client", NOW).ok();
    for stimulus in made.into_iter().chain(patch) {
        assert!(stimulus.content.is_some() != stimulus.data.is_some(), "text or data");
        assert!(stimulus.salience.is_none_or(|salience| (0.0..=1.0).contains(&salience)));
        let data = stimulus.data.as_ref().map(|data| serde_json::from_str::<serde_json::Value>(data.get()));
        assert!(data.is_none_or(|data| data.is_ok()), "everybody can read what was taken");
        let bytes = postcard::to_stdvec(&stimulus).unwrap();
        assert_eq!(postcard::from_bytes::<crate::types::Stimulus>(&bytes).unwrap(), stimulus);
    }
}

/// Sessions, queued messages, retained values, and what brokers tell each other.
pub fn records(bytes: &[u8]) {
    fn settle<T: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
        let read = |bytes: &[u8]| record::decode::<T>(bytes).ok();
        settles(read(bytes), |value| record::encode(value).unwrap().to_vec(), read);
    }
    settle::<Session>(bytes);
    settle::<Queued>(bytes);
    settle::<Message>(bytes);
    let read = |bytes: &[u8]| Note::decode(bytes).ok();
    settles(read(bytes), |note| note.encode().unwrap().to_vec(), read);
}
