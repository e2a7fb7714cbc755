//! Which values make sense: ranges, and settings that need each other. Pure.
//!
//! Not here: types and names (`load.rs`), log filters and rules (their owners check them). Tests: at the foot.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use secrecy::ExposeSecret;

use super::{
    Auth, Backend, Cache, Cognition, Config, Delivery, Embedder, Memory, Mqtt, MqttMode, NO_MODELS, PostgresTls,
    Readers, Redis, Scaling, Store,
};
use crate::types::{
    InstanceId,
    limits::{MAX_BUS_MESSAGE_BYTES, MAX_ID_BYTES},
    profile::EngineName,
};

/// A value that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The setting.
    pub path: Vec<String>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

pub(super) struct Findings(Vec<Found>);

impl Findings {
    pub(super) fn add(&mut self, path: &[&str], message: impl Into<String>) {
        self.0.push(Found {
            path: path.iter().map(|&name| name.to_owned()).collect(),
            message: message.into(),
            hint: None,
        });
    }

    fn add_with_hint(&mut self, path: &[&str], message: impl Into<String>, hint: &str) {
        self.add(path, message);
        if let Some(last) = self.0.last_mut() {
            last.hint = Some(hint.to_owned());
        }
    }

    pub(super) fn range<T: PartialOrd + std::fmt::Display>(
        &mut self,
        path: &[&str],
        value: T,
        allowed: RangeInclusive<T>,
    ) {
        if !allowed.contains(&value) {
            self.add(path, format!("{value} is out of range, allowed is {} to {}", allowed.start(), allowed.end()));
        }
    }
}

/// Everything that makes no sense. `has_env` says whether an environment variable is set and not empty.
pub(super) fn check(config: &Config, has_env: &dyn Fn(&str) -> bool) -> Vec<Found> {
    let mut found = Findings(Vec::new());
    ranges(config, &mut found);
    names(config, &mut found);
    mqtt(&config.mqtt, has_env, &mut found);
    store(&config.store, has_env, &mut found);
    redis(&config.redis, has_env, &mut found);
    scaling(config, &mut found);
    advertised(config, &mut found);
    cognition(&config.cognition, has_env, &mut found);
    super::tools::check(&config.tools, has_env, &mut found);
    embedder(&config.memory, has_env, &mut found);
    delivery(&config.delivery, &mut found);
    auth(&config.auth, has_env, &mut found);
    open_addresses(config, &mut found);
    found.0
}

