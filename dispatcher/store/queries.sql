-- Every statement of the store, by name, with its why. sql.py loads this file; Python holds no SQL strings.
-- Event columns are always (id, account_id, type, payload, created_at, occurred_at), and but in runs, which don't go by them, (ordering_key,
-- expires_at, priority, traceparent); `bytes` is the running size of the page, so that a page
-- ends with the first row that reaches its byte bound and is never empty when something is there. `size` is the payload's, told without fetching
-- it; only what came compressed out of another table, and was stored so, has to be opened (200 kB of it can read as 2).


-- ═══ any session ═══

-- name: set_parameters
SELECT set_config(p.name, p.value, false) FROM unnest($1::text[], $2::text[]) AS p (name, value);

-- name: backend_pid
SELECT pg_backend_pid();


-- ═══ reading the log (reader session; plans are generic and held to index scans, see tests/store/test_plans.py) ═══

-- name: head
-- Young gap ids ($4), everything above the head ($1), and the newest configuration, in one snapshot; last_id is evaluated after that snapshot
-- was taken.
SELECT l.last_id, l.config_seq, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes
FROM (
    SELECT coalesce(pg_sequence_last_value('webhook.outbox_id_seq'::regclass), 0) AS last_id,
           (SELECT coalesce(max(seq), 0) FROM webhook.config_change) AS config_seq
) AS l
LEFT JOIN LATERAL (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
        FROM webhook.outbox WHERE id = ANY ($4::bigint[])
        UNION ALL
        (SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
         FROM webhook.outbox WHERE id > $1 ORDER BY id LIMIT $2)
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b ON b.bytes - b.size < $3
ORDER BY b.id;

-- name: head_attempted
-- The same, until the head has passed the last id seen at Start: an earlier owner may have delivered these.
SELECT l.last_id, l.config_seq, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.run = 0) AS attempted
FROM (
    SELECT coalesce(pg_sequence_last_value('webhook.outbox_id_seq'::regclass), 0) AS last_id,
           (SELECT coalesce(max(seq), 0) FROM webhook.config_change) AS config_seq
) AS l
LEFT JOIN LATERAL (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
        FROM webhook.outbox WHERE id = ANY ($4::bigint[])
        UNION ALL
        (SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
         FROM webhook.outbox WHERE id > $1 ORDER BY id LIMIT $2)
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b ON b.bytes - b.size < $3
ORDER BY b.id;

-- name: holders
-- Whoever has taken or may take an id and write it holds this lock on the parent. A prepared transaction has no pid, and another
-- virtualtransaction after a restart.
SELECT virtualtransaction AS holder, pid IS NULL AS prepared
FROM pg_catalog.pg_locks
WHERE locktype = 'relation' AND relation = 'webhook.outbox'::regclass AND mode = 'RowExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database());

-- name: probe
-- Ranges of ids, each by its own index descent: one plain join over 10,000 ranges took 154 s, LATERAL 15 ms.
SELECT b.n, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.run = 0) AS attempted
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.n, q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT r.n, o.*
        FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS r (low, high, n)
        CROSS JOIN LATERAL (
            SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
            FROM webhook.outbox
            WHERE id >= r.low AND id <= r.high AND ($5::text[] IS NULL OR (account_id = ANY ($5) AND type = ANY ($6::text[])))
            ORDER BY id LIMIT $3
        ) AS o
        ORDER BY r.n, o.id
        LIMIT $3
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $4
ORDER BY b.n, b.id;

-- name: summary
-- What came in ranges of ids, without its rows: of 5,000,000, of which one account has most, 1,000 at a time instead of 200. OFFSET keeps it LATERAL.
SELECT o.account_id, o.type, count(*), coalesce(max(o.priority), 0) > 0, min(o.id), max(o.id)
FROM unnest($1::bigint[], $2::bigint[]) AS r (low, high)
CROSS JOIN LATERAL (SELECT id, account_id, type, priority FROM webhook.outbox WHERE id >= r.low AND id <= r.high OFFSET 0) AS o
GROUP BY o.account_id, o.type;

