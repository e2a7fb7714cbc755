-- Sessions change nodes on PostgreSQL only: a folder belongs to one process.
SELECT 1;
