-- What people look for in the log, from new to old, a bounded number of events at a time. $1 the account, NULL for all.

-- name: begin
-- What a search begins with: where the log ends, what public ids are made with, and whose endpoint $1 is.
SELECT webhook.last_id() AS last_id, (SELECT id_key FROM webhook.instance) AS id_key, (SELECT account_id FROM webhook.endpoint WHERE id = $1) AS account_id;

-- name: events
-- A page of the walk: events below $2 and not below $3, at most $4 of them are looked at.
SELECT w.id, w.account_id, w.type, w.occurred_at, w.created_at, pg_column_size(w.payload) AS bytes,
       ($5::text[] IS NULL OR w.type = ANY ($5::text[]) OR w.type ^@ ANY ($6::text[]))
       AND ($7::text IS NULL OR position($7 IN w.payload::text) > 0) AS matches
FROM (
    SELECT id, account_id, type, occurred_at, created_at, payload FROM webhook.outbox
    WHERE ($1::text IS NULL OR account_id = $1) AND id < $2 AND id >= $3
    ORDER BY id DESC
    LIMIT $4
) AS w
ORDER BY w.id DESC;

-- name: candidates
-- The same walk, for deliveries: at most $4 are looked at, whichever match.
SELECT w.id, w.account_id, w.created_at,
       ($5::text[] IS NULL OR w.type = ANY ($5::text[]) OR w.type ^@ ANY ($6::text[]))
       AND ($7::text IS NULL OR position($7 IN w.payload::text) > 0) AS matches
FROM (
    SELECT id, account_id, type, created_at, payload FROM webhook.outbox
    WHERE ($1::text IS NULL OR account_id = $1) AND id < $2 AND id >= $3
    ORDER BY id DESC
    LIMIT $4
) AS w
ORDER BY w.id DESC;

-- name: failed_candidates
-- Events of which endpoint $1 has a failed attempt, from their own index: for who asks for failures among millions of successes. An event that
-- retention has taken from the log matches nothing.
SELECT f.event_id AS id, o.account_id, o.created_at,
       o.type IS NOT NULL AND ($5::text[] IS NULL OR o.type = ANY ($5::text[]) OR o.type ^@ ANY ($6::text[]))
       AND ($7::text IS NULL OR position($7 IN o.payload::text) > 0) AS matches
FROM (
    SELECT DISTINCT event_id FROM webhook.attempt
    WHERE endpoint_id = $1 AND fault IS NOT NULL AND event_id < $2 AND event_id >= $3
    ORDER BY event_id DESC
    LIMIT $4
) AS f
LEFT JOIN LATERAL (SELECT account_id, type, created_at, payload FROM webhook.outbox WHERE id = f.event_id LIMIT 1) AS o ON true
ORDER BY f.event_id DESC;

-- name: endpoints_of
-- How many endpoints each account has, deleted ones too: what a look at one of its events costs.
SELECT account_id, count(*) AS endpoints FROM webhook.endpoint WHERE account_id = ANY ($1::text[]) GROUP BY account_id;

-- name: endpoints_floor
-- The first endpoint of account $1 that a look at $3 of them, from below $2 down, leaves out; NULL where there is none.
SELECT id FROM webhook.endpoint WHERE account_id = $1 AND id < $2 ORDER BY id DESC OFFSET $3 LIMIT 1;

