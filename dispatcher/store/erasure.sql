-- Erasure: what was said and answered goes, what happened (attempts, counts, times) stays. In pages, each its own transaction, found by an index.


-- ═══ what there is ═══

-- name: limit_time
SELECT set_config('statement_timeout', $1, true);

-- name: endpoints
-- Also deleted ones: they keep their URL and name until they are erased.
SELECT id, state, url = 'https://erased.invalid/' AS erased FROM webhook.endpoint WHERE account_id = $1 ORDER BY id;

-- name: count_events
SELECT count(*) FROM webhook.outbox WHERE account_id = $1;

-- name: count_dead_letters
SELECT count(*) FROM webhook.dead_letter WHERE account_id = $1 AND payload IS NOT NULL;

-- name: count_response_heads
SELECT count(*) FROM webhook.attempt WHERE endpoint_id = ANY ($1::bigint[]) AND fault IS NOT NULL AND response_head IS NOT NULL;

-- name: count_tests
SELECT count(*) FROM webhook.test_attempt WHERE endpoint_id = ANY ($1::bigint[]);

-- name: in_flight_s
-- How long what is on its way may still take to come back and be recorded: 0 if no dispatcher is at work.
SELECT CASE WHEN c.heartbeat_at > clock_timestamp() - interval '5 seconds'
            THEN (SELECT coalesce(max(timeout_ms), 0) / 1000.0 + 2 FROM webhook.endpoint WHERE account_id = $1) ELSE 0 END::double precision
FROM webhook.checkpoint AS c;


-- ═══ the record ═══

-- name: unfinished
SELECT id FROM webhook.erasure WHERE account_id = $1 AND event_id IS NULL AND ended_at IS NULL ORDER BY id LIMIT 1;

-- name: begin
INSERT INTO webhook.erasure (account_id, event_id) VALUES ($1, $2) RETURNING id;

-- name: end_access
-- Nobody logs in as the account any more; the keys' and links' rows stay, as a record.
WITH keys AS (
    UPDATE webhook.api_key SET name = '', revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE account_id = $1
), links AS (
    UPDATE webhook.login_link SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE account_id = $1
)
DELETE FROM webhook.login WHERE account_id = $1;

-- name: add
UPDATE webhook.erasure
SET events = events + $2, response_heads = response_heads + $3, dead_letters = dead_letters + $4, tests = tests + $5, endpoints = endpoints + $6
WHERE id = $1;

-- name: finish
UPDATE webhook.erasure SET ended_at = clock_timestamp() WHERE id = $1;

-- name: erasures
SELECT id, account_id, event_id, events, response_heads, dead_letters, tests, endpoints, erased_by, began_at, ended_at
FROM webhook.erasure
WHERE ($1::bigint IS NULL OR id = $1) AND ($2::text IS NULL OR account_id = $2) AND id > $3
ORDER BY id LIMIT $4;

-- name: erasure_of_event
-- Few rows, read by a person: no index.
SELECT id, account_id, began_at, ended_at FROM webhook.erasure WHERE event_id = $1 ORDER BY ended_at IS NOT NULL, id DESC LIMIT 1;

-- name: note
-- A running dispatcher lets go of its copies in memory. Last in its transaction: it takes the lock of configuration changes.
SELECT webhook.note_erasure($1::bigint[]);


-- ═══ an account ═══

-- name: scrub_endpoint
UPDATE webhook.endpoint SET url = 'https://erased.invalid/', name = '', draft = NULL, credentials = NULL, extra_signature = NULL, omit = '{}',
    tested_hash = NULL, state_reason = 'erased' WHERE id = $1;

-- name: delete_secrets
DELETE FROM webhook.endpoint_secret WHERE endpoint_id = $1;

-- name: delete_alerts
DELETE FROM webhook.alert WHERE account_id = $1;

-- name: delete_received
-- Copies of payloads, for a day.
DELETE FROM webhook.received WHERE receiver_id IN (SELECT id FROM webhook.receiver WHERE account_id = $1);

-- name: delete_receivers
DELETE FROM webhook.receiver WHERE account_id = $1;

-- name: delete_recipients
DELETE FROM webhook.alert_recipient WHERE audience = $1;

-- name: clear_notes
UPDATE webhook.run SET note = '' WHERE endpoint_id = $1 AND note <> '';

-- name: delete_tests
WITH gone AS (DELETE FROM webhook.test_attempt WHERE endpoint_id = $1 RETURNING 1)
SELECT count(*) FROM gone;

-- name: last_id
SELECT webhook.last_id();

-- name: events_bound
SELECT max(id) FROM (SELECT id FROM webhook.outbox WHERE account_id = $1 AND id > $2 AND id <= $3 ORDER BY id LIMIT $4) AS q;

-- name: delete_events
-- Also above the checkpoint: to the reader a row that is gone is a gap that nobody fills.
WITH gone AS (DELETE FROM webhook.outbox WHERE account_id = $1 AND id > $2 AND id <= $3 RETURNING 1)
SELECT count(*) FROM gone;

