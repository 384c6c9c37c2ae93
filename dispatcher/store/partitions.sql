-- The janitor's statements: partitions, retention, sweeps. They run on a session of its own. What needs the tables' owner is a function of the
-- schema (schema.sql, "Partitions"); deletes are in pages by an index, each its own transaction.

-- name: life
SELECT token FROM webhook.life;


-- ═══ what there is ═══

-- name: leaves
SELECT parent, low, high FROM webhook.leaves() WHERE low IS NOT NULL ORDER BY parent, low;

-- name: fences
-- The bounds are in the name: nobody has to parse an expression.
SELECT split_part(conname, '_', 1) AS parent, split_part(conname, '_', 3)::bigint AS low, split_part(conname, '_', 4)::bigint AS high
FROM pg_catalog.pg_constraint
WHERE connamespace = 'webhook'::regnamespace AND contype = 'c' AND conname ~ '^(outbox|attempt)_fence_\d+_\d+$';

-- name: fence_is_valid
SELECT convalidated FROM pg_catalog.pg_constraint
WHERE connamespace = 'webhook'::regnamespace AND contype = 'c' AND conname ~ ('^' || $1::text || '_fence_\d+_\d+$');

-- name: progress
-- The last id after the checkpoint: it is never behind the position.
SELECT k.position, k.gaps, webhook.last_id() AS last_id, clock_timestamp() AS wall FROM webhook.checkpoint AS k;

-- name: outbox_outside
-- Those of the ranges, which no leaf covers, that have rows: one descent into the DEFAULT partition's index each.
SELECT h.low, h.high FROM unnest($1::bigint[], $2::bigint[]) AS h (low, high)
CROSS JOIN LATERAL (SELECT FROM webhook.outbox WHERE id >= h.low AND id < h.high ORDER BY id LIMIT 1) AS o
ORDER BY h.low;

-- name: attempt_outside
SELECT h.low, h.high FROM unnest($1::bigint[], $2::bigint[]) AS h (low, high)
CROSS JOIN LATERAL (SELECT FROM webhook.attempt WHERE event_id >= h.low AND event_id < h.high ORDER BY event_id LIMIT 1) AS o
ORDER BY h.low;

-- name: sizes
-- Indexes and what is stored outside of the rows included; low NULL is the DEFAULT partition.
SELECT parent, low, pg_total_relation_size(leaf) AS bytes FROM webhook.leaves();

-- name: listed
-- For people. reltuples is what the last ANALYZE or VACUUM saw; -1: none yet.
SELECT l.parent, l.low, l.high, l.leaf::text AS name, nullif(c.reltuples, -1)::bigint AS rows_estimate, pg_total_relation_size(l.leaf) AS bytes
FROM webhook.leaves() AS l JOIN pg_catalog.pg_class AS c ON c.oid = l.leaf
ORDER BY l.low NULLS LAST, l.parent DESC;

-- name: first_from
-- One step of a binary search by time.
SELECT id, created_at FROM webhook.outbox WHERE id >= $1 ORDER BY id LIMIT 1;

-- name: newest_event
SELECT created_at FROM webhook.outbox WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT 1;

-- name: newest_attempt
SELECT started_at FROM webhook.attempt WHERE event_id >= $1 AND event_id < $2 ORDER BY event_id DESC LIMIT 1;

-- name: in_the_way
-- Whoever holds any lock on the parent. Asked twice, 20 ms apart: who is there both times will be there for longer than a try may wait.
SELECT virtualtransaction FROM pg_catalog.pg_locks
WHERE locktype = 'relation' AND relation = ('webhook.' || $1::text)::regclass AND granted AND pid IS DISTINCT FROM pg_backend_pid()
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database());


-- ═══ what is done ═══

-- name: attach
SELECT webhook.attach_partition($1, $2, $3);

-- name: recut
SELECT webhook.recut_partition($1, $2, $3);

-- name: adopt
SELECT webhook.adopt_default($1, $2, $3);


-- ═══ expiring a leaf: these in one transaction ═══

