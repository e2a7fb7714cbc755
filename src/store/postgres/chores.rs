//! What is removed in the background: rows of lives that are over, ids beyond the deduplication window, lanes that are gone.
//!
//! Each portion is a transaction of its own and skips what another node removes at present. Losing one costs nothing.
//! Tests: `tests/it/store_postgres.rs`.

use std::{sync::Weak, time::Duration};

use tokio_postgres::types::Type;

use super::{Shared, connect::Failure, sql::Sql, writes::day};
use crate::types::limits::DEDUPE_WINDOW_MS;

/// Between two looks when there was nothing to do.
const REST: Duration = Duration::from_secs(5);
/// Rows removed at once.
const PORTION: i64 = 5000;

const TURNS: Sql = Sql {
    text: "WITH life AS (SELECT tenant, life FROM forgotten LIMIT 1 FOR UPDATE SKIP LOCKED)
           DELETE FROM turns t USING (SELECT x.tenant, x.life, x.turn FROM turns x JOIN life l
             ON l.tenant = x.tenant AND l.life = x.life ORDER BY x.turn LIMIT $1) g
           WHERE t.tenant = g.tenant AND t.life = g.life AND t.turn = g.turn RETURNING 1",
    types: &[Type::INT8],
};
const EPISODES: Sql = Sql {
    text: "WITH life AS (SELECT tenant, life FROM forgotten LIMIT 1 FOR UPDATE SKIP LOCKED)
           DELETE FROM episodes t USING (SELECT x.tenant, x.life, x.episode FROM episodes x JOIN life l
             ON l.tenant = x.tenant AND l.life = x.life ORDER BY x.episode LIMIT $1) g
           WHERE t.tenant = g.tenant AND t.life = g.life AND t.episode = g.episode RETURNING 1",
    types: &[Type::INT8],
};
/// A life of which nothing is left. What it had seen expires by itself.
const FORGOTTEN: Sql = Sql {
    text: "DELETE FROM forgotten f WHERE (f.tenant, f.life) IN
             (SELECT tenant, life FROM forgotten LIMIT 1 FOR UPDATE SKIP LOCKED)
           AND NOT EXISTS (SELECT FROM turns t WHERE t.tenant = f.tenant AND t.life = f.life)
           AND NOT EXISTS (SELECT FROM episodes e WHERE e.tenant = f.tenant AND e.life = f.life) RETURNING 1",
    types: &[],
};
const SEEN: Sql = Sql {
    text: "DELETE FROM seen WHERE ctid = ANY(ARRAY(
             SELECT ctid FROM seen WHERE day < $1 LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING 1",
    types: &[Type::INT4, Type::INT8],
};
const LANES: Sql = Sql {
    text: "DELETE FROM lanes WHERE lane IN
             (SELECT lane FROM lanes WHERE used_at < now() - interval '7 days' FOR UPDATE SKIP LOCKED) RETURNING 1",
    types: &[],
};
/// Sessions that everybody who follows has seen the end of.
const GONE: Sql = Sql {
    text: "DELETE FROM mqtt_gone WHERE (tenant, client) IN (SELECT tenant, client FROM mqtt_gone
             WHERE at < now() - interval '1 hour' LIMIT $1 FOR UPDATE SKIP LOCKED) RETURNING 1",
    types: &[Type::INT8],
};

/// Of sessions whose publishes nobody can have on the way any more.
const BARRED: Sql = Sql {
    text: "DELETE FROM mqtt_barred WHERE (tenant, session) IN (SELECT tenant, session FROM mqtt_barred
             WHERE at < now() - interval '1 day' LIMIT $1 FOR UPDATE SKIP LOCKED) RETURNING 1",
    types: &[Type::INT8],
};

/// Removes until the store is gone.
pub(super) async fn run(shared: Weak<Shared>) {
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let done = portion(&shared).await;
        let idle = match done {
            Ok(rows) => rows == 0,
            Err(failure) => {
                tracing::debug!(?failure, "chores are tried again later");
                true
            }
        };
        let closed = shared.closed.clone();
        drop(shared);
        tokio::select! {
            () = closed.cancelled() => return,
            () = tokio::time::sleep(if idle { REST } else { Duration::from_millis(20) }) => {}
        }
    }
}

async fn portion(shared: &Shared) -> Result<usize, Failure> {
    let conn = shared.writer().await?;
    let turns = conn.run(&TURNS, &[&PORTION]).await?.len();
    let episodes = conn.run(&EPISODES, &[&PORTION]).await?.len();
    let lives = conn.run(&FORGOTTEN, &[]).await?.len();
    let expired = day(shared.clock.now().plus(-DEDUPE_WINDOW_MS));
    let seen = conn.run(&SEEN, &[&expired, &PORTION]).await?.len();
    let lanes = conn.run(&LANES, &[]).await?.len();
    let gone = conn.run(&GONE, &[&PORTION]).await?.len();
    let barred = conn.run(&BARRED, &[&PORTION]).await?.len();
    Ok(turns + episodes + lives + seen + lanes + gone + barred)
}
