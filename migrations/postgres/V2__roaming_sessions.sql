-- MQTT sessions go from node to node. `node` has the session at present, `hold` is a number for each time it was taken (what is
-- written under an older one is not applied), `changed` is the transaction that changed the row, by which others follow.
ALTER TABLE mqtt_sessions
    ADD node text COLLATE "C" NOT NULL DEFAULT '',
    ADD hold bigint NOT NULL DEFAULT 0,
    ADD changed bigint NOT NULL DEFAULT 0;
CREATE INDEX mqtt_sessions_node ON mqtt_sessions (node);
CREATE INDEX mqtt_sessions_changed ON mqtt_sessions (changed);
CREATE SEQUENCE mqtt_holds;

-- Sessions that are over, for those who follow.
CREATE TABLE mqtt_gone (
    tenant text COLLATE "C" NOT NULL,
    client text COLLATE "C" NOT NULL,
    hold bigint NOT NULL,
    changed bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, client)
);
CREATE INDEX mqtt_gone_changed ON mqtt_gone (changed);

-- Messages for a session that another node has. `queued`: the record is one of `mqtt_queue` already.
CREATE TABLE mqtt_mail (
    id bigserial PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    client text COLLATE "C" NOT NULL,
    queued boolean NOT NULL,
    rec bytea NOT NULL
);
CREATE INDEX mqtt_mail_client ON mqtt_mail (tenant, client, id);

-- At which nodes devices of an instance are connected.
CREATE TABLE mqtt_present (
    tenant text COLLATE "C" NOT NULL,
    instance text COLLATE "C" NOT NULL,
    node text COLLATE "C" NOT NULL,
    PRIMARY KEY (tenant, instance, node)
);
CREATE INDEX mqtt_present_node ON mqtt_present (node);
