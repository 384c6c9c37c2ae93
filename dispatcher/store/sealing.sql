-- Secrets at rest: under which keys they are, and putting them under another. In pages, each its own transaction. Nothing here is a change of
-- configuration: the triggers pass over it.

-- name: in_use
-- How many texts are sealed under each key, '' for those that are plain.
SELECT coalesce(substring(t.stored FROM '^sealed:([0-9a-f]{8}):'), '') AS key_id, count(*) AS texts
FROM (
    SELECT secret AS stored FROM webhook.endpoint_secret
    UNION ALL SELECT credentials FROM webhook.endpoint WHERE credentials IS NOT NULL
    UNION ALL SELECT draft ->> 'credentials' FROM webhook.endpoint WHERE draft ->> 'credentials' IS NOT NULL
) AS t
GROUP BY 1
ORDER BY 1;

-- name: secrets
-- A page of those that don't begin with $2.
SELECT id, endpoint_id, secret FROM webhook.endpoint_secret
WHERE id > $1 AND NOT starts_with(secret, $2)
ORDER BY id LIMIT $3
FOR UPDATE;

-- name: put_secrets
UPDATE webhook.endpoint_secret AS s SET secret = n.secret
FROM unnest($1::bigint[], $2::text[]) AS n (id, secret)
WHERE s.id = n.id;

-- name: credentials
SELECT id, credentials, draft ->> 'credentials' AS proposal FROM webhook.endpoint
WHERE id > $1 AND (NOT starts_with(credentials, $2) OR NOT starts_with(draft ->> 'credentials', $2))
ORDER BY id LIMIT $3
FOR UPDATE;

-- name: put_credentials
UPDATE webhook.endpoint AS e
SET credentials = n.credentials,
    draft = CASE WHEN n.proposal IS NULL THEN e.draft ELSE jsonb_set(e.draft, '{credentials}', to_jsonb(n.proposal)) END
FROM unnest($1::bigint[], $2::text[], $3::text[]) AS n (id, credentials, proposal)
WHERE e.id = n.id;
