-- What turns under way have behind them; `rec` is described in src/store/journal.rs. Rows go with the turn.
CREATE TABLE turn_steps (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    stimulus TEXT NOT NULL,
    n INTEGER NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, instance, stimulus, n)
) STRICT;

-- Long texts of an instance's steps, each once, by the hash of its content. They go when the instance has no steps.
CREATE TABLE blobs (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    hash BLOB NOT NULL,
    bytes BLOB NOT NULL,
    PRIMARY KEY (tenant, instance, hash)
) STRICT;
