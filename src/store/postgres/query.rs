//! What readers ask. Whatever must be of one moment is asked by one statement.
//!
//! Not here: `recall`. Tests: `tests/it/store_contract.rs`.

use std::sync::Arc;

use tokio_postgres::{Row, types::Type};

use super::{
    PostgresStore,
    connect::Failure,
    decide::{Standing, head},
    rows,
    sql::Sql,
    writes::{big, int},
};
use crate::{
    store::{
        DeadLetter, Error, Feed, Known, Listed, Loaded, MAX_LOCATED, MqttRow, Outgoing, Pending, Scope, Snapshot,
        Stats,
        journal::{self, Journal, Texts},
        record, replay,
    },
    types::{InstanceId, InstanceKey, Millis, StateChange, StateSnapshot, StimulusId, TenantId, TurnRecord},
};

/// Turns read at once when a state is put together, or a stimulus is looked for: a state stands whole in one of so many.
const PAGE: i64 = 17;
/// A turn whose stimulus did not wait in the inbox was decided within this time of its id's, in milliseconds.
const FAST_MS: i64 = 120_000;
/// Clocks may differ by this much, in milliseconds.
const SKEW_MS: i64 = 10_000;
/// The newest turns are searched for a generated id whatever their time.
const NEWEST: i64 = 64;
/// Enough of a turn's row to hold its head.
const HEAD_BYTES: i32 = 96;
/// Instances listed at once.
const LISTED: i64 = 256;

const LOAD: Sql = Sql {
    text: "SELECT i.life, i.created_at, i.profile,
             ARRAY(SELECT b.rec FROM inbox b WHERE b.tenant = i.tenant AND b.instance = i.instance ORDER BY b.ord),
             ARRAY(SELECT t.rec FROM turns t WHERE t.tenant = i.tenant AND t.life = i.life
               ORDER BY t.turn DESC LIMIT $3),
             ARRAY(SELECT s.stimulus FROM turn_steps s WHERE s.tenant = i.tenant AND s.instance = i.instance
               ORDER BY s.stimulus, s.n),
             ARRAY(SELECT s.rec FROM turn_steps s WHERE s.tenant = i.tenant AND s.instance = i.instance
               ORDER BY s.stimulus, s.n),
             ARRAY(SELECT b.hash FROM blobs b WHERE b.tenant = i.tenant AND b.instance = i.instance ORDER BY b.hash),
             ARRAY(SELECT b.bytes FROM blobs b WHERE b.tenant = i.tenant AND b.instance = i.instance ORDER BY b.hash)
           FROM instances i WHERE i.tenant = $1 AND i.instance = $2",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
const STATE: Sql = Sql {
    text: "SELECT i.life, ARRAY(SELECT t.rec FROM turns t WHERE t.tenant = i.tenant AND t.life = i.life
             ORDER BY t.turn DESC LIMIT $3)
           FROM instances i WHERE i.tenant = $1 AND i.instance = $2",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
const STANDING: Sql = Sql {
    text: "SELECT i.life, (SELECT max(t.turn) FROM turns t WHERE t.tenant = i.tenant AND t.life = i.life)
           FROM instances i WHERE i.tenant = $1 AND i.instance = $2",
    types: &[Type::TEXT, Type::TEXT],
};
/// Turns of a life below a number, newest first.
const BELOW: Sql = Sql {
    text: "SELECT rec FROM turns WHERE tenant = $1 AND life = $2 AND turn < $3 ORDER BY turn DESC LIMIT $4",
    types: &[Type::TEXT, Type::INT8, Type::INT8, Type::INT8],
};
/// Turns of an instance above a number. The limit stands inside: outside, a long history is sorted for a page of it.
const ABOVE: Sql = Sql {
    text: "SELECT t.rec, t.epoch FROM instances i CROSS JOIN LATERAL (SELECT x.turn, x.rec, x.epoch FROM turns x
             WHERE x.tenant = i.tenant AND x.life = i.life AND x.turn > $3 ORDER BY x.turn LIMIT $4) t
           WHERE i.tenant = $1 AND i.instance = $2 ORDER BY t.turn",
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::INT8],
};
const TURN_HEAD: Sql = Sql {
    text: "SELECT substr(rec, 1, $4) FROM turns WHERE tenant = $1 AND life = $2 AND turn = $3",
    types: &[Type::TEXT, Type::INT8, Type::INT8, Type::INT4],
};
/// Everything that is known of a stimulus by its id, in one look.
const FIND: Sql = Sql {
    text: "SELECT i.life, (SELECT max(t.turn) FROM turns t WHERE t.tenant = i.tenant AND t.life = i.life),
             w.rec, d.reason, d.tries, d.at, d.rec, t.rec
           FROM instances i
           LEFT JOIN LATERAL (SELECT b.rec FROM inbox b WHERE b.tenant = i.tenant AND b.stimulus = $3
             AND b.instance = i.instance ORDER BY b.ord LIMIT 1) w ON true
           LEFT JOIN LATERAL (SELECT * FROM dead x WHERE x.tenant = i.tenant AND x.stimulus = $3
             AND x.instance = i.instance ORDER BY x.ord LIMIT 1) d ON true
           LEFT JOIN seen s ON s.tenant = i.tenant AND s.stimulus = $3 AND s.life = i.life
           LEFT JOIN turns t ON t.tenant = i.tenant AND t.life = i.life AND t.turn = s.turn
           WHERE i.tenant = $1 AND i.instance = $2",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT],
};
const FIND_PREFIX: Sql = Sql {
    text: "SELECT t.rec FROM instances i
           JOIN seen s ON s.tenant = i.tenant AND s.stimulus >= $3 AND s.stimulus < $4 AND s.life = i.life
           JOIN turns t ON t.tenant = i.tenant AND t.life = i.life AND t.turn = s.turn
           WHERE i.tenant = $1 AND i.instance = $2 ORDER BY s.turn DESC",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT, Type::TEXT],
};
const LOCATE: Sql = Sql {
    text: "SELECT instance FROM (
             SELECT instance FROM inbox WHERE tenant = $1 AND stimulus = $2
             UNION SELECT instance FROM dead WHERE tenant = $1 AND stimulus = $2
             UNION SELECT i.instance FROM seen s JOIN instances i ON i.tenant = s.tenant AND i.life = s.life
               WHERE s.tenant = $1 AND s.stimulus = $2) f
           ORDER BY instance COLLATE \"C\" LIMIT $3",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
