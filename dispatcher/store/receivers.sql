-- The built-in receiver. `$n::text` is the account that asks, NULL an operator.

-- name: lock_account
SELECT pg_advisory_xact_lock(hashtextextended('receiver ' || $1, 9324665));

-- name: count_of_account
SELECT count(*) FROM webhook.receiver WHERE account_id = $1 AND expires_at > clock_timestamp();

-- name: insert
INSERT INTO webhook.receiver (account_id, token, created_by, expires_at)
VALUES ($1, $2, $3, clock_timestamp() + $4::double precision * interval '1 second')
RETURNING id, account_id, token, answer, created_at, expires_at;

-- name: receivers
-- Those that have not ended.
SELECT id, account_id, token, answer, created_at, expires_at FROM webhook.receiver
WHERE ($1::text IS NULL OR account_id = $1) AND ($2::bigint IS NULL OR id = $2) AND id > $3 AND expires_at > clock_timestamp()
ORDER BY id
LIMIT $4;

-- name: put_answer
UPDATE webhook.receiver SET answer = $3 WHERE id = $2 AND ($1::text IS NULL OR account_id = $1) AND expires_at > clock_timestamp()
RETURNING id, account_id, token, answer, created_at, expires_at;

-- name: delete
DELETE FROM webhook.receiver WHERE id = $2 AND ($1::text IS NULL OR account_id = $1)
RETURNING id, account_id, token, answer, created_at, expires_at;

-- name: by_token
SELECT id, account_id, answer FROM webhook.receiver WHERE token = $1 AND expires_at > clock_timestamp();

-- name: endpoints_of_url
-- Endpoints of the account whose URL is this, in force or in an edit that waits.
SELECT id FROM webhook.endpoint WHERE account_id = $1 AND state <> 'deleted' AND (url = $2 OR draft ->> 'url' = $2) ORDER BY id LIMIT $3;

-- name: insert_received
INSERT INTO webhook.received (receiver_id, headers, body, body_bytes, signature, endpoint_id, status)
VALUES ($1, $2::text::jsonb, $3, $4, $5, $6, $7);

-- name: trim_received
DELETE FROM webhook.received WHERE receiver_id = $1 AND id < (
    SELECT id FROM webhook.received WHERE receiver_id = $1 ORDER BY id DESC OFFSET $2 LIMIT 1
);

-- name: received
SELECT id, at, headers::text AS headers, body, body_bytes, signature, endpoint_id, status FROM webhook.received
WHERE receiver_id = $1 AND id < $2 AND id > $3
ORDER BY id DESC
LIMIT $4;
