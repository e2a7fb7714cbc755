//! A server that speaks just enough HTTP and MQTT 5 to be measured, keeps turns in memory, and breaks promises on demand.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// How the stand-in misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It does not.
    Honest,
    /// Every 50th stimulus is acknowledged and forgotten.
    Forgets,
    /// Every 50th stimulus is decided twice.
    Repeats,
    /// Every 50th stimulus of an instance is put before its predecessor.
    Swaps,
    /// Every third stimulus is refused with 429.
    Refuses,
    /// Answers nothing for half a second, once, when the 300th stimulus comes.
    Stalls,
}

/// The stand-in, on a thread of its own.
pub struct StandIn {
    /// HTTP address.
    pub http: SocketAddr,
    /// MQTT address.
    pub mqtt: SocketAddr,
}

struct Truth {
    manner: Manner,
    taken: AtomicU64,
    turns: Mutex<HashMap<String, Vec<String>>>,
    stall_over: Mutex<Option<tokio::time::Instant>>,
}

impl StandIn {
    /// Starts it; it ends with the test process.
    pub fn start(manner: Manner) -> Self {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let mqtt = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(Self { http: http.local_addr().unwrap(), mqtt: mqtt.local_addr().unwrap() }).unwrap();
                let truth = Arc::new(Truth {
                    manner,
                    taken: AtomicU64::new(0),
                    turns: Mutex::default(),
                    stall_over: Mutex::default(),
                });
                loop {
                    tokio::select! {
                        Ok((stream, _)) = http.accept() => drop(tokio::spawn(serve_http(stream, truth.clone()))),
                        Ok((stream, _)) = mqtt.accept() => drop(tokio::spawn(serve_mqtt(stream, truth.clone()))),
                    }
                }
            });
        });
        told.recv().unwrap()
    }
}

impl Truth {
    /// Decides; the turn's number.
    fn decide(&self, instance: &str, id: String) -> usize {
        let taken = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let mut turns = self.turns.lock().unwrap();
        let turns = turns.entry(instance.to_owned()).or_default();
        let odd = taken.is_multiple_of(50);
        match self.manner {
            Manner::Forgets if odd => return turns.len() + 1,
            Manner::Repeats if odd => turns.push(id.clone()),
            Manner::Swaps if odd && !turns.is_empty() => {
                let before = turns.len() - 1;
                turns.insert(before, id);
                return turns.len();
            }
            _ => {}
        }
        turns.push(id);
        turns.len()
    }

    async fn stall(&self) {
        if self.manner == Manner::Stalls && self.taken.load(Ordering::Relaxed) >= 300 {
            let now = tokio::time::Instant::now();
            let until = *self.stall_over.lock().unwrap().get_or_insert(now + Duration::from_millis(500));
            let _ = tokio::time::timeout_at(until, std::future::pending::<()>()).await;
        }
    }

    async fn answer(&self, method: &str, target: &str, body: &[u8]) -> (u16, Value) {
        let path = target.split('?').next().unwrap();
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        match (method, parts.as_slice()) {
            ("POST", ["v1", "instances", instance, "stimuli"]) => {
                self.stall().await;
                let body: Value = serde_json::from_slice(body).unwrap();
                let taken = self.taken.load(Ordering::Relaxed);
                if self.manner == Manner::Refuses && body["id"].is_string() && taken % 3 == 2 {
                    self.taken.fetch_add(1, Ordering::Relaxed);
                    return (429, json!({"code": "RATE_LIMITED"}));
                }
                let id = body["id"].as_str().map_or_else(|| format!("own-{taken}"), str::to_owned);
                (200, json!({"turn": self.decide(instance, id.clone()), "stimulus": {"id": id}}))
            }
            ("GET", ["v1", "instances", instance, "turns"]) => {
                let turns = self.turns.lock().unwrap();
                let turns = turns.get(*instance).cloned().unwrap_or_default();
                let after: usize = target.split("after=").nth(1).map_or(0, |text| text.parse().unwrap());
                // Small pages, so that cursors are followed.
                let page: Vec<_> = turns.iter().enumerate().skip(after).take(3).collect();
                let items: Vec<_> = page.iter().map(|(n, id)| json!({"turn": n + 1, "stimulus": {"id": id}})).collect();
                let end = after + page.len();
                let next = if end < turns.len() { json!(end.to_string()) } else { Value::Null };
                (200, json!({"items": items, "next": next}))
            }
            ("GET", ["v1", "instances", _, "state"]) => (200, json!({"version": 1, "desired": {}, "reported": {}})),
            ("PUT" | "PATCH", _) => (200, json!({})),
            _ => (404, json!({})),
        }
    }
}

