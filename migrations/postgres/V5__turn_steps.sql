-- What turns under way have behind them; `rec` is described in src/store/journal.rs. Rows go with the turn.
CREATE TABLE turn_steps (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    stimulus text COLLATE "C" NOT NULL,
    n integer NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, instance, stimulus, n)
);

-- Long texts of an instance's steps, each once, by the hash of its content. They go when the instance has no steps.
CREATE TABLE blobs (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    hash bytea NOT NULL,
    bytes bytea NOT NULL,
    PRIMARY KEY (tenant, instance, hash)
);

ALTER TABLE turn_steps ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON turn_steps USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE blobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON blobs USING (tenant = current_setting('sophont.tenant', true));
