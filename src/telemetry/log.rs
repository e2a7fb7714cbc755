//! The log: for people on a terminal, a JSON object a line otherwise, always on standard error.
//!
//! Owns: the subscriber, its filter, the node's name in every line. Not here: what is logged (each module, where it is
//! handled). Standard output is for contract lines. Tests: at the foot; `tests/it/cli.rs` reads the binary's log.

use std::{fmt, io::IsTerminal, sync::OnceLock};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Json, JsonFields, Writer},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use crate::config::{LogFormat, Telemetry};

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter cannot be read.
    #[error("'{filter}' is no log filter: {reason}")]
    Filter {
        /// As configured.
        filter: String,
        /// Why.
        reason: String,
    },
    /// Another subscriber is in the way.
    #[error("the log is set up already")]
    Installed,
}

/// Reads a filter such as `info` or `sophont=debug,warn`.
///
/// # Errors
/// [`Error::Filter`].
pub fn filter(text: &str) -> Result<EnvFilter, Error> {
    let bad = |reason: String| Error::Filter { filter: text.to_owned(), reason };
    // A misspelt level would be taken for the name of a target that never logs.
    for directive in text.split(',').map(str::trim) {
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        let is_target = !directive.contains('=') && (directive.contains("::") || directive == "sophont");
        let known = ["error", "warn", "info", "debug", "trace", "off"].contains(&level.to_ascii_lowercase().as_str());
        if !known && !is_target && !directive.contains('[') {
            return Err(bad(format!("'{level}' is not one of error, warn, info, debug, trace, off")));
        }
    }
    EnvFilter::try_new(text).map_err(|error| bad(error.to_string()))
}

/// Whether the log is for people: configured, or a terminal reads it.
pub fn is_for_people(format: LogFormat) -> bool {
    match format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Human => true,
        LogFormat::Json => false,
    }
}

/// Sets the log up for the whole process.
///
/// # Errors
/// [`Error`]; only the first call can succeed.
pub fn install(telemetry: &Telemetry, node: &str) -> Result<(), Error> {
    let (filter, change) = reload::Layer::new(filter(&telemetry.log)?);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = if is_for_people(telemetry.log_format) {
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour).with_filter(filter).boxed()
    } else {
        let format = WithNode::new(node);
        let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).fmt_fields(JsonFields::new());
        layer.event_format(format).with_filter(filter).boxed()
    };
    tracing_subscriber::registry().with(layer).try_init().map_err(|_| Error::Installed)?;
    // Only the first call comes here.
    let _ = CHANGE.set(change);
    Ok(())
}

/// The filter of this process's log.
static CHANGE: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// From here on this is logged; before [`install`] nothing happens.
///
/// # Errors
/// [`Error::Filter`]; the log stays as it is.
pub fn change(text: &str) -> Result<(), Error> {
    let filter = filter(text)?;
    match CHANGE.get() {
        Some(change) => {
            change.reload(filter).map_err(|error| Error::Filter { filter: text.to_owned(), reason: error.to_string() })
        }
        None => Ok(()),
    }
}

/// The library's JSON line with the node's name as its first field.
struct WithNode {
    inner: Format<Json>,
    /// `{"node":"NAME",`
    head: String,
}

impl WithNode {
    fn new(node: &str) -> Self {
        let inner = Format::default().json().flatten_event(true);
        Self { inner, head: format!("{{\"node\":{},", serde_json::Value::from(node)) }
    }
}

impl<S, N> FormatEvent<S, N> for WithNode
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::with_capacity(256);
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        match line.strip_prefix('{') {
            Some(rest) => write!(writer, "{}{rest}", self.head),
            None => writer.write_str(&line),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_json_line_names_the_node() {
        let page = Page::default();
        let writer = page.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).fmt_fields(JsonFields::new());
        let subscriber = tracing_subscriber::registry().with(layer.event_format(WithNode::new("a\"b")));
        tracing::subscriber::with_default(subscriber, || tracing::info!(shard = 3, "took a shard"));
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["node"], "a\"b");
        assert_eq!((&line["shard"], &line["message"]), (&3.into(), &"took a shard".into()));
    }

    #[test]
    fn a_misspelt_filter_is_refused() {
        for good in ["info", "sophont=debug,warn", "sophont::store=trace,off", "INFO", "sophont"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["inof", "sophont=loud", "", "sophont=debug,,"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}
