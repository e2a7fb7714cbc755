//! Who may come in: static tokens from the configuration, loopback without tokens, and the rule that binds them.
//!
//! Owns: the [`Authenticator`] both doors ask, the [`Pass`] of whoever was let in, and [`check_bind`], which start-up asks before
//! it listens. Not here: what a caller may do with which instance ([`AuthContext::may`]), and how each door carries credentials.
//!
//! Invariants: a secret is kept only as its digest under this process's own key, and is never logged; the time an answer takes
//! tells nothing about a secret ([`Authenticator::authenticate`]); a pass ends with the token it was given for, and before
//! anybody is told that tokens changed. Tests: at the foot; `tests/it/hostile.rs`, `tests/it/tokens.rs` over the wire.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use secrecy::ExposeSecret;
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Auth, Token},
    types::{AuthContext, Fault, Kind, Principal, TenantId},
};

/// Why credentials cannot be used as configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A token has no secret, or two sources of one.
    #[error("auth.tokens[{index}] ('{name}') needs exactly one of 'token' and 'token_env'")]
    Source {
        /// Position in the list.
        index: usize,
        /// Name of the token's owner.
        name: String,
    },
    /// The environment variable that holds a secret is not set, or is empty.
    #[error("auth.tokens[{index}] ('{name}') takes its secret from ${variable}, which is not set")]
    Unset {
        /// Position in the list.
        index: usize,
        /// Name of the token's owner.
        name: String,
        /// The variable.
        variable: String,
    },
    /// Two tokens have the same secret, so it would not say who comes.
    #[error("auth.tokens[{first}] and auth.tokens[{second}] have the same secret")]
    Same {
        /// The earlier position.
        first: usize,
        /// The later position.
        second: usize,
    },
    /// Without tokens everybody on this machine may do everything: that is decided at a start.
    #[error("auth.tokens: the last token cannot be taken away while the node runs")]
    Last,
    /// A door would be open to everybody.
    #[error(
        "{door} may not listen on {address}: others than this machine reach it and no credentials are configured. \
         Add one to the configuration:\n\n    [[auth.tokens]]\n    token_env = \"SOPHONT_TOKEN\"   # an environment \
         variable that holds the secret\n    tenant = \"default\"\n    name = \"me\"\n\nor listen on this machine only, \
         for example on 127.0.0.1:{port}", port = address.port()
    )]
    Open {
        /// Which door.
        door: &'static str,
        /// Where it would listen.
        address: SocketAddr,
    },
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Source { .. } | Error::Unset { .. } | Error::Same { .. } => "AUTH_TOKEN_INVALID",
            Error::Last | Error::Open { .. } => "AUTH_REQUIRED",
        }
    }
}

/// Refuses to open a door to other machines while anybody could walk in. `door` names it in the message.
///
/// # Errors
/// [`Error::Open`], whose message says both ways out.
pub fn check_bind(door: &'static str, address: SocketAddr, has_tokens: bool) -> Result<(), Error> {
    if has_tokens || address.ip().to_canonical().is_loopback() { Ok(()) } else { Err(Error::Open { door, address }) }
}

/// The right of whoever was let in to be here. All who come with the same credentials share one.
#[derive(Debug)]
pub struct Pass {
    /// Who.
    pub who: AuthContext,
    over: CancellationToken,
}

impl Pass {
    /// A right that has begun.
    pub fn new(who: AuthContext) -> Self {
        Self { who, over: CancellationToken::new() }
    }

    /// Whether it has ended: its token was taken away, has another secret, or stands for somebody else.
    pub fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    /// Returns when it has ended. Cancel safe.
    pub fn over(&self) -> impl Future<Output = ()> + Send + Sync + use<> {
        self.over.clone().cancelled_owned()
    }
}

/// Half of a secret's digest.
type Half = [u8; 16];

/// A token: found by the first half of its digest, which is the key of the table it stands in.
struct Entry {
    second: Half,
    pass: Arc<Pass>,
}

type Table = HashMap<Half, Entry, ahash::RandomState>;

/// Who may come in at present.
struct Guests {
    tokens: Table,
    /// Those without credentials; none while there are tokens.
    local: Option<Arc<Pass>>,
}

impl Guests {
    fn passes(&self) -> impl Iterator<Item = &Arc<Pass>> {
        self.tokens.values().map(|entry| &entry.pass).chain(&self.local)
    }
}

