-- Statements of the people's side: command-line verbs and migrations. Never on the path of a delivery.

-- name: constraint_definition
SELECT pg_get_constraintdef(oid) FROM pg_catalog.pg_constraint
WHERE conrelid = 'webhook.outbox'::regclass AND conname = 'outbox_payload_size';

-- name: replace_payload_bound
-- NOT VALID: rows that are there stay, new ones are checked; so nothing is scanned under the lock. {bytes} is an integer of ours.
ALTER TABLE webhook.outbox DROP CONSTRAINT outbox_payload_size,
    ADD CONSTRAINT outbox_payload_size CHECK (octet_length(payload::text) <= {bytes}) NOT VALID;

-- name: has_doorbell
SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = 'webhook.outbox'::regclass AND tgname = 'outbox_doorbell');

-- name: drop_doorbell
DROP TRIGGER outbox_doorbell ON webhook.outbox;

-- name: create_doorbell
CREATE TRIGGER outbox_doorbell AFTER INSERT ON webhook.outbox FOR EACH STATEMENT EXECUTE FUNCTION webhook.ring_doorbell();

-- name: insert_endpoint
INSERT INTO webhook.endpoint
    (account_id, name, url, event_types, timeout_ms, rate_per_s, rate_burst, in_flight_max, retry_schedule_s)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
RETURNING id;

-- name: insert_secret
INSERT INTO webhook.endpoint_secret (endpoint_id, secret) VALUES ($1, $2);

-- name: endpoint
-- One endpoint with what people ask about it. FOR UPDATE is added where a verb goes on to change it.
SELECT e.id, e.account_id, e.name, e.url, e.event_types, e.timeout_ms, e.rate_per_s, e.rate_burst, e.in_flight_max, e.retry_schedule_s,
       e.state, e.state_reason, e.state_changed_at, e.paused_at_id, e.draft, e.tested_hash, e.failing_since, e.created_at,
       ARRAY(
           SELECT s.secret FROM webhook.endpoint_secret AS s
           WHERE s.endpoint_id = e.id AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp()) ORDER BY s.id DESC
       ) AS secrets,
       coalesce(l.backlog, 0) AS backlog,
       (SELECT count(*) FROM webhook.retry AS r WHERE r.endpoint_id = e.id) AS retries,
       (SELECT count(*) FROM webhook.dead_letter AS d WHERE d.endpoint_id = e.id) AS dead_letters
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.id = $1 AND e.state <> 'deleted';

-- name: lock_endpoint
SELECT id FROM webhook.endpoint WHERE id = $1 FOR UPDATE;

-- name: endpoints
SELECT e.id, e.account_id, e.name, e.url, e.event_types, e.state, e.state_reason, e.failing_since, e.draft IS NOT NULL AS has_draft,
       coalesce(l.backlog, 0) AS backlog
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.state <> 'deleted' AND ($1::text IS NULL OR e.account_id = $1) AND ($2::text IS NULL OR e.state = $2) AND e.id > $3
ORDER BY e.id LIMIT $4;

-- name: put_config
UPDATE webhook.endpoint
SET name = $2, url = $3, event_types = $4, timeout_ms = $5, rate_per_s = $6, rate_burst = $7, in_flight_max = $8, retry_schedule_s = $9,
    draft = NULL
WHERE id = $1;

-- name: put_draft
UPDATE webhook.endpoint SET draft = $2::text::jsonb WHERE id = $1;

-- name: put_tested
UPDATE webhook.endpoint SET tested_hash = $2 WHERE id = $1;

-- name: put_state
UPDATE webhook.endpoint
SET state = $2, state_reason = $3, state_changed_at = clock_timestamp(),
    paused_at_id = CASE WHEN $2 IN ('paused', 'disabled') THEN webhook.last_id() END,
    failing_since = CASE WHEN $2 = 'live' THEN NULL ELSE failing_since END
WHERE id = $1;

-- name: close_subscriptions
-- Events handed out up to now are still owed; nothing above is.
UPDATE webhook.subscription SET until_id = webhook.last_id()
WHERE endpoint_id = $1 AND until_id IS NULL AND NOT pattern = ANY ($2::text[]);

-- name: open_subscriptions
INSERT INTO webhook.subscription (endpoint_id, pattern, since_id)
SELECT $1, p.pattern, webhook.last_id()
FROM unnest($2::text[]) AS p (pattern)
WHERE NOT EXISTS (
    SELECT FROM webhook.subscription AS s WHERE s.endpoint_id = $1 AND s.pattern = p.pattern AND s.until_id IS NULL
);

-- name: delete_subscriptions
DELETE FROM webhook.subscription WHERE endpoint_id = $1;

-- name: delete_secrets
DELETE FROM webhook.endpoint_secret WHERE endpoint_id = $1;

