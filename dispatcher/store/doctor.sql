-- What `dispatcher doctor` looks at. Nothing here changes anything, waits for a lock, or reads more than a bound.

-- name: writers
-- Who has the log open for writing for longer than $1 s: until they end, ids that they took can't be told from ids that never come. Sessions of
-- other roles show no times without pg_read_all_stats: those are counted in `hidden`.
SELECT a.pid, a.usename AS "user", a.application_name, a.state, extract(epoch FROM clock_timestamp() - a.xact_start)::double precision AS age_s
FROM pg_catalog.pg_locks AS l
JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.relation = 'webhook.outbox'::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND (a.xact_start IS NULL OR a.xact_start < clock_timestamp() - $1 * interval '1 second')
ORDER BY a.xact_start NULLS LAST
LIMIT 10;

-- name: oldest_transaction
-- Of any kind: vacuum can't remove what it may still see.
SELECT pid, usename AS "user", application_name, state, extract(epoch FROM clock_timestamp() - xact_start)::double precision AS age_s
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
ORDER BY xact_start
LIMIT 1;

-- name: prepared
SELECT gid, owner AS "user", extract(epoch FROM clock_timestamp() - prepared)::double precision AS age_s
FROM pg_catalog.pg_prepared_xacts WHERE database = current_database() ORDER BY prepared LIMIT 10;

-- name: in_default
-- One look each: whether the DEFAULT partitions hold anything.
SELECT EXISTS (SELECT FROM webhook.outbox_default) AS events, EXISTS (SELECT FROM webhook.attempt_default) AS attempts;

-- name: kept
-- How old the oldest event is that the log still has (NULL: it has none), and how large the log is.
SELECT extract(epoch FROM clock_timestamp() - (SELECT created_at FROM webhook.outbox ORDER BY id LIMIT 1))::double precision AS age_s,
       (SELECT coalesce(sum(pg_total_relation_size(leaf)), 0)::bigint FROM webhook.leaves()) AS bytes;

-- name: server
SELECT current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
       current_setting('max_connections')::integer AS connections_max,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend') AS connections,
       clock_timestamp() AS now;

-- name: notify
SELECT pg_notify('webhook_doctor', $1);
