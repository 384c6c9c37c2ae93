-- Dead letters as people list, resend and discard them. The filter is the same block each time: $1 ids, $2 endpoint, $3 account, $4 exact types and
-- $5 prefixes (exact NULL: every type), $6 since and $7 until (when it died, both inclusive), $8 fault, $9 status, $10 words in the reason,
-- $11 state, $12 after this id, $13 up to this id. An endpoint's open ones are found by their own index, else the account's in the order of ids.

-- name: page
-- `delivered_since`: a later run has delivered it. One look at the attempts' key for each row of a page.
SELECT d.id, d.endpoint_id, d.event_id, d.run, d.account_id, d.type, d.created_at, d.occurred_at, d.attempts, d.first_attempt_at, d.died_at,
       d.reason, d.status, d.fault, d.state, d.state_changed_at, d.resent_run,
       EXISTS (
           SELECT FROM webhook.attempt AS a
           WHERE a.event_id = d.event_id AND a.endpoint_id = d.endpoint_id AND a.run > d.run AND a.fault IS NULL
           OFFSET 0
       ) AS delivered_since
FROM (
    SELECT * FROM webhook.dead_letter
    WHERE ($1::bigint[] IS NULL OR id = ANY ($1::bigint[])) AND ($2::bigint IS NULL OR endpoint_id = $2) AND ($3::text IS NULL OR account_id = $3)
      AND ($4::text[] IS NULL OR type = ANY ($4::text[]) OR type ^@ ANY ($5::text[]))
      AND ($6::timestamptz IS NULL OR died_at >= $6) AND ($7::timestamptz IS NULL OR died_at <= $7)
      AND ($8::text IS NULL OR fault = $8) AND ($9::smallint IS NULL OR status = $9)
      AND ($10::text IS NULL OR position(lower($10) IN lower(reason)) > 0)
      AND ($11::text IS NULL OR state = $11) AND id > $12 AND ($13::bigint IS NULL OR id <= $13)
    ORDER BY id LIMIT $14
) AS d
ORDER BY d.id;

-- name: walk
-- From new to old, letters of account $1 (NULL: of all) below $2; at most $3 are looked at, whichever match.
SELECT w.id, w.died_at,
       ($4::bigint IS NULL OR w.endpoint_id = $4) AND ($5::text IS NULL OR w.state = $5)
       AND ($6::text[] IS NULL OR w.type = ANY ($6::text[]) OR w.type ^@ ANY ($7::text[])) AS matches
FROM (
    SELECT id, endpoint_id, type, state, died_at FROM webhook.dead_letter
    WHERE ($1::text IS NULL OR account_id = $1) AND id < $2
    ORDER BY id DESC
    LIMIT $3
) AS w
ORDER BY w.id DESC;

-- name: walk_open
-- The same of endpoint $1, open ones only, which have an index of their own.
SELECT w.id, w.died_at, ($4::text[] IS NULL OR w.type = ANY ($4::text[]) OR w.type ^@ ANY ($5::text[])) AS matches
FROM (
    SELECT id, type, died_at FROM webhook.dead_letter
    WHERE endpoint_id = $1 AND state = 'open' AND id < $2
    ORDER BY id DESC
    LIMIT $3
) AS w
ORDER BY w.id DESC;

-- name: totals
-- What a choice comes to, endpoint by endpoint, before anything is done.
SELECT d.endpoint_id, e.state, e.url, e.rate_per_s, d.letters, d.events, d.last_id
FROM (
    SELECT endpoint_id, count(*) AS letters, count(DISTINCT event_id) AS events, max(id) AS last_id
    FROM webhook.dead_letter
    WHERE ($1::bigint[] IS NULL OR id = ANY ($1::bigint[])) AND ($2::bigint IS NULL OR endpoint_id = $2) AND ($3::text IS NULL OR account_id = $3)
      AND ($4::text[] IS NULL OR type = ANY ($4::text[]) OR type ^@ ANY ($5::text[]))
      AND ($6::timestamptz IS NULL OR died_at >= $6) AND ($7::timestamptz IS NULL OR died_at <= $7)
      AND ($8::text IS NULL OR fault = $8) AND ($9::smallint IS NULL OR status = $9)
      AND ($10::text IS NULL OR position(lower($10) IN lower(reason)) > 0)
      AND ($11::text IS NULL OR state = $11) AND id > $12 AND ($13::bigint IS NULL OR id <= $13)
    GROUP BY endpoint_id
) AS d
JOIN webhook.endpoint AS e ON e.id = d.endpoint_id
ORDER BY d.endpoint_id;

-- name: ids
-- A page of those to be marked.
SELECT ARRAY(
    SELECT id FROM webhook.dead_letter
    WHERE ($1::bigint[] IS NULL OR id = ANY ($1::bigint[])) AND ($2::bigint IS NULL OR endpoint_id = $2) AND ($3::text IS NULL OR account_id = $3)
      AND ($4::text[] IS NULL OR type = ANY ($4::text[]) OR type ^@ ANY ($5::text[]))
      AND ($6::timestamptz IS NULL OR died_at >= $6) AND ($7::timestamptz IS NULL OR died_at <= $7)
      AND ($8::text IS NULL OR fault = $8) AND ($9::smallint IS NULL OR status = $9)
      AND ($10::text IS NULL OR position(lower($10) IN lower(reason)) > 0)
      AND ($11::text IS NULL OR state = $11) AND id > $12 AND ($13::bigint IS NULL OR id <= $13)
    ORDER BY id LIMIT $14
);

-- name: plan_each
-- The filter's plan depends on what is given, so one that suits every filter suits none.
SELECT set_config('plan_cache_mode', 'force_custom_plan', true);

-- name: states
SELECT id, account_id, state, resent_run FROM webhook.dead_letter WHERE id = ANY ($1::bigint[]);

-- name: account_of
SELECT account_id FROM webhook.endpoint WHERE id = $1;

-- name: payload
SELECT payload::text FROM webhook.dead_letter WHERE id = $1;

-- name: attempts
-- All of the delivery, as far as retention has left them.
SELECT run, number, started_at, duration_us, status, fault, response_head
FROM webhook.attempt WHERE event_id = $1 AND endpoint_id = $2 ORDER BY run, number;

-- name: mark_resent
WITH marked AS (
    UPDATE webhook.dead_letter SET state = 'resent', state_changed_at = clock_timestamp(), resent_run = $2
    WHERE id = ANY ($1::bigint[]) AND state = 'open'
    RETURNING 1
)
SELECT count(*) FROM marked;

-- name: resent_range
-- What a run took, from the index.
SELECT count(DISTINCT event_id) AS events, min(event_id) AS first_id, max(event_id) AS last_id FROM webhook.dead_letter WHERE resent_run = $1;

-- name: discard
WITH marked AS (
    UPDATE webhook.dead_letter SET state = 'discarded', state_changed_at = clock_timestamp(), payload = NULL
    WHERE id = ANY ($1::bigint[]) AND state = 'open'
    RETURNING 1
)
SELECT count(*) FROM marked;
