-- What belongs to a tenant is seen under its name only (`sophont.tenant`, set for each read) by everyone but the owner of the
-- tables, as whom nodes write. Nodes read as a role that these policies bind: docs/adr/0010-row-level-security.md.
-- A new table with a tenant gets the same two lines.
ALTER TABLE instances ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON instances USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE turns ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON turns USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE seen ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON seen USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE episodes ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON episodes USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE inbox ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON inbox USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE dead ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON dead USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE pending ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON pending USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE forgotten ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON forgotten USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_sessions ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_sessions USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_queue ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_queue USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_retained ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_retained USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_gone ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_gone USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_mail ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_mail USING (tenant = current_setting('sophont.tenant', true));
ALTER TABLE mqtt_present ENABLE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON mqtt_present USING (tenant = current_setting('sophont.tenant', true));