-- name: account
-- A page for lanes that are behind. $3 bounds how far one page scans when the lane's types are rare. Of an account with ten thousand endpoints
-- the attempts of those that read it only ($7): all of them were two million rows a page.
SELECT b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.endpoint_id = ANY ($7::bigint[]) AND a.run = 0) AS attempted
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
        FROM webhook.outbox
        WHERE account_id = $1 AND id > $2 AND id <= $3 AND ($4::text[] IS NULL OR type = ANY ($4::text[]))
        ORDER BY id LIMIT $5
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $6
ORDER BY b.id;

-- name: holes
-- The same for ids that a lane passed without settling them.
SELECT b.n, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.endpoint_id = ANY ($6::bigint[]) AND a.run = 0) AS attempted
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.n, q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT r.n, o.*
        FROM unnest($2::bigint[], $3::bigint[]) WITH ORDINALITY AS r (low, high, n)
        CROSS JOIN LATERAL (
            SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
            FROM webhook.outbox WHERE account_id = $1 AND id >= r.low AND id <= r.high ORDER BY id LIMIT $4
        ) AS o
        ORDER BY r.n, o.id
        LIMIT $4
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $5
ORDER BY b.n, b.id;

-- name: due_retries
-- Due retries of some endpoints ($1), so many of each ($2), oldest first each time: a row may commit late with an early due_at; and when the next
-- of each is due. Per endpoint, because one parked endpoint with a million due rows made one global order cost 946 ms; of many at once, because
-- with 3,000 endpoints failing a read for each left the head a third of its reads. statement_timestamp(), because an index can't be asked for a
-- volatile clock_timestamp(): that read every row that is not due. LATERAL with LIMIT 1, because a generic plan takes a LIMIT for a tenth of
-- the table, and joined by a hash over the whole log. Of a retry whose event is gone (id NULL) there is nothing to send; it comes too, to be ended.
SELECT b.n, b.next_due, b.event_id, b.run, b.number, b.first_attempt_at, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at,
       b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.n, q.due_at, q.event_id, q.run ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT w.n, o.*,
               (SELECT min(due_at) FROM webhook.retry WHERE endpoint_id = w.endpoint_id AND due_at > statement_timestamp() AND run <> ALL ($4::integer[])) AS next_due
        FROM unnest($1::bigint[], $2::bigint[]) WITH ORDINALITY AS w (endpoint_id, room, n)
        LEFT JOIN LATERAL (
            SELECT d.event_id, d.run, d.number, d.first_attempt_at, d.due_at, e.*
            FROM (
                SELECT event_id, run, number, first_attempt_at, due_at FROM webhook.retry
                WHERE endpoint_id = w.endpoint_id AND due_at <= statement_timestamp() AND run <> ALL ($4::integer[])
                ORDER BY due_at LIMIT w.room
            ) AS d
            LEFT JOIN LATERAL (
                (
                    SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
                    FROM webhook.outbox WHERE id = d.event_id LIMIT 1
                )
                UNION ALL
                (
                    -- A dead letter that was resent: the log may have forgotten the event.
                    SELECT l.event_id, l.account_id, l.type, l.payload, l.created_at, l.occurred_at, NULL, NULL, NULL, NULL
                    FROM webhook.dead_letter AS l
                    WHERE l.endpoint_id = w.endpoint_id AND l.event_id = d.event_id AND l.payload IS NOT NULL LIMIT 1
                )
                LIMIT 1
            ) AS e ON true
        ) AS o ON true
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN q.id IS NULL THEN 0 WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $3
ORDER BY b.n, b.due_at, b.event_id, b.run;

