//! How the broker is reached: address, login, TLS, session.
//!
//! The session: the client library refuses a session the broker kept unless it has its own half. Ours is always empty after a
//! start: we take messages at QoS 1 at most, whose state is the broker's, and what we publish is kept by `delivery` until it
//! is acknowledged. [`EmptyHalf`] says so once, before the first connection; it is taken away after it, since from then on
//! the library keeps its half in memory, and storing it would cost a copy of all that is in flight for every packet.
//! Tests: at the foot; `tests/it/mqtt_external.rs`.

use std::time::Duration;

use rumqttc::{
    AckMode, IncomingPacketSizeLimit, MqttOptions, PersistedAckMode, PersistedSession, SessionStore, SessionStoreError,
    SessionStoreKey, Transport,
};

use super::Error;
use crate::config;

/// Where a broker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// Name or address.
    pub(super) host: String,
    /// Port.
    pub(super) port: u16,
    /// With TLS.
    pub(super) tls: bool,
}

impl Address {
    /// Reads `mqtt://HOST[:PORT]` or `mqtts://HOST[:PORT]`.
    ///
    /// # Errors
    /// [`Error::Url`].
    pub(super) fn parse(url: &str) -> Result<Self, Error> {
        let wrong = |why: &str| Error::Url(format!("'{url}': {why}"));
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("expected mqtt://HOST:PORT"))?;
        let (tls, usual) = match scheme {
            "mqtt" => (false, 1883),
            "mqtts" => (true, 8883),
            _ => return Err(wrong("the scheme is mqtt or mqtts")),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('@') {
            return Err(wrong("user name and password go into mqtt.username and mqtt.password_env"));
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or_else(|| wrong("a ']' is missing"))?;
                (host, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or_else(|| wrong("a wrong port"))?)
            }
            None => rest.split_once(':').unwrap_or((rest, "")),
        };
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(wrong("no host"));
        }
        let port = if port.is_empty() { usual } else { port.parse().map_err(|_| wrong("a wrong port"))? };
        Ok(Self { host: host.into(), port, tls })
    }
}

/// What the client library is told.
///
/// # Errors
/// [`Error`]: a wrong address, no password where one is named, an unreadable CA.
pub(super) fn options(config: &config::Mqtt, client_id: &str) -> Result<MqttOptions, Error> {
    let address = Address::parse(&config.url)?;
    let mut options = MqttOptions::new(client_id, (address.host, address.port));
    let largest = config.max_packet_kb.saturating_mul(1024);
    options
        .set_keep_alive(30)
        .set_connect_timeout(Duration::from_secs(10))
        .set_clean_start(false)
        .set_session_expiry_interval(Some(config.max_session_expiry_seconds.max(1)))
        .set_receive_maximum(Some(config.receive_maximum.max(1)))
        .set_max_packet_size(Some(largest))
        .set_incoming_packet_size_limit(IncomingPacketSizeLimit::Bytes(largest))
        .set_ack_mode(AckMode::Manual)
        .set_max_request_batch(64)
        .set_pending_throttle(Duration::ZERO)
        .set_session_store(EmptyHalf { expiry: config.max_session_expiry_seconds.max(1) });
    if !config.username.is_empty() {
        match config.password_env.as_str() {
            "" => options.set_username(config.username.clone()),
            name => {
                let password = std::env::var(name).map_err(|_| Error::Password(name.into()))?;
                options.set_credentials(config.username.clone(), password.into_bytes())
            }
        };
    }
    if address.tls {
        options.set_transport(match &config.ca_file {
            Some(file) => {
                let ca = std::fs::read(file).map_err(|error| Error::Ca(format!("{}: {error}", file.display())))?;
                Transport::tls(ca, None, None)
            }
            None => Transport::try_tls_with_default_config().map_err(|error| Error::Ca(error.to_string()))?,
        });
    }
    Ok(options)
}

/// Our half of the session at the start of a process: nothing.
#[derive(Debug, Clone, Copy)]
struct EmptyHalf {
    expiry: u32,
}

type Answer<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T, SessionStoreError>> + Send + 'a>>;

impl SessionStore for EmptyHalf {
    fn load<'a>(&'a self, key: &'a SessionStoreKey) -> Answer<'a, Option<PersistedSession>> {
        let session = PersistedSession {
            format_version: 1,
            client_id: key.client_id().to_owned(),
            clean_start: false,
            session_expiry_interval: Some(self.expiry),
            outgoing_inflight_upper_limit: None,
            ack_mode: PersistedAckMode::Manual,
            last_pkid: 0,
            last_puback: 0,
            replay: Vec::new(),
            incoming_qos2: Vec::new(),
        };
        Box::pin(async move { Ok(Some(session)) })
    }

    fn save<'a>(&'a self, _: &'a SessionStoreKey, _: &'a PersistedSession) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn clear<'a>(&'a self, _: &'a SessionStoreKey) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_broker_is_told_of_session_and_limits() {
        let config = config::Mqtt { url: "mqtt://b".into(), receive_maximum: 9, ..config::Config::default().mqtt };
        let options = options(&config, "node-1").unwrap();
        let told = options.connect_properties().unwrap();
        assert_eq!((told.receive_maximum, told.session_expiry_interval), (Some(9), Some(604_800)));
        assert_eq!(told.max_packet_size, Some(1024 * 1024));
        assert!(!options.clean_start());
    }

    #[test]
    fn an_address_is_read() {
        let of = |url: &str| Address::parse(url).map(|address| (address.host, address.port, address.tls));
        assert_eq!(of("mqtt://broker:1884").unwrap(), ("broker".into(), 1884, false));
        assert_eq!(of("mqtt://10.0.0.1").unwrap(), ("10.0.0.1".into(), 1883, false));
        assert_eq!(of("mqtts://broker.example/").unwrap(), ("broker.example".into(), 8883, true));
        assert_eq!(of("mqtts://[::1]:99").unwrap(), ("::1".into(), 99, true));
        for bad in
            ["", "broker:1883", "http://broker", "mqtt://", "mqtt://:1883", "mqtt://a:b", "mqtt://u:p@a", "mqtt://[::1"]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
