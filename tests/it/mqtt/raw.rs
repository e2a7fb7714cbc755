//! MQTT packets by hand, for what real clients are too polite to do: withheld acks, repeats, exact order.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::PATIENCE;

/// A client that says exactly what it is told.
pub struct Raw {
    stream: TcpStream,
    is_v5: bool,
}

fn text(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap();
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}

fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let (mut out, mut length) = (vec![first], body.len());
    loop {
        let byte = u8::try_from(length & 0x7f).unwrap();
        length >>= 7;
        out.push(byte | if length > 0 { 0x80 } else { 0 });
        if length == 0 {
            break;
        }
    }
    out.extend_from_slice(body);
    out
}

/// How to connect.
#[derive(Clone, Copy)]
pub struct Hello<'a> {
    /// MQTT 5, else 3.1.1.
    pub is_v5: bool,
    /// Client id.
    pub client: &'a str,
    /// A session that lasts an hour, continued if it is there.
    pub lasts: bool,
    /// User name and password.
    pub login: Option<(&'a str, &'a str)>,
    /// Topic and payload of a retained will.
    pub will: Option<(&'a str, &'a str)>,
    /// Keep-alive in seconds, 0 for none.
    pub keep_alive: u16,
}

impl<'a> Hello<'a> {
    /// A clean session without login.
    pub fn v5(client: &'a str) -> Self {
        Self { is_v5: true, client, lasts: false, login: None, will: None, keep_alive: 60 }
    }

    /// As [`Hello::v5`], with MQTT 3.1.1.
    pub fn v3(client: &'a str) -> Self {
        Self { is_v5: false, ..Self::v5(client) }
    }

    /// A session that lasts.
    pub fn lasting(self) -> Self {
        Self { lasts: true, ..self }
    }

    /// Its CONNECT.
    pub fn packet(&self) -> Vec<u8> {
        let mut flags = if self.lasts { 0 } else { 2 };
        flags |= if self.will.is_some() { 0b10_1100 } else { 0 };
        flags |= if self.login.is_some() { 0xc0 } else { 0 };
        let mut body = text("MQTT");
        body.extend_from_slice(&[if self.is_v5 { 5 } else { 4 }, flags]);
        body.extend_from_slice(&self.keep_alive.to_be_bytes());
        if self.is_v5 {
            body.extend_from_slice(if self.lasts { &[5, 0x11, 0, 0, 0x0e, 0x10] } else { &[0] });
        }
        body.extend(text(self.client));
        if let Some((topic, payload)) = self.will {
            body.extend(if self.is_v5 { vec![0] } else { vec![] });
            body.extend([text(topic), text(payload)].concat());
        }
        if let Some((user, password)) = self.login {
            body.extend([text(user), text(password)].concat());
        }
        frame(0x10, &body)
    }
}

impl Raw {
    /// Connects and returns the CONNACK's session flag and code.
    pub async fn greet(to: SocketAddr, hello: Hello<'_>) -> (Self, bool, u8) {
        Self::over(TcpStream::connect(to).await.unwrap(), hello).await
    }

    /// As [`Raw::greet`], over a stream made elsewhere.
    pub async fn over(mut stream: TcpStream, hello: Hello<'_>) -> (Self, bool, u8) {
        stream.set_nodelay(true).unwrap();
        stream.write_all(&hello.packet()).await.unwrap();
        let mut raw = Self { stream, is_v5: hello.is_v5 };
        let (first, body) = raw.packet().await.expect("a CONNACK");
        assert_eq!(first, 0x20);
        (raw, body[0] == 1, body[1])
    }

    /// Connects; says whether the session was there.
    pub async fn connect(to: SocketAddr, hello: Hello<'_>) -> (Self, bool) {
        let (raw, is_present, code) = Self::greet(to, hello).await;
        assert_eq!(code, 0, "CONNACK");
        (raw, is_present)
    }

    /// The next packet, `None` at the end of the stream.
    pub async fn packet(&mut self) -> Option<(u8, Vec<u8>)> {
        let whole = async {
            let first = self.stream.read_u8().await.ok()?;
            let (mut length, mut shift) = (0_usize, 0);
            loop {
                let byte = self.stream.read_u8().await.ok()?;
                length |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body).await.ok()?;
            Some((first, body))
        };
        timeout(PATIENCE, whole).await.expect("a packet or the end of the stream")
    }

    /// Nothing comes for a while.
    pub async fn silence(&mut self) {
        let mut byte = [0];
        let came = timeout(Duration::from_millis(150), self.stream.peek(&mut byte)).await;
        assert!(came.is_err(), "something came");
    }

    /// Whether something comes within a moment.
    pub async fn comes(&mut self) -> bool {
        let mut byte = [0];
        timeout(Duration::from_millis(300), self.stream.peek(&mut byte)).await.is_ok()
    }

    /// Sends bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The bytes of a publish.
    pub fn publish_packet(&self, topic: &str, payload: &str, qos: u8, id: u16, dup: bool) -> Vec<u8> {
        let mut body = text(topic);
        if qos > 0 {
            body.extend_from_slice(&id.to_be_bytes());
        }
        body.extend(self.is_v5.then_some(0));
        body.extend_from_slice(payload.as_bytes());
        frame(0x30 | qos << 1 | u8::from(dup) << 3, &body)
    }

    /// Publishes without waiting.
    pub async fn publish(&mut self, topic: &str, payload: &str, qos: u8, id: u16) {
        let packet = self.publish_packet(topic, payload, qos, id, false);
        self.send(&packet).await;
    }

    /// Publishes a copy of what was published before.
    pub async fn publish_again(&mut self, topic: &str, payload: &str, qos: u8, id: u16) {
        let packet = self.publish_packet(topic, payload, qos, id, true);
        self.send(&packet).await;
    }

    /// The next packet is an ack of this kind: its id and reason.
    pub async fn ack(&mut self, kind: u8) -> (u16, u8) {
        let (first, body) = self.packet().await.expect("an ack");
        assert_eq!(first, kind, "{body:?}");
        (u16::from_be_bytes([body[0], body[1]]), body.get(2).copied().unwrap_or(0))
    }

    /// Sends an ack.
    pub async fn say(&mut self, kind: u8, id: u16) {
        self.send(&frame(kind, &id.to_be_bytes())).await;
    }

    /// Subscribes.
    pub async fn subscribe(&mut self, filter: &str, qos: u8) {
        let mut body = vec![0, 9];
        body.extend(self.is_v5.then_some(0));
        body.extend(text(filter));
        body.push(qos);
        self.send(&frame(0x82, &body)).await;
        let (first, body) = self.packet().await.expect("a SUBACK");
        assert_eq!((first, body.last().copied()), (0x90, Some(qos)));
    }

    /// The next packet is a message: topic, payload, first byte, packet id.
    pub async fn message(&mut self) -> (String, String, u8, u16) {
        let (first, body) = self.packet().await.expect("a message");
        assert_eq!(first & 0xf0, 0x30, "{first:#x} {body:?}");
        let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
        let topic = String::from_utf8(body[2..2 + length].to_vec()).unwrap();
        let mut at = 2 + length;
        let mut id = 0;
        if first & 0b110 != 0 {
            id = u16::from_be_bytes([body[at], body[at + 1]]);
            at += 2;
        }
        if self.is_v5 {
            at += 1 + usize::from(body[at]);
        }
        (topic, String::from_utf8(body[at..].to_vec()).unwrap(), first, id)
    }

    /// Says goodbye and waits for the end.
    pub async fn goodbye(mut self) {
        self.send(&[0xe0, 0]).await;
        assert!(self.packet().await.is_none());
    }
}