fn ranges(config: &Config, found: &mut Findings) {
    let Config { node, http, mqtt, store, cluster, scaling, instances, cognition, memory, delivery, .. } = config;
    found.range(&["node", "arbiters"], node.arbiters, 0..=1024);
    found.range(&["node", "drain_seconds"], node.drain_seconds, 1..=3600);
    found.range(&["node", "leave_seconds"], node.leave_seconds, 0..=3600);
    found.range(&["http", "workers"], http.workers, 0..=1024);
    found.range(&["http", "max_body_kb"], http.max_body_kb, 1..=65_536);
    found.range(&["http", "max_connections"], http.max_connections, 1..=1_000_000);
    found.range(&["http", "header_seconds"], http.header_seconds, 1..=300);
    found.range(&["http", "keep_alive_seconds"], http.keep_alive_seconds, 1..=3600);
    found.range(&["http", "max_wait_seconds"], http.max_wait_seconds, 1..=3600);
    found.range(&["mqtt", "max_packet_kb"], mqtt.max_packet_kb, 1..=65_536);
    found.range(&["mqtt", "max_connections"], mqtt.max_connections, 1..=1_000_000);
    found.range(&["mqtt", "receive_maximum"], mqtt.receive_maximum, 1..=65_535);
    found.range(&["mqtt", "max_queued"], mqtt.max_queued, 1..=1_000_000);
    found.range(&["store", "max_batch"], store.max_batch, 1..=65_536);
    found.range(&["store", "max_queue"], store.max_queue, store.max_batch.max(1)..=10_000_000);
    found.range(&["store", "readers"], store.readers, 0..=256);
    found.range(&["store", "cache_mb"], store.cache_mb, 1..=65_536);
    found.range(&["node", "weight"], node.weight, 1..=10_000);
    let postgres = &store.postgres;
    let at = |key| ["store", "postgres", key];
    found.range(&at("lanes"), postgres.lanes, 0..=64);
    found.range(&at("connect_ms"), postgres.connect_ms, 10..=60_000);
    found.range(&at("statement_ms"), postgres.statement_ms, 100..=3_600_000);
    found.range(&at("lock_ms"), postgres.lock_ms, 100..=600_000);
    found.range(&at("idle_in_transaction_ms"), postgres.idle_in_transaction_ms, 100..=600_000);
    found.range(&["cluster", "shards"], cluster.shards, 1..=65_536);
    found.range(&["cluster", "lease_seconds"], cluster.lease_seconds, 1..=600);
    found.range(&["cluster", "max_moves"], cluster.max_moves, 1..=65_536);
    found.range(&["store", "slow_query_ms"], store.slow_query_ms, 0..=600_000);
    cache(&config.cache, found);
    scaling_ranges(scaling, found);
    found.range(&["instances", "idle_passivate_seconds"], instances.idle_passivate_seconds, 1..=31_536_000);
    found.range(&["instances", "max_inbox"], instances.max_inbox, 1..=1_000_000);
    found.range(&["instances", "scan_seconds"], instances.scan_seconds, 1..=3600);
    found.range(&["memory", "cache_mb"], memory.cache_mb, 1..=1_048_576);
    found.range(&["memory", "exact_vectors"], memory.exact_vectors, 1000..=10_000_000);
    let endpoint = &memory.endpoint;
    found.range(&["memory", "endpoint", "max_batch"], endpoint.max_batch, 1..=2048);
    found.range(&["memory", "endpoint", "wait_ms"], endpoint.wait_ms, 0..=1000);
    found.range(&["memory", "endpoint", "max_concurrent"], endpoint.max_concurrent, 1..=64);
    found.range(&["memory", "endpoint", "timeout_ms"], endpoint.timeout_ms, 10..=600_000);
    found.range(&["cognition", "think_seconds"], cognition.think_seconds, 1..=3600);
    found.range(&["cognition", "max_steps"], u64::from(cognition.max_steps), 1..=10_000);
    found.range(&["cognition", "max_tokens_per_turn"], cognition.max_tokens_per_turn, 1..=1_000_000_000);
    found.range(&["delivery", "webhook_seconds"], delivery.webhook_seconds, 1..=300);
    found.range(&["delivery", "max_tries"], delivery.max_tries, 1..=1000);
    found.range(&["delivery", "max_hops"], delivery.max_hops, 1..=10_000);
    for (name, provider) in &cognition.providers {
        let at = |key| ["cognition", "providers", name.as_str(), key];
        found.range(&at("max_concurrent"), provider.max_concurrent, 1..=10_000);
        found.range(&at("max_waiting"), provider.max_waiting, 0..=1_000_000);
        found.range(&at("idle_seconds"), provider.idle_seconds, 1..=3600);
        found.range(&at("max_tokens"), provider.max_tokens, 1..=10_000_000);
        found.range(&at("context_tokens"), provider.context_tokens, 256..=100_000_000);
    }
}

fn cache(cache: &Cache, found: &mut Findings) {
    const YEAR: u64 = 31_536_000;
    found.range(&["cache", "jitter_percent"], cache.jitter_percent, 0..=90);
    found.range(&["cache", "negative_seconds"], cache.negative_seconds, 0..=3600);
    let (ttl, stale) = (&cache.ttl, &cache.stale);
    for (key, seconds) in [
        ("state", ttl.state),
        ("profile", ttl.profile),
        ("snapshot", ttl.snapshot),
        ("recall", ttl.recall),
        ("embedding", ttl.embedding),
        ("answer", ttl.answer),
        ("tool", ttl.tool),
    ] {
        found.range(&["cache", "ttl", key], seconds, 0..=YEAR);
    }
    found.range(&["cache", "stale", "tool"], stale.tool, 0..=YEAR);
}

