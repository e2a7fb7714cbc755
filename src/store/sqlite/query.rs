//! What readers ask, each in one read transaction over a look at the memtable.
//!
//! The look comes first, the transaction after: what the look does not find is folded and stands in the tables; what it
//! finds has its row in the log. Not here: `recall`. Tests: `tests/it/store_contract.rs`.

use std::{sync::Arc, time::Duration};

use rusqlite::{Connection, Transaction, params};

use super::{
    memtable::{Latest, Memtable, id_key},
    reader::View,
    record::{self, Row},
    rows, steps,
};
use crate::{
    store::{
        DeadLetter, Error, Feed, Head, Known, Listed, Loaded, MAX_LOCATED, MqttRow, Outgoing, Pending, Scope, Snapshot,
        Stats, links::Place, replay,
    },
    types::{
        InstanceId, InstanceKey, Millis, Profile, StateChange, StateSnapshot, Stimulus, StimulusId, TenantId,
        TurnRecord,
    },
};

/// How often a look is repeated when the instance moved between it and the transaction.
const LOOKS: u32 = 200;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);
/// A turn whose stimulus did not wait in the inbox was decided within this time of its id's, in milliseconds.
const FAST_MS: i64 = 120_000;
/// Clocks may differ by this much, in milliseconds.
const SKEW_MS: i64 = 10_000;
/// The newest turns are searched for a generated id whatever their time.
const NEWEST: u64 = 64;

/// A look at the memtable and a transaction that agree about an instance.
pub(super) struct Settled<'a, T> {
    pub tx: Transaction<'a>,
    latest: Option<Latest>,
    /// What else was looked for.
    pub extra: T,
}

impl<T> Settled<'_, T> {
    pub(super) fn head(&self, key: &InstanceKey) -> Result<Head, Error> {
        match self.latest {
            Some(latest) => Ok(latest.head),
            None => rows::folded_head(&self.tx, key),
        }
    }
}