-- name: unsent
-- What the leaf holds that an endpoint has not had one attempt of: above its lane's settled mark, or in its holes, or of a subscription that was
-- not taken up yet. The lanes that this finds are stalled, so nothing moves meanwhile. One scan of each account's index over the leaf.
SELECT w.id AS endpoint_id, n.deliveries, n.first_at, n.last_at
FROM (
    SELECT e.id, e.account_id, l.holes, coalesce(l.settled, 9223372036854775807) AS settled
    FROM webhook.endpoint AS e
    LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
    WHERE e.state <> 'deleted' AND (
        l.settled < $2::bigint - 1 OR l.holes && int8range($1::bigint, $2::bigint)
        OR EXISTS (SELECT FROM webhook.subscription AS s WHERE s.endpoint_id = e.id AND NOT s.taken_up AND s.since_id < $2::bigint - 1)
    )
) AS w
CROSS JOIN LATERAL (
    SELECT count(*) AS deliveries, min(o.created_at) AS first_at, max(o.created_at) AS last_at
    FROM webhook.outbox AS o
    WHERE o.account_id = w.account_id AND o.id >= $1::bigint AND o.id < $2::bigint
      AND EXISTS (
          SELECT FROM webhook.subscription AS s
          WHERE s.endpoint_id = w.id AND s.since_id < o.id AND (s.until_id IS NULL OR o.id <= s.until_id)
            AND (s.pattern = '*' OR s.pattern = o.type OR (right(s.pattern, 2) = '.*' AND starts_with(o.type, left(s.pattern, -1))))
            AND (o.id > w.settled OR o.id <@ w.holes OR NOT s.taken_up)
            AND CASE WHEN s.rule IS NULL THEN true ELSE webhook.passes(s.rule, o.type, o.payload) END
      )
      AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = o.id AND a.endpoint_id = w.id AND a.run = 0)
) AS n
WHERE n.deliveries > 0;

-- name: end_retries
-- Deliveries that wait for a retry, unless a dead letter has a copy of the event: then the retry goes on from that. A deleted endpoint's are
-- nobody's loss.
WITH gone AS (
    DELETE FROM webhook.retry AS r
    WHERE r.event_id >= $1 AND r.event_id < $2
      AND NOT EXISTS (
          SELECT FROM webhook.dead_letter AS d WHERE d.endpoint_id = r.endpoint_id AND d.event_id = r.event_id AND d.payload IS NOT NULL
      )
    RETURNING r.endpoint_id, r.event_id
)
SELECT g.endpoint_id, count(*) AS deliveries, min(o.created_at) AS first_at, max(o.created_at) AS last_at
FROM gone AS g
JOIN webhook.endpoint AS e ON e.id = g.endpoint_id AND e.state <> 'deleted'
LEFT JOIN LATERAL (SELECT created_at FROM webhook.outbox WHERE id = g.event_id) AS o ON true
GROUP BY g.endpoint_id;

-- name: reopen_dead_letters
-- Those that a replay of the log has taken on and not come to: it will find nothing here. They have their own copies, so nothing is lost.
UPDATE webhook.dead_letter AS d
SET state = 'open', state_changed_at = clock_timestamp(), resent_run = NULL
FROM webhook.run AS r
JOIN webhook.run_progress AS p ON p.run_id = r.id
WHERE p.finished_at IS NULL AND r.source = 'log' AND d.resent_run = r.id AND d.state = 'resent' AND d.event_id >= $1 AND d.event_id < $2
  AND NOT EXISTS (
      SELECT FROM webhook.attempt AS a WHERE a.event_id = d.event_id AND a.endpoint_id = d.endpoint_id AND a.run = r.id
  );

-- name: discard
INSERT INTO webhook.discard (endpoint_id, reason, after_id, upto_id, deliveries)
SELECT endpoint_id, 'expired', $1::bigint - 1, $2::bigint - 1, deliveries FROM unnest($3::bigint[], $4::bigint[]) AS l (endpoint_id, deliveries);

