//! The beginning of a connection: the first packet, who it is, and which session it continues.
//!
//! Not here: what happens afterwards (`connection`).
//!
//! Invariants: nothing is allocated for a stranger beyond the bytes it sent; the session row with its new epoch is durable
//! before CONNACK; a session has one connection, the newest. Tests: `tests/it/mqtt.rs`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rmqtt_codec::v5;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    connection::Connection,
    embedded::{Broker, Place, count_dropped},
    inbound::{self, Target},
    packet::{self, Broken, Codec, Connect, Id, Packet, Version, code},
    record::{Subscription, Will},
    registry::{Space, is_due},
    roam::Roam,
    session::{Inbound, Link, Session, State},
    topic::Filter,
    will,
    wire::Wire,
};
use crate::{
    gateway::auth::Pass,
    types::{AuthContext, limits::MAX_CLIENT_ID_BYTES},
};

/// Longest wait for CONNECT, and for a session to be handed over by its old connection.
const WITHIN: Duration = Duration::from_secs(10);
/// Longest wait for a refused client to take the refusal.
const GOODBYE: Duration = Duration::from_secs(2);
/// Topic aliases a client may use.
pub const TOPIC_ALIASES: u16 = 64;

/// A client that was let in.
pub struct Admitted {
    /// Who.
    pub auth: AuthContext,
    /// Its client id as it knows it.
    pub client: Arc<str>,
    /// Its tenant.
    pub space: Arc<Space>,
    /// Its session.
    pub session: Arc<Session>,
    /// Its connection.
    pub link: Arc<Link>,
    /// Whether the session was there before.
    pub is_present: bool,
    /// Which session, and which connection of it.
    pub uid: u64,
    /// As above.
    pub epoch: u64,
    /// Life of the session after the connection, in seconds.
    pub expiry_seconds: u32,
    /// What the session remembers of its client's publishes.
    pub inbound: Inbound,
    /// Messages to be released again.
    pub released: Vec<Id>,
}

/// Serves one connection from its first byte to its last.
pub(super) async fn serve<S>(broker: Arc<Broker>, stream: S, peer: SocketAddr, place: Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut wire = Wire::new(stream);
    let mut codec = Codec::new(broker.config.max_packet_kb as usize * 1024);
    let first = tokio::select! {
        first = timeout(WITHIN, first_packet(&mut wire, &mut codec)) => first,
        () = broker.drain.draining() => return,
    };
    let connect = match first {
        Ok(Ok(Some(connect))) => connect,
        Ok(Err(broken)) => return refuse(wire, codec, broken).await,
        Ok(Ok(None)) | Err(_) => return count_dropped("no_connect", 1),
    };
    let admitted = if place.is_over {
        Err(Broken::new(code::BUSY, "mqtt.max_connections reached"))
    } else {
        admit(&broker, &connect, peer).await
    };
    match admitted {
        Err(broken) => {
            tracing::debug!(%peer, reason = broken.what, "MQTT connection refused");
            refuse(wire, codec, broken).await;
        }
        Ok(admitted) => {
            codec.connack(admitted.is_present, connack(&broker, &connect, &admitted), &mut wire.output);
            // Released before the long part of the connection: the CONNECT holds a password.
            let (version, keep_alive) = (connect.version, keep_alive(&broker, &connect));
            let (receive_max, max_packet) = (connect.receive_max, connect.max_packet);
            drop(connect);
            let connection =
                Connection::new(broker, admitted, wire, codec, version, keep_alive, receive_max, max_packet);
            Box::pin(connection.run()).await;
        }
    }
    drop(place);
}

async fn first_packet<S>(wire: &mut Wire<S>, codec: &mut Codec) -> Result<Option<Box<Connect>>, Broken>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match codec.decode(&mut wire.input)? {
            Some(Packet::Connect(connect)) => return Ok(Some(connect)),
            Some(_) => return Err(Broken::new(code::PROTOCOL_ERROR, "the first packet is not CONNECT")),
            None => {}
        }
        if !matches!(wire.read().await, Ok(read) if read > 0) {
            return Ok(None);
        }
    }
}

