-- Statements of the people's side: command-line verbs and migrations. Never on the path of a delivery.

-- name: migration_lock_timeout
SET LOCAL lock_timeout = '3s';

-- name: migration_lock
-- What every batch of a running dispatcher's recorder locks first: who took it after others would be its deadlock.
LOCK TABLE webhook.checkpoint IN EXCLUSIVE MODE;

-- name: roles_lack
-- Whether one of the two roles is there and lacks what the end of schema.sql grants it: it was made later, or a table was.
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_roles AS r, pg_catalog.pg_class AS c
    WHERE r.rolname = 'webhook_dispatcher' AND c.relnamespace = 'webhook'::regnamespace AND c.relkind IN ('r', 'p')
      AND NOT has_table_privilege(r.oid, c.oid, 'DELETE')
) OR EXISTS (
    SELECT FROM pg_catalog.pg_roles AS r WHERE r.rolname = 'webhook_producer' AND NOT has_column_privilege(r.oid, 'webhook.outbox', 'payload', 'INSERT')
);

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
    (account_id, name, url, event_types, timeout_ms, rate_per_s, rate_burst, in_flight_max, retry_schedule_s, ordering, filters, response_control)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::text::jsonb, $12)
RETURNING id;

-- name: endpoints_of
-- Counts no further than its bound.
SELECT count(*) FROM (SELECT FROM webhook.endpoint WHERE account_id = $1 AND state <> 'deleted' LIMIT $2) AS e;

-- name: insert_secret
INSERT INTO webhook.endpoint_secret (endpoint_id, scheme, secret, public_key) VALUES ($1, $2, $3, $4);

-- name: endpoint
-- One endpoint with what people ask about it. FOR UPDATE is added where a verb goes on to change it.
SELECT e.id, e.account_id, e.name, e.url, e.event_types, e.timeout_ms, e.rate_per_s, e.rate_burst, e.in_flight_max, e.retry_schedule_s,
       e.signing, e.body_format, e.omit, e.extra_signature, e.credentials, e.ordering, e.filters, e.response_control,
       e.state, e.state_reason, e.state_changed_at, e.paused_at_id, e.draft, e.tested_hash, e.failing_since, e.created_at,
       ARRAY(
           SELECT (s.scheme, s.secret, s.public_key, s.created_at, s.expires_at) FROM webhook.endpoint_secret AS s
           WHERE s.endpoint_id = e.id AND (s.expires_at IS NULL OR s.expires_at > clock_timestamp()) ORDER BY s.id DESC
       ) AS secrets,
       coalesce(l.backlog, 0) AS backlog,
       (SELECT count(*) FROM webhook.retry AS r WHERE r.endpoint_id = e.id) AS retries,
       (SELECT count(*) FROM webhook.dead_letter AS d WHERE d.endpoint_id = e.id AND d.state = 'open') AS dead_letters,
       (
           SELECT coalesce(sum(t.expired), 0) FROM webhook.endpoint_stat AS t
           WHERE t.endpoint_id = e.id AND t.minute > clock_timestamp() - interval '1 day'
       ) AS expired,
       (SELECT r.due_at FROM webhook.retry AS r WHERE r.endpoint_id = e.id ORDER BY r.due_at LIMIT 1) AS next_retry_at, clock_timestamp() AS read_at
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.id = $1 AND e.state <> 'deleted';

-- name: deleted_endpoint
SELECT id, account_id, name, url, state_reason, state_changed_at FROM webhook.endpoint WHERE id = $1 AND state = 'deleted';

-- name: lock_endpoint
SELECT id FROM webhook.endpoint WHERE id = $1 FOR UPDATE;

