//! MQTT sessions that go from node to node, in PostgreSQL's tables.
//!
//! Taking a session changes its row, so it waits for every batch that writes under the earlier hold, and no later one passes.
//! Who follows the changes asks by the number of the transaction that made them, from the oldest one that was under way at
//! the last look: nothing that commits late is missed.
//!
//! Not here: the rules' meaning (`store::roaming`), writes under a hold (`lane`, `writes`). Tests: `tests/it/roaming.rs`.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_postgres::{Row, types::Type};

use super::{
    PostgresStore,
    connect::Failure,
    ownership::with_held,
    rows,
    sql::{Param, Sql},
    writes::big,
};
use crate::{
    store::{
        Error,
        roaming::{Changes, Holder, Mail, Origin, Roaming, Seat, Seen, Sign, Taken},
    },
    types::{InstanceId, NodeId, TenantId},
};

const HOLDER: Sql = Sql {
    text: with_held!(
        "SELECT s.node, s.hold, EXISTS (SELECT FROM nodes n WHERE n.node = s.node
           AND n.lease_until > clock_timestamp() AND n.session IN (SELECT session FROM held)),
           EXISTS (SELECT FROM nodes n WHERE n.node = s.node AND n.session IN (SELECT session FROM held))
         FROM mqtt_sessions s WHERE s.tenant = $1 AND s.client = $2"
    ),
    types: &[Type::TEXT, Type::TEXT],
};
const CLAIM: Sql = Sql {
    text:
        "UPDATE mqtt_sessions SET node = $3, hold = nextval('mqtt_holds'), changed = pg_current_xact_id()::text::bigint
           WHERE tenant = $1 AND client = $2 AND hold = $4 RETURNING tenant, client, hold, rec",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT, Type::INT8],
};
const FOUND: Sql = Sql {
    text: "INSERT INTO mqtt_sessions (tenant, client, rec, node, hold, changed)
           VALUES ($1, $2, '', $3, nextval('mqtt_holds'), pg_current_xact_id()::text::bigint)
           ON CONFLICT (tenant, client) DO NOTHING RETURNING tenant, client, hold, rec",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT],
};
const QUEUE: Sql = Sql {
    text: "SELECT tenant, client, ord, rec FROM mqtt_queue WHERE tenant = $1 AND client = $2 ORDER BY ord",
    types: &[Type::TEXT, Type::TEXT],
};
const ADOPT: Sql = Sql {
    text: with_held!(
        ", orphans AS (SELECT s.tenant, s.client FROM mqtt_sessions s WHERE s.node = ANY($1)
             AND NOT EXISTS (SELECT FROM nodes n WHERE n.node = s.node
               AND n.lease_until > clock_timestamp() AND n.session IN (SELECT session FROM held))
             ORDER BY s.tenant, s.client LIMIT $3 FOR NO KEY UPDATE OF s SKIP LOCKED)
         UPDATE mqtt_sessions s
         SET node = $2, hold = nextval('mqtt_holds'), changed = pg_current_xact_id()::text::bigint
         FROM orphans o WHERE s.tenant = o.tenant AND s.client = o.client
         RETURNING s.tenant, s.client, s.hold, s.rec"
    ),
    types: &[Type::TEXT_ARRAY, Type::TEXT, Type::INT8],
};
/// Queues of the sessions that a node took from others and has still.
const QUEUES: Sql = Sql {
    text: "SELECT q.tenant, q.client, q.ord, q.rec FROM mqtt_queue q
           JOIN unnest($1::text[], $2::text[], $3::bigint[]) g(tenant, client, hold)
             ON q.tenant = g.tenant AND q.client = g.client ORDER BY q.tenant, q.client, q.ord",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY],
};
const DEAD: Sql = Sql {
    text: with_held!(
        "SELECT g.node FROM unnest($1::text[]) g(node) WHERE NOT EXISTS (SELECT FROM nodes n WHERE n.node = g.node
           AND n.lease_until > clock_timestamp() AND n.session IN (SELECT session FROM held))"
    ),
    types: &[Type::TEXT_ARRAY],
};
const BAR: Sql = Sql {
    text: "INSERT INTO mqtt_barred (tenant, session, hold) VALUES ($1, $2, $3)
           ON CONFLICT (tenant, session) DO UPDATE SET hold = greatest(mqtt_barred.hold, excluded.hold), at = now()",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
/// The oldest transaction under way that may write, and the one after the newest.
const UNDER_WAY: Sql = Sql {
    text: "SELECT pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint FROM pg_current_snapshot() s",
    types: &[],
};
/// Pause between two looks at what is under way.
const LOOK: Duration = Duration::from_millis(5);
const CHANGES: Sql = Sql {
    text: "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, c.tenant, c.client, c.node, c.hold, c.rec
           FROM (SELECT 1) one LEFT JOIN (
             SELECT tenant, client, '' AS node, hold, NULL::bytea AS rec FROM mqtt_gone WHERE changed >= $1
             UNION ALL SELECT tenant, client, node, hold, rec FROM mqtt_sessions WHERE changed >= $1
           ) c ON true ORDER BY c.rec IS NOT NULL",
    types: &[Type::INT8],
};
const MAIL: Sql = Sql {
    text: "SELECT m.id, m.tenant, m.client, m.queued, m.rec FROM mqtt_mail m
           JOIN mqtt_sessions s ON s.tenant = m.tenant AND s.client = m.client
           WHERE s.node = $1 ORDER BY m.id LIMIT $2",
    types: &[Type::TEXT, Type::INT8],
};
const RETAINED: Sql = Sql {
    text: "SELECT rec FROM mqtt_retained WHERE tenant = $1 AND topic >= $2 AND starts_with(topic, $2) ORDER BY topic",
    types: &[Type::TEXT, Type::TEXT],
};
const FULL: Sql = Sql {
    text: "SELECT tenant FROM mqtt_retained GROUP BY tenant
           HAVING count(*) >= $1 OR sum(octet_length(rec) + octet_length(topic)) >= $2",
    types: &[Type::INT8, Type::INT8],
};
/// One at a time about an instance: what is seen below stands until the end.
const ALONE: Sql = Sql {
    text: "SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || $2, 0))",
    types: &[Type::TEXT, Type::TEXT],
};
const ARRIVE: Sql = Sql {
    text: "INSERT INTO mqtt_present (tenant, instance, node) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT],
};
const PART: Sql = Sql {
    text: "DELETE FROM mqtt_present WHERE tenant = $1 AND instance = $2 AND node = $3 RETURNING 1",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT],
};
const PART_DEAD: Sql = Sql {
    text: with_held!(
        "DELETE FROM mqtt_present p WHERE p.tenant = $1 AND p.instance = $2 AND NOT EXISTS (SELECT FROM nodes n
           WHERE n.node = p.node AND n.lease_until > clock_timestamp() AND n.session IN (SELECT session FROM held))
         RETURNING 1"
    ),
    types: &[Type::TEXT, Type::TEXT],
};
/// Sets the value when it does not say so yet and no other node has devices of the instance.
const SIGN: Sql = Sql {
    text: "INSERT INTO mqtt_retained (tenant, topic, rec) SELECT $1, $4, $5
           WHERE NOT EXISTS (SELECT FROM mqtt_present WHERE tenant = $1 AND instance = $2 AND node <> $3)
           ON CONFLICT (tenant, topic) DO UPDATE SET rec = excluded.rec WHERE mqtt_retained.rec <> excluded.rec
           RETURNING 1",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT, Type::BYTEA],
};
const ABANDONED: Sql = Sql {
    text: with_held!(
        "SELECT DISTINCT p.tenant, p.instance FROM mqtt_present p WHERE p.node IN (
           SELECT d.node FROM (SELECT DISTINCT node FROM mqtt_present) d WHERE NOT EXISTS (SELECT FROM nodes n
             WHERE n.node = d.node AND n.lease_until > clock_timestamp() AND n.session IN (SELECT session FROM held)))
         LIMIT $1"
    ),
    types: &[Type::INT8],
};