async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(mut wire: Wire<S>, mut codec: Codec, broken: Broken) {
    count_dropped("connection_refused", 1);
    if broken.code == code::UNSUPPORTED_VERSION {
        wire.output.extend_from_slice(&packet::UNSUPPORTED_VERSION_ANSWER);
    } else {
        codec.refuse(broken.code, &mut wire.output);
    }
    wire.close(GOODBYE).await;
}

/// The keep-alive in force, in seconds. A client of MQTT 5 that wants none is told ours.
fn keep_alive(broker: &Broker, connect: &Connect) -> u16 {
    match (connect.keep_alive, connect.version) {
        (0, Version::V5) => broker.config.default_keep_alive_seconds,
        (wanted, _) => wanted,
    }
}

fn connack(broker: &Broker, connect: &Connect, admitted: &Admitted) -> v5::ConnectAck {
    let own = keep_alive(broker, connect);
    let response_info = connect.wants_response_info.then(|| match &admitted.auth.instance {
        Some(instance) => Some(format!("sophont/{}/{instance}/out/reply", admitted.space.tenant)),
        None => broker.config.plain_topics.then(|| format!("replies/{}", admitted.client)),
    });
    v5::ConnectAck {
        session_expiry_interval_secs: (admitted.expiry_seconds != connect.expiry_seconds)
            .then_some(admitted.expiry_seconds),
        receive_max: Id::new(broker.config.receive_maximum).unwrap_or(Id::MIN),
        max_packet_size: Some(broker.config.max_packet_kb.saturating_mul(1024)),
        assigned_client_id: connect.client_id.is_empty().then(|| admitted.client.to_string().into()),
        topic_alias_max: TOPIC_ALIASES,
        server_keepalive_sec: (own != connect.keep_alive).then_some(own),
        response_info: response_info.flatten().map(Into::into),
        ..v5::ConnectAck::default()
    }
}

/// Who a client is, and for how long.
fn identify(broker: &Broker, connect: &Connect, peer: SocketAddr) -> Result<Arc<Pass>, Broken> {
    const BAD_LOGIN: Broken = Broken::new(code::BAD_LOGIN, "user name or password");
    if broker.auth.has_tokens() {
        let Some(password) = &connect.password else {
            return Err(Broken::new(code::NOT_AUTHORIZED, "no credentials"));
        };
        let password = std::str::from_utf8(password).map_err(|_| BAD_LOGIN)?;
        let found = match &connect.username {
            Some(user) => broker.auth.login(user, password),
            None => broker.auth.authenticate(password),
        };
        return found.ok_or(BAD_LOGIN);
    }
    let pass =
        broker.auth.anonymous(peer.ip()).ok_or(Broken::new(code::NOT_AUTHORIZED, "no credentials are configured"))?;
    let tenant = connect.username.as_deref().map(|user| user.split('/').next().unwrap_or_default());
    if tenant.is_some_and(|tenant| tenant != pass.who.tenant.as_str()) { Err(BAD_LOGIN) } else { Ok(pass) }
}

/// Checks a will while its sender is there to be told.
fn check_will(broker: &Broker, auth: &AuthContext, will: &Will) -> Result<(), Broken> {
    let message = &will.message;
    let target = inbound::target(auth, &message.topic, broker.config.plain_topics)
        .map_err(|refusal| Broken::new(refusal.reason.code(), "the topic of the will"))?;
    let is_fine = match target {
        Target::Presence(_) => inbound::presence(&message.payload).is_ok(),
        _ => !message.is_utf8 || std::str::from_utf8(&message.payload).is_ok(),
    };
    if is_fine { Ok(()) } else { Err(Broken::new(0x99, "the payload of the will")) }
}