/// Knows every credential of the node. Cheap to ask; shared by all doors.
pub struct Authenticator {
    default_tenant: TenantId,
    /// Of this process alone, and told to nobody.
    key: [u8; 32],
    guests: ArcSwap<Guests>,
    changed: watch::Sender<()>,
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator").field("tokens", &self.guests.load().tokens.len()).finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Resolves the configured tokens, reading `token_env` from the process's environment.
    ///
    /// # Errors
    /// [`Error`] when a token has no secret, two sources of one, or the secret of another.
    pub fn new(config: &Auth) -> Result<Self, Error> {
        Self::with_environment(config, environment)
    }

    /// As [`Authenticator::new`], with the environment handed in.
    ///
    /// # Errors
    /// As [`Authenticator::new`].
    pub fn with_environment(config: &Auth, variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut key = [0; 32];
        for half in key.chunks_exact_mut(16) {
            half.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        }
        let tokens = resolve(config, &key, &variable)?;
        let local =
            tokens.is_empty().then(|| Arc::new(Pass::new(AuthContext::loopback(config.default_tenant.clone()))));
        let guests = ArcSwap::from_pointee(Guests { tokens, local });
        Ok(Self { default_tenant: config.default_tenant.clone(), key, guests, changed: watch::Sender::new(()) })
    }

    /// Whether these tokens can be put in place of the others.
    ///
    /// # Errors
    /// As [`Authenticator::new`]; [`Error::Last`].
    pub fn may_adopt(&self, config: &Auth) -> Result<(), Error> {
        self.prepare(config).map(drop)
    }

    /// Goes by these tokens from here on. Whoever came with one that is not among them, or stands for somebody else now, has no
    /// right to be here any more ([`Pass::is_over`]); once tokens are there, neither has whoever came without one.
    ///
    /// # Errors
    /// As [`Authenticator::may_adopt`]; then nothing has changed.
    pub fn adopt(&self, config: &Auth) -> Result<(), Error> {
        let mut tokens = self.prepare(config)?;
        let old = self.guests.load_full();
        for (first, entry) in &mut tokens {
            let same = |known: &&Entry| known.second == entry.second && known.pass.who == entry.pass.who;
            if let Some(known) = old.tokens.get(first).filter(same) {
                entry.pass = known.pass.clone();
            }
        }
        let local = old.local.clone().filter(|_| tokens.is_empty());
        let new = Arc::new(Guests { tokens, local });
        self.guests.store(new.clone());
        let stays: HashSet<*const Pass> = new.passes().map(Arc::as_ptr).collect();
        old.passes().filter(|pass| !stays.contains(&Arc::as_ptr(pass))).for_each(|pass| pass.over.cancel());
        self.changed.send_replace(());
        Ok(())
    }

    fn prepare(&self, config: &Auth) -> Result<Table, Error> {
        let tokens = resolve(config, &self.key, &environment)?;
        if tokens.is_empty() && self.has_tokens() { Err(Error::Last) } else { Ok(tokens) }
    }

    /// Tells each change of the tokens from here on, after passes ended.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The caller a token stands for.
    ///
    /// The time it takes is the same for one token and for thousands, and tells nothing about secrets. The table is searched by the
    /// first half of the digest; how long that takes may depend on the bytes it meets, and whoever could measure it would learn
    /// something of digests that are made under a key nobody else has: they cannot be computed from guesses, so nobody can aim
    /// at one, and nothing follows from them for the secrets. Whether it is the token is then said by the second half, in constant time.
    pub fn authenticate(&self, token: &str) -> Option<Arc<Pass>> {
        let (first, second) = halves(&self.key, token);
        let guests = self.guests.load();
        let entry = guests.tokens.get(&first)?;
        bool::from(entry.second.ct_eq(&second)).then(|| entry.pass.clone())
    }

    /// The caller without credentials: only from this machine, and only while no tokens are configured.
    pub fn anonymous(&self, peer: IpAddr) -> Option<Arc<Pass>> {
        if peer.to_canonical().is_loopback() { self.guests.load().local.clone() } else { None }
    }

    /// The caller of an MQTT login: the password is a token; the user name is the token's tenant, or `tenant/name`.
    pub fn login(&self, user: &str, password: &str) -> Option<Arc<Pass>> {
        let pass = self.authenticate(password)?;
        let (tenant, name) = user.split_once('/').map_or((user, None), |(tenant, name)| (tenant, Some(name)));
        let matches = tenant == pass.who.tenant.as_str() && name.is_none_or(|name| pass.who.sender() == Some(name));
        matches.then_some(pass)
    }

