-- How a migration changes the log beside its producers (online.py). What is in braces are names of ours.

-- name: begin
-- One migration at a time. Whatever timeouts the role or the database has, reading the log through takes as long as it takes.
SELECT pg_try_advisory_lock(9324665, 4), set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false);

-- name: end
SELECT pg_advisory_unlock(9324665, 4); RESET statement_timeout; RESET lock_timeout;

-- name: lock_timeout
SELECT set_config('lock_timeout', $1, false);

-- name: no_lock_timeout
SET lock_timeout = 0;

-- name: index
-- Whether the parent's index is there, and valid: that is, whole.
SELECT (SELECT k.indisvalid FROM pg_index AS k WHERE k.indexrelid = to_regclass('webhook.' || $1::text)) AS is_valid;

-- name: leaves
-- Those without a part of the index; is_valid: of one that was built, but not attached yet (false: its building was interrupted).
SELECT leaf.relname::text AS leaf, (
    SELECT k.indisvalid FROM pg_index AS k JOIN pg_class AS x ON x.oid = k.indexrelid
    WHERE k.indrelid = leaf.oid AND x.relname = leaf.relname || $2::text
) AS is_valid
FROM pg_inherits AS l
JOIN pg_class AS leaf ON leaf.oid = l.inhrelid
WHERE l.inhparent = 'webhook.outbox'::regclass AND NOT EXISTS (
    SELECT FROM pg_index AS k JOIN pg_inherits AS h ON h.inhrelid = k.indexrelid
    WHERE k.indrelid = leaf.oid AND h.inhparent = to_regclass('webhook.' || $1::text)
)
ORDER BY l.inhrelid;

-- name: drop
DROP INDEX CONCURRENTLY IF EXISTS webhook.{index};

-- name: attach
ALTER INDEX webhook.{parent} ATTACH PARTITION webhook.{index};

-- name: constraint
SELECT convalidated FROM pg_constraint WHERE conrelid = 'webhook.outbox'::regclass AND conname = $1;

-- name: validate
ALTER TABLE webhook.outbox VALIDATE CONSTRAINT {constraint};
