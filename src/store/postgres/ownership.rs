//! Membership and ownership of shards, in PostgreSQL's tables and by PostgreSQL's clock.
//!
//! A member's process holds a session advisory lock on a connection of its own: when the process dies the lock is free at
//! once. Taking a shard changes its row, so it waits for every commit that holds the row, and no later one passes with the
//! old epoch.
//!
//! Not here: the rules' meaning (`store::ownership`). Invariant: shards are locked in the order of their numbers, everywhere.
//! Tests: `tests/it/ownership_contract.rs`.

use std::collections::HashMap;

use async_trait::async_trait;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Row, types::Type};

use super::{
    PostgresStore,
    connect::Failure,
    rows,
    sql::{Conn, Param, Sql},
    writes::int,
};
use crate::{
    store::{
        self, Fence,
        ownership::{Claim, Error, Joining, NodeRow, Ownership, Renewal, ShardRow, View},
    },
    types::{Load, Millis, NodeId, Protocol, Role},
};

/// The class of the advisory locks that members hold.
const SESSIONS: i32 = 0x736f_7068;
/// Leases over for so long are swept when a node joins.
const SWEEP: &str = "60 seconds";
/// Tries of a transaction that another one disturbed.
const TRIES: u32 = 5;

/// The sessions by which this process shows that it is alive, by member.
pub(super) type Sessions = HashMap<NodeId, Session>;

/// A connection that holds a member's lock as long as it lives.
pub(super) struct Session {
    /// The lock's number: a new one with each joining.
    number: i32,
    client: Client,
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sessions whose lock is held, as a common table expression.
macro_rules! with_held {
    ($rest:literal) => {
        concat!(
            "WITH held AS (SELECT l.objid::bigint AS session FROM pg_locks l JOIN pg_database d ON d.oid = l.database
               WHERE l.locktype = 'advisory' AND l.classid = 1936683112 AND l.objsubid = 2 AND l.granted
               AND d.datname = current_database()) ",
            $rest
        )
    };
}
pub(super) use with_held;

const NOW: Sql = Sql { text: "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint", types: &[] };
const NODES: Sql = Sql {
    text: with_held!(
        "SELECT n.node, n.addresses, n.roles, n.weight, n.protocol_min, n.protocol_max,
           ceil(extract(epoch FROM n.lease_until - clock_timestamp()) * 1000)::bigint,
           n.busy_permille, n.instances, n.in_hand, n.draining, n.session IN (SELECT session FROM held)
         FROM nodes n ORDER BY n.node"
    ),
    types: &[],
};
const SHARDS: Sql = Sql { text: "SELECT shard, node, epoch, lodged FROM shards ORDER BY shard", types: &[] };
const CLUSTER: Sql = Sql { text: "SELECT coalesce(name, ''), shards FROM cluster FOR UPDATE", types: &[] };
const NAME: Sql = Sql { text: "UPDATE cluster SET name = $1 WHERE name IS NULL", types: &[Type::TEXT] };
const SWEPT: Sql = Sql {
    text: "DELETE FROM nodes n WHERE n.node = $1 OR n.lease_until < clock_timestamp() - $2::text::interval
           AND NOT EXISTS (SELECT FROM shards s WHERE s.node = n.node)",
    types: &[Type::TEXT, Type::TEXT],
};
const JOIN: Sql = Sql {
    text: "INSERT INTO nodes (node, addresses, roles, weight, protocol_min, protocol_max, lease_until, session)
           VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + $7::bigint * interval '1 millisecond', $8)",
    types: &[
        Type::TEXT,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::INT8,
        Type::INT8,
        Type::INT8,
        Type::INT8,
        Type::INT4,
    ],
};
const RENEW: Sql = Sql {
    text:
        "UPDATE nodes SET lease_until = clock_timestamp() + $2::bigint * interval '1 millisecond', busy_permille = $3,
             instances = $4, in_hand = $5, draining = draining OR $6, weight = $7
           WHERE node = $1 AND lease_until > clock_timestamp() RETURNING session",
    types: &[Type::TEXT, Type::INT8, Type::INT8, Type::INT8, Type::INT8, Type::BOOL, Type::INT8],
};
const GONE: Sql = Sql {
    text: with_held!(
        "SELECT n.node FROM nodes n
         WHERE n.lease_until > clock_timestamp() AND n.session NOT IN (SELECT session FROM held) ORDER BY n.node"
    ),
    types: &[],
};
const MEMBER: Sql = Sql {
    text: "SELECT 1 FROM nodes WHERE node = $1 AND lease_until > clock_timestamp() FOR SHARE",
    types: &[Type::TEXT],
};
const LOCK: Sql = Sql {
    text: "SELECT shard FROM shards WHERE shard = ANY($1) ORDER BY shard FOR UPDATE",
    types: &[Type::INT4_ARRAY],
};
const TAKE: Sql = Sql {
    text: with_held!(
        "UPDATE shards s SET node = $1, epoch = s.epoch + 1
         FROM unnest($2::int[], $3::bigint[]) c(shard, epoch)
         WHERE s.shard = c.shard AND s.epoch = c.epoch
           AND NOT EXISTS (SELECT FROM nodes n WHERE n.node = s.node AND n.lease_until > clock_timestamp()
             AND n.session IN (SELECT session FROM held))
         RETURNING s.shard, s.epoch, s.lodged"
    ),
    types: &[Type::TEXT, Type::INT4_ARRAY, Type::INT8_ARRAY],
};
const RELEASE: Sql = Sql {
    text: "UPDATE shards s SET node = NULL FROM unnest($2::int[], $3::bigint[]) c(shard, epoch)
           WHERE s.shard = c.shard AND s.epoch = c.epoch AND s.node = $1",
    types: &[Type::TEXT, Type::INT4_ARRAY, Type::INT8_ARRAY],
};
const OWNED: Sql =
    Sql { text: "SELECT shard FROM shards WHERE node = $1 ORDER BY shard FOR UPDATE", types: &[Type::TEXT] };
