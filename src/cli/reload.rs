//! Reads the settings again while a node runs: when its file is another, or when SIGHUP asks for it.
//!
//! Owns: what is logged and counted of it. Not here: whether the file is another (`config::watch`), who is told
//! (`node::live`). Invariant: whatever is wrong with the new settings, the node goes on with those it has.
//! Tests: `tests/it/settings.rs`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

use super::SettingsArgs;
use crate::{
    config::{
        self, Loaded,
        watch::{Look, Watch},
    },
    node::Node,
    telemetry::metric,
};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Longest wait for a node to take new settings.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the settings are read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// SIGHUP.
    Signal,
    /// The file is another one.
    File,
}

impl Cause {
    const fn as_str(self) -> &'static str {
        match self {
            Cause::Signal => "SIGHUP",
            Cause::File => "the file changed",
        }
    }
}

/// The way to new settings.
pub(super) struct Reload {
    args: SettingsArgs,
    /// What is to be looked at; gone once the looking began.
    watch: Option<Watch>,
    news: Option<mpsc::Receiver<Look>>,
}

impl Reload {
    /// To be made before the settings are read for the first time.
    pub fn new(args: &SettingsArgs) -> Self {
        let path = args.config.clone().unwrap_or_else(|| PathBuf::from(config::USUAL_FILE));
        Self { args: args.clone(), watch: Some(Watch::new(path)), news: None }
    }

    /// The file that was read is the one to be read from now on, also when it is gone for a moment.
    pub fn settle(&mut self, loaded: &Loaded) {
        self.args.config.clone_from(&loaded.file);
    }

    /// Returns when the file is another one. Cancel safe.
    pub async fn changed(&mut self) -> Cause {
        if let Some(watch) = self.watch.take() {
            let (sender, news) = mpsc::channel(1);
            tokio::spawn(look(watch, sender));
            self.news = Some(news);
        }
        let Some(news) = &mut self.news else { return std::future::pending().await };
        loop {
            match news.recv().await {
                Some(Look::Changed) => return Cause::File,
                Some(Look::Gone) => tracing::warn!("the configuration file is gone; the settings stay as they are"),
                Some(Look::Same) => {}
                None => return std::future::pending().await,
            }
        }
    }

    /// Reads all layers again and has the node go by them, or says why not.
    pub async fn now(&mut self, node: &Node, cause: Cause) {
        let result = match self.args.load() {
            Ok(loaded) => {
                self.settle(&loaded);
                adopt(node, loaded, cause).await
            }
            Err(error) => {
                for line in error.to_string().lines() {
                    tracing::error!(cause = cause.as_str(), "the settings stay as they are: {line}");
                }
                "refused"
            }
        };
        metrics::counter!(metric::CONFIG_RELOADS, "result" => result).increment(1);
    }
}

async fn adopt(node: &Node, loaded: Loaded, cause: Cause) -> &'static str {
    let cause = cause.as_str();
    match timeout(PATIENCE, node.adopt(loaded.config)).await {
        Ok(Ok(changes)) if changes.is_empty() => {
            tracing::info!(cause, "the settings were read again and are the same");
            "unchanged"
        }
        Ok(Ok(changes)) => {
            for change in changes {
                tracing::info!(cause, "setting changed: {change}");
            }
            "applied"
        }
        Ok(Err(refused)) => {
            tracing::error!(cause, "the settings stay as they are: {refused}");
            "refused"
        }
        Err(_) => {
            tracing::error!(cause, "the settings stay as they are: the node did not take new ones in time");
            "refused"
        }
    }
}

/// Looks at the file now and then, on a thread that may wait: a file system that hangs holds up nothing else.
async fn look(watch: Watch, news: mpsc::Sender<Look>) {
    let watch = Arc::new(std::sync::Mutex::new(watch));
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let looking = watch.clone();
        let found = tokio::task::spawn_blocking(move || {
            looking.lock().unwrap_or_else(std::sync::PoisonError::into_inner).look()
        });
        match found.await {
            Ok(Look::Same) => {}
            Ok(found) => {
                if news.send(found).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}