-- name: endpoints
SELECT e.id, e.account_id, e.name, e.url, e.event_types, e.state, e.state_reason, e.failing_since,
       e.state = 'live' AND e.failing_since IS NOT NULL AS failing, e.draft IS NOT NULL AS has_draft,
       coalesce(l.backlog, 0) AS backlog
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.state <> 'deleted' AND ($1::text IS NULL OR e.account_id = $1) AND ($2::text IS NULL OR e.state = $2) AND e.id > $3
ORDER BY e.id LIMIT $4;

-- name: put_config
UPDATE webhook.endpoint
SET name = $2, url = $3, event_types = $4, timeout_ms = $5, rate_per_s = $6, rate_burst = $7, in_flight_max = $8, retry_schedule_s = $9,
    ordering = $10, filters = $11::text::jsonb, response_control = $12, draft = NULL
WHERE id = $1;

-- name: has_sealed
SELECT EXISTS (SELECT FROM webhook.endpoint_secret WHERE starts_with(secret, 'sealed:'))
    OR EXISTS (SELECT FROM webhook.endpoint WHERE starts_with(credentials, 'sealed:'));

-- name: put_shape
-- Apart from put_config, because credentials are sealed for the endpoint's id, which a new one has only now.
UPDATE webhook.endpoint SET signing = $2, body_format = $3, omit = $4, extra_signature = $5, credentials = $6 WHERE id = $1;

-- name: put_draft
UPDATE webhook.endpoint SET draft = $2::text::jsonb WHERE id = $1;

-- name: put_tested
UPDATE webhook.endpoint SET tested_hash = $2 WHERE id = $1;

-- name: put_state
-- Events after $4 are held; one that is paused and then disabled has held them since the first of it.
UPDATE webhook.endpoint
SET state = $2, state_reason = $3, state_changed_at = clock_timestamp(),
    paused_at_id = CASE WHEN $2 IN ('paused', 'disabled') THEN coalesce(paused_at_id, $4::bigint) END,
    failing_since = CASE WHEN $2 = 'live' THEN NULL ELSE failing_since END,
    failing_told_at = CASE WHEN $2 = 'live' THEN NULL ELSE failing_told_at END
WHERE id = $1;

-- name: put_reason
UPDATE webhook.endpoint SET state_reason = $2 WHERE id = $1;

-- name: tell_of_endpoint
SELECT webhook.tell_of_endpoint($1, $2, $3, $4);

-- name: last_id
SELECT webhook.last_id();

-- name: subscriptions
SELECT pattern, since_id, until_id, rule::text AS rule FROM webhook.subscription WHERE endpoint_id = $1 ORDER BY id;

-- name: close_subscriptions
-- But for the patterns of $2: what was handed out up to $3 is still owed, nothing above is.
UPDATE webhook.subscription SET until_id = $3
WHERE endpoint_id = $1 AND until_id IS NULL AND NOT pattern = ANY ($2::text[]);

-- name: skip_held
-- Nothing above $2 is owed, whatever was opened or closed since.
UPDATE webhook.subscription SET until_id = greatest(since_id, $2)
WHERE endpoint_id = $1 AND (until_id IS NULL OR until_id > greatest(since_id, $2));

-- name: open_subscriptions
INSERT INTO webhook.subscription (endpoint_id, pattern, since_id)
SELECT $1, p.pattern, $3
FROM unnest($2::text[]) AS p (pattern)
WHERE NOT EXISTS (
    SELECT FROM webhook.subscription AS s WHERE s.endpoint_id = $1 AND s.pattern = p.pattern AND s.until_id IS NULL
);

-- name: filter_names
SELECT DISTINCT f.name FROM webhook.event_type AS e CROSS JOIN jsonb_object_keys(e.filter_fields) AS f (name) ORDER BY f.name;

-- name: rule
SELECT webhook.filter_rule(filters)::text FROM webhook.endpoint WHERE id = $1;