fn bytes(row: &Row, column: usize) -> Result<Bytes, Failure> {
    Ok(row.try_get::<_, Vec<u8>>(column)?.into())
}

fn seat(row: &Row, column: usize) -> Result<Seat, Failure> {
    Ok(Seat { tenant: rows::id(row, column)?, client: row.try_get(column + 1)? })
}

fn hold(row: &Row, column: usize) -> Result<u64, Failure> {
    Ok(row.try_get::<_, i64>(column)?.unsigned_abs())
}

fn taken(rows: &[Row]) -> Result<Vec<Taken>, Failure> {
    let one = |row| Ok(Taken { seat: seat(row, 0)?, hold: hold(row, 2)?, record: bytes(row, 3)?, queue: Vec::new() });
    rows.iter().map(one).collect()
}

fn queues(rows: &[Row], taken: &mut [Taken]) -> Result<(), Failure> {
    let places: HashMap<Seat, usize> = taken.iter().enumerate().map(|(at, one)| (one.seat.clone(), at)).collect();
    for row in rows {
        if let Some(at) = places.get(&seat(row, 0)?) {
            taken[*at].queue.push((row.try_get(2)?, bytes(row, 3)?));
        }
    }
    Ok(())
}

#[async_trait]
impl Roaming for PostgresStore {
    async fn holder(&self, seat: &Seat) -> Result<Option<Holder>, Error> {
        let found = self.rows(&HOLDER, &[&seat.tenant.as_str(), &seat.client]).await?;
        let holder = |row: &Row| {
            Ok::<_, Failure>(Holder {
                node: row.try_get(0)?,
                hold: hold(row, 1)?,
                alive: row.try_get(2)?,
                running: row.try_get(3)?,
            })
        };
        Ok(found.first().map(holder).transpose()?)
    }