-- name: end_orphans
-- Retries of events that are nowhere: erased while they were in flight, and then they failed. One that is the oldest due of a failing endpoint
-- was all that its next look found, for ever. An event is always committed before its retry.
DELETE FROM webhook.retry AS r
USING unnest($1::bigint[], $2::bigint[], $3::integer[]) AS w (endpoint_id, event_id, run)
WHERE r.endpoint_id = w.endpoint_id AND r.event_id = w.event_id AND r.run = w.run
  AND NOT EXISTS (SELECT FROM webhook.outbox AS o WHERE o.id = r.event_id)
  AND NOT EXISTS (
      SELECT FROM webhook.dead_letter AS d WHERE d.endpoint_id = r.endpoint_id AND d.event_id = r.event_id AND d.payload IS NOT NULL
  );

-- name: urgent
-- What a lane that is behind sends first: the page of `account` with priority only, by the partial index.
SELECT b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.endpoint_id = ANY ($6::bigint[]) AND a.run = 0) AS attempted
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
        FROM webhook.outbox
        WHERE account_id = $1 AND id > $2 AND id <= $3 AND priority > 0
        ORDER BY id LIMIT $4
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $5
ORDER BY b.id;

-- name: keys
-- What may be sent next of each key ($2), from an id on ($3): a descent of the partial index each.
SELECT b.n, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.ordering_key, b.expires_at, b.priority, b.traceparent, b.bytes,
       ARRAY(SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = b.id AND a.endpoint_id = ANY ($7::bigint[]) AND a.run = 0) AS attempted
FROM (
    SELECT q.*, s.size, sum(s.size) OVER (ORDER BY q.n, q.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT k.n, o.*
        FROM unnest($2::text[], $3::bigint[]) WITH ORDINALITY AS k (key, low, n)
        CROSS JOIN LATERAL (
            SELECT id, account_id, type, payload, created_at, occurred_at, ordering_key, expires_at, priority, traceparent
            FROM webhook.outbox WHERE account_id = $1 AND ordering_key = k.key AND id >= k.low AND id <= $4 ORDER BY id LIMIT $5
        ) AS o
        ORDER BY k.n, o.id
    ) AS q
    CROSS JOIN LATERAL (
        SELECT CASE WHEN pg_column_compression(q.payload) IS NULL THEN pg_column_size(q.payload) ELSE octet_length(q.payload::text) END
    ) AS s (size)
) AS b
WHERE b.bytes - b.size < $6
ORDER BY b.n, b.id;

-- name: held_keys
-- Keys of an endpoint whose head waits for a retry.
SELECT ordering_key, event_id FROM webhook.retry WHERE endpoint_id = $1 AND ordering_key IS NOT NULL AND run = 0;

-- name: run_page
-- A page of a resend or replay: ids first, then those of them that have no attempt of this run ($7). `seen` says how far it was read.
SELECT b.seen, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.bytes
FROM (
    SELECT i.id AS seen, e.*, sum(coalesce(e.size, 0)) OVER (ORDER BY i.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT id FROM webhook.outbox
        WHERE account_id = $1 AND id > $2 AND id <= $3 AND type LIKE ANY ($4::text[])
        ORDER BY id LIMIT $5
    ) AS i
    LEFT JOIN LATERAL (
        SELECT o.id, o.account_id, o.type, o.payload, o.created_at, o.occurred_at,
               CASE WHEN pg_column_compression(o.payload) IS NULL THEN pg_column_size(o.payload) ELSE octet_length(o.payload::text) END AS size
        FROM webhook.outbox AS o
        WHERE o.id = i.id
          AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = i.id AND a.endpoint_id = $6 AND a.run = $7)
        LIMIT 1
    ) AS e ON true
) AS b
WHERE b.bytes - coalesce(b.size, 0) < $8
ORDER BY b.seen;