fn scaling_ranges(scaling: &Scaling, found: &mut Findings) {
    let limits = &scaling.limits;
    let at = |key| ["scaling", key];
    found.range(&at("max_consciousness_instances"), limits.max_consciousness_instances, 1..=100_000_000);
    found.range(&at("cache_l1_size_mb"), limits.cache_l1_size_mb, 0..=1_048_576);
    found.range(&at("cache_l2_size_mb"), limits.cache_l2_size_mb, 0..=1_048_576);
    found.range(&at("cache_l3_size_mb"), limits.cache_l3_size_mb, 0..=1_048_576);
    found.range(&at("connection_pool_size"), limits.connection_pool_size, 1..=1000);
    found.range(&at("auto_scaling_threshold_cpu"), limits.auto_scaling_threshold_cpu, 1..=100);
    found.range(&at("auto_scaling_threshold_memory"), limits.auto_scaling_threshold_memory, 1..=100);
    found.range(&at("pool_overflow"), scaling.pool_overflow, 0..=1000);
    found.range(&at("pool_wait_seconds"), scaling.pool_wait_seconds, 1..=300);
    found.range(&at("pool_recycle_seconds"), scaling.pool_recycle_seconds, 10..=86_400);
    found.range(&at("full_after_seconds"), scaling.full_after_seconds, 0..=3600);
    found.range(&at("spare_after_seconds"), scaling.spare_after_seconds, 0..=86_400);
    found.range(&at("load_seconds"), scaling.load_seconds, 0..=3600);
}

fn names(config: &Config, found: &mut Findings) {
    let name = &config.node.name;
    if name.len() > MAX_ID_BYTES || name.chars().any(char::is_control) {
        found.add(
            &["node", "name"],
            format!("a node's name has at most {MAX_ID_BYTES} bytes and no control characters"),
        );
    }
    if config.node.roles.iter().next().is_none() {
        found.add(&["node", "roles"], "a node without a role does nothing: name at least one");
    }
    if InstanceId::new(&config.cluster.name).is_err() {
        let least = "a cluster's name has 1 to 128 characters of A-Z a-z 0-9 . _ ~ -";
        found.add(&["cluster", "name"], least);
    }
    if config.node.data_dir.as_os_str().is_empty() {
        found.add(&["node", "data_dir"], "the data folder has no name");
    }
    if config.telemetry.log.trim().is_empty() {
        found.add(&["telemetry", "log"], "the filter is empty, \"off\" logs nothing");
    }
}