    async fn claim(&self, seat: &Seat, node: &NodeId, hold: u64) -> Result<Option<Taken>, Error> {
        let (tenant, node, hold) = (seat.tenant.as_str(), node.as_str(), big(hold));
        let params: Vec<Param<'_>> = vec![&tenant, &seat.client, &node, &hold];
        let done = self.transact(&[(&CLAIM, params), (&QUEUE, vec![&tenant, &seat.client])]).await?;
        let [row, queue] = &done[..] else { return Err(Error::Closed) };
        let mut taken = taken(row)?;
        queues(queue, &mut taken)?;
        Ok(taken.pop())
    }

    async fn found(&self, seat: &Seat, node: &NodeId) -> Result<Option<Taken>, Error> {
        let (tenant, node) = (seat.tenant.as_str(), node.as_str());
        let done = self.transact(&[(&FOUND, vec![&tenant, &seat.client, &node])]).await?;
        Ok(taken(done.first().map_or(&[], Vec::as_slice))?.pop())
    }

    async fn adopt(&self, from: &[String], node: &NodeId, limit: usize) -> Result<Vec<Taken>, Error> {
        let (node, limit) = (node.as_str(), big(limit as u64));
        let done = self.transact(&[(&ADOPT, vec![&from, &node, &limit])]).await?;
        let mut taken = taken(done.first().map_or(&[], Vec::as_slice))?;
        if taken.is_empty() {
            return Ok(taken);
        }
        // Nobody but this node writes to these queues now.
        let tenants: Vec<&str> = taken.iter().map(|one| one.seat.tenant.as_str()).collect();
        let clients: Vec<&str> = taken.iter().map(|one| one.seat.client.as_str()).collect();
        let holds: Vec<i64> = taken.iter().map(|one| big(one.hold)).collect();
        let found = self.rows(&QUEUES, &[&tenants, &clients, &holds]).await?;
        queues(&found, &mut taken)?;
        Ok(taken)
    }