-- name: run_page_failed
-- The same, of deliveries that failed: an attempt that did, none that succeeded in any run, and no retry to come; not what expired (number 0).
-- From the index of failures.
SELECT b.seen, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.bytes
FROM (
    SELECT i.id AS seen, e.*, sum(coalesce(e.size, 0)) OVER (ORDER BY i.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT DISTINCT event_id AS id FROM webhook.attempt
        WHERE endpoint_id = $6 AND event_id > $2 AND event_id <= $3 AND fault IS NOT NULL
        ORDER BY event_id LIMIT $5
    ) AS i
    LEFT JOIN LATERAL (
        SELECT o.id, o.account_id, o.type, o.payload, o.created_at, o.occurred_at,
               CASE WHEN pg_column_compression(o.payload) IS NULL THEN pg_column_size(o.payload) ELSE octet_length(o.payload::text) END AS size
        FROM webhook.outbox AS o
        WHERE o.id = i.id AND o.account_id = $1 AND o.type LIKE ANY ($4::text[])
          AND NOT EXISTS (
              SELECT FROM webhook.attempt AS a
              WHERE a.event_id = i.id AND a.endpoint_id = $6 AND (a.run = $7 OR a.fault IS NULL OR a.number = 0)
          )
          AND NOT EXISTS (SELECT FROM webhook.retry AS r WHERE r.endpoint_id = $6 AND r.event_id = i.id)
        LIMIT 1
    ) AS e ON true
) AS b
WHERE b.bytes - coalesce(b.size, 0) < $8
ORDER BY b.seen;

-- name: run_page_dead
-- The same, of dead letters that are resent, from their own copies.
SELECT b.seen, b.id, b.account_id, b.type, b.payload, b.created_at, b.occurred_at, b.bytes
FROM (
    SELECT i.id AS seen, e.*, sum(coalesce(e.size, 0)) OVER (ORDER BY i.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM (
        SELECT DISTINCT event_id AS id FROM webhook.dead_letter
        WHERE resent_run = $7 AND event_id > $2 AND event_id <= $3 AND account_id = $1 AND type LIKE ANY ($4::text[])
        ORDER BY event_id LIMIT $5
    ) AS i
    LEFT JOIN LATERAL (
        SELECT d.event_id AS id, d.account_id, d.type, d.payload, d.created_at, d.occurred_at,
               CASE WHEN pg_column_compression(d.payload) IS NULL THEN pg_column_size(d.payload) ELSE octet_length(d.payload::text) END AS size
        FROM webhook.dead_letter AS d
        WHERE d.resent_run = $7 AND d.event_id = i.id AND d.payload IS NOT NULL
          AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = i.id AND a.endpoint_id = $6 AND a.run = $7)
        LIMIT 1
    ) AS e ON true
) AS b
WHERE b.bytes - coalesce(b.size, 0) < $8
ORDER BY b.seen;

-- name: arm_doorbell
SELECT pg_try_advisory_lock(9324665, 1);

-- name: disarm_doorbell
SELECT pg_advisory_unlock(9324665, 1);


-- ═══ starting (owner session) ═══

-- name: life
SELECT token FROM webhook.life;

-- name: begin_life
INSERT INTO webhook.life DEFAULT VALUES ON CONFLICT DO NOTHING;

-- name: try_own
SELECT pg_try_advisory_lock(9324665, 2) AS had, pg_backend_pid() AS pid;

