-- MQTT sessions that another node took without the memory of the node before: what that one made of their publishes under this
-- hold or an earlier one is not applied any more. `session` as in the ids of those stimuli.
CREATE TABLE mqtt_barred (
    tenant text COLLATE "C" NOT NULL,
    session text COLLATE "C" NOT NULL,
    hold bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, session)
);

ALTER TABLE mqtt_barred ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_barred USING (tenant = current_setting('sophont.tenant', true));