-- name: deliveries
-- Of the events $2, what each endpoint that was to have them (or has had them) came to; $3 one endpoint, $4 states, $5 the status of its last
-- answer from … $6 to, $7 its last fault. Below the delivery ($8, $9), at most $10; of endpoints from $11 up. LATERAL and LIMIT 1: a look at a key each, never a join of tables.
-- $12 and $13 are the lowest and the highest of $2: with sixty-five partitions the plan took 4.6 ms, and now looks at those that can have any.
SELECT q.*
FROM (
    SELECT o.id AS event_id, o.account_id, o.type, o.created_at, e.id AS endpoint_id, e.name AS endpoint_name, e.url AS endpoint_url, e.state AS endpoint_state,
           a.run, a.number, a.started_at, a.duration_us, a.status, a.fault, coalesce(a.attempts, 0) AS attempts, r.due_at AS next_attempt_at, d.id AS dead_letter_id,
           CASE WHEN a.delivered THEN 'delivered'
                WHEN r.due_at IS NOT NULL THEN 'retrying'
                WHEN d.id IS NOT NULL THEN 'dead'
                WHEN a.fault = 'expired' THEN 'expired'
                WHEN a.attempts IS NOT NULL THEN 'failed'
                ELSE 'waiting' END AS state
    FROM webhook.outbox AS o
    JOIN webhook.endpoint AS e ON e.account_id = o.account_id AND ($3::bigint IS NULL OR e.id = $3)
    LEFT JOIN LATERAL (
        SELECT x.run, x.number, x.started_at, x.duration_us, x.status, x.fault, count(*) FILTER (WHERE x.number > 0) OVER () AS attempts,
               bool_or(x.fault IS NULL) OVER () AS delivered
        FROM webhook.attempt AS x
        WHERE x.event_id = o.id AND x.endpoint_id = e.id AND x.event_id BETWEEN $12 AND $13
        ORDER BY x.run DESC, x.number DESC LIMIT 1
    ) AS a ON true
    LEFT JOIN LATERAL (
        SELECT x.due_at FROM webhook.retry AS x WHERE x.endpoint_id = e.id AND x.event_id = o.id ORDER BY x.due_at LIMIT 1
    ) AS r ON true
    LEFT JOIN LATERAL (
        SELECT x.id FROM webhook.dead_letter AS x WHERE x.endpoint_id = e.id AND x.event_id = o.id ORDER BY x.run DESC LIMIT 1
    ) AS d ON true
    WHERE o.id = ANY ($2::bigint[]) AND ($1::text IS NULL OR o.account_id = $1)
      AND (o.id < $8 OR (o.id = $8 AND e.id < $9)) AND e.id >= $11
      AND (
          a.attempts IS NOT NULL
          OR (e.state <> 'deleted' AND EXISTS (
              SELECT FROM webhook.subscription AS s
              WHERE s.endpoint_id = e.id AND s.since_id < o.id AND (s.until_id IS NULL OR o.id <= s.until_id)
                AND (s.pattern = '*' OR s.pattern = o.type OR (right(s.pattern, 2) = '.*' AND starts_with(o.type, left(s.pattern, -1))))
                AND webhook.passes(s.rule, o.type, o.payload)
          ))
      )
) AS q
WHERE ($4::text[] IS NULL OR q.state = ANY ($4::text[]))
  AND ($5::smallint IS NULL OR q.status BETWEEN $5 AND $6)
  AND ($7::text IS NULL OR q.fault = $7)
ORDER BY q.event_id DESC, q.endpoint_id DESC
LIMIT $10;

-- name: retries_of
-- When the retries of a delivery are due, one for each run at most; by the table's key.
SELECT due_at FROM webhook.retry WHERE endpoint_id = $1 AND event_id = $2 ORDER BY due_at LIMIT 100;

-- name: accounts
-- Every account that has endpoints, in order, after $1. Its index is walked by hops: an account a step, however many endpoints it has.
WITH RECURSIVE hop AS (
    SELECT (SELECT account_id FROM webhook.endpoint WHERE account_id > $1 AND state <> 'deleted' ORDER BY account_id LIMIT 1) AS account_id, 1 AS n
    UNION ALL
    SELECT (SELECT account_id FROM webhook.endpoint AS e WHERE e.account_id > hop.account_id AND state <> 'deleted' ORDER BY account_id LIMIT 1), n + 1
    FROM hop
    WHERE hop.account_id IS NOT NULL AND n < $2
)
SELECT h.account_id, c.*
FROM hop AS h
CROSS JOIN LATERAL (
    SELECT count(*) AS endpoints, count(*) FILTER (WHERE e.state = 'live') AS live, count(*) FILTER (WHERE e.state = 'disabled') AS disabled,
           count(*) FILTER (WHERE e.state = 'live' AND e.failing_since IS NOT NULL) AS failing, coalesce(sum(l.backlog), 0)::bigint AS backlog
    FROM webhook.endpoint AS e
    LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
    WHERE e.account_id = h.account_id AND e.state <> 'deleted'
) AS c
WHERE h.account_id IS NOT NULL
ORDER BY h.account_id;

-- name: tests
SELECT id, started_at, duration_us, status, fault, verdict, request, response_head, event_type, at_fault, timing::text AS timing, response_body
FROM webhook.test_attempt WHERE endpoint_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3;

-- name: tested_types
-- How the last test of each event type ended, for one configuration; within the newest tests, of which there are ten a minute at most.
SELECT DISTINCT ON (t.event_type) t.event_type, t.started_at, t.fault IS NULL AS passed, t.status, t.fault, t.verdict, t.duration_us
FROM (
    SELECT * FROM webhook.test_attempt WHERE endpoint_id = $1 ORDER BY id DESC LIMIT 1000
) AS t
WHERE t.config_hash = $2
ORDER BY t.event_type, t.id DESC;

-- name: tests_lately
SELECT count(*) FROM webhook.test_attempt WHERE endpoint_id = $1 AND started_at > clock_timestamp() - interval '1 minute';