-- name: look_at_owner
-- What a standby watches. held_up: the server is at work for the holder (its Start), or for the recorder, or keeps them waiting for
-- something other than their client; seen only by the same role or pg_read_all_stats. may_end: pg_terminate_backend would be allowed.
SELECT k.owner, k.epoch, k.heartbeat_at, h.pid, h.role, current_user AS us, clock_timestamp() AS now,
       EXISTS (
           SELECT FROM pg_catalog.pg_stat_activity AS a
           WHERE (a.pid = h.pid OR (a.datname = current_database() AND a.application_name = 'dispatcher recorder'))
             AND a.state = 'active' AND a.wait_event_type IS DISTINCT FROM 'Client'
       ) AS held_up,
       (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
       OR (NOT h.rolsuper AND (pg_has_role(h.usesysid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE'))) AS may_end
FROM webhook.checkpoint AS k
LEFT JOIN (
    SELECT l.pid, s.usesysid, r.rolname AS role, r.rolsuper
    FROM pg_catalog.pg_locks AS l
    JOIN pg_catalog.pg_stat_activity AS s ON s.pid = l.pid
    JOIN pg_catalog.pg_roles AS r ON r.oid = s.usesysid
    WHERE l.locktype = 'advisory' AND l.classid = 9324665 AND l.objid = 2 AND l.objsubid = 2 AND l.granted
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
) AS h ON true;

-- name: is_stood_by
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'dispatcher standby %'
);

-- name: end_owner
-- End the session that holds the owner lock if it is the one that was watched, and its heartbeat still the same; wait for its end.
SELECT pg_terminate_backend(l.pid, 1000)
FROM pg_catalog.pg_locks AS l
CROSS JOIN webhook.checkpoint AS k
WHERE l.locktype = 'advisory' AND l.classid = 9324665 AND l.objid = 2 AND l.objsubid = 2 AND l.granted
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND l.pid = $1 AND k.heartbeat_at IS NOT DISTINCT FROM $2;

-- name: end_own_session
-- The same for our own former session, which the server takes for alive.
SELECT pg_terminate_backend(l.pid, 1000)
FROM pg_catalog.pg_locks AS l
WHERE l.locktype = 'advisory' AND l.classid = 9324665 AND l.objid = 2 AND l.objsubid = 2 AND l.granted
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND l.pid = $1;

-- name: end_recorders
-- Whoever has the owner lock has the only recorder that counts: one that is in a batch now is a former owner's, which may have been frozen
-- or cut off in the middle of a COPY, where no timeout but the statement's own ends it. So with the janitor, which empties a partition under
-- the same row's lock.
SELECT pg_terminate_backend(a.pid, 1000)
FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname = current_database() AND a.application_name IN ('dispatcher recorder', 'dispatcher janitor')
  AND EXISTS (
      SELECT FROM pg_catalog.pg_locks AS l
      WHERE l.pid = a.pid AND l.locktype = 'relation' AND l.relation = 'webhook.checkpoint'::regclass AND l.mode = 'RowShareLock' AND l.granted
        AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  );

-- name: raise_epoch
UPDATE webhook.checkpoint SET epoch = epoch + 1, owner = $1, owned_since = clock_timestamp(), heartbeat_at = clock_timestamp()
RETURNING epoch;

-- name: beat
-- While Start reads; then the recorder's checkpoints do it.
UPDATE webhook.checkpoint SET heartbeat_at = clock_timestamp() WHERE epoch = $1;

-- name: epoch
SELECT epoch FROM webhook.checkpoint;

-- name: read_checkpoint
SELECT position, gaps, epoch FROM webhook.checkpoint;

-- name: read_lanes
SELECT endpoint_id, settled, holes, backlog FROM webhook.lane;

-- name: read_retries_due
-- The earliest retry of each endpoint, one index descent each: a GROUP BY would read every row of a million.
SELECT e.id, d.due_at
FROM webhook.endpoint AS e
CROSS JOIN LATERAL (SELECT min(due_at) AS due_at FROM webhook.retry WHERE endpoint_id = e.id) AS d
WHERE e.state <> 'deleted' AND d.due_at IS NOT NULL;

-- name: forget_deleted
-- What a deleted endpoint left behind: nobody reads it any more.
WITH gone AS (SELECT id FROM webhook.endpoint WHERE state = 'deleted'),
     lanes AS (DELETE FROM webhook.lane WHERE endpoint_id IN (SELECT id FROM gone))
DELETE FROM webhook.retry WHERE endpoint_id IN (SELECT id FROM gone);

-- name: trim_config_changes
DELETE FROM webhook.config_change WHERE seq < (SELECT max(seq) FROM webhook.config_change) - 1000;

-- name: last_id
SELECT coalesce(pg_sequence_last_value('webhook.outbox_id_seq'::regclass), 0);

-- name: ping
SELECT 1;

-- name: wall
SELECT clock_timestamp();

-- name: id_key
SELECT id_key FROM webhook.instance;


-- ═══ recording (recorder session) ═══

-- name: fence
-- The first statement of every batch. FOR UPDATE waits for a batch whose fate is unknown to end, and costs 60–75 µs however long a
-- transaction is held open somewhere; an UPDATE per batch grew from 69 to 2,040 µs in 120,000 batches.
SELECT FROM webhook.checkpoint WHERE epoch = $1 FOR UPDATE;

-- name: attempt_one
-- The row-by-row path, after COPY was refused: a batch sent again meets its own rows.
INSERT INTO webhook.attempt (event_id, endpoint_id, run, number, started_at, duration_us, status, fault, response_head)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT DO NOTHING;

-- name: put_retries
INSERT INTO webhook.retry (endpoint_id, event_id, run, number, first_attempt_at, due_at, reason, ordering_key)
SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::smallint[], $5::timestamptz[], $6::timestamptz[], $7::text[], $8::text[])
ON CONFLICT (endpoint_id, event_id, run) DO UPDATE
    SET number = excluded.number, due_at = excluded.due_at, reason = excluded.reason
    WHERE webhook.retry.number < excluded.number;

-- name: end_retries
DELETE FROM webhook.retry AS r
USING unnest($1::bigint[], $2::bigint[], $3::integer[]) AS s (endpoint_id, event_id, run)
WHERE r.endpoint_id = s.endpoint_id AND r.event_id = s.event_id AND r.run = s.run;

-- name: put_dead_letters
INSERT INTO webhook.dead_letter
    (endpoint_id, event_id, run, account_id, type, payload, occurred_at, created_at, attempts, first_attempt_at, reason, status, fault)
SELECT d.endpoint_id, d.event_id, d.run, o.account_id, o.type, o.payload, o.occurred_at, o.created_at,
       d.attempts, d.first_attempt_at, d.reason, d.status, d.fault
FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::smallint[], $5::timestamptz[], $6::text[], $7::smallint[], $8::text[])
    AS d (endpoint_id, event_id, run, attempts, first_attempt_at, reason, status, fault)
CROSS JOIN LATERAL (
    (SELECT account_id, type, payload, occurred_at, created_at FROM webhook.outbox WHERE id = d.event_id LIMIT 1)
    UNION ALL
    (
        -- A dead letter that was resent in vain, after the log had forgotten the event.
        SELECT l.account_id, l.type, l.payload, l.occurred_at, l.created_at FROM webhook.dead_letter AS l
        WHERE l.endpoint_id = d.endpoint_id AND l.event_id = d.event_id AND l.payload IS NOT NULL LIMIT 1
    )
    LIMIT 1
) AS o
ON CONFLICT DO NOTHING;

-- name: end_canceled_runs
-- So many a batch: all of millions would take longer than a statement may, and the same batch would come again for ever. A run is not finished
-- while it has any, so it is written again.
DELETE FROM webhook.retry WHERE (endpoint_id, event_id, run) IN (
    SELECT r.endpoint_id, r.event_id, r.run FROM webhook.retry AS r WHERE r.run <> 0 AND r.run = ANY ($1::integer[]) LIMIT $2
);

-- name: put_runs
-- A run that has ended is finished when none of its retries is left: asked here, after this batch's own.
UPDATE webhook.run_progress AS p
SET settled = s.settled, attempted = s.attempted, delivered = s.delivered, dead = s.dead,
    finished_at = CASE
        WHEN s.ended AND NOT EXISTS (SELECT FROM webhook.retry AS r WHERE r.run <> 0 AND r.run = s.run)
        THEN coalesce(p.finished_at, clock_timestamp())
    END
FROM unnest($1::integer[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::boolean[])
    AS s (run, settled, attempted, delivered, dead, ended)
WHERE p.run_id = s.run
RETURNING p.run_id, p.finished_at IS NOT NULL AS finished;

-- name: put_stats
-- An array of arrays would be flattened by unnest, so the counts of durations come as text. The backlog is that of the lane's row: a second
-- old, or as near as a parked lane's is kept.
INSERT INTO webhook.endpoint_stat (minute, endpoint_id, epoch, delivered, failed, dead, expired, duration_ms, durations, backlog)
SELECT to_timestamp(minute * 60), endpoint_id, $1, delivered, failed, dead, expired, duration_ms, durations::integer[],
       coalesce((SELECT l.backlog FROM webhook.lane AS l WHERE l.endpoint_id = s.endpoint_id), 0)
FROM unnest($2::bigint[], $3::bigint[], $4::integer[], $5::integer[], $6::integer[], $7::integer[], $8::bigint[], $9::text[])
    AS s (minute, endpoint_id, delivered, failed, dead, expired, duration_ms, durations)
ON CONFLICT DO NOTHING;

-- name: put_lanes
INSERT INTO webhook.lane (endpoint_id, settled, holes, backlog)
SELECT endpoint_id, settled, holes::int8multirange, backlog
FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[]) AS l (endpoint_id, settled, holes, backlog)
ON CONFLICT (endpoint_id) DO UPDATE
    SET settled = excluded.settled, holes = excluded.holes, backlog = excluded.backlog, updated_at = now();

-- name: end_lanes
DELETE FROM webhook.lane WHERE endpoint_id = ANY ($1::bigint[]);

-- name: take_up
-- A row that somebody is changing right now is skipped and taken up by a later batch: the recorder waits for nobody's open transaction.
UPDATE webhook.subscription SET taken_up = true
WHERE id IN (SELECT id FROM webhook.subscription WHERE id = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED)
RETURNING id;

-- name: put_checkpoint
UPDATE webhook.checkpoint SET position = $1, gaps = $2::text::int8multirange, heartbeat_at = clock_timestamp();


-- ═══ configuration ═══

-- name: config_seq
SELECT coalesce(max(seq), 0) FROM webhook.config_change;

-- name: config_changes
-- At least one row, so that each look sees the epoch, and that nobody gave the sequence a cache (migrate.py says why).
SELECT k.epoch, q.seqcache AS cache, clock_timestamp() AS wall, c.seq, c.endpoint_id, c.forget
FROM webhook.checkpoint AS k
JOIN pg_catalog.pg_sequence AS q ON q.seqrelid = 'webhook.outbox_id_seq'::regclass
LEFT JOIN webhook.config_change AS c ON c.seq > $1
ORDER BY c.seq LIMIT $2;

-- name: endpoints
-- Everything the engine needs of each endpoint ($1 NULL: of all that are not deleted).
SELECT e.id, e.account_id, e.url, e.state, e.timeout_ms, e.rate_per_s, e.rate_burst, e.in_flight_max, e.retry_schedule_s, e.failing_since,
       e.failing_told_at IS NOT NULL AS failing_told, e.state_reason, e.response_control, e.ordering, e.signing, e.body_format, e.omit, e.extra_signature, e.credentials,
       ARRAY(
           SELECT s.secret FROM webhook.endpoint_secret AS s
           WHERE s.endpoint_id = e.id AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp())
             AND s.scheme = ANY (string_to_array(e.signing, ','))
           ORDER BY s.id DESC
       ) AS secrets,
       (
           SELECT min(s.expires_at) FROM webhook.endpoint_secret AS s
           WHERE s.endpoint_id = e.id AND s.expires_at > clock_timestamp()
       ) AS reload_at,
       ARRAY(
           SELECT (u.id, u.pattern, u.since_id, u.until_id, u.taken_up, u.rule::text) FROM webhook.subscription AS u
           WHERE u.endpoint_id = e.id ORDER BY u.id
       ) AS subscriptions