const LIST: Sql = Sql {
    text: "SELECT instance, created_at, profile FROM instances
           WHERE tenant = $1 AND instance > $2 AND (profile IS NOT NULL OR $3) ORDER BY instance LIMIT $4",
    types: &[Type::TEXT, Type::TEXT, Type::BOOL, Type::INT8],
};
const WAITING: Sql = Sql {
    text: "SELECT DISTINCT tenant, instance FROM inbox
           WHERE (tenant, instance) > ($1, $2) AND ($3::int[] IS NULL OR shard = ANY($3))
           ORDER BY tenant, instance LIMIT $4",
    types: &[Type::TEXT, Type::TEXT, Type::INT4_ARRAY, Type::INT8],
};
const DEAD: Sql = Sql {
    text: "SELECT reason, tries, at, rec FROM dead WHERE tenant = $1 AND instance = $2
           AND ord > coalesce((SELECT max(ord) FROM dead WHERE tenant = $1 AND instance = $2 AND stimulus = $3), 0)
           ORDER BY ord LIMIT $4",
    types: &[Type::TEXT, Type::TEXT, Type::TEXT, Type::INT8],
};
const OUTGOING: Sql = Sql {
    text: "SELECT t.shard, t.position, t.tenant, t.instance, t.rec
           FROM unnest($1::int[], $2::bigint[]) WITH ORDINALITY f(shard, after, n)
           CROSS JOIN LATERAL (SELECT * FROM turns x WHERE x.shard = f.shard AND x.position > f.after
             ORDER BY x.position LIMIT $3) t
           ORDER BY f.n, t.position LIMIT $3",
    types: &[Type::INT4_ARRAY, Type::INT8_ARRAY, Type::INT8],
};
const SHIPPED: Sql =
    Sql { text: "SELECT feed, position FROM shipped WHERE feed = ANY($1)", types: &[Type::INT4_ARRAY] };
const DUE: Sql = Sql {
    text: "SELECT tenant, instance, effect, tries, due, rec FROM pending
           WHERE due <= $1 AND ($2::int[] IS NULL OR shard = ANY($2))
           ORDER BY due, tenant, instance, effect LIMIT $3",
    types: &[Type::INT8, Type::INT4_ARRAY, Type::INT8],
};
const SESSIONS: Sql = Sql { text: "SELECT tenant, client, rec FROM mqtt_sessions ORDER BY tenant, client", types: &[] };
const QUEUED: Sql =
    Sql { text: "SELECT tenant, client, rec, ord FROM mqtt_queue ORDER BY tenant, client, ord", types: &[] };
