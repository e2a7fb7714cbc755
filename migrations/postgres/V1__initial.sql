-- Every key begins with tenant and every row of a tenant carries it, so that tables can be distributed by tenant and guarded
-- by row-level security. Names and ids are compared byte by byte (COLLATE "C"), as the program does.

-- The cluster: one row. `shards` is fixed when the database is founded.
CREATE TABLE cluster (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    name text,
    shards integer NOT NULL
);

-- Members. `session` is the number of the advisory lock that the node's process holds.
CREATE TABLE nodes (
    node text COLLATE "C" PRIMARY KEY,
    addresses text[] NOT NULL,
    roles text[] NOT NULL,
    weight bigint NOT NULL,
    protocol_min bigint NOT NULL,
    protocol_max bigint NOT NULL,
    lease_until timestamptz NOT NULL,
    busy_permille bigint NOT NULL DEFAULT 0,
    instances bigint NOT NULL DEFAULT 0,
    in_hand bigint NOT NULL DEFAULT 0,
    draining boolean NOT NULL DEFAULT false,
    session integer NOT NULL
) WITH (fillfactor = 50);

CREATE SEQUENCE sessions AS integer CYCLE;

-- Ownership. Commits hold these rows FOR SHARE; taking a shard and lodging for it change them.
CREATE TABLE shards (
    shard integer PRIMARY KEY,
    node text COLLATE "C",
    epoch bigint NOT NULL DEFAULT 0,
    lodged bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- How far delivery is, by feed. Apart from `shards`, whose rows are held by commits.
CREATE TABLE shipped (
    feed integer PRIMARY KEY,
    position bigint NOT NULL
) WITH (fillfactor = 50);

-- The last group commit of each writer: what is asked when a connection broke in the middle of a COMMIT.
CREATE TABLE lanes (
    lane uuid PRIMARY KEY,
    batch bigint NOT NULL,
    used_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 10);

-- Positions and lives are handed out under the shard's lock: CACHE 1, so that a later one is always greater.
CREATE SEQUENCE positions CACHE 1;
CREATE SEQUENCE lives CACHE 1;

-- Which instances there are. `life` is new whenever an instance begins again.
CREATE TABLE instances (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    life bigint NOT NULL,
    created_at bigint NOT NULL,
    profile text,
    PRIMARY KEY (tenant, instance)
);

-- The turn log, appended, never changed. `rec` is described in src/store/record.rs. `position` is set where the turn has
-- effects: its place in the shard's feed.
CREATE TABLE turns (
    tenant text COLLATE "C" NOT NULL,
    life bigint NOT NULL,
    turn bigint NOT NULL,
    position bigint,
    shard integer NOT NULL,
    instance text COLLATE "C" NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, life, turn)
);
ALTER TABLE turns ALTER COLUMN rec SET STORAGE EXTERNAL;
CREATE INDEX turns_feed ON turns (shard, position) WHERE position IS NOT NULL;

-- Which turn decided a stimulus whose id may come again, or that waited. `day` tells when it expires.
CREATE TABLE seen (
    tenant text COLLATE "C" NOT NULL,
    stimulus text COLLATE "C" NOT NULL,
    life bigint NOT NULL,
    turn bigint NOT NULL,
    day integer NOT NULL,
    PRIMARY KEY (tenant, stimulus, life)
);
CREATE INDEX seen_day ON seen USING brin (day);

-- The words of each episode. A lexeme is the life, a colon and the word, so that an instance's words are found without
-- those of others; its position is how often the word stands there. `nth` and `words` count the life's episodes and their
-- words up to this one.
CREATE TABLE episodes (
    tenant text COLLATE "C" NOT NULL,
    life bigint NOT NULL,
    episode bigint NOT NULL,
    length bigint NOT NULL,
    nth bigint NOT NULL,
    words bigint NOT NULL,
    lexemes tsvector NOT NULL,
    PRIMARY KEY (tenant, life, episode)
);
CREATE INDEX episodes_lexemes ON episodes USING gin (lexemes);

-- Accepted, not decided, in the order of `ord`.
CREATE TABLE inbox (
    ord bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    shard integer NOT NULL,
    stimulus text COLLATE "C" NOT NULL,
    rec bytea NOT NULL
);
CREATE INDEX inbox_order ON inbox (tenant, instance, ord);
CREATE INDEX inbox_stimulus ON inbox (tenant, stimulus, instance);

-- Given up, in the order of `ord`.
CREATE TABLE dead (
    ord bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    stimulus text COLLATE "C" NOT NULL,
    reason text NOT NULL,
    tries bigint NOT NULL,
    at bigint NOT NULL,
    rec bytea NOT NULL
);
CREATE INDEX dead_order ON dead (tenant, instance, ord);
CREATE INDEX dead_stimulus ON dead (tenant, stimulus, instance);

-- Effects to be tried again, and reminders.
CREATE TABLE pending (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    effect text COLLATE "C" NOT NULL,
    shard integer NOT NULL,
    due bigint NOT NULL,
    tries bigint NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, instance, effect)
);
CREATE INDEX pending_due ON pending (due, tenant, instance, effect);

-- Lives that are over and whose rows are still being removed.
CREATE TABLE forgotten (
    tenant text COLLATE "C" NOT NULL,
    life bigint NOT NULL,
    PRIMARY KEY (tenant, life)
);

CREATE TABLE mqtt_sessions (
    tenant text COLLATE "C" NOT NULL,
    client text COLLATE "C" NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, client)
);

CREATE TABLE mqtt_queue (
    tenant text COLLATE "C" NOT NULL,
    client text COLLATE "C" NOT NULL,
    ord bigint NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, client, ord)
);

CREATE TABLE mqtt_retained (
    tenant text COLLATE "C" NOT NULL,
    topic text COLLATE "C" NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, topic)
);
