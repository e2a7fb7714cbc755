//! The settings in force as TOML, each with where it came from. Secrets never appear.
//!
//! Tests: at the foot; `tests/it/config.rs` reads it back into the binary.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};

use super::{live::live, load::Loaded};

impl Loaded {
    /// TOML that yields these settings again, with the origin of each value as comment, and which of them change while a node
    /// runs; secrets are `***`.
    pub fn print(&self) -> String {
        let text = match toml::to_string(&self.config) {
            Ok(text) => text,
            Err(error) => return format!("# cannot be written as TOML: {error}\n"),
        };
        let mut comments = Vec::new();
        if let Ok(table) = DeTable::parse(&text) {
            self.comment(&text, table.get_ref(), &mut Vec::new(), &mut comments);
        }
        let mut out = String::with_capacity(text.len() * 2);
        for (number, line) in text.lines().enumerate() {
            out.push_str(line);
            if let Some((_, comment)) = comments.iter().find(|(at, _)| *at == number) {
                let pad = 44_usize.saturating_sub(line.chars().count()).max(2);
                out.push_str(&format!("{:pad$}# {comment}", ""));
            }
            out.push('\n');
        }
        out
    }

    /// Notes for each value on which line it ends and where it came from.
    fn comment(&self, text: &str, table: &DeTable<'_>, path: &mut Vec<String>, out: &mut Vec<(usize, String)>) {
        for (key, value) in table {
            path.push(key.get_ref().to_string());
            match value.get_ref() {
                DeValue::Table(below) => self.comment(text, below, path, out),
                DeValue::Array(items) if items.iter().any(|item| item.get_ref().is_table()) => {
                    for (index, item) in items.iter().enumerate() {
                        path.push(index.to_string());
                        if let DeValue::Table(below) = item.get_ref() {
                            self.comment(text, below, path, out);
                        }
                        path.pop();
                    }
                }
                _ => {
                    let line = text[..value.span().end].matches('\n').count();
                    let live = if is_live(path) { "live, " } else { "" };
                    out.push((line, format!("{live}{}", self.said(path))));
                }
            }
            path.pop();
        }
    }

    /// The origin of a value; one that stands in a section somebody wrote, but was not written itself, is a default.
    fn said(&self, path: &[String]) -> String {
        match self.origins.exactly(path) {
            Some(origin) => origin.to_string(),
            None => match self.origins.of(path) {
                super::Origin::File { .. } | super::Origin::Preset(_) | super::Origin::Default => {
                    String::from("default")
                }
                given_whole => given_whole.to_string(),
            },
        }
    }
}

/// Whether a node that runs goes by another value; of lists the whole list does.
fn is_live(path: &[String]) -> bool {
    (1..=path.len()).any(|parts| live(&path[..parts].join(".")).is_some())
}

/// Serializes a secret as `***`.
pub(super) fn hide<S: serde::Serializer>(
    _secret: &Option<secrecy::SecretString>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("***")
}

/// Serializes names with their values as `***`: an environment often holds keys.
pub(super) fn hide_values<S: serde::Serializer>(
    values: &BTreeMap<String, String>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(values.keys().map(|name| (name, "***")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::config::{Config, Sources, load};

    #[test]
    fn what_is_printed_is_toml_with_origins_and_without_secrets() {
        let sources = Sources {
            set: vec![
                String::from("http.listen=127.0.0.1:9"),
                String::from("auth.tokens=[{token = 'geheim', tenant = 't', name = 'n'}]"),
                String::from("tools.mcp.files={command = 'files', env = {KEY = 'geheim'}}"),
            ],
            ..Sources::default()
        };
        let printed = load(&sources).unwrap().print();
        assert!(!printed.contains("geheim"), "{printed}");
        let line = |key: &str| printed.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
        assert!(line("listen = \"127.0.0.1:9\"").ends_with("# --set http.listen"));
        assert!(line("token = \"***\"").ends_with("# live, --set auth.tokens"));
        assert!(line("KEY = \"***\"").contains("# --set tools.mcp.files"), "{printed}");
        assert!(line("max_batch").ends_with("  # default") && line("cache_l1_size_mb").ends_with("# live, default"));
        let again: Config = toml::from_str(&printed).unwrap();
        assert_eq!(again.http.listen, "127.0.0.1:9".parse().unwrap());
    }
}