-- name: unsettled
-- The ids up to $2 that were not settled for the endpoint when the dispatcher last wrote down where it is: above its mark, in its holes, in gaps.
SELECT (
    (
        int8multirange(int8range(least(coalesce(l.settled, c.position), u.since_id), NULL, '(]'))
        + coalesce(l.holes, '{}') + c.gaps
    ) * int8multirange(int8range(NULL, $2, '(]'))
)::text
FROM webhook.checkpoint AS c
LEFT JOIN webhook.lane AS l ON l.endpoint_id = $1
CROSS JOIN LATERAL (SELECT min(since_id) AS since_id FROM webhook.subscription WHERE endpoint_id = $1 AND NOT taken_up) AS u;

-- name: held
-- How many events of account $1 in the ids $3 are for endpoint $2, by the patterns, bounds and rules $4, $5, $6, $8, and have had no
-- attempt; and the lowest of them. At most $7 are counted (NULL: all). 4 to 7 µs an event: half a million in 3 s. OFFSET 0, so that a range is an index's
-- descent: without, it was planned as a filter over all of the account. LIMIT 1 likewise: without, as a hash of all attempts there are.
SELECT count(*) AS deliveries, min(h.id) AS first_id
FROM (
    SELECT o.id
    FROM unnest($3::text::int8multirange) AS r (ids)
    CROSS JOIN LATERAL (
        SELECT id, type, payload FROM webhook.outbox WHERE account_id = $1 AND id >= lower(r.ids) AND id < upper(r.ids) OFFSET 0
    ) AS o
    LEFT JOIN LATERAL (
        SELECT true AS was FROM webhook.attempt AS a WHERE a.event_id = o.id AND a.endpoint_id = $2 AND a.run = 0 LIMIT 1
    ) AS a ON true
    WHERE a.was IS NULL
      AND EXISTS (
          SELECT FROM unnest($4::text[], $5::bigint[], $6::bigint[], $8::text[]) AS s (pattern, since_id, until_id, rule)
          WHERE s.since_id < o.id AND o.id <= s.until_id
            AND (s.pattern = '*' OR s.pattern = o.type OR (right(s.pattern, 2) = '.*' AND starts_with(o.type, left(s.pattern, -1))))
            AND CASE WHEN s.rule IS NULL THEN true ELSE webhook.passes(s.rule::jsonb, o.type, o.payload) END
      )
    LIMIT $7
) AS h;

-- name: retries
SELECT count(*) AS deliveries, min(event_id) AS first_id FROM webhook.retry WHERE endpoint_id = $1;

-- name: stands
-- How endpoints stand: asked every two seconds for those that are looked at, so without what is summed over a day. The earliest retry is
-- told whatever holds it; of more than $2 retries no more are counted.
SELECT e.id AS endpoint_id, e.account_id, e.state, e.failing_since, coalesce(l.backlog, 0) AS backlog,
       (SELECT count(*) FROM (SELECT FROM webhook.retry AS r WHERE r.endpoint_id = e.id LIMIT $2) AS counted) AS retries,
       (SELECT r.due_at FROM webhook.retry AS r WHERE r.endpoint_id = e.id ORDER BY r.due_at LIMIT 1) AS next_retry_at
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.id = ANY ($1::bigint[]) AND e.state <> 'deleted';

-- name: expired_24h
SELECT endpoint_id, sum(expired)::bigint AS expired FROM webhook.endpoint_stat
WHERE endpoint_id = ANY ($1::bigint[]) AND minute > clock_timestamp() - interval '1 day'
GROUP BY endpoint_id;

-- name: insert_discard
INSERT INTO webhook.discard (endpoint_id, reason, after_id, upto_id, deliveries) VALUES ($1, $2, $3, $4, $5);

