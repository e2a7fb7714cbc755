-- Under which epoch of its shard a turn was committed: what proves afterwards that no two owners wrote at once. Turns from
-- before this migration have none.
ALTER TABLE turns ADD COLUMN epoch bigint NOT NULL DEFAULT 0;