const RETAINED: Sql = Sql { text: "SELECT tenant, topic, rec FROM mqtt_retained ORDER BY tenant, topic", types: &[] };
const STATS: Sql = Sql {
    text: "SELECT (SELECT count(*) FROM inbox), (SELECT count(*) FROM dead), (SELECT count(*) FROM pending),
             pg_database_size(current_database())",
    types: &[],
};

/// The shards of a scope as a parameter; none for all.
fn shards(scope: &Scope) -> Option<Vec<i32>> {
    scope.shards().map(|shards| shards.iter().map(|shard| int(*shard)).collect())
}

/// The steps that [`LOAD`] found.
fn journals(row: &Row) -> Result<Vec<Journal>, Error> {
    let stimuli: Vec<&str> = row.try_get(5).map_err(column)?;
    let recs: Vec<&[u8]> = row.try_get(6).map_err(column)?;
    let hashes: Vec<&[u8]> = row.try_get(7).map_err(column)?;
    let bytes: Vec<&[u8]> = row.try_get(8).map_err(column)?;
    let mut texts = Texts::default();
    for (hash, bytes) in hashes.iter().zip(&bytes) {
        texts.add(hash, bytes)?;
    }
    let read = |(stimulus, rec): (&&str, &&[u8])| {
        let id = StimulusId::new(*stimulus).map_err(|e| Error::Corrupt(format!("a stored id '{stimulus}': {e}")))?;
        Ok((id, texts.decode(rec)?))
    };
    Ok(journal::gather(stimuli.iter().zip(&recs).map(read).collect::<Result<Vec<_>, Error>>()?))
}

fn limit(count: usize) -> i64 {
    big(count as u64)
}