/// Whether a URL has a user or password before its host.
fn has_credentials(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

/// Whether a URL has a password before its host.
fn has_password(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let named = url.split(['?', '&', ' ']).any(|part| part.starts_with("password="));
    named || authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
}

fn store(store: &Store, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    let postgres = &store.postgres;
    for (key, url) in
        [("url", &postgres.url), ("direct_url", &postgres.direct_url), ("replica_url", &postgres.replica_url)]
    {
        if has_password(url) {
            let message = "this is shown and logged, so it holds no password";
            found.add_with_hint(
                &["store", "postgres", key],
                message,
                "put the whole address into a variable and name it in the setting that ends in _env",
            );
        }
    }
    if store.backend != Backend::Postgres {
        return;
    }
    for (key, name) in [
        ("url_env", &postgres.url_env),
        ("direct_url_env", &postgres.direct_url_env),
        ("replica_url_env", &postgres.replica_url_env),
    ] {
        variable(&["store", "postgres", key], name, has_env, found);
    }
    if postgres.url.is_empty() && postgres.url_env.is_empty() {
        let message = "backend \"postgres\" needs the address of the database, postgres://USER@HOST:PORT/DATABASE";
        found.add(&["store", "postgres", "url"], message);
    }
    if postgres.pooler && postgres.direct_url.is_empty() && postgres.direct_url_env.is_empty() {
        let message = "behind a pooler, migrations and session locks need the server's own address";
        found.add(&["store", "postgres", "direct_url"], message);
    }
    if postgres.tls == PostgresTls::Off && postgres.tls_ca.is_some() {
        found.add(&["store", "postgres", "tls_ca"], "tls_ca is used only with tls = \"verify\"");
    }
}

fn advertised(config: &Config, found: &mut Findings) {
    if let Some(url) = &config.http.advertise
        && !(url.starts_with("http://") || url.starts_with("https://"))
    {
        found.add(&["http", "advertise"], "an address begins with http:// or https://");
    }
}

fn scaling(config: &Config, found: &mut Findings) {
    if config.scaling.limits.horizontal_scaling_enabled == Some(true) && config.store.backend != Backend::Postgres {
        found.add_with_hint(
            &["scaling", "horizontal_scaling_enabled"],
            "several nodes need a store they can share, and this one is of a single process",
            "set store.backend = \"postgres\" and [store.postgres] url, the same on every node; or leave this out",
        );
    }
}

fn variable(path: &[&str], name: &str, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    if !name.is_empty() && !has_env(name) {
        found.add(path, format!("the environment variable {name} is not set"));
    }
}

fn mqtt(mqtt: &Mqtt, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    match mqtt.mode {
        MqttMode::Off => {}
        MqttMode::Embedded => {
            let pair = (mqtt.tls_cert.is_some(), mqtt.tls_key.is_some());
            if mqtt.tls_listen.is_some() && pair != (true, true) {
                found.add(&["mqtt", "tls_listen"], "TLS needs tls_cert and tls_key");
            } else if pair.0 != pair.1 {
                let there = if pair.0 { "tls_cert" } else { "tls_key" };
                found.add(&["mqtt", there], "tls_cert and tls_key go together");
            }
        }
        MqttMode::External => {
            if !(mqtt.url.starts_with("mqtt://") || mqtt.url.starts_with("mqtts://")) {
                let message = "mode \"external\" needs the broker's address, mqtt://HOST:PORT or mqtts://HOST:PORT";
                found.add(&["mqtt", "url"], message);
            }
            variable(&["mqtt", "password_env"], &mqtt.password_env, has_env, found);
            if mqtt.readers == Readers::One && !mqtt.share_group.is_empty() {
                found.add(
                    &["mqtt", "share_group"],
                    "one reader needs no group: leave it empty, or set readers to \"all\"",
                );
            }
        }
    }
    if has_credentials(&mqtt.url) {
        let hint = "use username, and password_env for the name of a variable that holds the password";
        found.add_with_hint(&["mqtt", "url"], "an address must not carry credentials", hint);
    }
}

fn redis(redis: &Redis, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    let Redis { url, prefix, .. } = redis;
    if !(url.is_empty() || url.starts_with("redis://") || url.starts_with("rediss://")) {
        found.add(&["redis", "url"], "an address begins with redis:// or rediss://");
    }
    if has_credentials(url) {
        let hint = "use url_env for the name of a variable that holds the whole address";
        found.add_with_hint(&["redis", "url"], "an address must not carry credentials", hint);
    }
    variable(&["redis", "url_env"], &redis.url_env, has_env, found);
    if prefix.is_empty() || prefix.len() > 64 || prefix.chars().any(|c| c.is_whitespace() || c.is_control()) {
        found.add(&["redis", "prefix"], "a prefix has 1 to 64 characters and no spaces");
    }
    found.range(&["redis", "timeout_ms"], redis.timeout_ms, 50..=60_000);
    found.range(&["redis", "answer_ms"], redis.answer_ms, 50..=60_000);
    found.range(&["redis", "max_queue"], redis.max_queue, 1..=10_000_000);
    found.range(&["redis", "max_queue_mb"], redis.max_queue_mb, MAX_BUS_MESSAGE_BYTES / (1024 * 1024) + 1..=65_536);
    found.range(&["redis", "mailbox_entries"], redis.mailbox_entries, 100..=10_000_000);
}

fn cognition(cognition: &Cognition, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    for (name, provider) in &cognition.providers {
        let at = |key| ["cognition", "providers", name.as_str(), key];
        let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if name.is_empty() || !name.bytes().all(word) {
            found.add(&["cognition", "providers", name], "a provider's name has letters, digits, '.', '_' and '-'");
        }
        if !(provider.base_url.starts_with("http://") || provider.base_url.starts_with("https://")) {
            found.add(&at("base_url"), "an address begins with http:// or https://");
        }
        if has_credentials(&provider.base_url) {
            let hint = "use api_key_env for the name of a variable that holds the key";
            found.add_with_hint(&at("base_url"), "an address must not carry credentials", hint);
        }
        variable(&at("api_key_env"), &provider.api_key_env, has_env, found);
    }
    let default = &cognition.default_provider;
    if !default.is_empty() && !cognition.providers.contains_key(default) {
        let known = cognition.providers.keys().cloned().collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { String::from("none is") } else { format!("there are: {known}") };
        let message = format!("no provider '{default}' is configured, {known}");
        found.add(&["cognition", "default_provider"], message);
    }
    if cognition.default_engine == EngineName::Llm && cognition.providers.is_empty() {
        let hint = "add [cognition.providers.NAME] with base_url and model";
        found.add_with_hint(&["cognition", "default_engine"], "\"llm\" needs a model provider", hint);
    }
}

fn embedder(memory: &Memory, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    let (endpoint, at) = (&memory.endpoint, |key| ["memory", "endpoint", key]);
    if memory.embedder == Embedder::Endpoint && endpoint.base_url.is_empty() {
        let hint = "set memory.endpoint.base_url and memory.endpoint.model";
        found.add_with_hint(&["memory", "embedder"], "\"endpoint\" needs a server", hint);
    }
    if memory.embedder == Embedder::Model && !cfg!(feature = "static-embeddings") {
        let hint = "build with `cargo build --release --features static-embeddings`, or use another embedder";
        found.add_with_hint(&["memory", "embedder"], NO_MODELS, hint);
    } else if memory.embedder == Embedder::Model && memory.model.path.as_os_str().is_empty() {
        let hint = "set memory.model.path to a folder with tokenizer.json, model.safetensors and config.json";
        found.add_with_hint(&["memory", "embedder"], "\"model\" needs a folder", hint);
    }
    let known = endpoint.base_url.starts_with("http://") || endpoint.base_url.starts_with("https://");
    if !endpoint.base_url.is_empty() && !known {
        found.add(&at("base_url"), "an address begins with http:// or https://");
    }
    if has_credentials(&endpoint.base_url) {
        let hint = "use api_key_env for the name of a variable that holds the key";
        found.add_with_hint(&at("base_url"), "an address must not carry credentials", hint);
    }
    variable(&at("api_key_env"), &endpoint.api_key_env, has_env, found);
}

fn delivery(delivery: &Delivery, found: &mut Findings) {
    for (index, host) in delivery.webhook_allow.iter().enumerate() {
        let plain = !host.is_empty() && !host.contains(['/', '@', '*', ' ']) && !host.contains("://");
        if !plain {
            let message = format!("'{host}' is no host, the form is HOST or HOST:PORT");
            found.add(&["delivery", "webhook_allow", &index.to_string()], message);
        }
    }
}

fn auth(auth: &Auth, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    let mut secrets = BTreeSet::new();
    for (index, token) in auth.tokens.iter().enumerate() {
        let index = index.to_string();
        let at = |key| ["auth", "tokens", index.as_str(), key];
        match (&token.token, token.token_env.as_str()) {
            (Some(_), name) if !name.is_empty() => {
                found.add(&at("token_env"), "token and token_env exclude each other")
            }
            (None, "") => found.add(&["auth", "tokens", &index], "'token' or 'token_env' is missing"),
            (None, name) => variable(&at("token_env"), name, has_env, found),
            (Some(secret), _) if secret.expose_secret().trim().is_empty() => {
                found.add(&at("token"), "the token is empty")
            }
            (Some(secret), _) if !secrets.insert(secret.expose_secret()) => {
                found.add(&at("token"), "two callers have the same token");
            }
            (Some(_), _) => {}
        }
        if token.name.is_empty() || token.name.len() > MAX_ID_BYTES || token.name.chars().any(char::is_control) {
            found.add(&at("name"), format!("a name has 1 to {MAX_ID_BYTES} bytes and no control characters"));
        }
        if token.scopes.is_empty() {
            found.add(&at("scopes"), "a token without rights is of no use");
        }
    }
}

fn is_loopback(address: &SocketAddr) -> bool {
    match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()),
    }
}