-- name: dead_letters_bound
SELECT max(id) FROM (SELECT id FROM webhook.dead_letter WHERE account_id = $1 AND id > $2 ORDER BY id LIMIT $3) AS q;

-- name: erase_dead_letters
WITH gone AS (
    UPDATE webhook.dead_letter SET payload = NULL, state = 'erased', state_changed_at = clock_timestamp()
    WHERE account_id = $1 AND id > $2 AND id <= $3 AND payload IS NOT NULL
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: response_heads_bound
SELECT max(event_id) FROM (
    SELECT event_id FROM webhook.attempt WHERE endpoint_id = $1 AND fault IS NOT NULL AND event_id > $2 ORDER BY event_id LIMIT $3
) AS q;

-- name: erase_response_heads
WITH gone AS (
    UPDATE webhook.attempt SET response_head = NULL
    WHERE endpoint_id = $1 AND fault IS NOT NULL AND event_id > $2 AND event_id <= $3 AND response_head IS NOT NULL
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: retries_bound
SELECT max(event_id) FROM (
    SELECT event_id FROM webhook.retry WHERE endpoint_id = $1 AND event_id > $2 ORDER BY event_id LIMIT $3
) AS q;

-- name: delete_retries
DELETE FROM webhook.retry WHERE endpoint_id = $1 AND event_id > $2 AND event_id <= $3;


-- ═══ one event ═══

-- name: event
SELECT account_id, type, created_at FROM webhook.outbox WHERE id = $1;

-- name: dead_letters_of_event
-- There is no index by event alone: one descent for each endpoint, 3 µs.
SELECT d.id, d.endpoint_id, d.account_id, d.type, d.created_at, d.payload IS NOT NULL AS has_payload
FROM webhook.endpoint AS e
CROSS JOIN LATERAL (SELECT * FROM webhook.dead_letter WHERE endpoint_id = e.id AND event_id = $1 OFFSET 0) AS d
WHERE $2::text IS NULL OR e.account_id = $2;

-- name: attempts_of_event
SELECT e.account_id, count(*) AS attempts, count(a.response_head) AS response_heads
FROM webhook.attempt AS a JOIN webhook.endpoint AS e ON e.id = a.endpoint_id
WHERE a.event_id = $1
GROUP BY e.account_id;

-- name: owed_of_event
-- By endpoint, what will not be sent any more: a delivery that has had no attempt yet, and those that wait for a retry. `running`: a resend
-- or replay may have it in its hands.
SELECT q.id, q.owed, q.running FROM (
    SELECT e.id,
           (
               NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = $1 AND a.endpoint_id = e.id AND a.run = 0)
               AND EXISTS (
                   SELECT FROM webhook.outbox AS o JOIN webhook.subscription AS s
                     ON s.endpoint_id = e.id AND s.since_id < o.id AND (s.until_id IS NULL OR o.id <= s.until_id)
                    AND (s.pattern = '*' OR s.pattern = o.type OR (right(s.pattern, 2) = '.*' AND starts_with(o.type, left(s.pattern, -1))))
                    AND webhook.passes(s.rule, o.type, o.payload)
                   WHERE o.id = $1
               )
           )::integer + (SELECT count(*) FROM webhook.retry AS r WHERE r.endpoint_id = e.id AND r.event_id = $1) AS owed,
           EXISTS (
               SELECT FROM webhook.run AS r JOIN webhook.run_progress AS p ON p.run_id = r.id
               WHERE r.endpoint_id = e.id AND p.finished_at IS NULL AND r.after_id < $1 AND $1 <= r.upto_id
           ) AS running
    FROM webhook.endpoint AS e
    WHERE e.account_id = $2 AND e.state <> 'deleted'
) AS q
ORDER BY q.id;

-- name: discard_owed
INSERT INTO webhook.discard (endpoint_id, reason, after_id, upto_id, deliveries)
SELECT id, 'erased', $1::bigint - 1, $1, owed FROM unnest($2::bigint[], $3::bigint[]) AS d (id, owed) WHERE owed > 0;

-- name: delete_event
DELETE FROM webhook.outbox WHERE id = $1 RETURNING id;

-- name: delete_retries_of_event
DELETE FROM webhook.retry WHERE event_id = $1 AND endpoint_id IN (SELECT id FROM webhook.endpoint WHERE account_id = $2);

-- name: erase_response_heads_of_event
WITH gone AS (
    UPDATE webhook.attempt SET response_head = NULL WHERE event_id = $1 AND response_head IS NOT NULL RETURNING 1
)
SELECT count(*) FROM gone;

-- name: erase_dead_letters_of_event
WITH gone AS (
    UPDATE webhook.dead_letter SET payload = NULL, state = 'erased', state_changed_at = clock_timestamp()
    WHERE event_id = $1 AND endpoint_id IN (SELECT id FROM webhook.endpoint WHERE account_id = $2) AND payload IS NOT NULL
    RETURNING 1
)
SELECT count(*) FROM gone;