impl PostgresStore {
    pub(super) async fn load_instance(&self, key: &InstanceKey, snapshot: Option<&Snapshot>) -> Result<Loaded, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        // With a snapshot the newest turn is enough to see whether anything came since.
        let turns = if snapshot.is_some() { 1 } else { PAGE };
        let found = self.rows_of(&key.tenant, &LOAD, &[&names.0, &names.1, &turns]).await?;
        let Some(row) = found.first() else {
            return Ok(Loaded {
                exists: false,
                profile: None,
                created_at: None,
                head: crate::store::Head::default(),
                state: replay::empty_state()?,
                turns_since_full: 0,
                inbox: Vec::new(),
                journals: Vec::new(),
            });
        };
        let life: i64 = row.try_get(0).map_err(column)?;
        let inbox: Vec<&[u8]> = row.try_get(3).map_err(column)?;
        let inbox =
            inbox.into_iter().map(|rec| record::decode_stimulus(rec).map(Arc::new)).collect::<Result<_, _>>()?;
        let newest: Vec<&[u8]> = row.try_get(4).map_err(column)?;
        let turn = newest.first().map_or(Ok(0), |rec| rows::decode(rec).map(|(_, record)| record.turn))?;
        let same = snapshot.filter(|snapshot| snapshot.head == head(Standing { life, turn }));
        let (state, turns_since_full, turn) = match same {
            Some(snapshot) => (snapshot.state.clone(), snapshot.turns_since_full, turn),
            None => self.replay(key, life, newest).await?,
        };
        Ok(Loaded {
            exists: true,
            profile: rows::profile(row, 2)?,
            created_at: Some(Millis(row.try_get(1).map_err(column)?)),
            head: head(Standing { life, turn }),
            state,
            turns_since_full,
            inbox,
            journals: journals(row)?,
        })
    }

    pub(super) async fn read_state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let found = self.fresh_rows(&key.tenant, &STATE, &[&names.0, &names.1, &PAGE]).await?;
        let Some(row) = found.first() else { return Ok(None) };
        let life = row.try_get(0).map_err(column)?;
        Ok(Some(self.replay(key, life, row.try_get(1).map_err(column)?).await?.0))
    }

    /// The state after the newest of these turns, the turns since the one that holds it whole, and the number of the newest.
    /// When none of them holds it whole, reads on, however far that is. What is read on never changes.
    async fn replay(
        &self,
        key: &InstanceKey,
        life: i64,
        newest: Vec<&[u8]>,
    ) -> Result<(StateSnapshot, u64, u64), Error> {
        let mut turns: Vec<TurnRecord> = Vec::new();
        let mut whole = 0;
        for rec in newest {
            let (_, turn) = rows::decode(rec)?;
            let is_whole = matches!(turn.state, StateChange::Full(_));
            let number = turn.turn;
            turns.push(turn);
            if is_whole {
                whole = number;
                break;
            }
        }
        let last = turns.first().map_or(0, |turn| turn.turn);
        while whole == 0 && turns.last().is_some_and(|turn| turn.turn > 1) {
            let below = big(turns.last().map_or(0, |turn| turn.turn));
            let page = self.rows_of(&key.tenant, &BELOW, &[&key.tenant.as_str(), &life, &below, &(PAGE * 16)]).await?;
            if page.is_empty() {
                return Err(Error::Corrupt(format!("the turn of {key} before {below} is gone")));
            }
            for row in &page {
                let turn = rows::turn(row, 0)?;
                let (number, is_whole) = (turn.turn, matches!(turn.state, StateChange::Full(_)));
                turns.push(turn);
                if is_whole {
                    whole = number;
                    break;
                }
            }
        }
        Ok((replay::replay(turns.iter().rev())?, last - whole, last))
    }

    pub(super) async fn read_turns(
        &self,
        key: &InstanceKey,
        after: u64,
        count: usize,
    ) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let found = self.fresh_rows(&key.tenant, &ABOVE, &[&names.0, &names.1, &big(after), &limit(count)]).await?;
        let turn = |row: &Row| {
            let epoch: i64 = row.try_get(1).map_err(column)?;
            Ok(Arc::new(TurnRecord { epoch: epoch.unsigned_abs(), ..rows::turn(row, 0)? }))
        };
        found.iter().map(turn).collect()
    }

    pub(super) async fn find_stimulus(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let found = self.fresh_rows(&key.tenant, &FIND, &[&names.0, &names.1, &stimulus.as_str()]).await?;
        let Some(row) = found.first() else { return Ok(None) };
        if is_there(row, 2) {
            return Ok(Some(Known::Waiting(Arc::new(rows::stimulus(row, 2)?))));
        }
        if is_there(row, 6) {
            return Ok(Some(Known::Dead(Arc::new(rows::letter(row, 3)?))));
        }
        if is_there(row, 7) {
            return Ok(Some(Known::Decided(Arc::new(rows::turn(row, 7)?))));
        }
        let Some(generated) = replay::generated_at(stimulus) else { return Ok(None) };
        let life: i64 = row.try_get(0).map_err(column)?;
        let last: Option<i64> = row.try_get(1).map_err(column)?;
        let found = self.by_time(key, life, last.unwrap_or(0), generated, stimulus).await?;
        Ok(found.map(|turn| Known::Decided(Arc::new(turn))))
    }

    /// The turn that decided a stimulus with a generated id. It was decided soon after the id was made, unless it waited in
    /// the inbox, and then the index has it.
    async fn by_time(
        &self,
        key: &InstanceKey,
        life: i64,
        last: i64,
        generated: Millis,
        stimulus: &StimulusId,
    ) -> Result<Option<TurnRecord>, Error> {
        let (earliest, latest) = (generated.plus(-SKEW_MS), generated.plus(FAST_MS));
        // Turns up to `low` are not later than it can be, those from `high` on are.
        let (mut low, mut high) = (0, last + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let found =
                self.rows_of(&key.tenant, &TURN_HEAD, &[&key.tenant.as_str(), &life, &middle, &HEAD_BYTES]).await?;
            let Some(row) = found.first() else { return Ok(None) };
            let (head, _) = record::decode_row(row.try_get(0).map_err(column)?, 0)?;
            if head.decided_at > latest { high = middle } else { low = middle }
        }
        let near = self.walk(key, life, high, stimulus, |row| row.decided_at >= earliest).await?;
        if near.is_some() {
            return Ok(near);
        }
        let oldest = (last - NEWEST).max(0).unsigned_abs();
        self.walk(key, life, last + 1, stimulus, |row| row.place.turn > oldest).await
    }

    /// Walks back turn by turn from below a number while `goes_on`, looking for a stimulus.
    async fn walk(
        &self,
        key: &InstanceKey,
        life: i64,
        below: i64,
        stimulus: &StimulusId,
        goes_on: impl Fn(&record::Row) -> bool,
    ) -> Result<Option<TurnRecord>, Error> {
        let mut below = below;
        loop {
            let page = self.rows_of(&key.tenant, &BELOW, &[&key.tenant.as_str(), &life, &below, &NEWEST]).await?;
            if page.is_empty() {
                return Ok(None);
            }
            for row in &page {
                let (head, turn) = rows::decode(row.try_get(0).map_err(column)?)?;
                below = big(head.place.turn);
                if turn.stimulus.id == *stimulus {
                    return Ok(Some(turn));
                }
                if !goes_on(&head) {
                    return Ok(None);
                }
            }
        }
    }

    pub(super) async fn find_by_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error> {
        // Ids are made of characters below this one.
        let end = format!("{prefix}\u{7f}");
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let found = self.fresh_rows(&key.tenant, &FIND_PREFIX, &[&names.0, &names.1, &prefix, &end]).await?;
        for row in &found {
            let turn = rows::turn(row, 0)?;
            if turn.stimulus.repeatable {
                return Ok(Some(Known::Decided(Arc::new(turn))));
            }
        }
        Ok(None)
    }

    pub(super) async fn locate_stimulus(
        &self,
        tenant: &TenantId,
        stimulus: &StimulusId,
    ) -> Result<Vec<InstanceId>, Error> {
        let found =
            self.fresh_rows(tenant, &LOCATE, &[&tenant.as_str(), &stimulus.as_str(), &limit(MAX_LOCATED)]).await?;
        Ok(found.iter().map(|row| rows::id(row, 0)).collect::<Result<_, _>>()?)
    }

    pub(super) async fn list_instances(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        count: usize,
    ) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        let mut after = after.map_or_else(String::new, |after| after.as_str().to_owned());
        while listed.len() < count {
            let page = self.fresh_rows(tenant, &LIST, &[&tenant.as_str(), &after, &label.is_none(), &LISTED]).await?;
            for row in &page {
                let instance: InstanceId = rows::id(row, 0)?;
                instance.as_str().clone_into(&mut after);
                let profile = rows::profile(row, 2)?;
                let labels = profile.as_ref().map(|profile| &profile.labels);
                let fits =
                    label.is_none_or(|(name, value)| labels.and_then(|l| l.get(name)).is_some_and(|v| v == value));
                if fits && listed.len() < count {
                    listed.push(Listed { instance, profile, created_at: Millis(row.try_get(1).map_err(column)?) });
                }
            }
            if page.len() < usize::try_from(LISTED).unwrap_or(0) {
                break;
            }
        }
        Ok(listed)
    }

    pub(super) async fn waiting_instances(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        count: usize,
    ) -> Result<Vec<InstanceKey>, Error> {
        let (tenant, instance) = after.map_or(("", ""), |key| (key.tenant.as_str(), key.instance.as_str()));
        let found = self.rows(&WAITING, &[&tenant, &instance, &shards(scope), &limit(count)]).await?;
        Ok(found.iter().map(|row| rows::key(row, 0)).collect::<Result<_, _>>()?)
    }

    pub(super) async fn read_dead(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        count: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let after = after.map(StimulusId::as_str);
        let found = self.fresh_rows(&key.tenant, &DEAD, &[&names.0, &names.1, &after, &limit(count)]).await?;
        Ok(found.iter().map(|row| rows::letter(row, 0)).collect::<Result<_, _>>()?)
    }

    pub(super) async fn read_outgoing(&self, after: &[(Feed, i64)], count: usize) -> Result<Vec<Outgoing>, Error> {
        let (feeds, positions): (Vec<i32>, Vec<i64>) =
            after.iter().map(|(feed, position)| (int(feed.0), *position)).unzip();
        let found = self.rows(&OUTGOING, &[&feeds, &positions, &limit(count)]).await?;
        found
            .iter()
            .map(|row| {
                let feed: i32 = row.try_get(0).map_err(column)?;
                Ok(Outgoing {
                    feed: Feed(feed.unsigned_abs()),
                    position: row.try_get(1).map_err(column)?,
                    key: rows::key(row, 2)?,
                    turn: Arc::new(rows::turn(row, 4)?),
                })
            })
            .collect()
    }

    pub(super) async fn read_shipped(&self, feeds: &[Feed]) -> Result<Vec<i64>, Error> {
        let numbers: Vec<i32> = feeds.iter().map(|feed| int(feed.0)).collect();
        let found = self.rows(&SHIPPED, &[&numbers]).await?;
        let mut positions = std::collections::HashMap::new();
        for row in &found {
            positions.insert(row.try_get::<_, i32>(0).map_err(column)?, row.try_get::<_, i64>(1).map_err(column)?);
        }
        Ok(numbers.iter().map(|feed| positions.get(feed).copied().unwrap_or(0)).collect())
    }

    pub(super) async fn read_due(&self, scope: &Scope, now: Millis, count: usize) -> Result<Vec<Pending>, Error> {
        let found = self.rows(&DUE, &[&now.0, &shards(scope), &limit(count)]).await?;
        found
            .iter()
            .map(|row| {
                let tries: i64 = row.try_get(3).map_err(column)?;
                record::decode_pending(
                    rows::key(row, 0)?,
                    row.try_get(2).map_err(column)?,
                    u32::try_from(tries).unwrap_or(u32::MAX),
                    Millis(row.try_get(4).map_err(column)?),
                    row.try_get(5).map_err(column)?,
                )
            })
            .collect()
    }

    pub(super) async fn read_mqtt(&self) -> Result<Vec<MqttRow>, Error> {
        let record = |row: &Row| Ok::<_, Error>(row.try_get::<_, Vec<u8>>(2).map_err(column)?.into());
        let mut out = Vec::new();
        for row in &self.rows(&SESSIONS, &[]).await? {
            let client = row.try_get(1).map_err(column)?;
            out.push(MqttRow::Session { tenant: rows::id(row, 0)?, client, record: record(row)? });
        }
        for row in &self.rows(&QUEUED, &[]).await? {
            let (client, order) = (row.try_get(1).map_err(column)?, row.try_get(3).map_err(column)?);
            out.push(MqttRow::Queued { tenant: rows::id(row, 0)?, client, order, record: record(row)? });
        }
        for row in &self.rows(&RETAINED, &[]).await? {
            let topic = row.try_get(1).map_err(column)?;
            out.push(MqttRow::Retained { tenant: rows::id(row, 0)?, topic, record: record(row)? });
        }
        Ok(out)
    }

    pub(super) async fn read_stats(&self) -> Result<Stats, Error> {
        let found = self.rows(&STATS, &[]).await?;
        let figure = |at| found.first().and_then(|row| row.try_get::<_, i64>(at).ok()).map_or(0, i64::unsigned_abs);
        Ok(Stats { queue: self.queued(), inbox: figure(0), dead: figure(1), pending: figure(2), bytes: figure(3) })
    }

    /// Where an instance stands, if it exists.
    pub(super) async fn standing(&self, key: &InstanceKey) -> Result<Option<Standing>, Error> {
        let names: (&str, &str) = (key.tenant.as_str(), key.instance.as_str());
        let found = self.rows_of(&key.tenant, &STANDING, &[&names.0, &names.1]).await?;
        found
            .first()
            .map(|row| {
                let turn: Option<i64> = row.try_get(1).map_err(column)?;
                Ok(Standing { life: row.try_get(0).map_err(column)?, turn: turn.unwrap_or(0).unsigned_abs() })
            })
            .transpose()
    }

    /// Turns of a life, by their numbers.
    pub(super) async fn read_turns_at(
        &self,
        key: &InstanceKey,
        life: i64,
        turns: &[i64],
    ) -> Result<Vec<TurnRecord>, Error> {
        let found = self.rows_of(&key.tenant, &TURNS_AT, &[&key.tenant.as_str(), &life, &turns]).await?;
        Ok(found.iter().map(|row| rows::turn(row, 0)).collect::<Result<_, _>>()?)
    }
}

const TURNS_AT: Sql = Sql {
    text: "SELECT rec FROM turns WHERE tenant = $1 AND life = $2 AND turn = ANY($3)",
    types: &[Type::TEXT, Type::INT8, Type::INT8_ARRAY],
};

/// A column that is not what it should be.
fn column(error: tokio_postgres::Error) -> Error {
    Failure::from(error).into()
}

fn is_there(row: &Row, column: usize) -> bool {
    matches!(row.try_get::<_, Option<&[u8]>>(column), Ok(Some(_)))
}
