//! `[tools]`: what engines may call, how long and how often, and where it may reach.
//!
//! Not here: the tools (`crate::tools`). Tests: at the foot.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::check::Findings;

/// The built-in tools, as they stand in `allow` and in profiles.
pub const BUILT_IN: [&str; 7] = ["recall", "remember", "set_state", "publish", "send", "remind", "http_fetch"];

/// `[tools]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// Tools that a profile may name: built-in ones, `SERVER.TOOL`, `SERVER.*`.
    pub allow: Vec<String>,
    /// Threads of the calls that leave the node.
    pub threads: usize,
    /// Such calls at once.
    pub max_concurrent: usize,
    /// Such calls waiting; beyond it a call fails.
    pub max_waiting: usize,
    /// Longest call, in seconds.
    pub call_seconds: u64,
    /// Largest result handed to an engine, in KiB; what is longer is cut.
    pub max_result_kb: usize,
    /// Fetching web pages.
    pub http: Fetching,
    /// Other rules for single tenants, by name.
    #[serde(default)]
    pub tenants: BTreeMap<String, TenantTools>,
    /// MCP servers by name.
    #[serde(default)]
    pub mcp: BTreeMap<String, McpServer>,
}

/// `[tools.http]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetching {
    /// Hosts (`host` or `host:port`) that may be asked; none when empty.
    pub allow: Vec<String>,
    /// Whether a listed host may have an address that is not public.
    pub private: bool,
    /// Whether POST may be used.
    pub post: bool,
    /// Longest fetch, in seconds.
    pub seconds: u64,
    /// Largest body read, in KiB.
    pub max_kb: usize,
    /// Fetches at once.
    pub max_concurrent: usize,
}

/// `[tools.tenants.NAME]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantTools {
    /// In place of `tools.allow`.
    pub allow: Vec<String>,
}

/// `[tools.mcp.NAME]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct McpServer {
    /// The program of a server that is started, or
    pub command: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, beside PATH, HOME, LANG and TMPDIR.
    #[serde(serialize_with = "super::print::hide_values")]
    pub env: BTreeMap<String, String>,
    /// Variables of the node's environment that it gets, too.
    pub pass_env: Vec<String>,
    /// the address of one that runs.
    pub url: String,
    /// Variable that holds a bearer token for that address.
    pub bearer_env: String,
    /// Longest start, in seconds.
    #[serde(default = "twenty")]
    pub start_seconds: u64,
    /// Calls at once.
    #[serde(default = "four")]
    pub max_concurrent: usize,
    /// Tools whose results may be held, where the server says that they are read only; `*`: all of those.
    pub cache: Vec<String>,
}

const fn twenty() -> u64 {
    20
}

const fn four() -> usize {
    4
}

/// Whether a text names a tool or a server's tools.
pub fn is_pattern(text: &str) -> bool {
    let word = |text: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        !text.is_empty() && text.len() <= 64 && text.bytes().all(fits)
    };
    match text.split_once('.') {
        None => BUILT_IN.contains(&text),
        Some((server, tool)) => is_server(server) && (tool == "*" || word(tool)),
    }
}

/// Whether a text is a server's name: it must leave room for tools' names within theirs.
pub fn is_server(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=24).contains(&name.len()) && name.bytes().all(fits)
}

/// What makes no sense.
pub(super) fn check(tools: &Tools, has_env: &dyn Fn(&str) -> bool, found: &mut Findings) {
    found.range(&["tools", "threads"], tools.threads, 1..=256);
    found.range(&["tools", "max_concurrent"], tools.max_concurrent, 1..=10_000);
    found.range(&["tools", "max_waiting"], tools.max_waiting, 0..=1_000_000);
    found.range(&["tools", "call_seconds"], tools.call_seconds, 1..=3600);
    found.range(&["tools", "max_result_kb"], tools.max_result_kb, 1..=1024);
    let http = &tools.http;
    found.range(&["tools", "http", "seconds"], http.seconds, 1..=300);
    found.range(&["tools", "http", "max_kb"], http.max_kb, 1..=65_536);
    found.range(&["tools", "http", "max_concurrent"], http.max_concurrent, 1..=10_000);
    for (index, host) in http.allow.iter().enumerate() {
        let plain = !host.is_empty() && !host.contains(['/', '@', '*', ' ']);
        if !plain {
            let message = format!("'{host}' is no host, the form is HOST or HOST:PORT");
            found.add(&["tools", "http", "allow", &index.to_string()], message);
        }
    }
    patterns(&["tools", "allow"], &tools.allow, found);
    for (tenant, own) in &tools.tenants {
        patterns(&["tools", "tenants", tenant, "allow"], &own.allow, found);
    }
    for (name, server) in &tools.mcp {
        let at = |key| ["tools", "mcp", name.as_str(), key];
        if !is_server(name) {
            found.add(&["tools", "mcp", name], "a server's name has 1 to 24 lower-case letters, digits and '-'");
        }
        if server.command.is_empty() == server.url.is_empty() {
            found.add(&at("command"), "a server has either a command, which is started, or a url");
        }
        let web = server.url.starts_with("http://") || server.url.starts_with("https://");
        if !server.url.is_empty() && (!web || server.url.contains('@')) {
            found.add(&at("url"), "an address begins with http:// or https:// and carries no credentials");
        }
        if !server.bearer_env.is_empty() && !has_env(&server.bearer_env) {
            found.add(&at("bearer_env"), format!("the environment variable {} is not set", server.bearer_env));
        }
        found.range(&at("start_seconds"), server.start_seconds, 1..=300);
        found.range(&at("max_concurrent"), server.max_concurrent, 1..=10_000);
    }
}

fn patterns(path: &[&str], allow: &[String], found: &mut Findings) {
    for (index, text) in allow.iter().enumerate().filter(|(_, text)| !is_pattern(text)) {
        let index = index.to_string();
        let path: Vec<&str> = path.iter().copied().chain([index.as_str()]).collect();
        let message = format!("'{text}' is no tool: there are {}, SERVER.TOOL and SERVER.*", BUILT_IN.join(", "));
        found.add(&path, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_names_a_tool_or_a_servers_tools() {
        for good in ["recall", "http_fetch", "time.*", "my-files.read_file", "a.B-c"] {
            assert!(is_pattern(good), "{good}");
        }
        for bad in ["", "*", "fetch", "time", "time.", ".x", "Time.*", "a.b.c", "a b.*", "time.**", &"x".repeat(99)] {
            assert!(!is_pattern(bad), "{bad}");
        }
    }
}