async fn admit(broker: &Arc<Broker>, connect: &Connect, peer: SocketAddr) -> Result<Admitted, Broken> {
    if connect.has_auth_method {
        return Err(Broken::new(code::BAD_AUTH_METHOD, "enhanced authentication"));
    }
    let pass = identify(broker, connect, peer)?;
    let auth = pass.who.clone();
    if connect.client_id.len() > MAX_CLIENT_ID_BYTES || connect.client_id.chars().any(char::is_control) {
        return Err(Broken::new(code::CLIENT_ID_INVALID, "client id"));
    }
    if let Some(will) = &connect.will {
        check_will(broker, &auth, will)?;
    }
    let client: Arc<str> = match &*connect.client_id {
        "" => Arc::from(format!("auto-{}", uuid::Uuid::new_v4().simple())),
        given => Arc::from(given),
    };
    let space = broker.space(&auth.tenant);
    let link = Arc::new(Link::new(pass));
    let (session, claim) = match (&broker.roam, &auth.instance) {
        (Some(roam), Some(instance)) => {
            roam.expect(&space, instance).await;
            let claimed = claim(broker, connect, &auth, &space, &client, &link).await;
            claimed.inspect_err(|_| roam.miss(&space, instance))?
        }
        _ => claim(broker, connect, &auth, &space, &client, &link).await?,
    };
    if broker.drain.is_draining() {
        link.close(code::SHUTTING_DOWN);
    }
    if link.pass.is_over() {
        link.close(code::NOT_AUTHORIZED);
    }
    Ok(Admitted {
        auth,
        client,
        space,
        session,
        link,
        is_present: claim.is_present,
        uid: claim.uid,
        epoch: claim.epoch,
        expiry_seconds: claim.expiry_seconds,
        inbound: claim.inbound,
        released: claim.released,
    })
}

/// What a connection takes over from its session.
#[derive(Default)]
struct Claim {
    is_present: bool,
    uid: u64,
    epoch: u64,
    expiry_seconds: u32,
    inbound: Inbound,
    released: Vec<Id>,
    /// Filters of the session that was there and is forgotten, or that its client may not have any more.
    obsolete: Vec<String>,
    /// The will of the session that was there, which cannot be cancelled any more: will, uid, epoch, sender.
    will: Option<(Will, u64, u64, String)>,
    had_row: bool,
}

/// The key of a session: client ids of a device bound to an instance are its own, so that no other device can take them.
fn session_key(auth: &AuthContext, client: &str) -> String {
    let instance = auth.instance.as_ref().map_or("", |instance| instance.as_str());
    format!("{instance}/{client}")
}

async fn claim(
    broker: &Arc<Broker>,
    connect: &Connect,
    auth: &AuthContext,
    space: &Arc<Space>,
    client: &Arc<str>,
    link: &Arc<Link>,
) -> Result<(Arc<Session>, Claim), Broken> {
    let key = session_key(auth, client);
    let taking = async {
        loop {
            let session = space.session(&key);
            let old = {
                let mut state = session.lock();
                match (&state.link, state.gone) {
                    (_, true) => None,
                    (Some(old), _) => Some(old.clone()),
                    (None, _) if broker.roam.is_some() => {
                        // Nobody else here takes it while the store is asked.
                        (state.link, state.claiming) = (Some(link.clone()), true);
                        drop(state);
                        return (session, None);
                    }
                    (None, _) => {
                        let claim = Some(take_over(broker, connect, auth, client, link, &session, &mut state));
                        drop(state);
                        return (session, claim);
                    }
                }
            };
            match old {
                Some(old) => {
                    old.close(code::TAKEN_OVER);
                    old.ended().cancelled().await;
                }
                None => space.forget(&session),
            }
        }
    };
    let (session, claim) =
        timeout(WITHIN, taking).await.map_err(|_| Broken::new(code::BUSY, "the session is still in use"))?;
    let mut claim = match (claim, &broker.roam) {
        (Some(claim), _) => claim,
        (None, Some(roam)) => sit(broker, roam, connect, auth, space, &session, client, link).await?,
        (None, None) => return Err(Broken::new(code::UNSPECIFIED, "the session is not there")),
    };
    for filter in &claim.obsolete {
        space.unsubscribe(&session, filter);
    }
    if let Some((will, uid, epoch, sender)) = claim.will.take() {
        will::send(broker, space, &session, &will, uid, epoch, &sender).await;
    }
    let mut writes = Vec::new();
    let put = {
        let state = session.lock();
        if claim.had_row && (!claim.is_present || !state.stored) {
            writes.push(session.drop_row());
        }
        state.stored.then(|| session.put(&state))
    };
    let written = match put.transpose() {
        Ok(put) => {
            writes.extend(put);
            broker.write(writes).await
        }
        Err(_) => false,
    };
    if written {
        if let Some(roam) = &broker.roam {
            roam.came(&session);
        }
        return Ok((session, claim));
    }
    let mut state = session.lock();
    state.link = None;
    state.disconnected_at = Some(broker.clock.now());
    (state.will, state.inbound) = (None, claim.inbound);
    let next = will::next_look(&state);
    broker.schedule.set(&session, &mut state, next);
    drop(state);
    link.end();
    Err(Broken::new(code::UNAVAILABLE, "the store does not take the session"))
}

