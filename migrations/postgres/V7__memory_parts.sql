-- What memories make of their turns, in parts of some turns each; `rec` is described in src/memory/part.rs. Derived: may be
-- deleted at any time. The row with `after` -1 names the turn that forgot something last.
CREATE TABLE memory_parts (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    after bigint NOT NULL,
    upto bigint NOT NULL,
    rec bytea NOT NULL,
    PRIMARY KEY (tenant, instance, after)
);

ALTER TABLE memory_parts ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON memory_parts USING (tenant = current_setting('sophont.tenant', true));
