//! A device on the wire: the least MQTT client that lets a test choose packet ids, repeat with DUP and withhold an ack.
//!
//! Bytes are made here by hand, on purpose: neither the codec of the MQTT door nor a client library that hides repeats.
//! Real client libraries (paho, Mosquitto's) have tests of their own.

use std::{
    io::{self, Error, ErrorKind},
    net::SocketAddr,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Longest wait for the next packet.
const DEADLINE: Duration = Duration::from_secs(20);

/// The protocol a device speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1.
    V311,
    /// MQTT 5.
    V5,
}

/// What a server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Acknowledges a publish, with a reason code (0 on 3.1.1).
    Puback(u16, u8),
    /// Grants subscriptions.
    Suback(u16),
    /// A message; with packet id when it wants an acknowledgement.
    Publish { topic: String, packet_id: Option<u16>, payload: Vec<u8> },
    /// Anything else, by its first byte.
    Other(u8),
}

/// An open connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    version: Version,
    /// Whether the server remembered the session.
    pub session_present: bool,
}

impl Connection {
    /// Connects with a session that outlives the connection.
    ///
    /// # Errors
    /// When the server is not there, refuses or hangs up.
    pub async fn open(to: SocketAddr, client: &str, version: Version) -> io::Result<Self> {
        let stream = within(TcpStream::connect(to)).await?;
        stream.set_nodelay(true)?;
        let mut connection = Self { stream, buffer: Vec::new(), version, session_present: false };
        let mut body = text("MQTT");
        body.extend([if version == Version::V5 { 5 } else { 4 }, 0, 0, 0]); // no clean start, no keep-alive
        if version == Version::V5 {
            body.push(5);
            body.push(0x11); // session expiry interval
            body.extend(3600u32.to_be_bytes());
        }
        body.extend(text(client));
        connection.send(0x10, &body).await?;
        match connection.read_packet().await? {
            (0x20, body) if body.get(1) == Some(&0) => connection.session_present = body[0] & 1 == 1,
            (_, body) => return Err(Error::other(format!("the connection is refused: {body:?}"))),
        }
        Ok(connection)
    }

    /// Publishes with QoS 1. `id` becomes the user property of that name on MQTT 5.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn publish(
        &mut self,
        packet_id: u16,
        repeat: bool,
        topic: &str,
        id: Option<&str>,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut body = text(topic);
        body.extend(packet_id.to_be_bytes());
        if self.version == Version::V5 {
            let mut properties = Vec::new();
            if let Some(id) = id {
                properties.push(0x26);
                properties.extend(text("id"));
                properties.extend(text(id));
            }
            length(&mut body, properties.len());
            body.extend(properties);
        }
        body.extend(payload);
        self.send(0x32 | u8::from(repeat) << 3, &body).await
    }

    /// Subscribes with QoS 1.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn subscribe(&mut self, packet_id: u16, filter: &str) -> io::Result<()> {
        let mut body = packet_id.to_be_bytes().to_vec();
        if self.version == Version::V5 {
            body.push(0);
        }
        body.extend(text(filter));
        body.push(1);
        self.send(0x82, &body).await
    }

    /// Acknowledges a message.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn acknowledge(&mut self, packet_id: u16) -> io::Result<()> {
        self.send(0x40, &packet_id.to_be_bytes()).await
    }

    /// The next packet.
    ///
    /// # Errors
    /// When the connection broke or nothing comes by the deadline.
    pub async fn next(&mut self) -> io::Result<Packet> {
        let (first, body) = self.read_packet().await?;
        let number = |at: usize| body.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]));
        Ok(match first >> 4 {
            4 => Packet::Puback(number(0), body.get(2).copied().unwrap_or(0)),
            9 => Packet::Suback(number(0)),
            3 => {
                let mut at = 2 + usize::from(number(0));
                let topic = String::from_utf8_lossy(&body[2..at]).into_owned();
                let packet_id = (first & 6 != 0).then(|| number(at));
                at += if packet_id.is_some() { 2 } else { 0 };
                if self.version == Version::V5 {
                    let (properties, bytes) = read_length(&body[at..]).ok_or(ErrorKind::InvalidData)?;
                    at += bytes + properties;
                }
                Packet::Publish { topic, packet_id, payload: body[at..].to_vec() }
            }
            _ => Packet::Other(first),
        })
    }

    async fn send(&mut self, first: u8, body: &[u8]) -> io::Result<()> {
        let mut packet = vec![first];
        length(&mut packet, body.len());
        packet.extend(body);
        within(self.stream.write_all(&packet)).await
    }

    async fn read_packet(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let Some((size, bytes)) = self.buffer.get(1..).and_then(read_length) {
                let (start, end) = (1 + bytes, 1 + bytes + size);
                if self.buffer.len() >= end {
                    let packet = (self.buffer[0], self.buffer[start..end].to_vec());
                    self.buffer.drain(..end);
                    return Ok(packet);
                }
            }
            if within(self.stream.read_buf(&mut self.buffer)).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(DEADLINE, work).await.map_err(|_| Error::from(ErrorKind::TimedOut))?
}

fn text(text: &str) -> Vec<u8> {
    let size = u16::try_from(text.len()).expect("a short text");
    [&size.to_be_bytes(), text.as_bytes()].concat()
}

fn length(out: &mut Vec<u8>, mut size: usize) {
    loop {
        let low = u8::try_from(size % 128).expect("below 128");
        size /= 128;
        out.push(low | if size > 0 { 128 } else { 0 });
        if size == 0 {
            return;
        }
    }
}

/// A variable length integer and the bytes it takes, when it is all there.
fn read_length(bytes: &[u8]) -> Option<(usize, usize)> {
    let end = bytes.iter().take(4).position(|byte| byte & 128 == 0)?;
    let size = bytes[..=end].iter().rev().fold(0, |sum, byte| sum * 128 + usize::from(byte & 127));
    Some((size, end + 1))
}