impl View {
    /// A read transaction. Its snapshot is that of its first read.
    fn begin(&self) -> Result<Transaction<'_>, Error> {
        Ok(self.db.unchecked_transaction()?)
    }

    /// A look and a transaction between which no commit of the instance's turns lies, so that head, inbox and index are
    /// those of one moment. When commits follow each other so closely that there is no gap to look through, the last look
    /// stands: nothing in it is untrue, but a stimulus may be seen neither waiting nor decided.
    pub(super) fn settled<T: PartialEq>(
        &self,
        key: &InstanceKey,
        extra: impl Fn(&Memtable) -> T,
    ) -> Result<Settled<'_, T>, Error> {
        let look = || {
            let memtable = self.shared.memtable();
            (memtable.is_moving(key), memtable.head(key), extra(&memtable))
        };
        let mut looks = 0;
        loop {
            let before = look();
            let tx = self.begin()?;
            rows::meta(&tx, "folded")?;
            let after = look();
            looks += 1;
            if (before == after && !after.0) || looks == LOOKS {
                return Ok(Settled { tx, latest: before.1, extra: before.2 });
            }
            drop(tx);
            std::thread::sleep(PAUSE);
        }
    }

    pub(super) fn load(&self, key: &InstanceKey, snapshot: Option<&Snapshot>) -> Result<Loaded, Error> {
        let settled = self.settled(key, |_| ())?;
        let Some((profile, created_at)) = instance(&settled.tx, key)? else {
            return Ok(Loaded {
                exists: false,
                profile: None,
                created_at: None,
                head: Head::default(),
                state: replay::empty_state()?,
                turns_since_full: 0,
                inbox: Vec::new(),
                journals: Vec::new(),
            });
        };
        let head = settled.head(key)?;
        // Positions in the log are never used again: the same head is the same history.
        let (state, turns_since_full) = match snapshot.filter(|snapshot| snapshot.head == head) {
            Some(snapshot) => (snapshot.state.clone(), snapshot.turns_since_full),
            None => state(&settled.tx, key, head)?,
        };
        let inbox = inbox(&settled.tx, key)?;
        let journals = steps::journals(&settled.tx, key)?;
        Ok(Loaded {
            exists: true,
            profile,
            created_at: Some(created_at),
            head,
            state,
            turns_since_full,
            inbox,
            journals,
        })
    }

    pub(super) fn state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error> {
        let settled = self.settled(key, |_| ())?;
        if rows::born(&settled.tx, key)?.is_none() {
            return Ok(None);
        }
        let head = settled.head(key)?;
        Ok(Some(state(&settled.tx, key, head)?.0))
    }

    pub(super) fn turns(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let settled = self.settled(key, |_| ())?;
        let head = settled.head(key)?;
        let last = head.turn.min(after.saturating_add(u64::try_from(limit).unwrap_or(u64::MAX)));
        if last <= after {
            return Ok(Vec::new());
        }
        let mut turns = Vec::with_capacity(usize::try_from(last - after).unwrap_or(0));
        let mut place = descend(&settled.tx, key, head.place(), last + 1)?;
        while place.turn > after + 1 {
            let Some((_, seq)) = place.jump(place.turn - 1) else { break };
            let (row, record) = rows::turn_at(&settled.tx, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            turns.push(Arc::new(record));
            place = row.place;
        }
        turns.reverse();
        Ok(turns)
    }

    pub(super) fn find(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error> {
        let id = id_key(key, stimulus);
        let settled = self.settled(key, |memtable| memtable.decided(key, &id))?;
        let tx = &settled.tx;
        if rows::born(tx, key)?.is_none() {
            return Ok(None);
        }
        if let Some((_, waiting)) = rows::waiting(tx, key, stimulus)? {
            return Ok(Some(Known::Waiting(Arc::new(waiting))));
        }
        if let Some((_, letter)) = rows::dead(tx, key, stimulus)? {
            return Ok(Some(Known::Dead(Arc::new(letter))));
        }
        let seq = match settled.extra {
            Some(decided) => Some(decided.seq),
            None => rows::seen(tx, rows::days(tx)?.into_iter(), key, stimulus)?,
        };
        let found = match (seq, replay::generated_at(stimulus)) {
            (Some(seq), _) => rows::turn_at(tx, key, seq)?.map(|(_, record)| record),
            (None, Some(generated)) => by_time(tx, key, settled.head(key)?, generated, stimulus)?,
            (None, None) => None,
        };
        Ok(found.map(|record| Known::Decided(Arc::new(record))))
    }

    pub(super) fn find_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error> {
        let settled = self.settled(key, |memtable| memtable.decided_prefix(key, prefix))?;
        let mut seqs: Vec<i64> = settled.extra.iter().map(|found| found.seq).collect();
        let tx = settled.tx;
        let Some(born) = rows::born(&tx, key)? else { return Ok(None) };
        let mut query = tx.prepare_cached(
            "SELECT seq FROM seen WHERE bucket = ?1 AND tenant = ?2 AND stimulus >= ?3 AND stimulus < ?4
             AND instance = ?5 AND seq > ?6",
        )?;
        // Ids are made of characters below this one.
        let end = format!("{prefix}\u{7f}");
        for day in rows::days(&tx)? {
            let names = params![day, key.tenant.as_str(), prefix, end, key.instance.as_str(), born];
            let found = query.query_map(names, |row| row.get(0))?;
            for seq in found {
                seqs.push(seq?);
            }
        }
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        for seq in seqs.into_iter().filter(|seq| *seq > born) {
            let found = rows::turn_at(&tx, key, seq)?.map(|(_, record)| record);
            if let Some(record) = found.filter(|record| record.stimulus.repeatable) {
                return Ok(Some(Known::Decided(Arc::new(record))));
            }
        }
        Ok(None)
    }

    pub(super) fn locate(&self, tenant: &TenantId, stimulus: &StimulusId) -> Result<Vec<InstanceId>, Error> {
        let unfolded = self.shared.memtable().holders(tenant, stimulus);
        let tx = self.begin()?;
        // A stimulus that was decided between look and transaction has left the inbox: the second look finds it.
        rows::meta(&tx, "folded")?;
        let later = self.shared.memtable().holders(tenant, stimulus);
        let mut found: Vec<InstanceId> = unfolded.into_iter().chain(later).map(|(instance, _)| instance).collect();
        for query in [
            "SELECT instance FROM inbox WHERE tenant = ?1 AND stimulus = ?2",
            "SELECT instance FROM dead WHERE tenant = ?1 AND stimulus = ?2",
        ] {
            let mut query = tx.prepare_cached(query)?;
            let mut rows = query.query(params![tenant.as_str(), stimulus.as_str()])?;
            while let Some(row) = rows.next()? {
                found.push(rows::id(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?);
            }
        }
        let mut query = tx.prepare_cached(
            "SELECT s.instance FROM seen s JOIN instances i ON i.tenant = s.tenant AND i.instance = s.instance
             WHERE s.bucket = ?1 AND s.tenant = ?2 AND s.stimulus = ?3 AND s.seq > i.born ORDER BY s.instance LIMIT ?4",
        )?;
        for day in rows::days(&tx)? {
            let mut rows = query.query(params![day, tenant.as_str(), stimulus.as_str(), MAX_LOCATED])?;
            while let Some(row) = rows.next()? {
                found.push(rows::id(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?);
            }
        }
        found.sort_unstable();
        found.dedup();
        found.truncate(MAX_LOCATED);
        Ok(found)
    }

    pub(super) fn list(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error> {
        let tx = self.begin()?;
        let mut query = tx.prepare_cached(
            "SELECT instance, created_at, profile FROM instances
             WHERE tenant = ?1 AND instance > ?2 AND (profile IS NOT NULL OR ?3) ORDER BY instance",
        )?;
        let after = after.map_or("", InstanceId::as_str);
        let mut found = query.query(params![tenant.as_str(), after, label.is_none()])?;
        let mut listed = Vec::new();
        while listed.len() < limit {
            let Some(row) = found.next()? else { break };
            let profile = profile(row.get_ref(2)?.as_str_or_null().map_err(rusqlite::Error::from)?)?;
            let labels = profile.as_ref().map(|profile| &profile.labels);
            let fits = label.is_none_or(|(name, value)| labels.and_then(|l| l.get(name)).is_some_and(|v| v == value));
            if fits {
                let instance = rows::id(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
                listed.push(Listed { instance, profile, created_at: Millis(row.get(1)?) });
            }
        }
        Ok(listed)
    }

    pub(super) fn waiting(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        limit: usize,
    ) -> Result<Vec<InstanceKey>, Error> {
        let tx = self.begin()?;
        // One seek per instance, however many stimuli wait for it.
        let mut query = tx.prepare_cached(
            "SELECT tenant, instance FROM inbox WHERE (tenant, instance) > (?1, ?2)
             ORDER BY tenant, instance LIMIT 1",
        )?;
        let mut keys: Vec<InstanceKey> = Vec::new();
        let mut seen = after.cloned();
        while keys.len() < limit {
            let last = seen.as_ref();
            let names = params![last.map_or("", |k| k.tenant.as_str()), last.map_or("", |k| k.instance.as_str())];
            let mut found = query.query(names)?;
            let Some(row) = found.next()? else { break };
            let key = rows::key(row, 0, 1)?;
            drop(found);
            if scope.contains(&key) {
                keys.push(key.clone());
            }
            seen = Some(key);
        }
        Ok(keys)
    }

    pub(super) fn dead_letters(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        let tx = self.begin()?;
        let named = after.map(|after| rows::dead(&tx, key, after)).transpose()?.flatten();
        let from = named.map_or(i64::MIN, |(ord, _)| ord);
        let mut query = tx.prepare_cached(
            "SELECT ord, reason, tries, at, rec FROM dead WHERE tenant = ?1 AND instance = ?2 AND ord > ?3
             ORDER BY ord LIMIT ?4",
        )?;
        let mut found = query.query(params![key.tenant.as_str(), key.instance.as_str(), from, limit])?;
        let mut letters = Vec::new();
        while let Some(row) = found.next()? {
            letters.push(rows::letter(row)?);
        }
        Ok(letters)
    }

    /// Turns with effects after a position, and up to where the log was searched.
    pub(super) fn outgoing(&self, after: i64, limit: usize) -> Result<(Vec<Outgoing>, i64), Error> {
        let tx = self.begin()?;
        let newest: Option<i64> = tx.prepare_cached("SELECT max(seq) FROM turns")?.query_row([], |row| row.get(0))?;
        let mut query = tx.prepare_cached(
            "SELECT seq, tenant, instance, rec FROM turns WHERE seq > ?1 AND (flags & ?2) != 0 ORDER BY seq LIMIT ?3",
        )?;
        let mut found = query.query(params![after, record::EFFECTS, limit])?;
        let mut outgoing = Vec::new();
        while let Some(row) = found.next()? {
            let position = row.get(0)?;
            let (_, bytes) = record::decode_row(rows::blob(row, 3)?, position)?;
            let turn = Arc::new(record::decode_record(bytes, position)?);
            outgoing.push(Outgoing { feed: Feed(0), position, key: rows::key(row, 1, 2)?, turn });
        }
        Ok((outgoing, newest.unwrap_or(0)))
    }

    pub(super) fn shipped(&self) -> Result<i64, Error> {
        rows::meta(&self.db, "shipped")
    }

    pub(super) fn due(&self, scope: &Scope, now: Millis, limit: usize) -> Result<Vec<Pending>, Error> {
        let tx = self.begin()?;
        let mut query = tx.prepare_cached(
            "SELECT tenant, instance, effect, tries, due, rec FROM pending WHERE due <= ?1
             ORDER BY due, tenant, instance, effect",
        )?;
        let mut found = query.query(params![now.0])?;
        let mut due = Vec::new();
        while due.len() < limit {
            let Some(row) = found.next()? else { break };
            let (key, time) = (rows::key(row, 0, 1)?, Millis(row.get(4)?));
            if !scope.contains(&key) {
                continue;
            }
            due.push(record::decode_pending(key, row.get(2)?, row.get(3)?, time, rows::blob(row, 5)?)?);
        }
        Ok(due)
    }

    pub(super) fn mqtt_rows(&self) -> Result<Vec<MqttRow>, Error> {
        let tx = self.begin()?;
        let tenant = |row: &rusqlite::Row<'_>| -> Result<TenantId, Error> {
            rows::id(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)
        };
        let mut out = Vec::new();
        let mut query = tx.prepare("SELECT tenant, client, rec FROM mqtt_sessions ORDER BY tenant, client")?;
        let mut found = query.query([])?;
        while let Some(row) = found.next()? {
            let record = row.get::<_, Vec<u8>>(2)?.into();
            out.push(MqttRow::Session { tenant: tenant(row)?, client: row.get(1)?, record });
        }
        let mut query = tx.prepare("SELECT tenant, client, ord, rec FROM mqtt_queue ORDER BY tenant, client, ord")?;
        let mut found = query.query([])?;
        while let Some(row) = found.next()? {
            let record = row.get::<_, Vec<u8>>(3)?.into();
            out.push(MqttRow::Queued { tenant: tenant(row)?, client: row.get(1)?, order: row.get(2)?, record });
        }
        let mut query = tx.prepare("SELECT tenant, topic, rec FROM mqtt_retained ORDER BY tenant, topic")?;
        let mut found = query.query([])?;
        while let Some(row) = found.next()? {
            let record = row.get::<_, Vec<u8>>(2)?.into();
            out.push(MqttRow::Retained { tenant: tenant(row)?, topic: row.get(1)?, record });
        }
        Ok(out)
    }

    pub(super) fn stats(&self) -> Result<Stats, Error> {
        let queue = self.shared.jobs.len();
        let tx = self.begin()?;
        let count =
            |query: &str| -> Result<u64, Error> { Ok(tx.prepare_cached(query)?.query_row([], |row| row.get(0))?) };
        let inbox = count("SELECT count(*) FROM inbox")?;
        let dead = count("SELECT count(*) FROM dead")?;
        let pending = count("SELECT count(*) FROM pending")?;
        Ok(Stats { queue, inbox, dead, pending, bytes: 0 })
    }
}

fn profile(json: Option<&str>) -> Result<Option<Arc<Profile>>, Error> {
    let parse = |json| serde_json::from_str(json).map_err(|e| Error::Corrupt(format!("a stored profile: {e}")));
    json.map(parse).transpose().map(|profile| profile.map(Arc::new))
}

/// An instance's profile and when it was created.
type Made = (Option<Arc<Profile>>, Millis);

fn instance(db: &Connection, key: &InstanceKey) -> Result<Option<Made>, Error> {
    let mut query =
        db.prepare_cached("SELECT created_at, profile FROM instances WHERE tenant = ?1 AND instance = ?2")?;
    let mut found = query.query(params![key.tenant.as_str(), key.instance.as_str()])?;
    let Some(row) = found.next()? else { return Ok(None) };
    let json = row.get_ref(1)?.as_str_or_null().map_err(rusqlite::Error::from)?;
    Ok(Some((profile(json)?, Millis(row.get(0)?))))
}

fn inbox(db: &Connection, key: &InstanceKey) -> Result<Vec<Arc<Stimulus>>, Error> {
    let mut query = db.prepare_cached("SELECT rec FROM inbox WHERE tenant = ?1 AND instance = ?2 ORDER BY ord")?;
    let mut found = query.query(params![key.tenant.as_str(), key.instance.as_str()])?;
    let mut stimuli = Vec::new();
    while let Some(row) = found.next()? {
        stimuli.push(Arc::new(record::decode_stimulus(rows::blob(row, 0)?)?));
    }
    Ok(stimuli)
}

/// The state at a head, and the turns since the one that holds it whole. Reads back to that one, however far it is; it is
/// `TURNS_PER_FULL_STATE` turns back at most for instances that keep that promise.
fn state(db: &Connection, key: &InstanceKey, head: Head) -> Result<(StateSnapshot, u64), Error> {
    let mut turns: Vec<TurnRecord> = Vec::new();
    let mut place = head.place();
    let mut whole = 0;
    while let Some((_, seq)) = place.jump(place.turn - 1) {
        let (row, record) = rows::turn_at(db, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
        place = row.place;
        let is_whole = matches!(record.state, StateChange::Full(_));
        turns.push(record);
        if is_whole {
            whole = place.turn;
            break;
        }
    }
    Ok((replay::replay(turns.iter().rev())?, head.turn - whole))
}

/// The place of a turn (or the one given when it is that), by the fewest reads.
fn descend(db: &Connection, key: &InstanceKey, from: Place, turn: u64) -> Result<Place, Error> {
    let mut place = from;
    while place.turn > turn {
        let Some((_, seq)) = place.jump(turn) else { break };
        place = rows::row_at(db, key, seq)?.ok_or_else(|| rows::missing(key, seq))?.place;
    }
    Ok(place)
}

/// Where a turn before the head stands in the log.
pub(super) fn position(db: &Connection, key: &InstanceKey, head: Head, turn: u64) -> Result<Option<i64>, Error> {
    if turn == 0 || turn > head.turn {
        return Ok(None);
    }
    let place = descend(db, key, head.place(), turn + 1)?;
    Ok(place.jump(turn).filter(|(landed, _)| *landed == turn).map(|(_, seq)| seq))
}

/// The turn that decided a stimulus with a generated id. It was decided soon after the id was made, unless it waited in
/// the inbox, and then the index has it.
fn by_time(
    db: &Connection,
    key: &InstanceKey,
    head: Head,
    generated: Millis,
    stimulus: &StimulusId,
) -> Result<Option<TurnRecord>, Error> {
    let (earliest, latest) = (generated.plus(-SKEW_MS), generated.plus(FAST_MS));
    // Back, in the widest steps, as long as the turns are later than it can be.
    let mut place = head.place();
    'back: loop {
        for target in place.landings() {
            let Some((_, seq)) = place.jump(target) else { continue };
            let row = rows::row_at(db, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            if row.decided_at > latest {
                place = row.place;
                continue 'back;
            }
        }
        break;
    }
    if let Some(found) = walk(db, key, place, stimulus, |row| row.decided_at >= earliest)? {
        return Ok(Some(found));
    }
    let oldest = head.turn.saturating_sub(NEWEST);
    walk(db, key, head.place(), stimulus, |row| row.place.turn > oldest)
}

/// Walks back turn by turn while `goes_on`, looking for a stimulus.
fn walk(
    db: &Connection,
    key: &InstanceKey,
    from: Place,
    stimulus: &StimulusId,
    goes_on: impl Fn(&Row) -> bool,
) -> Result<Option<TurnRecord>, Error> {
    let mut place = from;
    while let Some((_, seq)) = place.jump(place.turn - 1) {
        let (row, record) = rows::turn_at(db, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
        if record.stimulus.id == *stimulus {
            return Ok(Some(record));
        }
        if !goes_on(&row) {
            break;
        }
        place = row.place;
    }
    Ok(None)
}