const LEAVE_SHARDS: Sql = Sql { text: "UPDATE shards SET node = NULL WHERE node = $1", types: &[Type::TEXT] };
const LEAVE: Sql = Sql { text: "DELETE FROM nodes WHERE node = $1", types: &[Type::TEXT] };
const DRAIN: Sql = Sql { text: "UPDATE nodes SET draining = true WHERE node = $1 RETURNING 1", types: &[Type::TEXT] };

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Store(failure.into_error())
    }
}

/// Why a transaction ended early.
enum Stop {
    Failure(Failure),
    Refused(Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<tokio_postgres::Error> for Stop {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failure(error.into())
    }
}

/// A statement of a transaction, and its parameters.
pub(super) type Step<'a> = (&'static Sql, Vec<Param<'a>>);

fn millis(lease: std::time::Duration) -> i64 {
    i64::try_from(lease.as_millis()).unwrap_or(i64::MAX)
}

fn node_row(row: &Row) -> Result<NodeRow, Failure> {
    let small = |at| row.try_get::<_, i64>(at).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    let large = |at| row.try_get::<_, i64>(at).map(i64::unsigned_abs);
    let roles: Vec<&str> = row.try_get(2)?;
    Ok(NodeRow {
        node: rows::id(row, 0)?,
        addresses: row.try_get(1)?,
        // What a later build takes part in, and this one does not know, is nothing to it.
        roles: roles.iter().filter_map(|role| role.parse::<Role>().ok()).collect(),
        weight: small(3)?,
        protocol: Protocol { min: small(4)?, max: small(5)? },
        lease_left: row.try_get(6)?,
        load: Load { busy_permille: small(7)?, instances: large(8)?, in_hand: large(9)? },
        draining: row.try_get(10)?,
        alive: row.try_get(11)?,
    })
}

fn shard_row(row: &Row) -> Result<ShardRow, Failure> {
    let node: Option<&str> = row.try_get(1)?;
    let node = node.map(|_| rows::id(row, 1)).transpose()?;
    Ok(ShardRow {
        shard: row.try_get::<_, i32>(0)?.unsigned_abs(),
        node,
        epoch: row.try_get::<_, i64>(2)?.unsigned_abs(),
        lodged: row.try_get::<_, i64>(3)?.unsigned_abs(),
    })
}

async fn view(conn: &Conn) -> Result<View, Failure> {
    // A lease that was seen to run had so long left at the time told or a little later.
    let now = conn.run(&NOW, &[]).await?;
    let nodes = conn.run(&NODES, &[]).await?;
    let shards = conn.run(&SHARDS, &[]).await?;
    Ok(View {
        now: Millis(now.first().map(|row| row.try_get(0)).transpose()?.unwrap_or(0)),
        nodes: nodes.iter().map(node_row).collect::<Result<_, _>>()?,
        shards: shards.iter().map(shard_row).collect::<Result<_, _>>()?,
    })
}

impl PostgresStore {
    /// Runs statements in one transaction, again when another one disturbed it; the rows of each.
    pub(super) async fn transact(&self, steps: &[Step<'_>]) -> Result<Vec<Vec<Row>>, Failure> {
        let mut tries = 0;
        loop {
            let tried = async {
                let conn = self.writer().await?;
                let done = async {
                    conn.batch(self.begin()).await?;
                    let mut all = Vec::with_capacity(steps.len());
                    for (sql, params) in steps {
                        all.push(conn.run(sql, params).await?);
                    }
                    conn.batch("COMMIT").await?;
                    Ok(all)
                }
                .await;
                if done.is_err() {
                    conn.discard();
                }
                done
            };
            match tried.await {
                Err(Failure::Again(why)) if tries < TRIES => {
                    tries += 1;
                    tracing::debug!(tries, "a change of ownership is tried again: {why}");
                }
                done => return done,
            }
        }
    }

    async fn try_join(&self, conn: &Conn, joining: &Joining, session: i32) -> Result<View, Stop> {
        conn.batch(self.begin()).await?;
        let found = conn.run(&CLUSTER, &[]).await?;
        let Some(row) = found.first() else {
            return Err(Failure::Refused(store::Error::Corrupt(String::from("there is no cluster"))).into());
        };
        let stored = row.try_get::<_, i32>(1)?.unsigned_abs();
        if stored != joining.shards {
            let (cluster, configured) = (joining.cluster.clone(), joining.shards);
            return Err(Stop::Refused(Error::OtherShards { cluster, stored, configured }));
        }
        conn.run(&NAME, &[&joining.cluster]).await?;
        let members = view(conn).await?.nodes;
        let live = members.into_iter().filter(|row| row.holds() && row.node != joining.node);
        if let Some(other) = live.into_iter().find(|row| !row.protocol.meets(joining.protocol)) {
            let (node, theirs, ours) = (other.node, other.protocol, joining.protocol);
            return Err(Stop::Refused(Error::OtherProtocol { node, theirs, ours }));
        }
        let node = joining.node.as_str();
        conn.run(&SWEPT, &[&node, &SWEEP]).await?;
        let roles: Vec<&str> = joining.roles.iter().map(Role::as_str).collect();
        let (min, max) = (i64::from(joining.protocol.min), i64::from(joining.protocol.max));
        let (weight, lease) = (i64::from(joining.weight), millis(joining.lease));
        conn.run(&JOIN, &[&node, &joining.addresses, &roles, &weight, &min, &max, &lease, &session]).await?;
        let view = view(conn).await?;
        conn.batch("COMMIT").await?;
        Ok(view)
    }

    /// Makes sure that this process holds the member's lock.
    async fn hold_session(&self, node: &NodeId, session: i32) -> Result<(), Failure> {
        let mut sessions = self.sessions().await;
        if sessions.get(node).is_some_and(|held| held.number == session && !held.client.is_closed()) {
            return Ok(());
        }
        sessions.remove(node);
        let (client, task) = self.session_connection().await?;
        client.execute("SELECT pg_advisory_lock($1, $2)", &[&SESSIONS, &session]).await?;
        sessions.insert(node.clone(), Session { number: session, client, task });
        Ok(())
    }

    async fn drop_session(&self, node: &NodeId) {
        self.sessions().await.remove(node);
    }
}

#[async_trait]
impl Ownership for PostgresStore {
    async fn join(&self, joining: &Joining) -> Result<View, Error> {
        let number = self.rows(&Sql { text: "SELECT nextval('sessions')::int", types: &[] }, &[]).await?;
        let session: i32 = match number.first() {
            Some(row) => row.try_get(0).map_err(Failure::from)?,
            None => return Err(Error::Store(store::Error::Closed)),
        };
        // The lock first: a member whose lock is free counts as gone.
        self.hold_session(&joining.node, session).await?;
        let conn = self.writer().await?;
        match self.try_join(&conn, joining, session).await {
            Ok(view) => Ok(view),
            Err(stop) => {
                conn.discard();
                self.drop_session(&joining.node).await;
                Err(match stop {
                    Stop::Refused(error) => error,
                    Stop::Failure(failure) => failure.into(),
                })
            }
        }
    }