/// Others can reach an address that is not loopback: it needs credentials.
fn open_addresses(config: &Config, found: &mut Findings) {
    if !config.auth.tokens.is_empty() {
        return;
    }
    let mut doors = vec![(["http", "listen"], Some(config.http.listen))];
    if config.mqtt.mode == MqttMode::Embedded {
        doors.push((["mqtt", "listen"], Some(config.mqtt.listen)));
        doors.push((["mqtt", "tls_listen"], config.mqtt.tls_listen));
    }
    for (path, address) in doors {
        if let Some(address) = address.filter(|address| !is_loopback(address)) {
            let message = format!("{address} can be reached by others and no credentials are configured");
            let hint = "add an [[auth.tokens]] section, for example token_env = \"SOPHONT_TOKEN\", tenant = \"default\", \
                        name = \"me\", or listen on 127.0.0.1";
            found.add_with_hint(&path, message, hint);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Durability;

    fn found(change: impl FnOnce(&mut Config)) -> Vec<String> {
        let mut config = Config::default();
        change(&mut config);
        check(&config, &|name| name == "SET")
            .into_iter()
            .map(|f| format!("{}: {}", f.path.join("."), f.message))
            .collect()
    }

    fn token(text: &str) -> super::super::Token {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn ranges_say_what_is_allowed() {
        assert_eq!(
            found(|c| {
                c.cluster.shards = 0;
                c.store.max_batch = 100;
                c.store.max_queue = 99;
                c.store.durability = Durability::Off;
            }),
            [
                "store.max_queue: 99 is out of range, allowed is 100 to 10000000",
                "cluster.shards: 0 is out of range, allowed is 1 to 65536"
            ]
        );
    }

    #[test]
    fn an_open_address_needs_credentials() {
        let open = |c: &mut Config| {
            c.http.listen = "0.0.0.0:8080".parse().unwrap();
            c.mqtt.listen = "[::]:1883".parse().unwrap();
        };
        assert_eq!(found(open).len(), 2);
        assert_eq!(found(|c| c.mqtt.listen = "127.8.8.8:1883".parse().unwrap()), [""; 0]);
        let with_token = |c: &mut Config| {
            open(c);
            c.auth.tokens = vec![token("token_env = 'SET'\ntenant = 't'\nname = 'n'")];
        };
        assert_eq!(found(with_token), [""; 0]);
        let mqtt_off = |c: &mut Config| {
            c.mqtt.listen = "0.0.0.0:1883".parse().unwrap();
            c.mqtt.mode = MqttMode::Off;
        };
        assert_eq!(found(mqtt_off), [""; 0]);
    }

    #[test]
    fn tokens_are_whole_and_distinct() {
        let tokens = |texts: &[&str]| {
            let tokens = texts.iter().map(|text| token(&format!("tenant = 't'\nname = 'n'\n{text}"))).collect();
            found(|c| c.auth.tokens = tokens)
        };
        assert_eq!(tokens(&["token = 'a'", "token = 'b'"]), [""; 0]);
        assert_eq!(tokens(&["token = 'a'", "token = 'a'"]), ["auth.tokens.1.token: two callers have the same token"]);
        assert_eq!(tokens(&[""]), ["auth.tokens.0: 'token' or 'token_env' is missing"]);
        assert_eq!(
            tokens(&["token_env = 'NOT'"]),
            ["auth.tokens.0.token_env: the environment variable NOT is not set"]
        );
        assert_eq!(
            tokens(&["token = 'a'\ntoken_env = 'SET'"]),
            ["auth.tokens.0.token_env: token and token_env exclude each other"]
        );
    }

    #[test]
    fn addresses_carry_no_credentials() {
        assert!(has_credentials("mqtt://me:secret@host:1883"));
        assert!(!has_credentials("https://host/v1?mail=a@b"));
        let external = |url: &str| {
            let url = url.to_owned();
            found(|c| {
                c.mqtt.mode = MqttMode::External;
                c.mqtt.url = url;
            })
        };
        assert_eq!(external("mqtt://127.0.0.1:1883"), [""; 0]);
        assert_eq!(external("").len(), 1);
        assert_eq!(external("mqtt://a@b").len(), 1);
    }

    #[test]
    fn engines_need_their_provider() {
        assert_eq!(found(|c| c.cognition.default_engine = EngineName::Llm).len(), 1);
        assert_eq!(
            found(|c| c.cognition.default_provider = String::from("gpu")),
            ["cognition.default_provider: no provider 'gpu' is configured, none is"]
        );
    }

    #[test]
    fn postgres_needs_an_address_and_no_password_in_it() {
        let postgres = |change: &dyn Fn(&mut crate::config::Postgres)| {
            found(|config| {
                config.store.backend = Backend::Postgres;
                config.store.postgres.url =
                    String::from("postgres://user@host:5432/db?target_session_attrs=read-write");
                change(&mut config.store.postgres);
            })
        };
        assert_eq!(postgres(&|_| ()), [""; 0]);
        assert_eq!(postgres(&|p| (p.url, p.url_env) = (String::new(), String::from("SET"))), [""; 0]);
        for url in ["postgres://user:secret@host/db", "host=h password=secret", "postgres://h/db?password=secret"] {
            let told = postgres(&|p| p.url = String::from(url));
            assert!(told[0].starts_with("store.postgres.url: ") && !told[0].contains("secret"), "{told:?}");
        }
        assert!(postgres(&|p| p.url.clear())[0].contains("needs the address"));
        assert!(postgres(&|p| p.url_env = String::from("UNSET"))[0].contains("UNSET is not set"));
        assert!(postgres(&|p| p.pooler = true)[0].starts_with("store.postgres.direct_url: "));
        assert!(postgres(&|p| p.tls_ca = Some("ca.pem".into()))[0].starts_with("store.postgres.tls_ca: "));
        assert!(postgres(&|p| p.lanes = 65)[0].starts_with("store.postgres.lanes: "));
    }
}