-- name: tell
-- The account is told by the log; the endpoint itself too, for it may have been paused and be back.
SELECT webhook.tell(e.id, 'endpoint.events_expired', json_build_object(
           'endpoint', json_build_object('id', e.id, 'name', e.name, 'url', substring(e.url FROM '^[^:]+://[^/?#]+') || '/'), 'deliveries', l.deliveries,
           'from', to_char(l.first_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
           'to', to_char(l.last_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
       ))
FROM unnest($1::bigint[], $2::bigint[], $3::timestamptz[], $4::timestamptz[]) AS l (endpoint_id, deliveries, first_at, last_at)
JOIN webhook.endpoint AS e ON e.id = l.endpoint_id
ORDER BY e.id;

-- name: expire
SELECT webhook.expire_partition($1, $2, $3);


-- ═══ sweeping ═══

-- name: retrying_below
-- Endpoints with a retry of an event below $1: one descent each.
SELECT e.id FROM webhook.endpoint AS e
CROSS JOIN LATERAL (SELECT FROM webhook.retry AS r WHERE r.endpoint_id = e.id AND r.event_id < $1 ORDER BY r.event_id LIMIT 1) AS q
WHERE e.state <> 'deleted';

-- name: sweep_retries
-- A page of the retries in the order of their key; those whose event is gone, and that no dead letter has a copy of, are over. They are left by
-- an erasure that met a POST in flight, or by hand: what retention takes ends with its leaf (end_retries).
WITH page AS (
    SELECT endpoint_id, event_id, run FROM webhook.retry
    WHERE (endpoint_id, event_id, run) > ($1::bigint, $2::bigint, $3::integer)
    ORDER BY endpoint_id, event_id, run LIMIT $4
), gone AS (
    DELETE FROM webhook.retry AS r USING page AS p
    WHERE r.endpoint_id = p.endpoint_id AND r.event_id = p.event_id AND r.run = p.run
      AND NOT EXISTS (SELECT FROM webhook.outbox AS o WHERE o.id = r.event_id)
      AND NOT EXISTS (
          SELECT FROM webhook.dead_letter AS d WHERE d.endpoint_id = r.endpoint_id AND d.event_id = r.event_id AND d.payload IS NOT NULL
      )
    RETURNING r.endpoint_id, r.event_id
), counted AS (
    INSERT INTO webhook.discard (endpoint_id, reason, after_id, upto_id, deliveries)
    SELECT g.endpoint_id, 'expired', min(g.event_id) - 1, max(g.event_id), count(*)
    FROM gone AS g JOIN webhook.endpoint AS e ON e.id = g.endpoint_id AND e.state <> 'deleted'
    GROUP BY g.endpoint_id
    RETURNING deliveries
)
SELECT (SELECT coalesce(sum(deliveries), 0)::bigint FROM counted) AS deliveries, p.endpoint_id, p.event_id, p.run
FROM page AS p ORDER BY p.endpoint_id DESC, p.event_id DESC, p.run DESC LIMIT 1;

-- name: sweep_attempts
-- Attempts of events that are gone: dead letters that were resent later, what came in late, and what no leaf of its own was emptied of.
WITH gone AS (
    DELETE FROM webhook.attempt
    WHERE event_id < $1 AND (event_id, endpoint_id, run, number) IN (
        SELECT event_id, endpoint_id, run, number FROM webhook.attempt WHERE event_id < $1 AND started_at < $2 ORDER BY event_id LIMIT $3
    )
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: sweep_dead_letters
-- A page above id $1. Ids ascend with the time of death, so the first page that ends with a young one is the last. One that was resent lately
-- stays: its run reads the copy.
WITH page AS (
    SELECT id, died_at < $2 AS is_old, greatest(died_at, state_changed_at) < $2 AS is_over FROM webhook.dead_letter WHERE id > $1 ORDER BY id LIMIT $3
), gone AS (
    DELETE FROM webhook.dead_letter WHERE id IN (SELECT id FROM page WHERE is_over) RETURNING state
)
SELECT p.id AS passed, p.is_old, (SELECT count(*) FROM gone) AS deleted, (SELECT count(*) FROM gone WHERE state = 'open') AS open
FROM page AS p ORDER BY p.id DESC LIMIT 1;

-- name: sweep_tests
WITH gone AS (
    DELETE FROM webhook.test_attempt
    WHERE started_at < $1 AND id IN (SELECT id FROM webhook.test_attempt ORDER BY id LIMIT $2)
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: sweep_stats
WITH gone AS (
    DELETE FROM webhook.endpoint_stat
    WHERE (minute, endpoint_id, epoch) IN (
        SELECT minute, endpoint_id, epoch FROM webhook.endpoint_stat WHERE minute < $1 ORDER BY minute LIMIT $2
    )
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: sweep_event_keys
-- One that somebody uses at this moment stays for the next page.
WITH gone AS (
    DELETE FROM webhook.event_key WHERE (account_id, key) IN (
        SELECT account_id, key FROM webhook.event_key WHERE created_at < $1 ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
    )
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: sweep_runs
-- Runs that have finished long ago. Each is a change of configuration, so few at a time.
WITH progress AS (
    DELETE FROM webhook.run_progress WHERE run_id IN (SELECT run_id FROM webhook.run_progress WHERE finished_at < $1 ORDER BY run_id LIMIT $2)
    RETURNING run_id
), gone AS (
    DELETE FROM webhook.run WHERE id IN (SELECT run_id FROM progress) RETURNING 1
)
SELECT count(*) FROM gone;

-- name: missing_functions
-- Which of the functions the role may not call.
SELECT p.oid::regprocedure::text AS missing FROM pg_catalog.pg_proc AS p
WHERE p.pronamespace = 'webhook'::regnamespace
  AND p.proname IN ('attach_partition', 'recut_partition', 'expire_partition', 'adopt_default') AND NOT has_function_privilege(p.oid, 'EXECUTE');
