-- Policies of rows are PostgreSQL's: a folder belongs to one process, and every query names its tenant.
SELECT 1;
