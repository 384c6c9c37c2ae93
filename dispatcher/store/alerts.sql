-- Who is told by mail what happens to endpoints, and what they are to be told. `$n::text` is the account that asks, NULL an operator; the
-- audience '' is the operators.

-- name: insert_recipient
INSERT INTO webhook.alert_recipient (audience, address, created_by)
SELECT $1, $2, $3
WHERE (SELECT count(*) FROM webhook.alert_recipient WHERE audience = $1) < $4
ON CONFLICT (audience, address) DO NOTHING
RETURNING id, audience, address, created_at, created_by;

-- name: recipients
SELECT id, audience, address, created_at, created_by FROM webhook.alert_recipient
WHERE ($1::text IS NULL OR audience = $1) AND ($2::text IS NULL OR audience = $2) AND id > $3
ORDER BY id
LIMIT $4;

-- name: recipient_exists
SELECT EXISTS (SELECT FROM webhook.alert_recipient WHERE audience = $1 AND address = $2);

-- name: delete_recipient
DELETE FROM webhook.alert_recipient WHERE id = $2 AND ($1::text IS NULL OR audience = $1)
RETURNING id, audience, address, created_at, created_by;

-- name: lock_audience
-- Two that add a recipient at once would both find room for the last.
SELECT pg_advisory_xact_lock(hashtextextended('alert_recipient ' || $1, 9324665));

-- name: alerts
SELECT id, account_id, audience = '' AS to_operators, endpoint_id, type, at, state, mailed_at FROM webhook.alert
WHERE ($1::text IS NULL OR audience = $1) AND id < $2
ORDER BY id DESC
LIMIT $3;

-- name: operator_account
SELECT operator_account FROM webhook.instance;

-- name: put_operator_account
UPDATE webhook.instance SET operator_account = $1;


-- ═══ mailing ═══

-- name: give_up_old
-- What could not be told within a day is no news any more.
UPDATE webhook.alert SET state = 'given_up'
WHERE state IN ('waiting', 'held') AND at < clock_timestamp() - interval '1 day' AND id IN (
    SELECT id FROM webhook.alert WHERE state IN ('waiting', 'held') AND at < clock_timestamp() - interval '1 day' LIMIT 1000
);

-- name: audiences_due
SELECT audience FROM webhook.alert WHERE state IN ('waiting', 'held') AND due_at <= clock_timestamp()
GROUP BY audience ORDER BY min(due_at) LIMIT $1;

-- name: due
-- What the audience is to be told, the oldest first, what was held with it. A process that was the owner until just now may be at the same: it
-- finds these taken.
SELECT id, account_id, endpoint_id, type, said::text AS said, at, state, tries FROM webhook.alert
WHERE audience = $1 AND state IN ('waiting', 'held') AND (due_at <= clock_timestamp() OR (state = 'held' AND tries = 0))
ORDER BY id
LIMIT $2
FOR UPDATE SKIP LOCKED;

-- name: mails_lately
SELECT count(DISTINCT mail) FROM webhook.alert
WHERE audience = $1 AND state = 'mailed' AND mailed_at > clock_timestamp() - interval '1 hour';

-- name: hold
UPDATE webhook.alert SET state = 'held', due_at = clock_timestamp() + $2::double precision * interval '1 second' WHERE id = ANY ($1::bigint[]);

-- name: take
-- It counts as tried before it is, so that what kills the process at it is not tried for ever.
UPDATE webhook.alert SET tries = tries + 1, mail = $2, due_at = clock_timestamp() + $3::double precision * interval '1 second'
WHERE id = ANY ($1::bigint[]);

-- name: mailed
UPDATE webhook.alert SET state = 'mailed', mailed_at = clock_timestamp() WHERE id = ANY ($1::bigint[]);

-- name: give_up
UPDATE webhook.alert SET state = 'given_up' WHERE id = ANY ($1::bigint[]);

-- name: addresses
SELECT address FROM webhook.alert_recipient WHERE audience = $1 ORDER BY id LIMIT $2;
