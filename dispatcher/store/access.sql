-- Who may: keys, login links, logins, and the trail of what they changed. `$n::text` is the account that asks, NULL an operator.

-- name: web_key
SELECT web_key FROM webhook.instance;

-- name: insert_key
INSERT INTO webhook.api_key (account_id, name, prefix, hash, created_by, expires_at)
VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6::double precision * interval '1 second')
RETURNING id, account_id, name, prefix, created_at, created_by, expires_at, last_used_at, revoked_at;

-- name: keys
SELECT id, account_id, name, prefix, created_at, created_by, expires_at, last_used_at, revoked_at
FROM webhook.api_key
WHERE ($1::text IS NULL OR account_id = $1) AND ($2::bigint IS NULL OR id = $2) AND ($3 OR revoked_at IS NULL) AND id > $4
ORDER BY id
LIMIT $5;

-- name: revoke_key
-- Its logins end with it.
UPDATE webhook.api_key SET revoked_at = coalesce(revoked_at, clock_timestamp())
WHERE id = $2 AND ($1::text IS NULL OR account_id = $1)
RETURNING id, account_id, name, prefix, created_at, created_by, expires_at, last_used_at, revoked_at;

-- name: key_by_hash
SELECT id, account_id, name, expires_at, coalesce(last_used_at < clock_timestamp() - interval '1 minute', true) AS is_stale
FROM webhook.api_key
WHERE hash = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp());

-- name: note_use
UPDATE webhook.api_key SET last_used_at = clock_timestamp() WHERE id = $1;

-- name: insert_link
INSERT INTO webhook.login_link (account_id, hash, uses_left, session_s, created_by, expires_at)
VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6::integer * interval '1 second')
RETURNING id, account_id, uses_left, created_at, created_by, expires_at, revoked_at;

-- name: links
-- Operators' own are not in the list: they are made at the command line and live for minutes.
SELECT id, account_id, uses_left, created_at, created_by, expires_at, revoked_at
FROM webhook.login_link
WHERE account_id IS NOT NULL AND ($1::text IS NULL OR account_id = $1) AND id > $2
ORDER BY id
LIMIT $3;

-- name: revoke_link
UPDATE webhook.login_link SET revoked_at = coalesce(revoked_at, clock_timestamp())
WHERE id = $2 AND account_id IS NOT NULL AND ($1::text IS NULL OR account_id = $1)
RETURNING id, account_id, uses_left, created_at, created_by, expires_at, revoked_at;

-- name: use_link
-- One of two that come at once waits for the other's row and then finds no use left.
UPDATE webhook.login_link SET uses_left = uses_left - 1
WHERE hash = $1 AND uses_left > 0 AND revoked_at IS NULL AND expires_at > clock_timestamp()
RETURNING id, account_id, session_s, created_by;

-- name: insert_login
INSERT INTO webhook.login (account_id, actor, key_id, link_id, proxy_user, expires_at)
VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6::integer * interval '1 second')
RETURNING id, expires_at;

-- name: login
SELECT s.id, s.account_id, s.actor, s.proxy_user, s.expires_at, s.link_id IS NOT NULL AS by_link, k.expires_at AS key_expires_at
FROM webhook.login AS s
LEFT JOIN webhook.api_key AS k ON k.id = s.key_id
LEFT JOIN webhook.login_link AS l ON l.id = s.link_id
WHERE s.id = $1 AND s.expires_at > clock_timestamp() AND l.revoked_at IS NULL
  AND (s.key_id IS NULL OR (k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())));

-- name: end_login
DELETE FROM webhook.login WHERE id = $1;

-- name: begin_change
INSERT INTO webhook.audit (actor, account_id, action, subject, address) VALUES ($1, $2, $3, $4, $5) RETURNING id;

-- name: end_change
UPDATE webhook.audit SET status = $2, subject = $3 WHERE id = $1;

-- name: audit
-- The newest first.
SELECT id, at, actor, account_id, action, subject, address, status
FROM webhook.audit
WHERE ($1::text IS NULL OR account_id = $1) AND id < $2
ORDER BY id DESC
LIMIT $3;

-- name: sweep_logins
DELETE FROM webhook.login WHERE id IN (SELECT id FROM webhook.login WHERE expires_at < clock_timestamp() ORDER BY expires_at LIMIT $1);

-- name: sweep_links
-- Not sooner than the logins by it, which look whether it was revoked.
DELETE FROM webhook.login_link WHERE id IN (
    SELECT id FROM webhook.login_link WHERE expires_at < clock_timestamp() - interval '31 days' ORDER BY expires_at LIMIT $1
);

-- name: sweep_idempotency_keys
DELETE FROM webhook.idempotency_key WHERE (scope, key) IN (
    SELECT scope, key FROM webhook.idempotency_key
    WHERE created_at < clock_timestamp() - interval '24 hours' ORDER BY created_at LIMIT $1
);

-- name: sweep_audit
DELETE FROM webhook.audit WHERE id IN (
    SELECT id FROM webhook.audit WHERE at < clock_timestamp() - interval '400 days' ORDER BY id LIMIT $1
);

-- name: sweep_alerts
DELETE FROM webhook.alert WHERE id IN (SELECT id FROM webhook.alert WHERE at < clock_timestamp() - interval '30 days' LIMIT $1);

-- name: sweep_receivers
DELETE FROM webhook.receiver WHERE id IN (SELECT id FROM webhook.receiver WHERE expires_at < clock_timestamp() ORDER BY id LIMIT $1);
