-- The turn log. One row a turn, appended, never changed; no index. `flags` and the head of `rec` are described in
-- src/store/sqlite/record.rs.
CREATE TABLE turns (
    seq INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    flags INTEGER NOT NULL,
    rec BLOB NOT NULL
) STRICT;

-- Which instances there are. `born` is a log position: turns of this life of the instance stand above it.
CREATE TABLE instances (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    born INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    profile TEXT,
    PRIMARY KEY (tenant, instance)
) STRICT, WITHOUT ROWID;

-- Folded from the log: the last turn of each instance.
CREATE TABLE heads (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (tenant, instance)
) STRICT, WITHOUT ROWID;

-- Folded from the log: where the stimuli were decided whose ids may come again. `bucket` is a day, so that a day expires
-- as one range.
CREATE TABLE seen (
    bucket INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    stimulus TEXT NOT NULL,
    instance TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (bucket, tenant, stimulus, instance)
) STRICT, WITHOUT ROWID;

-- Folded from the log: where each episode stands, and the words it has. `owner` is the `born` of its instance.
CREATE TABLE episodes (
    owner INTEGER NOT NULL,
    episode INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (owner, episode)
) STRICT, WITHOUT ROWID;

CREATE TABLE words (
    owner INTEGER NOT NULL,
    word TEXT NOT NULL,
    episode INTEGER NOT NULL,
    count INTEGER NOT NULL,
    length INTEGER NOT NULL,
    PRIMARY KEY (owner, word, episode)
) STRICT, WITHOUT ROWID;

CREATE TABLE corpora (
    owner INTEGER PRIMARY KEY,
    episodes INTEGER NOT NULL,
    words INTEGER NOT NULL
) STRICT;

-- Accepted, not decided, in the order of `ord`.
CREATE TABLE inbox (
    ord INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    stimulus TEXT NOT NULL,
    rec BLOB NOT NULL
) STRICT;
CREATE INDEX inbox_order ON inbox (tenant, instance, ord);
CREATE INDEX inbox_stimulus ON inbox (tenant, stimulus, instance);

-- Given up, in the order of `ord`.
CREATE TABLE dead (
    ord INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    stimulus TEXT NOT NULL,
    reason TEXT NOT NULL,
    tries INTEGER NOT NULL,
    at INTEGER NOT NULL,
    rec BLOB NOT NULL
) STRICT;
CREATE INDEX dead_order ON dead (tenant, instance, ord);
CREATE INDEX dead_stimulus ON dead (tenant, stimulus, instance);

-- Effects to be tried again, and reminders.
CREATE TABLE pending (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    effect TEXT NOT NULL,
    due INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, instance, effect)
) STRICT, WITHOUT ROWID;
CREATE INDEX pending_due ON pending (due);

-- Lives of instances that are gone and whose rows are still being removed, from the turn at `seq` backward.
CREATE TABLE forgotten (
    born INTEGER PRIMARY KEY,
    seq INTEGER NOT NULL
) STRICT;

CREATE TABLE mqtt_sessions (
    tenant TEXT NOT NULL,
    client TEXT NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, client)
) STRICT, WITHOUT ROWID;

CREATE TABLE mqtt_queue (
    tenant TEXT NOT NULL,
    client TEXT NOT NULL,
    ord INTEGER NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, client, ord)
) STRICT, WITHOUT ROWID;

CREATE TABLE mqtt_retained (
    tenant TEXT NOT NULL,
    topic TEXT NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, topic)
) STRICT, WITHOUT ROWID;

-- folded: the log up to here is in the folded tables. shipped: delivery's position. issued: positions up to here were
-- given out once, also when their rows are gone. probe: the last readiness check.
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