FROM webhook.endpoint AS e
WHERE e.state <> 'deleted' AND ($1::bigint[] IS NULL OR e.id = ANY ($1::bigint[]));

-- name: open_runs
-- Resends and replays that haven't finished, of some endpoints ($1 NULL: of all).
SELECT r.endpoint_id, r.id, r.source, r.after_id, r.upto_id, r.patterns, r.only_failed, r.rate_per_s, r.state,
       r.rule::text AS rule, p.settled, p.attempted, p.delivered, p.dead
FROM webhook.run_progress AS p
JOIN webhook.run AS r ON r.id = p.run_id
WHERE p.finished_at IS NULL AND ($1::bigint[] IS NULL OR r.endpoint_id = ANY ($1::bigint[]))
ORDER BY r.id;

-- name: note_failing
-- This and the next three change nothing once another epoch rules: they may be asked for by a process that was frozen right after its last look.
UPDATE webhook.endpoint AS e SET failing_since = f.failing_since
FROM unnest($1::bigint[], $2::timestamptz[]) AS f (id, failing_since)
WHERE e.id = f.id AND e.failing_since IS DISTINCT FROM f.failing_since AND EXISTS (SELECT FROM webhook.checkpoint WHERE epoch = $3);

-- name: disable_endpoint
-- Only a live one: what an owner paused or deleted meanwhile stays as the owner left it. The operational event goes to the account's
-- *other* endpoints by way of the log, like any event.
WITH disabled AS (
    UPDATE webhook.endpoint SET state = 'disabled', state_reason = $2, state_changed_at = clock_timestamp(), paused_at_id = webhook.last_id()
    WHERE id = $1 AND state = 'live' AND EXISTS (SELECT FROM webhook.checkpoint WHERE epoch = $4)
    RETURNING id
)
SELECT webhook.tell_of_endpoint(id, 'endpoint.disabled', $2, $3) FROM disabled;