-- name: details
-- What else there is to tell of an endpoint: its subscriptions, what of it was discarded and why, and its runs that haven't ended.
SELECT ARRAY(SELECT (pattern, since_id, until_id, taken_up, rule::text) FROM webhook.subscription WHERE endpoint_id = $1 ORDER BY id) AS subscriptions,
       ARRAY(SELECT (reason, sum(deliveries)::bigint) FROM webhook.discard WHERE endpoint_id = $1 GROUP BY reason ORDER BY reason) AS discards,
       ARRAY(
           SELECT (r.id, r.source, r.state, r.total, p.attempted, p.delivered, p.dead, r.created_at)
           FROM webhook.run AS r
           JOIN webhook.run_progress AS p ON p.run_id = r.id
           WHERE r.endpoint_id = $1 AND r.state <> 'canceled' AND p.finished_at IS NULL
           ORDER BY r.id
       ) AS runs;

-- name: cancel_runs
UPDATE webhook.run AS r SET state = 'canceled'
WHERE r.endpoint_id = $1 AND r.state <> 'canceled'
  AND NOT EXISTS (SELECT FROM webhook.run_progress AS p WHERE p.run_id = r.id AND p.finished_at IS NOT NULL);

-- name: expire_secrets
-- Those of scheme $3, $2 seconds from now. One that expires earlier keeps its time.
UPDATE webhook.endpoint_secret SET expires_at = clock_timestamp() + $2::double precision * interval '1 second'
WHERE endpoint_id = $1 AND scheme = $3 AND (expires_at IS NULL OR expires_at > clock_timestamp() + $2::double precision * interval '1 second');

-- name: forget_expired_secrets
DELETE FROM webhook.endpoint_secret WHERE endpoint_id = $1 AND expires_at <= clock_timestamp();

-- name: delete_subscriptions
DELETE FROM webhook.subscription WHERE endpoint_id = $1;

-- name: forget_credentials
UPDATE webhook.endpoint SET credentials = NULL, draft = NULL WHERE id = $1;

-- name: delete_secrets
DELETE FROM webhook.endpoint_secret WHERE endpoint_id = $1;

-- name: insert_test_attempt
INSERT INTO webhook.test_attempt (
    endpoint_id, config_hash, duration_us, status, fault, verdict, request, response_head, event_type, at_fault, timing, response_body
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::text::jsonb, $12);

-- name: insert_event
INSERT INTO webhook.outbox (account_id, type, payload, occurred_at, ordering_key, expires_at, priority)
VALUES ($1, $2, $3::text::json, $4, $5, $6, $7)
RETURNING id, created_at;

-- name: insert_events
-- The elements' own text goes in: `->` on json copies it as it was written.
INSERT INTO webhook.outbox (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent)
SELECT g.account_id, g.type, g.given -> 'data', g.occurred_at, g.ordering_key, g.expires_at, g.priority, g.traceparent
FROM ROWS FROM (
    json_array_elements(CASE WHEN $2::text IS NULL THEN $1::text::json ELSE $1::text::json -> $2 END),
    unnest($3::text[]), unnest($4::text[]), unnest($5::timestamptz[]), unnest($6::text[]), unnest($7::timestamptz[]), unnest($8::smallint[]),
    unnest($9::text[])
)
    WITH ORDINALITY AS g (given, account_id, type, occurred_at, ordering_key, expires_at, priority, traceparent, n)
ORDER BY g.n
RETURNING id, created_at;

-- name: insert_idempotency_key
-- One that comes while the first is under way waits here for its end.
INSERT INTO webhook.idempotency_key (scope, key, request_hash) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING true;

-- name: idempotency_key
SELECT request_hash, answer::text AS answer FROM webhook.idempotency_key WHERE scope = $1 AND key = $2;

-- name: put_idempotent_answer
UPDATE webhook.idempotency_key SET answer = $3::text::json WHERE scope = $1 AND key = $2;

-- name: event
SELECT id, account_id, type, payload::text AS payload, occurred_at, created_at, ordering_key, expires_at, priority, traceparent
FROM webhook.outbox WHERE id = $1;

