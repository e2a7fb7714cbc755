//! Who may come in: static tokens from the configuration, loopback without tokens, and the rule that binds them.
//!
//! Owns: the [`Authenticator`] both doors ask, and [`check_bind`], which start-up asks before it listens.
//! Not here: what a caller may do with which instance ([`AuthContext::may`]), and how each door carries credentials.
//!
//! Invariants: a secret is kept only as its BLAKE3 digest and is never logged; every candidate is compared, in constant
//! time, whether or not an earlier one matched. Tests: at the foot; `tests/it/hostile.rs` over the wire.

use std::net::{IpAddr, SocketAddr};

use secrecy::ExposeSecret;
use subtle::{ConditionallySelectable, ConstantTimeEq};

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
            Error::Open { .. } => "AUTH_REQUIRED",
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

struct Entry {
    digest: [u8; 32],
    context: AuthContext,
}

/// Knows every credential of the node. Cheap to ask; shared by all doors.
pub struct Authenticator {
    default_tenant: TenantId,
    entries: Vec<Entry>,
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator").field("tokens", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Resolves the configured tokens, reading `token_env` from the process's environment.
    ///
    /// # Errors
    /// [`Error`] when a token has no secret, two sources of one, or the secret of another.
    pub fn new(config: &Auth) -> Result<Self, Error> {
        Self::with_environment(config, |name| std::env::var(name).ok())
    }

    /// As [`Authenticator::new`], with the environment handed in.
    ///
    /// # Errors
    /// As [`Authenticator::new`].
    pub fn with_environment(config: &Auth, variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut entries: Vec<Entry> = Vec::with_capacity(config.tokens.len());
        for (index, token) in config.tokens.iter().enumerate() {
            let digest = *blake3::hash(secret(index, token, &variable)?.as_bytes()).as_bytes();
            if let Some(first) = entries.iter().position(|entry| entry.digest == digest) {
                return Err(Error::Same { first, second: index });
            }
            entries.push(Entry { digest, context: context(token) });
        }
        Ok(Self { default_tenant: config.default_tenant.clone(), entries })
    }

    /// The caller a token stands for.
    pub fn authenticate(&self, token: &str) -> Option<AuthContext> {
        self.entry(token).map(|entry| entry.context.clone())
    }

    /// The caller without credentials: only from this machine, and only while no tokens are configured.
    pub fn anonymous(&self, peer: IpAddr) -> Option<AuthContext> {
        let local = !self.has_tokens() && peer.to_canonical().is_loopback();
        local.then(|| AuthContext::loopback(self.default_tenant.clone()))
    }

    /// The caller of an MQTT login: the password is a token; the user name is the token's tenant, or `tenant/name`.
    pub fn login(&self, user: &str, password: &str) -> Option<AuthContext> {
        let context = &self.entry(password)?.context;
        let (tenant, name) = user.split_once('/').map_or((user, None), |(tenant, name)| (tenant, Some(name)));
        let matches = tenant == context.tenant.as_str() && name.is_none_or(|name| context.sender() == Some(name));
        matches.then(|| context.clone())
    }

    /// Whether any token is configured; then everybody needs one.
    pub fn has_tokens(&self) -> bool {
        !self.entries.is_empty()
    }

    /// The tenant of callers on loopback without a token.
    pub fn default_tenant(&self) -> &TenantId {
        &self.default_tenant
    }

    /// Visits every entry, so that the time taken tells nothing about which one matched.
    fn entry(&self, token: &str) -> Option<&Entry> {
        let digest = *blake3::hash(token.as_bytes()).as_bytes();
        let mut found = u32::MAX;
        for (index, entry) in (0u32..).zip(&self.entries) {
            found.conditional_assign(&index, entry.digest.ct_eq(&digest));
        }
        self.entries.get(usize::try_from(found).ok()?)
    }
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
        assert_eq!((bob.tenant, bob.principal), (tenant("acme"), Principal::User(String::from("bob"))));
        assert_eq!(auth.authenticate("from-env").unwrap().principal, Principal::Device(String::from("lamp")));
        for wrong in ["", "three", "on", "one "] {
            assert_eq!(auth.authenticate(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_login_names_the_tokens_tenant_and_perhaps_its_name() {
        let auth = build(vec![token("one", "acme", "ann")]).unwrap();
        assert!(auth.login("acme", "one").is_some());
        assert!(auth.login("acme/ann", "one").is_some());
        for (user, password) in [("acme/bob", "one"), ("other", "one"), ("acme", "two"), ("", "one"), ("acme/", "one")]
        {
            assert_eq!(auth.login(user, password), None, "{user:?} {password:?}");
        }
    }

    #[test]
    fn loopback_needs_no_token_until_there_are_tokens() {
        let open = build(vec![]).unwrap();
        for local in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            let context = open.anonymous(local.parse().unwrap()).unwrap();
            assert_eq!((context.tenant, context.principal), (tenant("default"), Principal::Loopback), "{local}");
        }
        assert_eq!(open.anonymous("10.0.0.1".parse().unwrap()), None);
        let closed = build(vec![token("one", "acme", "ann")]).unwrap();
        assert_eq!(closed.anonymous("127.0.0.1".parse().unwrap()), None);
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

    #[test]
    fn nothing_printed_holds_a_secret() {
        let auth = build(vec![token("hush-hush", "acme", "ann")]).unwrap();
        assert!(!format!("{auth:?}").contains("hush"));
    }
}
