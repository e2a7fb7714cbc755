//! What a group commit writes: columns of rows, table by table, each written by one statement.
//!
//! Not here: what is written (`decide`). Invariant: of two writes to one key of a table the later one stands.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::types::Type;

use super::{
    sql::{Param, Sql},
    steps::Steps,
};
use crate::{
    store::{Error, Feed, Fence, MqttWrite, Pending, Shipping, rank, record, replay},
    types::{EpisodeId, InstanceKey, Millis, Stimulus, StimulusId, TenantId, TurnRecord},
};

/// Most different words of an episode that are indexed: a `tsvector` holds a megabyte at most.
const MAX_WORDS: usize = 8192;
/// Largest position in a `tsvector`: where a word's count ends.
const MAX_COUNT: u32 = 16_383;

const INSTANCES: Sql = Sql {
    text: "INSERT INTO instances (tenant, instance, life, created_at, profile)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[])",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY, Type::TEXT_ARRAY],
};
const PROFILES: Sql = Sql {
    text: "UPDATE instances i SET profile = p.profile
           FROM unnest($1::text[], $2::text[], $3::text[]) p(tenant, instance, profile)
           WHERE i.tenant = p.tenant AND i.instance = p.instance",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const TURNS: Sql = Sql {
    text: "INSERT INTO turns (tenant, life, turn, position, shard, epoch, instance, rec)
           SELECT tenant, life, turn, CASE WHEN leaves THEN nextval('positions') END, shard, epoch, instance, rec
           FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bool[], $5::int[], $6::bigint[], $7::text[], $8::bytea[])
             t(tenant, life, turn, leaves, shard, epoch, instance, rec)",
    types: &[
        Type::TEXT_ARRAY,
        Type::INT8_ARRAY,
        Type::INT8_ARRAY,
        Type::BOOL_ARRAY,
        Type::INT4_ARRAY,
        Type::INT8_ARRAY,
        Type::TEXT_ARRAY,
        Type::BYTEA_ARRAY,
    ],
};
const SEEN: Sql = Sql {
    text: "INSERT INTO seen (tenant, stimulus, life, turn, day)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::int[])
           ON CONFLICT (tenant, stimulus, life) DO UPDATE SET turn = excluded.turn, day = excluded.day",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY, Type::INT4_ARRAY],
};
const EPISODES: Sql = Sql {
    text: "INSERT INTO episodes (tenant, life, episode, length, nth, words, lexemes)
           SELECT e.tenant, e.life, e.episode, e.length,
             coalesce(last.nth, 0) + row_number() OVER own, coalesce(last.words, 0) + sum(e.length) OVER own,
             e.lexemes::tsvector
           FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[])
             e(tenant, life, episode, length, lexemes)
           LEFT JOIN LATERAL (SELECT p.nth, p.words FROM episodes p WHERE p.tenant = e.tenant AND p.life = e.life
             ORDER BY p.episode DESC LIMIT 1) last ON true
           WINDOW own AS (PARTITION BY e.tenant, e.life ORDER BY e.episode)",
    types: &[Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY, Type::TEXT_ARRAY],
};
/// Which turn forgot something last. Whoever writes a part of that memory waits here, or is waited for.
const MARKS: Sql = Sql {
    text: "INSERT INTO memory_parts AS p (tenant, instance, after, upto, rec)
           SELECT tenant, instance, -1, turn, ''::bytea
           FROM unnest($1::text[], $2::text[], $3::bigint[]) g(tenant, instance, turn)
           ON CONFLICT (tenant, instance, after) DO UPDATE SET upto = greatest(p.upto, excluded.upto)",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY],
};
/// Parts in which something stands that is forgotten, and the index. After [`MARKS`], so that it sees all that were written.
const PARTS_LOST: Sql = Sql {
    text: "DELETE FROM memory_parts p USING unnest($1::text[], $2::text[], $3::bigint[]) g(tenant, instance, turn)
           WHERE p.tenant = g.tenant AND p.instance = g.instance
             AND (p.after = -2 OR p.after >= 0 AND p.after < g.turn AND p.upto >= g.turn)",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY],
};
/// Parts of instances that are forgotten. After [`FORGOTTEN`], which waits for those who write one.
const PARTS_FORGOTTEN: Sql = Sql {
    text: "DELETE FROM memory_parts p USING unnest($1::text[], $2::text[]) g(tenant, instance)
           WHERE p.tenant = g.tenant AND p.instance = g.instance",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
/// Earlier turns without what was forgotten of them.
const REDACTED: Sql = Sql {
    text: "UPDATE turns t SET rec = g.rec
           FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[]) g(tenant, life, turn, rec)
           WHERE t.tenant = g.tenant AND t.life = g.life AND t.turn = g.turn",
    types: &[Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY, Type::BYTEA_ARRAY],
};
/// The words of what was forgotten; the places stay.
const LOST: Sql = Sql {
    text: "UPDATE episodes e SET lexemes = ''::tsvector
           FROM unnest($1::text[], $2::bigint[], $3::bigint[]) g(tenant, life, episode)
           WHERE e.tenant = g.tenant AND e.life = g.life AND e.episode = g.episode",
    types: &[Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::INT8_ARRAY],
};
const INBOX_OUT: Sql = Sql { text: "DELETE FROM inbox WHERE ord = ANY($1::bigint[])", types: &[Type::INT8_ARRAY] };
const INBOX_IN: Sql = Sql {
    text: "INSERT INTO inbox (tenant, instance, shard, stimulus, rec)
           SELECT * FROM unnest($1::text[], $2::text[], $3::int[], $4::text[], $5::bytea[])",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT4_ARRAY, Type::TEXT_ARRAY, Type::BYTEA_ARRAY],
};
const REVIVED: Sql = Sql {
    text: "WITH back AS (DELETE FROM dead WHERE ord = ANY($1::bigint[]) RETURNING ord, tenant, instance, stimulus, rec)
           INSERT INTO inbox (tenant, instance, shard, stimulus, rec)
           SELECT b.tenant, b.instance, s.shard, b.stimulus, b.rec
           FROM back b JOIN unnest($1::bigint[], $2::int[]) s(ord, shard) ON s.ord = b.ord",
    types: &[Type::INT8_ARRAY, Type::INT4_ARRAY],
};
const DEAD_OUT: Sql = Sql { text: "DELETE FROM dead WHERE ord = ANY($1::bigint[])", types: &[Type::INT8_ARRAY] };
const DEAD_IN: Sql = Sql {
    text: "INSERT INTO dead (tenant, instance, stimulus, reason, tries, at, rec)
           SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bytea[])",
    types: &[
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::INT8_ARRAY,
        Type::INT8_ARRAY,
        Type::BYTEA_ARRAY,
    ],
};
const FORGOTTEN: Sql = Sql {
    text: "WITH gone AS (SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[]) g(tenant, instance, life)),
           i AS (DELETE FROM instances x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance),
           b AS (DELETE FROM inbox x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance),
           d AS (DELETE FROM dead x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance),
           p AS (DELETE FROM pending x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance),
           s AS (DELETE FROM turn_steps x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance),
           t AS (DELETE FROM blobs x USING gone g WHERE x.tenant = g.tenant AND x.instance = g.instance)
           INSERT INTO forgotten (tenant, life) SELECT tenant, life FROM gone",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY],
};
const LODGED: Sql = Sql {
    text: "UPDATE shards s SET lodged = s.lodged + l.count FROM unnest($1::int[], $2::bigint[]) l(shard, count)
           WHERE s.shard = l.shard",
    types: &[Type::INT4_ARRAY, Type::INT8_ARRAY],
};
const SHIPPED: Sql = Sql {
    text: "INSERT INTO shipped AS s (feed, position) SELECT * FROM unnest($1::int[], $2::bigint[])
           ON CONFLICT (feed) DO UPDATE SET position = greatest(s.position, excluded.position)",
    types: &[Type::INT4_ARRAY, Type::INT8_ARRAY],
};
const SETTLED: Sql = Sql {
    text: "DELETE FROM pending x USING unnest($1::text[], $2::text[], $3::text[]) g(tenant, instance, effect)
           WHERE x.tenant = g.tenant AND x.instance = g.instance AND x.effect = g.effect",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const POSTPONED: Sql = Sql {
    text: "INSERT INTO pending (tenant, instance, effect, shard, due, tries, rec)
           SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bigint[], $6::bigint[], $7::bytea[])
           ON CONFLICT (tenant, instance, effect)
           DO UPDATE SET shard = excluded.shard, due = excluded.due, tries = excluded.tries, rec = excluded.rec",
    types: &[
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::INT4_ARRAY,
        Type::INT8_ARRAY,
        Type::INT8_ARRAY,
        Type::BYTEA_ARRAY,
    ],
};
const QUEUES_GONE: Sql = Sql {
    text: "WITH g AS (SELECT * FROM unnest($1::text[], $2::text[]) g(tenant, client)),
             mail AS (DELETE FROM mqtt_mail x USING g WHERE x.tenant = g.tenant AND x.client = g.client)
           DELETE FROM mqtt_queue x USING g WHERE x.tenant = g.tenant AND x.client = g.client",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const SESSIONS_GONE: Sql = Sql {
    text: "WITH gone AS (DELETE FROM mqtt_sessions x USING unnest($1::text[], $2::text[]) g(tenant, client)
             WHERE x.tenant = g.tenant AND x.client = g.client RETURNING x.tenant, x.client, x.hold)
           INSERT INTO mqtt_gone (tenant, client, hold, changed)
           SELECT tenant, client, hold, pg_current_xact_id()::text::bigint FROM gone
           ON CONFLICT (tenant, client) DO UPDATE SET hold = excluded.hold, changed = excluded.changed, at = now()",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const SESSIONS: Sql = Sql {
    text: "INSERT INTO mqtt_sessions (tenant, client, rec, changed)
           SELECT g.*, pg_current_xact_id()::text::bigint FROM unnest($1::text[], $2::text[], $3::bytea[]) g
           ON CONFLICT (tenant, client) DO UPDATE SET rec = excluded.rec, changed = excluded.changed",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::BYTEA_ARRAY],
};
const MAIL: Sql = Sql {
    text: "INSERT INTO mqtt_mail (tenant, client, queued, rec)
           SELECT g.tenant, g.client, g.queued, g.rec
           FROM unnest($1::text[], $2::text[], $3::bool[], $4::bytea[]) WITH ORDINALITY g(tenant, client, queued, rec, n)
           WHERE EXISTS (SELECT FROM mqtt_sessions s WHERE s.tenant = g.tenant AND s.client = g.client) ORDER BY g.n",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::BOOL_ARRAY, Type::BYTEA_ARRAY],
};
const COLLECTED: Sql = Sql { text: "DELETE FROM mqtt_mail WHERE id = ANY($1)", types: &[Type::INT8_ARRAY] };
const DEQUEUED: Sql = Sql {
    text: "DELETE FROM mqtt_queue x USING unnest($1::text[], $2::text[], $3::bigint[]) g(tenant, client, ord)
           WHERE x.tenant = g.tenant AND x.client = g.client AND x.ord = g.ord",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY],
};
const ENQUEUED: Sql = Sql {
    text: "INSERT INTO mqtt_queue (tenant, client, ord, rec)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bytea[])
           ON CONFLICT (tenant, client, ord) DO UPDATE SET rec = excluded.rec",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::BYTEA_ARRAY],
};
const CLEARED: Sql = Sql {
    text: "DELETE FROM mqtt_retained x USING unnest($1::text[], $2::text[]) g(tenant, topic)
           WHERE x.tenant = g.tenant AND x.topic = g.topic",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const RETAINED: Sql = Sql {
    text: "INSERT INTO mqtt_retained (tenant, topic, rec) SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[])
           ON CONFLICT (tenant, topic) DO UPDATE SET rec = excluded.rec",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::BYTEA_ARRAY],
};