-- name: event_copy
-- An event that retention has taken from the log, from a dead letter's copy. There is no index by event alone: one descent for each endpoint.
SELECT d.event_id AS id, d.account_id, d.type, d.payload::text AS payload, d.occurred_at, d.created_at, NULL AS ordering_key,
       NULL::timestamptz AS expires_at, NULL::smallint AS priority, NULL AS traceparent
FROM webhook.endpoint AS e
CROSS JOIN LATERAL (SELECT * FROM webhook.dead_letter WHERE endpoint_id = e.id AND event_id = $1 OFFSET 0) AS d
ORDER BY d.payload IS NULL
LIMIT 1;

-- name: event_deliveries
-- Each endpoint that was subscribed to the event, or has had an attempt of it, and how it stands: dead letters and retries by run, and the
-- resends and replays that have had it or will. Of endpoints in ($5, $6]: each costs a dozen
-- look-ups. `filtered`: it was subscribed, but its filters leave the event out. `discarded`: why it was never sent, from the counted ranges.
SELECT e.id AS endpoint_id, e.name, e.url, e.state, q.subscribed, q.subscribed AND NOT q.passes AS filtered, q.discarded,
       ARRAY(
           SELECT (d.id, d.run, d.state, d.resent_run) FROM webhook.dead_letter AS d
           WHERE d.event_id = $1 AND d.endpoint_id = e.id ORDER BY d.run
       ) AS dead_letters,
       ARRAY(
           SELECT (r.run, r.number, r.due_at) FROM webhook.retry AS r WHERE r.event_id = $1 AND r.endpoint_id = e.id ORDER BY r.run
       ) AS retries,
       ARRAY(
           SELECT (r.id, r.source, r.after_id, r.upto_id, r.state)
           FROM webhook.run AS r JOIN webhook.run_progress AS p ON p.run_id = r.id
           WHERE r.endpoint_id = e.id AND r.after_id < $1 AND $1 <= r.upto_id AND (
               EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = $1 AND a.endpoint_id = e.id AND a.run = r.id)
               OR (p.finished_at IS NULL AND r.state <> 'canceled' AND p.settled < $1 AND r.source = 'log' AND NOT r.only_failed AND EXISTS (
                   SELECT FROM unnest(r.patterns) AS t (pattern)
                   WHERE t.pattern = '*' OR t.pattern = $3 OR (right(t.pattern, 2) = '.*' AND starts_with($3, left(t.pattern, -1)))
               ) AND webhook.passes(r.rule, $3, $4::text::json))
               OR (p.finished_at IS NULL AND r.state <> 'canceled' AND EXISTS (
                   SELECT FROM webhook.dead_letter AS d WHERE d.event_id = $1 AND d.endpoint_id = e.id AND d.resent_run = r.id
               ))
           )
           ORDER BY r.id
       ) AS runs
FROM webhook.endpoint AS e
CROSS JOIN LATERAL (
    SELECT EXISTS (
               SELECT FROM webhook.subscription AS s
               WHERE s.endpoint_id = e.id AND s.since_id < $1 AND (s.until_id IS NULL OR $1 <= s.until_id)
                 AND (s.pattern = '*' OR s.pattern = $3 OR (right(s.pattern, 2) = '.*' AND starts_with($3, left(s.pattern, -1))))
           ) AS subscribed,
           EXISTS (
               SELECT FROM webhook.subscription AS s
               WHERE s.endpoint_id = e.id AND s.since_id < $1 AND (s.until_id IS NULL OR $1 <= s.until_id)
                 AND (s.pattern = '*' OR s.pattern = $3 OR (right(s.pattern, 2) = '.*' AND starts_with($3, left(s.pattern, -1))))
                 AND webhook.passes(s.rule, $3, $4::text::json)
           ) AS passes,
           (
               SELECT x.reason FROM webhook.discard AS x
               WHERE x.endpoint_id = e.id AND x.after_id < $1 AND $1 <= x.upto_id AND x.deliveries > 0 AND EXISTS (
                   SELECT FROM unnest(e.event_types) AS t (pattern)
                   WHERE t.pattern = '*' OR t.pattern = $3 OR (right(t.pattern, 2) = '.*' AND starts_with($3, left(t.pattern, -1)))
               ) AND webhook.passes(webhook.filter_rule(e.filters), $3, $4::text::json)
               ORDER BY x.id DESC LIMIT 1
           ) AS discarded
) AS q
WHERE e.account_id = $2 AND e.id > $5 AND ($6::bigint IS NULL OR e.id <= $6) AND (
    (q.subscribed AND e.state <> 'deleted') OR q.discarded IS NOT NULL
    OR EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = $1 AND a.endpoint_id = e.id)
    OR EXISTS (SELECT FROM webhook.dead_letter AS d WHERE d.event_id = $1 AND d.endpoint_id = e.id)
    OR EXISTS (
        SELECT FROM webhook.run AS r JOIN webhook.run_progress AS p ON p.run_id = r.id
        WHERE r.endpoint_id = e.id AND p.finished_at IS NULL AND r.upto_id = r.after_id + 1 AND r.upto_id = $1
    )
)
ORDER BY e.id;