/// Makes a reserved session this node's, and this connection's.
#[allow(clippy::too_many_arguments, reason = "those of the claim it is a part of")]
async fn sit(
    broker: &Broker,
    roam: &Roam,
    connect: &Connect,
    auth: &AuthContext,
    space: &Space,
    session: &Arc<Session>,
    client: &Arc<str>,
    link: &Arc<Link>,
) -> Result<Claim, Broken> {
    let is_kept = connect.expiry_seconds.min(broker.config.max_session_expiry_seconds) > 0 || connect.will.is_some();
    let seated = timeout(WITHIN, roam.sit(broker, space, session, is_kept)).await;
    let mut state = session.lock();
    state.claiming = false;
    let why = match seated {
        Ok(Ok(())) => {
            let claim = take_over(broker, connect, auth, client, link, session, &mut state);
            let kept: Vec<Subscription> = state.subscriptions.values().cloned().collect();
            drop(state);
            // Whether other nodes are told of them depends on whether the session lasts now.
            kept.iter().for_each(|one| space.subscribe(session, one));
            return Ok(claim);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => String::from("it takes too long"),
    };
    state.link = None;
    drop(state);
    link.end();
    tracing::debug!(client = %session.client, %why, "an MQTT session cannot be taken");
    Err(Broken::new(code::UNAVAILABLE, "the store does not give the session"))
}

/// Makes a free session this connection's, in memory.
fn take_over(
    broker: &Broker,
    connect: &Connect,
    auth: &AuthContext,
    client: &Arc<str>,
    link: &Arc<Link>,
    session: &Session,
    state: &mut State,
) -> Claim {
    let now = broker.clock.now();
    broker.schedule.set(session, state, None);
    let is_over = is_due(state.expires_at(), now);
    let is_present = state.epoch > 0 && !connect.clean_start && !is_over;
    let mut claim = Claim { is_present, had_row: state.stored, ..Claim::default() };
    // A will that waits is cancelled only by the session going on before its time.
    if let Some(will) = state.will.take()
        && (!is_present || is_due(state.will_at, now))
    {
        claim.will = Some((will, state.uid, state.epoch, state.sender.clone()));
    }
    if is_present {
        let plain = broker.config.plain_topics;
        let may = |filter: &String| {
            Filter::parse(filter).is_some_and(|filter| inbound::may_subscribe(auth, filter.path, plain).is_ok())
        };
        claim.obsolete = state.subscriptions.keys().filter(|filter| !may(filter)).cloned().collect();
        state.subscriptions.retain(|filter, _| may(filter));
        claim.inbound = std::mem::take(&mut state.inbound);
        claim.released = state.outbox.resume();
    } else {
        claim.obsolete = std::mem::take(&mut state.subscriptions).into_keys().collect();
        // Made anew with its row, it keeps its place there.
        *state = State { uid: uuid::Uuid::new_v4().as_u64_pair().0, ..State::default() };
    }
    state.epoch += 1;
    state.expiry_seconds = connect.expiry_seconds.min(broker.config.max_session_expiry_seconds);
    (state.disconnected_at, state.will_at) = (None, None);
    state.sender = String::from(auth.sender().unwrap_or(client));
    state.will.clone_from(&connect.will);
    state.stored = state.is_persistent() || state.will.is_some();
    state.link = Some(link.clone());
    state.since = now;
    (claim.uid, claim.epoch, claim.expiry_seconds) = (state.uid, state.epoch, state.expiry_seconds);
    claim
}