    async fn bar(&self, tenant: &TenantId, origin: Origin<'_>) -> Result<(), Error> {
        let (tenant, hold) = (tenant.as_str(), big(origin.hold));
        self.transact(&[(&BAR, vec![&tenant, &origin.session, &hold])]).await?;
        let under_way = async || {
            let found = self.rows(&UNDER_WAY, &[]).await?;
            let bounds = |row: &Row| Ok::<(i64, i64), Failure>((row.try_get(0)?, row.try_get(1)?));
            Ok::<_, Error>(found.first().map(bounds).transpose()?.unwrap_or_default())
        };
        // A batch has its number before it reads what is barred: one that began later reads this, the others are waited for.
        let (_, next) = under_way().await?;
        while under_way().await?.0 < next {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn dead(&self, nodes: &[String]) -> Result<Vec<String>, Error> {
        let found = self.rows(&DEAD, &[&nodes]).await?;
        Ok(found.iter().map(|row| Ok(row.try_get(0)?)).collect::<Result<_, Failure>>()?)
    }

    async fn changes(&self, since: i64) -> Result<Changes, Error> {
        let found = self.rows(&CHANGES, &[&since]).await?;
        let until = found.first().map(|row| row.try_get(0)).transpose().map_err(Failure::from)?.unwrap_or(since);
        let seen = |row: &Row| {
            let record = row.try_get::<_, Option<Vec<u8>>>(5)?.map(Bytes::from);
            Ok::<_, Failure>(Seen { seat: seat(row, 1)?, node: row.try_get(3)?, hold: hold(row, 4)?, record })
        };
        let told = found.iter().filter(|row| row.try_get::<_, Option<&str>>(1).is_ok_and(|tenant| tenant.is_some()));
        Ok(Changes { until, rows: told.map(seen).collect::<Result<_, _>>()? })
    }

    async fn mail(&self, node: &NodeId, limit: usize) -> Result<Vec<Mail>, Error> {
        let found = self.rows(&MAIL, &[&node.as_str(), &big(limit as u64)]).await?;
        let mail = |row: &Row| {
            let (id, queued) = (row.try_get(0)?, row.try_get(3)?);
            Ok::<_, Failure>(Mail { id, seat: seat(row, 1)?, queued, record: bytes(row, 4)? })
        };
        Ok(found.iter().map(mail).collect::<Result<_, _>>()?)
    }

    async fn retained(&self, tenant: &TenantId, prefix: &str) -> Result<Vec<Bytes>, Error> {
        let found = self.rows(&RETAINED, &[&tenant.as_str(), &prefix]).await?;
        Ok(found.iter().map(|row| bytes(row, 0)).collect::<Result<_, _>>()?)
    }

    async fn full(&self, values: usize, limit: usize) -> Result<Vec<TenantId>, Error> {
        let found = self.rows(&FULL, &[&big(values as u64), &big(limit as u64)]).await?;
        Ok(found.iter().map(|row| rows::id(row, 0)).collect::<Result<_, _>>()?)
    }

    async fn arrive(&self, sign: Sign<'_>, node: &NodeId) -> Result<bool, Error> {
        let Sign { tenant, instance, topic, record } = sign;
        let (tenant, instance, node) = (tenant.as_str(), instance.as_str(), node.as_str());
        let here: Vec<Param<'_>> = vec![&tenant, &instance, &node];
        let done = self
            .transact(&[
                (&ALONE, vec![&tenant, &instance]),
                (&ARRIVE, here),
                (&SIGN, vec![&tenant, &instance, &node, &topic, &record]),
            ])
            .await?;
        Ok(done.last().is_some_and(|told| !told.is_empty()))
    }

    async fn part(&self, sign: Sign<'_>, node: Option<&NodeId>) -> Result<bool, Error> {
        let Sign { tenant, instance, topic, record } = sign;
        let (tenant, instance, node) = (tenant.as_str(), instance.as_str(), node.map_or("", NodeId::as_str));
        let nowhere = "";
        let mut parting: Vec<Param<'_>> = vec![&tenant, &instance];
        if !node.is_empty() {
            parting.push(&node);
        }
        let done = self
            .transact(&[
                (&ALONE, vec![&tenant, &instance]),
                (if node.is_empty() { &PART_DEAD } else { &PART }, parting),
                (&SIGN, vec![&tenant, &instance, &nowhere, &topic, &record]),
            ])
            .await?;
        Ok(done.last().is_some_and(|told| !told.is_empty()))
    }

    async fn abandoned(&self, limit: usize) -> Result<Vec<(TenantId, InstanceId)>, Error> {
        let found = self.rows(&ABANDONED, &[&big(limit as u64)]).await?;
        Ok(found.iter().map(|row| Ok((rows::id(row, 0)?, rows::id(row, 1)?))).collect::<Result<_, Failure>>()?)
    }
}