    /// Whether any token is configured; then everybody needs one.
    pub fn has_tokens(&self) -> bool {
        !self.guests.load().tokens.is_empty()
    }

    /// The tenant of callers on loopback without a token.
    pub fn default_tenant(&self) -> &TenantId {
        &self.default_tenant
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn halves(key: &[u8; 32], secret: &str) -> (Half, Half) {
    let digest = blake3::keyed_hash(key, secret.as_bytes());
    let (mut first, mut second) = (Half::default(), Half::default());
    let (front, back) = digest.as_bytes().split_at(first.len());
    first.copy_from_slice(front);
    second.copy_from_slice(back);
    (first, second)
}

fn resolve(config: &Auth, key: &[u8; 32], variable: &impl Fn(&str) -> Option<String>) -> Result<Table, Error> {
    let mut positions: HashMap<Half, usize> = HashMap::new();
    let mut table = Table::default();
    for (index, token) in config.tokens.iter().enumerate() {
        let (first, second) = halves(key, &secret(index, token, variable)?);
        if let Some(first) = positions.insert(first, index) {
            return Err(Error::Same { first, second: index });
        }
        table.insert(first, Entry { second, pass: Arc::new(Pass::new(context(token))) });
    }
    Ok(table)
}

fn secret(index: usize, token: &Token, variable: &impl Fn(&str) -> Option<String>) -> Result<String, Error> {
    let name = || token.name.clone();
    match (&token.token, token.token_env.as_str()) {
        (Some(secret), "") if !secret.expose_secret().is_empty() => Ok(secret.expose_secret().to_owned()),
        (None, env) if !env.is_empty() => variable(env).filter(|value| !value.is_empty()).ok_or_else(|| Error::Unset {
            index,
            name: name(),
            variable: env.to_owned(),
        }),
        _ => Err(Error::Source { index, name: name() }),
    }
}

fn context(token: &Token) -> AuthContext {
    let principal =
        if token.device { Principal::Device(token.name.clone()) } else { Principal::User(token.name.clone()) };
    AuthContext {
        tenant: token.tenant.clone(),
        principal,
        scopes: token.scopes.clone(),
        instance: token.instance.clone(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::Scope;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    fn token(secret: &str, tenant_name: &str, name: &str) -> Token {
        Token {
            token: (!secret.is_empty()).then(|| secret.to_owned().into()),
            token_env: String::new(),
            tenant: tenant(tenant_name),
            name: name.to_owned(),
            device: false,
            instance: None,
            scopes: vec![Scope::Read],
        }
    }

    fn build(tokens: Vec<Token>) -> Result<Authenticator, Error> {
        let auth = Auth { default_tenant: tenant("default"), tokens };
        Authenticator::with_environment(&auth, |name| (name == "SET").then(|| String::from("from-env")))
    }

    #[test]
    fn a_token_says_who_comes() {
        let mut lamp = token("", "home", "lamp");
        (lamp.token_env, lamp.device) = (String::from("SET"), true);
        let auth = build(vec![token("one", "acme", "ann"), token("two", "acme", "bob"), lamp]).unwrap();
        assert!(auth.has_tokens());
        let bob = auth.authenticate("two").unwrap();
        assert_eq!((&bob.who.tenant, &bob.who.principal), (&tenant("acme"), &Principal::User(String::from("bob"))));
        assert_eq!(auth.authenticate("from-env").unwrap().who.principal, Principal::Device(String::from("lamp")));
        for wrong in ["", "three", "on", "one "] {
            assert!(auth.authenticate(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn a_login_names_the_tokens_tenant_and_perhaps_its_name() {
        let auth = build(vec![token("one", "acme", "ann")]).unwrap();
        assert!(auth.login("acme", "one").is_some());
        assert!(auth.login("acme/ann", "one").is_some());
        for (user, password) in [("acme/bob", "one"), ("other", "one"), ("acme", "two"), ("", "one"), ("acme/", "one")]
        {
            assert!(auth.login(user, password).is_none(), "{user:?} {password:?}");
        }
    }

    #[test]
    fn loopback_needs_no_token_until_there_are_tokens() {
        let open = build(vec![]).unwrap();
        for local in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            let pass = open.anonymous(local.parse().unwrap()).unwrap();
            assert_eq!((&pass.who.tenant, &pass.who.principal), (&tenant("default"), &Principal::Loopback), "{local}");
        }
        assert!(open.anonymous("10.0.0.1".parse().unwrap()).is_none());
        let closed = build(vec![token("one", "acme", "ann")]).unwrap();
        assert!(closed.anonymous("127.0.0.1".parse().unwrap()).is_none());
    }

    #[test]
    fn secrets_that_cannot_work_are_refused_at_start() {
        let mut both = token("one", "acme", "ann");
        both.token_env = String::from("SET");
        assert!(matches!(build(vec![both]), Err(Error::Source { index: 0, .. })));
        assert!(matches!(build(vec![token("", "acme", "ann")]), Err(Error::Source { .. })));
        let mut unset = token("", "acme", "ann");
        unset.token_env = String::from("UNSET");
        assert!(matches!(build(vec![unset]), Err(Error::Unset { .. })));
        let twice = build(vec![token("one", "acme", "ann"), token("one", "acme", "bob")]);
        assert_eq!(twice.err(), Some(Error::Same { first: 0, second: 1 }));
    }

    #[test]
    fn an_open_door_is_refused_with_the_ways_out() {
        for local in ["127.0.0.1:8080", "[::1]:0", "127.0.0.2:1"] {
            assert_eq!(check_bind("http", local.parse().unwrap(), false), Ok(()));
        }
        for open in ["0.0.0.0:8080", "[::]:8080", "192.168.1.4:8080"] {
            assert_eq!(check_bind("http", open.parse().unwrap(), true), Ok(()));
            let error = check_bind("http", open.parse().unwrap(), false).unwrap_err();
            let message = error.to_string();
            assert!(message.contains("[[auth.tokens]]") && message.contains("127.0.0.1:8080"), "{message}");
        }
    }

    /// Both halves of a digest count: the table finds by the first alone.
    #[test]
    fn half_a_digest_lets_nobody_in() {
        let auth = build(vec![token("one", "acme", "ann")]).unwrap();
        let mut forged = Table::default();
        for (first, entry) in &auth.guests.load().tokens {
            let mut second = entry.second;
            second[15] ^= 1;
            forged.insert(*first, Entry { second, pass: entry.pass.clone() });
        }
        auth.guests.store(Arc::new(Guests { tokens: forged, local: None }));
        assert!(auth.authenticate("one").is_none());
    }

    #[test]
    fn a_pass_ends_with_its_token_and_with_no_other() {
        let some = |tokens: &[(&str, &str)]| Auth {
            default_tenant: tenant("default"),
            tokens: tokens.iter().map(|(secret, name)| token(secret, "acme", name)).collect(),
        };
        let auth = build(vec![]).unwrap();
        let local = auth.anonymous("127.0.0.1".parse().unwrap()).unwrap();
        let mut changes = auth.changes();
        auth.adopt(&some(&[("one", "ann"), ("two", "bob")])).unwrap();
        assert!(local.is_over() && changes.has_changed().unwrap(), "now everybody needs a token");
        let [ann, bob] = ["one", "two"].map(|secret| auth.authenticate(secret).unwrap());
        // As a token is renewed: first both are there, then the new one alone.
        auth.adopt(&some(&[("new", "bob"), ("one", "ann"), ("two", "bob")])).unwrap();
        let new = auth.authenticate("new").unwrap();
        assert!(!ann.is_over() && !bob.is_over() && Arc::ptr_eq(&bob, &auth.authenticate("two").unwrap()));
        auth.adopt(&some(&[("one", "ann"), ("new", "bob")])).unwrap();
        assert!(bob.is_over() && auth.authenticate("two").is_none());
        assert!(!new.is_over() && !ann.is_over(), "the same person with another token stays");
        changes.mark_unchanged();
        for refused in [some(&[]), some(&[("one", "ann"), ("one", "bob")])] {
            assert!(auth.may_adopt(&refused).is_err() && auth.adopt(&refused).is_err());
        }
        assert!(auth.authenticate("one").is_some() && !ann.is_over() && !changes.has_changed().unwrap(), "as before");
        auth.adopt(&some(&[("one", "eve")])).unwrap();
        assert!(ann.is_over() && !auth.authenticate("one").unwrap().is_over(), "it stands for somebody else");
    }

    #[test]
    fn nothing_printed_holds_a_secret() {
        let auth = build(vec![token("hush-hush", "acme", "ann")]).unwrap();
        assert!(!format!("{auth:?} {:?}", auth.authenticate("hush-hush")).contains("hush"));
    }
}