    async fn renew(&self, node: &NodeId, renewal: Renewal) -> Result<View, Error> {
        let load = renewal.load;
        let (lease, busy) = (millis(renewal.lease), i64::from(load.busy_permille));
        let figure = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let (instances, in_hand) = (figure(load.instances), figure(load.in_hand));
        let conn = self.writer().await?;
        let weight = i64::from(renewal.weight);
        let params: [Param<'_>; 7] = [&node.as_str(), &lease, &busy, &instances, &in_hand, &renewal.draining, &weight];
        let renewed = conn.run(&RENEW, &params).await?;
        let session = match renewed.first() {
            Some(row) => row.try_get(0).map_err(Failure::from)?,
            None => return Err(Error::Lost),
        };
        self.hold_session(node, session).await?;
        Ok(view(&conn).await?)
    }

    async fn view(&self) -> Result<View, Error> {
        Ok(view(&self.writer().await?).await?)
    }

    async fn gone(&self) -> Result<Vec<NodeId>, Error> {
        let gone = self.writer().await?.run(&GONE, &[]).await?;
        Ok(gone.iter().map(|row| rows::id(row, 0)).collect::<Result<_, _>>()?)
    }

    async fn drain(&self, node: &NodeId) -> Result<bool, Error> {
        Ok(!self.writer().await?.run(&DRAIN, &[&node.as_str()]).await?.is_empty())
    }

    async fn take(&self, node: &NodeId, claims: &[Claim]) -> Result<Vec<Fence>, Error> {
        let shards: Vec<i32> = claims.iter().map(|claim| int(claim.shard)).collect();
        let epochs: Vec<i64> = claims.iter().map(|claim| super::writes::big(claim.epoch)).collect();
        let name = node.as_str();
        let steps: [Step<'_>; 3] =
            [(&MEMBER, vec![&name]), (&LOCK, vec![&shards]), (&TAKE, vec![&name, &shards, &epochs])];
        let done = self.transact(&steps).await?;
        if done[0].is_empty() {
            // Whatever was taken is given back: nobody writes under these epochs.
            self.transact(&[(&OWNED, vec![&name]), (&LEAVE_SHARDS, vec![&name])]).await?;
            return Err(Error::Lost);
        }
        let mut taken = Vec::with_capacity(done[2].len());
        for row in &done[2] {
            taken.push(Fence {
                shard: row.try_get::<_, i32>(0).map_err(Failure::from)?.unsigned_abs(),
                epoch: row.try_get::<_, i64>(1).map_err(Failure::from)?.unsigned_abs(),
                lodged: row.try_get::<_, i64>(2).map_err(Failure::from)?.unsigned_abs(),
            });
        }
        taken.sort_unstable_by_key(|fence| fence.shard);
        Ok(taken)
    }

    async fn release(&self, node: &NodeId, fences: &[Fence]) -> Result<(), Error> {
        let shards: Vec<i32> = fences.iter().map(|fence| int(fence.shard)).collect();
        let epochs: Vec<i64> = fences.iter().map(|fence| super::writes::big(fence.epoch)).collect();
        let name = node.as_str();
        self.transact(&[(&LOCK, vec![&shards]), (&RELEASE, vec![&name, &shards, &epochs])]).await?;
        Ok(())
    }

    async fn leave(&self, node: &NodeId) -> Result<(), Error> {
        let name = node.as_str();
        self.transact(&[(&OWNED, vec![&name]), (&LEAVE_SHARDS, vec![&name]), (&LEAVE, vec![&name])]).await?;
        self.drop_session(node).await;
        Ok(())
    }
}
