-- What memories make of their turns, in parts of some turns each; `rec` is described in src/memory/part.rs. Derived: may be
-- deleted at any time. The row with `after` -1 names the turn that forgot something last.
CREATE TABLE memory_parts (
    tenant TEXT NOT NULL,
    instance TEXT NOT NULL,
    after INTEGER NOT NULL,
    upto INTEGER NOT NULL,
    rec BLOB NOT NULL,
    PRIMARY KEY (tenant, instance, after)
) STRICT;