-- name: tell_failing
-- Once until it has recovered, also over restarts.
WITH failing AS (
    UPDATE webhook.endpoint SET failing_since = coalesce(failing_since, $2), failing_told_at = clock_timestamp()
    WHERE id = $1 AND state = 'live' AND failing_told_at IS NULL AND EXISTS (SELECT FROM webhook.checkpoint WHERE epoch = $3)
    RETURNING id
)
SELECT webhook.tell_of_endpoint(id, 'endpoint.failing', 'consecutive_failures', $2) FROM failing;

-- name: tell_recovered
-- Clears the notes as well, and tells only if there was one: asked again, because nobody knows whether it took effect, it tells nothing twice.
WITH recovered AS (
    UPDATE webhook.endpoint SET failing_since = NULL, failing_told_at = NULL
    WHERE id = $1 AND state = 'live' AND failing_told_at IS NOT NULL AND EXISTS (SELECT FROM webhook.checkpoint WHERE epoch = $3)
    RETURNING id
)
SELECT webhook.tell_of_endpoint(id, 'endpoint.recovered', 'delivered', $2) FROM recovered;


-- ═══ health checks at start ═══

-- name: fitness
SELECT current_setting('server_version_num')::integer AS version_num,
       current_setting('server_encoding') AS encoding,
       pg_is_in_recovery() AS in_recovery,
       current_user AS role;

-- name: schema_version
SELECT max(version) FROM webhook.schema_version;

-- name: sequence_cache
SELECT seqcache FROM pg_catalog.pg_sequence WHERE seqrelid = 'webhook.outbox_id_seq'::regclass;

-- name: missing_privileges
SELECT t.name || ' (' || p.privilege || ')' AS missing
FROM unnest(ARRAY[
    'outbox', 'attempt', 'retry', 'dead_letter', 'checkpoint', 'lane', 'life', 'subscription', 'endpoint', 'endpoint_secret', 'config_change',
    'instance', 'run', 'run_progress', 'endpoint_stat', 'discard', 'alert', 'alert_recipient', 'event_key'
])
    AS t (name)
CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p (privilege)
WHERE NOT has_table_privilege('webhook.' || t.name, p.privilege);