-- name: insert_test_attempt
INSERT INTO webhook.test_attempt (endpoint_id, config_hash, duration_us, status, fault, verdict, request, response_head)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8);

-- name: insert_event
INSERT INTO webhook.outbox (account_id, type, payload, occurred_at) VALUES ($1, $2, $3::text::json, $4) RETURNING id, created_at;

-- name: event
SELECT id, account_id, type, payload::text AS payload, occurred_at, created_at FROM webhook.outbox WHERE id = $1;

-- name: event_deliveries
-- Each endpoint that was subscribed to the event, or has had an attempt of it, and how it stands.
SELECT e.id AS endpoint_id, e.name, e.url, e.state,
       EXISTS (SELECT FROM webhook.dead_letter AS d WHERE d.event_id = $1 AND d.endpoint_id = e.id) AS dead,
       (SELECT r.due_at FROM webhook.retry AS r WHERE r.event_id = $1 AND r.endpoint_id = e.id ORDER BY r.run LIMIT 1) AS retry_due_at,
       (SELECT r.reason FROM webhook.retry AS r WHERE r.event_id = $1 AND r.endpoint_id = e.id ORDER BY r.run LIMIT 1) AS retry_reason
FROM webhook.endpoint AS e
WHERE e.id IN (SELECT a.endpoint_id FROM webhook.attempt AS a WHERE a.event_id = $1)
   OR (e.account_id = $2 AND e.state <> 'deleted' AND EXISTS (
        SELECT FROM webhook.subscription AS s
        WHERE s.endpoint_id = e.id AND s.since_id < $1 AND (s.until_id IS NULL OR $1 <= s.until_id)
          AND (s.pattern = '*' OR s.pattern = $3 OR (right(s.pattern, 2) = '.*' AND starts_with($3, left(s.pattern, -1))))
   ))
ORDER BY e.id;

-- name: event_attempts
SELECT endpoint_id, run, number, started_at, duration_us, status, fault, response_head
FROM webhook.attempt WHERE event_id = $1 ORDER BY endpoint_id, run, number;

-- name: tail
-- Attempts since $1, among the last $3 events of the log; and those of events that are being retried.
SELECT a.event_id, a.endpoint_id, a.run, a.number, a.started_at, a.duration_us, a.status, a.fault, o.account_id, o.type, o.created_at
FROM webhook.attempt AS a
JOIN webhook.outbox AS o ON o.id = a.event_id
WHERE a.started_at > $1 AND a.event_id > webhook.last_id() - $3::bigint AND ($2::bigint IS NULL OR a.endpoint_id = $2)
ORDER BY a.started_at
LIMIT 1000;

-- name: now
SELECT clock_timestamp();

-- name: account_for
-- Every (event, endpoint) that was subscribed, and how it ended.
WITH owed AS (
    SELECT DISTINCT o.id AS event_id, e.id AS endpoint_id
    FROM webhook.outbox AS o
    JOIN webhook.endpoint AS e ON e.account_id = o.account_id AND e.state <> 'deleted'
    JOIN webhook.subscription AS s ON s.endpoint_id = e.id AND s.since_id < o.id AND (s.until_id IS NULL OR o.id <= s.until_id)
     AND (s.pattern = '*' OR s.pattern = o.type OR (right(s.pattern, 2) = '.*' AND starts_with(o.type, left(s.pattern, -1))))
), fates AS (
    SELECT w.endpoint_id,
           EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = w.event_id AND a.endpoint_id = w.endpoint_id AND a.fault IS NULL) AS delivered,
           EXISTS (SELECT FROM webhook.dead_letter AS d WHERE d.event_id = w.event_id AND d.endpoint_id = w.endpoint_id) AS dead
    FROM owed AS w
)
SELECT e.id AS endpoint_id, e.name, count(f.endpoint_id) AS owed,
       count(*) FILTER (WHERE f.delivered) AS delivered,
       count(*) FILTER (WHERE f.dead AND NOT f.delivered) AS dead_letters,
       count(*) FILTER (WHERE f.endpoint_id IS NOT NULL AND NOT f.delivered AND NOT f.dead) AS open,
       (SELECT count(*) FROM webhook.attempt AS a WHERE a.endpoint_id = e.id) AS attempts
FROM webhook.endpoint AS e
LEFT JOIN fates AS f ON f.endpoint_id = e.id
WHERE e.state <> 'deleted'
GROUP BY e.id
ORDER BY e.id;

-- name: emit_many
INSERT INTO webhook.outbox (account_id, type, payload, occurred_at)
SELECT account_id, type, payload::json, occurred_at
FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) AS e (account_id, type, payload, occurred_at)
RETURNING id, created_at;