async fn serve_http(mut stream: TcpStream, truth: Arc<Truth>) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let head = loop {
            if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let text = String::from_utf8(bytes[..head].to_vec()).ok()?;
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |text| text.parse().unwrap());
        while bytes.len() < head + length {
            stream.read_buf(&mut bytes).await.ok().filter(|n| *n > 0)?;
        }
        let mut words = text.split(' ');
        let (status, answer) = truth.answer(words.next()?, words.next()?, &bytes[head..head + length]).await;
        bytes.drain(..head + length);
        let answer = answer.to_string();
        let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
        stream.write_all(answer.as_bytes()).await.ok()?;
    }
}

/// CONNECT, SUBSCRIBE and QoS 1 PUBLISH, each below 16 KiB.
async fn serve_mqtt(mut stream: TcpStream, truth: Arc<Truth>) -> Option<()> {
    loop {
        let kind = stream.read_u8().await.ok()?;
        let mut length = 0;
        for shift in [0, 7, 14] {
            let byte = stream.read_u8().await.ok()?;
            length |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        match kind >> 4 {
            // Receive maximum 8.
            1 => stream.write_all(&[0x20, 6, 0, 0, 3, 0x21, 0, 8]).await.ok()?,
            8 => {
                let filters = suback_reasons(&body);
                let head = [0x90, u8::try_from(3 + filters).unwrap(), body[0], body[1], 0];
                stream.write_all(&head).await.ok()?;
                stream.write_all(&vec![1; filters]).await.ok()?;
            }
            3 => {
                let (topic, rest) = take_text(&body);
                let (packet_id, rest) = ([rest[0], rest[1]], &rest[2..]);
                // One user property, "id"; lengths below 128.
                let properties = &rest[1..1 + usize::from(rest[0])];
                let (_, value) = take_text(&properties[1..]);
                let id = take_text(value).0;
                let instance = topic.split('/').nth(2).unwrap().to_owned();
                let turn = truth.decide(&instance, id.clone());
                stream.write_all(&[0x40, 2, packet_id[0], packet_id[1]]).await.ok()?;
                let reply = json!({"stimulus": id, "content": "ok", "turn": turn}).to_string();
                let topic = topic.replace("/in/load", "/out/reply");
                let length = 2 + topic.len() + 2 + 1 + reply.len();
                assert!((128..16_384).contains(&length) || length < 128);
                let mut out = vec![0x32];
                if length < 128 {
                    out.push(u8::try_from(length).unwrap());
                } else {
                    out.extend([u8::try_from(length % 128).unwrap() | 0x80, u8::try_from(length / 128).unwrap()]);
                }
                out.extend(u16::try_from(topic.len()).unwrap().to_be_bytes());
                out.extend(topic.as_bytes());
                out.extend([0, 7, 0]);
                out.extend(reply.as_bytes());
                stream.write_all(&out).await.ok()?;
            }
            14 => return None,
            _ => {}
        }
    }
}

fn suback_reasons(body: &[u8]) -> usize {
    let mut rest = &body[3..];
    let mut count = 0;
    while !rest.is_empty() {
        rest = &take_text(rest).1[1..];
        count += 1;
    }
    count
}

fn take_text(bytes: &[u8]) -> (String, &[u8]) {
    let length = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    (String::from_utf8(bytes[2..2 + length].to_vec()).unwrap(), &bytes[2 + length..])
}