-- name: endpoints_bound
-- Where a page of an account's endpoints ends, deleted ones too; NULL where it is the last.
SELECT id FROM webhook.endpoint WHERE account_id = $1 AND id > $2 ORDER BY id OFFSET $3 - 1 LIMIT 1;

-- name: event_attempts
SELECT endpoint_id, run, number, started_at, duration_us, status, fault, response_head
FROM webhook.attempt WHERE event_id = $1 AND endpoint_id > $2 AND ($3::bigint IS NULL OR endpoint_id <= $3) ORDER BY endpoint_id, run, number;

-- name: tail
-- The newest $5 attempts since $1, or of the last $4, of events above $3; of endpoints $2, NULL for all; only failures, if $6.
-- The bound is a value, so that the plan is made for it: where it was asked for by a subquery, a third of the log was expected above it, and a join of all of it was planned.
SELECT t.*, o.account_id, o.type, o.created_at
FROM (
    SELECT event_id, endpoint_id, run, number, started_at, duration_us, status, fault
    FROM webhook.attempt
    WHERE started_at > coalesce($1, clock_timestamp() - $4::interval) AND event_id > $3 AND ($2::bigint[] IS NULL OR endpoint_id = ANY ($2::bigint[]))
      AND ($6::boolean IS NOT TRUE OR fault IS NOT NULL)
    ORDER BY started_at DESC
    LIMIT $5
) AS t
CROSS JOIN LATERAL (SELECT account_id, type, created_at FROM webhook.outbox WHERE id = t.event_id LIMIT 1) AS o
ORDER BY t.started_at DESC;

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
     AND CASE WHEN s.rule IS NULL THEN true ELSE webhook.passes(s.rule, o.type, o.payload) END
), fates AS (
    SELECT w.endpoint_id,
           EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = w.event_id AND a.endpoint_id = w.endpoint_id AND a.fault IS NULL) AS delivered,
           EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = w.event_id AND a.endpoint_id = w.endpoint_id AND a.number = 0) AS expired,
           EXISTS (SELECT FROM webhook.dead_letter AS d WHERE d.event_id = w.event_id AND d.endpoint_id = w.endpoint_id) AS dead
    FROM owed AS w
)
SELECT e.id AS endpoint_id, e.name, count(f.endpoint_id) AS owed,
       count(*) FILTER (WHERE f.delivered) AS delivered,
       count(*) FILTER (WHERE f.dead AND NOT f.delivered) AS dead_letters,
       count(*) FILTER (WHERE f.expired AND NOT f.delivered AND NOT f.dead) AS expired,
       count(*) FILTER (WHERE f.endpoint_id IS NOT NULL AND NOT f.delivered AND NOT f.dead AND NOT f.expired) AS open,
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
