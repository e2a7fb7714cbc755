//! One reader for all nodes: the node that has the first shard takes messages from the broker, under a session that is the
//! cluster's.
//!
//! Brokers that spread a shared group by turns give two messages of one device to two nodes, and then nobody knows which was
//! first. With one subscriber the broker's order holds; its session outlives the reader, so the next one gets what was not
//! acknowledged, in order. Whoever lost the shard lets go; for the moment in which two believe to be the reader, the broker
//! keeps the newer connection. Tests: `tests/it/mqtt_external.rs`.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Link, Parts};
use crate::store::Scope;

/// Whoever has it reads.
const FIRST: u32 = 0;
/// Longest wait for what a reader has in hand when its turn is over.
const LET_GO: Duration = Duration::from_secs(2);

/// When it is this node's turn.
#[derive(Debug, Clone)]
pub struct Turn {
    /// The shards that are here.
    pub scope: watch::Receiver<Scope>,
    /// The cluster's name.
    pub cluster: String,
}

/// Reads while it is this node's turn, until it is told to stop.
pub(super) async fn follow(parts: Parts, turn: Turn, close: CancellationToken) {
    let Turn { mut scope, cluster } = turn;
    let client_id = format!("sophont-{cluster}-reader");
    loop {
        if !until(&mut scope, true, &close).await {
            return;
        }
        let link = match Link::connect(&parts, &client_id, true) {
            Ok(link) => link,
            Err(error) => return tracing::error!(%error, "this node cannot read from the MQTT broker"),
        };
        tracing::info!("this node reads from the MQTT broker for all");
        let goes_on = until(&mut scope, false, &close).await;
        link.close(LET_GO).await;
        if !goes_on {
            return;
        }
    }
}

/// Waits until the turn begins or ends; false when it is told to stop.
async fn until(scope: &mut watch::Receiver<Scope>, mine: bool, close: &CancellationToken) -> bool {
    let changed = async { scope.wait_for(|scope| scope.has(FIRST) == mine).await.is_ok() };
    tokio::select! {
        () = close.cancelled() => false,
        is_there = changed => is_there,
    }
}