/// An earlier turn that loses episodes: tenant, life, turn, places.
pub(super) type Loss<'a> = (&'a str, i64, u64, Vec<usize>);

/// Columns.
pub(super) type Texts<'a> = Vec<&'a str>;
type Numbers = Vec<i64>;
type Shorts = Vec<i32>;
pub(super) type Blobs = Vec<Vec<u8>>;

/// A statement with its columns.
pub(super) type Step<'a> = (&'static Sql, Vec<Param<'a>>);

/// Everything one group commit writes. `'a` is the life of the jobs whose rows these are.
#[derive(Default)]
pub(super) struct Writes<'a> {
    instances: (Texts<'a>, Texts<'a>, Numbers, Numbers, Vec<Option<String>>),
    profiles: (Texts<'a>, Texts<'a>, Vec<String>),
    turns: Turns<'a>,
    seen: BTreeMap<(&'a str, &'a str, i64), (i64, i32)>,
    episodes: (Texts<'a>, Numbers, Numbers, Numbers, Vec<String>),
    redacted: (Texts<'a>, Numbers, Numbers, Blobs),
    lost: (Texts<'a>, Numbers, Numbers),
    losses: Vec<Loss<'a>>,
    marks: BTreeMap<(&'a str, &'a str), i64>,
    parts_lost: (Texts<'a>, Texts<'a>, Numbers),
    inbox_out: Numbers,
    inbox_in: (Texts<'a>, Texts<'a>, Shorts, Texts<'a>, Blobs),
    revived: (Numbers, Shorts),
    dead_out: Numbers,
    dead_in: Dead<'a>,
    forgotten: (Texts<'a>, Texts<'a>, Numbers),
    lodged: BTreeMap<i32, i64>,
    shipped: BTreeMap<i32, i64>,
    pending: BTreeMap<(&'a InstanceKey, &'a str), Option<&'a Pending>>,
    queues_gone: BTreeSet<(&'a TenantId, &'a str)>,
    sessions: BTreeMap<(&'a TenantId, &'a str), Option<&'a [u8]>>,
    queued: BTreeMap<(&'a TenantId, &'a str, i64), Option<&'a [u8]>>,
    retained: BTreeMap<(&'a TenantId, &'a str), Option<&'a [u8]>>,
    /// Journals of turns under way.
    pub(super) journals: Steps<'a>,
    mail: (Texts<'a>, Texts<'a>, Vec<bool>, Vec<&'a [u8]>),
    collected: Numbers,
    /// What the maps become when they are written.
    flat: Flat<'a>,
}

#[derive(Default)]
struct Turns<'a> {
    tenant: Texts<'a>,
    life: Numbers,
    turn: Numbers,
    leaves: Vec<bool>,
    shard: Shorts,
    epoch: Numbers,
    instance: Texts<'a>,
    rec: Blobs,
}

#[derive(Default)]
struct Dead<'a> {
    tenant: Texts<'a>,
    instance: Texts<'a>,
    stimulus: Texts<'a>,
    reason: Vec<String>,
    tries: Numbers,
    at: Numbers,
    rec: Blobs,
}

/// Columns of keys, and of what goes with them.
type Keyed<'a, V> = (Texts<'a>, Texts<'a>, V);

#[derive(Default)]
struct Flat<'a> {
    seen: (Texts<'a>, Texts<'a>, Numbers, Numbers, Shorts),
    marks: (Texts<'a>, Texts<'a>, Numbers),
    lodged: (Shorts, Numbers),
    shipped: (Shorts, Numbers),
    settled: Keyed<'a, Texts<'a>>,
    postponed: (Keyed<'a, Texts<'a>>, Shorts, Numbers, Numbers, Blobs),
    queues_gone: Keyed<'a, ()>,
    sessions_gone: Keyed<'a, ()>,
    sessions: Keyed<'a, Vec<&'a [u8]>>,
    dequeued: Keyed<'a, Numbers>,
    enqueued: (Keyed<'a, Numbers>, Vec<&'a [u8]>),
    cleared: Keyed<'a, ()>,
    retained: Keyed<'a, Vec<&'a [u8]>>,
}

#[allow(clippy::cast_possible_wrap)] // shards are far fewer
pub(super) const fn int(shard: u32) -> i32 {
    shard as i32
}

pub(super) fn big(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The day a time falls on, since 1970.
pub(super) fn day(at: Millis) -> i32 {
    i32::try_from(at.0.div_euclid(86_400_000)).unwrap_or(i32::MAX)
}

/// The lexeme of a word in a life.
pub(super) fn lexeme(life: i64, word: &str) -> String {
    format!("{life}:{word}")
}

impl<'a> Writes<'a> {
    /// A new instance.
    pub(super) fn instance(&mut self, key: &'a InstanceKey, life: i64, at: Millis, profile: Option<String>) {
        let rows = &mut self.instances;
        rows.0.push(key.tenant.as_str());
        rows.1.push(key.instance.as_str());
        rows.2.push(life);
        rows.3.push(at.0);
        rows.4.push(profile);
    }

    /// Another profile.
    pub(super) fn profile(&mut self, key: &'a InstanceKey, profile: String) {
        self.profiles.0.push(key.tenant.as_str());
        self.profiles.1.push(key.instance.as_str());
        self.profiles.2.push(profile);
    }

    /// A turn; `waited`: its stimulus stood in the inbox.
    pub(super) fn turn(
        &mut self,
        key: &'a InstanceKey,
        fence: Fence,
        life: i64,
        turn: &'a TurnRecord,
        waited: bool,
    ) -> Result<(), Error> {
        let flags = record::flags(turn, waited) & !record::COARSE;
        let place = crate::store::links::Place { turn: turn.turn, back: [0; crate::store::links::LEVELS] };
        let row = record::Row { flags, place, decided_at: turn.decided_at };
        let rec = record::encode(&row, 0, turn, Vec::with_capacity(256))?;
        let (tenant, number) = (key.tenant.as_str(), big(turn.turn));
        self.turns.tenant.push(tenant);
        self.turns.life.push(life);
        self.turns.turn.push(number);
        self.turns.leaves.push(row.has(record::EFFECTS));
        self.turns.shard.push(int(fence.shard));
        self.turns.epoch.push(big(fence.epoch));
        self.turns.instance.push(key.instance.as_str());
        self.turns.rec.push(rec);
        if row.has(record::INDEXED) {
            self.seen.insert((tenant, turn.stimulus.id.as_str(), life), (number, day(turn.decided_at)));
        }
        for lost in replay::losses(turn).keys() {
            self.marks.insert((tenant, key.instance.as_str()), number);
            self.parts_lost.0.push(tenant);
            self.parts_lost.1.push(key.instance.as_str());
            self.parts_lost.2.push(big(*lost));
        }
        self.losses.extend(replay::losses(turn).into_iter().map(|(number, places)| (tenant, life, number, places)));
        if turn.is_marked() {
            self.episode(tenant, life, EpisodeId::marker(turn.turn).0, 0, String::new());
        }
        for episode in replay::episodes(turn) {
            let (counts, length) = rank::count_words(&episode.content, &episode.tags);
            let mut words: Vec<(&String, &u32)> = counts.iter().collect();
            words.sort_unstable();
            words.truncate(MAX_WORDS);
            let lexemes: Vec<String> = words
                .iter()
                .map(|(word, count)| format!("'{}':{}", lexeme(life, word), (**count).min(MAX_COUNT)))
                .collect();
            self.episode(tenant, life, episode.id, length, lexemes.join(" "));
        }
        Ok(())
    }

    fn episode(&mut self, tenant: &'a str, life: i64, id: u64, length: u32, lexemes: String) {
        self.episodes.0.push(tenant);
        self.episodes.1.push(life);
        self.episodes.2.push(big(id));
        self.episodes.3.push(i64::from(length));
        self.episodes.4.push(lexemes);
    }

    /// The earlier turns that lose something, to be read and given back by [`Writes::redact`].
    pub(super) fn take_losses(&mut self) -> Vec<Loss<'a>> {
        std::mem::take(&mut self.losses)
    }

    /// An earlier turn without what was forgotten of it.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub(super) fn redact(&mut self, loss: &Loss<'a>, rec: &[u8]) -> Result<(), Error> {
        let (tenant, life, turn, places) = loss;
        let Some(redacted) = record::redact(rec, 0, places)? else { return Ok(()) };
        self.redacted.0.push(tenant);
        self.redacted.1.push(*life);
        self.redacted.2.push(big(*turn));
        self.redacted.3.push(redacted);
        for place in places {
            self.lost.0.push(tenant);
            self.lost.1.push(*life);
            self.lost.2.push(big(EpisodeId::new(*turn, *place).0));
        }
        Ok(())
    }

    /// A stimulus leaves the inbox.
    pub(super) fn leave_inbox(&mut self, ord: i64) {
        self.inbox_out.push(ord);
    }

    /// A stimulus enters the inbox.
    pub(super) fn enter_inbox(
        &mut self,
        key: &'a InstanceKey,
        shard: u32,
        stimulus: &'a Stimulus,
    ) -> Result<(), Error> {
        let rows = &mut self.inbox_in;
        rows.4.push(record::encode_stimulus(stimulus)?);
        rows.0.push(key.tenant.as_str());
        rows.1.push(key.instance.as_str());
        rows.2.push(int(shard));
        rows.3.push(stimulus.id.as_str());
        Ok(())
    }

    /// A dead letter goes back to the inbox.
    pub(super) fn revive(&mut self, ord: i64, shard: u32) {
        self.revived.0.push(ord);
        self.revived.1.push(int(shard));
    }

    /// A stimulus becomes a dead letter, in the place of an earlier one of the same id.
    pub(super) fn bury(
        &mut self,
        key: &'a InstanceKey,
        stimulus: &'a Stimulus,
        (reason, tries, at): (&str, u32, Millis),
        earlier: Option<i64>,
    ) -> Result<(), Error> {
        self.dead_out.extend(earlier);
        self.dead_in.rec.push(record::encode_stimulus(stimulus)?);
        self.dead_in.tenant.push(key.tenant.as_str());
        self.dead_in.instance.push(key.instance.as_str());
        self.dead_in.stimulus.push(stimulus.id.as_str());
        // PostgreSQL's text holds no zero byte.
        self.dead_in.reason.push(reason.replace('\0', "\u{fffd}"));
        self.dead_in.tries.push(i64::from(tries));
        self.dead_in.at.push(at.0);
        Ok(())
    }

    /// An instance's life ends.
    pub(super) fn forget(&mut self, key: &'a InstanceKey, life: i64) {
        self.forgotten.0.push(key.tenant.as_str());
        self.forgotten.1.push(key.instance.as_str());
        self.forgotten.2.push(life);
        self.pending.retain(|(owner, _), _| *owner != key);
    }

    /// So many stimuli were lodged for a shard.
    pub(super) fn lodge(&mut self, shard: u32, count: usize) {
        *self.lodged.entry(int(shard)).or_default() += big(count as u64);
    }

    /// A write of delivery.
    pub(super) fn ship(&mut self, write: &'a Shipping) {
        match write {
            Shipping::Shipped { feed: Feed(feed), position } => {
                let shipped = self.shipped.entry(int(*feed)).or_default();
                *shipped = position.max(shipped).to_owned();
            }
            Shipping::Postpone(pending) => {
                self.pending.insert((&pending.key, &pending.effect_id), Some(pending));
            }
            Shipping::Settle { key, effect_id } => {
                self.pending.insert((key, effect_id), None);
            }
        }
    }

    /// A write of the MQTT door; `held`: under the number in force.
    pub(super) fn mqtt(&mut self, write: &'a MqttWrite, held: bool) {
        match write {
            MqttWrite::Enqueue { tenant, client, or_mail: true, record, .. } if !held => {
                self.mail(tenant, client, true, record);
            }
            _ if !held => {}
            MqttWrite::PutSession { tenant, client, record, .. } => {
                self.sessions.insert((tenant, client), Some(record));
            }
            MqttWrite::DropSession { tenant, client, .. } => {
                self.sessions.insert((tenant, client), None);
                self.queues_gone.insert((tenant, client));
                self.queued.retain(|(t, c, _), _| (*t, *c) != (tenant, client.as_str()));
            }
            MqttWrite::Enqueue { tenant, client, order, record, .. } => {
                self.queued.insert((tenant, client, *order), Some(record));
            }
            MqttWrite::Dequeue { tenant, client, order, .. } => {
                self.queued.insert((tenant, client, *order), None);
            }
            MqttWrite::Mail { tenant, client, record } => self.mail(tenant, client, false, record),
            MqttWrite::Collect { mail, .. } => self.collected.push(*mail),
            MqttWrite::Retain { tenant, topic, record } => {
                self.retained.insert((tenant, topic), (!record.is_empty()).then_some(&**record));
            }
        }
    }

    fn mail(&mut self, tenant: &'a TenantId, client: &'a str, queued: bool, record: &'a [u8]) {
        self.mail.0.push(tenant.as_str());
        self.mail.1.push(client);
        self.mail.2.push(queued);
        self.mail.3.push(record);
    }

    /// The feeds of its turns with effects, some more than once.
    pub(super) fn feeds(&self) -> impl Iterator<Item = u32> {
        let leaving = self.turns.leaves.iter().zip(&self.turns.shard).filter(|(leaves, _)| **leaves);
        leaving.map(|(_, shard)| shard.unsigned_abs())
    }

    /// Makes columns of the maps. `shard_of` tells the shard of an instance.
    pub(super) fn flatten(&mut self, shard_of: impl Fn(&InstanceKey) -> u32) -> Result<(), Error> {
        let flat = &mut self.flat;
        for (&(tenant, stimulus, life), &(turn, day)) in &self.seen {
            flat.seen.0.push(tenant);
            flat.seen.1.push(stimulus);
            flat.seen.2.push(life);
            flat.seen.3.push(turn);
            flat.seen.4.push(day);
        }
        for (&(tenant, instance), &turn) in &self.marks {
            flat.marks.0.push(tenant);
            flat.marks.1.push(instance);
            flat.marks.2.push(turn);
        }
        flat.lodged = self.lodged.iter().map(|(shard, count)| (*shard, *count)).unzip();
        flat.shipped = self.shipped.iter().map(|(feed, position)| (*feed, *position)).unzip();
        for (&(key, effect), pending) in &self.pending {
            let Some(pending) = pending else {
                push(&mut flat.settled, &key.tenant, key.instance.as_str()).push(effect);
                continue;
            };
            flat.postponed.4.push(record::encode_pending(pending)?);
            push(&mut flat.postponed.0, &key.tenant, key.instance.as_str()).push(effect);
            flat.postponed.1.push(int(shard_of(key)));
            flat.postponed.2.push(pending.due.0);
            flat.postponed.3.push(i64::from(pending.tries));
        }
        for (tenant, client) in &self.queues_gone {
            push(&mut flat.queues_gone, tenant, client);
        }
        for (&(tenant, client), rec) in &self.sessions {
            match rec {
                Some(rec) => push(&mut flat.sessions, tenant, client).push(rec),
                None => *push(&mut flat.sessions_gone, tenant, client) = (),
            }
        }
        for (&(tenant, client, order), rec) in &self.queued {
            match rec {
                Some(rec) => {
                    push(&mut flat.enqueued.0, tenant, client).push(order);
                    flat.enqueued.1.push(rec);
                }
                None => push(&mut flat.dequeued, tenant, client).push(order),
            }
        }
        for (&(tenant, topic), rec) in &self.retained {
            match rec {
                Some(rec) => push(&mut flat.retained, tenant, topic).push(rec),
                None => *push(&mut flat.cleared, tenant, topic) = (),
            }
        }
        Ok(())
    }

    /// The statements that write it all, in order. [`Writes::flatten`] comes before.
    pub(super) fn steps(&self) -> Vec<Step<'_>> {
        let (instances, turns, dead, flat) = (&self.instances, &self.turns, &self.dead_in, &self.flat);
        let postponed = &flat.postponed;
        let all: [(&'static Sql, usize, Vec<Param<'_>>); 29] = [
            (&FORGOTTEN, self.forgotten.0.len(), vec![&self.forgotten.0, &self.forgotten.1, &self.forgotten.2]),
            (&PARTS_FORGOTTEN, self.forgotten.0.len(), vec![&self.forgotten.0, &self.forgotten.1]),
            (&INSTANCES, instances.0.len(), vec![&instances.0, &instances.1, &instances.2, &instances.3, &instances.4]),
            (&PROFILES, self.profiles.0.len(), vec![&self.profiles.0, &self.profiles.1, &self.profiles.2]),
            (&INBOX_OUT, self.inbox_out.len(), vec![&self.inbox_out]),
            (
                &INBOX_IN,
                self.inbox_in.0.len(),
                vec![&self.inbox_in.0, &self.inbox_in.1, &self.inbox_in.2, &self.inbox_in.3, &self.inbox_in.4],
            ),
            (&REVIVED, self.revived.0.len(), vec![&self.revived.0, &self.revived.1]),
            (&DEAD_OUT, self.dead_out.len(), vec![&self.dead_out]),
            (
                &DEAD_IN,
                dead.tenant.len(),
                vec![&dead.tenant, &dead.instance, &dead.stimulus, &dead.reason, &dead.tries, &dead.at, &dead.rec],
            ),
            (
                &TURNS,
                turns.turn.len(),
                vec![
                    &turns.tenant,
                    &turns.life,
                    &turns.turn,
                    &turns.leaves,
                    &turns.shard,
                    &turns.epoch,
                    &turns.instance,
                    &turns.rec,
                ],
            ),
            (&SEEN, flat.seen.0.len(), vec![&flat.seen.0, &flat.seen.1, &flat.seen.2, &flat.seen.3, &flat.seen.4]),
            (
                &EPISODES,
                self.episodes.0.len(),
                vec![&self.episodes.0, &self.episodes.1, &self.episodes.2, &self.episodes.3, &self.episodes.4],
            ),
            (
                &REDACTED,
                self.redacted.0.len(),
                vec![&self.redacted.0, &self.redacted.1, &self.redacted.2, &self.redacted.3],
            ),
            (&MARKS, flat.marks.0.len(), vec![&flat.marks.0, &flat.marks.1, &flat.marks.2]),
            (&PARTS_LOST, self.parts_lost.0.len(), vec![&self.parts_lost.0, &self.parts_lost.1, &self.parts_lost.2]),
            (&LOST, self.lost.0.len(), vec![&self.lost.0, &self.lost.1, &self.lost.2]),
            (&LODGED, flat.lodged.0.len(), vec![&flat.lodged.0, &flat.lodged.1]),
            (&SHIPPED, flat.shipped.0.len(), vec![&flat.shipped.0, &flat.shipped.1]),
            (&SETTLED, flat.settled.0.len(), vec![&flat.settled.0, &flat.settled.1, &flat.settled.2]),
            (
                &POSTPONED,
                postponed.1.len(),
                vec![
                    &postponed.0.0,
                    &postponed.0.1,
                    &postponed.0.2,
                    &postponed.1,
                    &postponed.2,
                    &postponed.3,
                    &postponed.4,
                ],
            ),
            (&QUEUES_GONE, flat.queues_gone.0.len(), vec![&flat.queues_gone.0, &flat.queues_gone.1]),
            (&SESSIONS_GONE, flat.sessions_gone.0.len(), vec![&flat.sessions_gone.0, &flat.sessions_gone.1]),
            (&SESSIONS, flat.sessions.0.len(), vec![&flat.sessions.0, &flat.sessions.1, &flat.sessions.2]),
            (&DEQUEUED, flat.dequeued.0.len(), vec![&flat.dequeued.0, &flat.dequeued.1, &flat.dequeued.2]),
            (
                &ENQUEUED,
                flat.enqueued.1.len(),
                vec![&flat.enqueued.0.0, &flat.enqueued.0.1, &flat.enqueued.0.2, &flat.enqueued.1],
            ),
            (&MAIL, self.mail.3.len(), vec![&self.mail.0, &self.mail.1, &self.mail.2, &self.mail.3]),
            (&COLLECTED, self.collected.len(), vec![&self.collected]),
            (&CLEARED, flat.cleared.0.len(), vec![&flat.cleared.0, &flat.cleared.1]),
            (&RETAINED, flat.retained.0.len(), vec![&flat.retained.0, &flat.retained.1, &flat.retained.2]),
        ];
        let all = all.into_iter().map(|(sql, rows, params)| (rows, (sql, params))).chain(self.journals.statements());
        all.filter(|(rows, _)| *rows > 0).map(|(_, step)| step).collect()
    }
}

/// Appends a key; the column of what goes with it.
fn push<'b, 'a, V>(columns: &'b mut Keyed<'a, V>, tenant: &'a TenantId, name: &'a str) -> &'b mut V {
    columns.0.push(tenant.as_str());
    columns.1.push(name);
    &mut columns.2
}

/// What is looked up of a stimulus.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    /// Whose.
    pub key: &'a InstanceKey,
    /// Its id.
    pub stimulus: &'a StimulusId,
    /// The instance's life, if it is known.
    pub life: Option<i64>,
    /// Whether dead letters and decided ones are of interest too.
    pub wide: bool,
}
