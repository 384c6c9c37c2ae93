-- What an operator's first page shows beside `status`. Cheap at any size: index descents, and two looks at the endpoints.

-- name: endpoints
SELECT count(*) FILTER (WHERE state = 'live') AS live, count(*) FILTER (WHERE state = 'paused') AS paused,
       count(*) FILTER (WHERE state = 'disabled') AS disabled, count(*) FILTER (WHERE state = 'draft') AS drafts,
       count(*) FILTER (WHERE state = 'live' AND failing_since IS NOT NULL) AS failing
FROM webhook.endpoint
WHERE state <> 'deleted';

-- name: failing
SELECT id, account_id, name, url, failing_since
FROM webhook.endpoint
WHERE state = 'live' AND failing_since IS NOT NULL
ORDER BY failing_since, id
LIMIT $1;

-- name: backlog_by_account
SELECT e.account_id, sum(l.backlog)::bigint AS backlog, count(*) AS endpoints
FROM webhook.lane AS l
JOIN webhook.endpoint AS e ON e.id = l.endpoint_id AND e.state <> 'deleted'
GROUP BY e.account_id
ORDER BY backlog DESC, e.account_id
LIMIT $1;

-- name: first_posts
-- How long after its insert an event was POSTed first: of the newest $2 first attempts above id $1.
SELECT count(*) AS posts, percentile_disc(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM a.started_at - o.created_at) * 1000) AS ms
FROM (
    SELECT event_id, started_at FROM webhook.attempt WHERE event_id > $1 AND run = 0 AND number = 1 ORDER BY event_id DESC LIMIT $2
) AS a
JOIN webhook.outbox AS o ON o.id = a.event_id AND o.id > $1;

-- name: database
-- A role without pg_read_all_stats is told of its own sessions' transactions only.
SELECT current_setting('server_version') AS version, current_setting('max_connections')::integer AS connections_max,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend') AS connections,
       (
           SELECT extract(epoch FROM max(clock_timestamp() - xact_start))::double precision FROM pg_catalog.pg_stat_activity
           WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
       ) AS longest_transaction_s,
       pg_database_size(current_database()) AS bytes;
