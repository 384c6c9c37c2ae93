-- What `dispatcher status` shows. Cheap at any size: one row, index descents, and counts that stop at a bound.

-- name: owner
-- Who holds the owner lock (pid NULL: nobody), beside what the checkpoint says of the last owner.
SELECT k.owner, k.epoch, k.owned_since, k.heartbeat_at, k.position, webhook.last_id() AS last_id, clock_timestamp() AS now, h.pid, h.client_addr,
       (SELECT count(*) FROM unnest(k.gaps) AS g (ids)) AS gap_ranges,
       (SELECT coalesce(sum(upper(g.ids) - lower(g.ids)), 0)::bigint FROM unnest(k.gaps) AS g (ids)) AS gap_ids
FROM webhook.checkpoint AS k
LEFT JOIN (
    SELECT l.pid, host(s.client_addr) AS client_addr
    FROM pg_catalog.pg_locks AS l
    LEFT JOIN pg_catalog.pg_stat_activity AS s ON s.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.classid = 9324665 AND l.objid = 2 AND l.objsubid = 2 AND l.granted
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
) AS h ON true;

-- name: standbys
-- backend_start and client_addr are hidden from other roles without pg_read_all_stats.
SELECT substr(application_name, length('dispatcher standby ') + 1) AS name, pid, host(client_addr) AS client_addr, backend_start AS since
FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'dispatcher standby %'
ORDER BY backend_start NULLS LAST, pid;

-- name: oldest
-- When the oldest event was made that may still have to be sent: the first above the position ($1), and the first of its account after the mark
-- of each of the 100 lanes that are furthest behind; but of one that isn't live only if something waits for it. Its type may be one that nobody wants.
SELECT min(o.created_at)
FROM (
    (SELECT created_at FROM webhook.outbox WHERE id > $1 ORDER BY id LIMIT 1)
    UNION ALL
    SELECT n.created_at
    FROM (
        SELECT endpoint_id, least(settled + 1, lower(holes)) AS next_id, backlog FROM webhook.lane ORDER BY least(settled + 1, lower(holes)) LIMIT 100
    ) AS l
    JOIN webhook.endpoint AS e ON e.id = l.endpoint_id AND (e.state = 'live' OR (e.state <> 'deleted' AND l.backlog > 0))
    CROSS JOIN LATERAL (
        SELECT created_at FROM webhook.outbox WHERE account_id = e.account_id AND id >= l.next_id ORDER BY id LIMIT 1
    ) AS n
) AS o;

-- name: lanes
SELECT count(*) AS behind, coalesce(sum(backlog), 0)::bigint AS backlog FROM webhook.lane;

-- name: lanes_behind
SELECT l.endpoint_id, e.account_id, e.name, e.url, e.state, l.backlog, l.settled,
       (
           SELECT o.created_at FROM webhook.outbox AS o
           WHERE o.account_id = e.account_id AND o.id >= least(l.settled + 1, lower(l.holes)) ORDER BY o.id LIMIT 1
       ) AS oldest_at
FROM webhook.lane AS l
JOIN webhook.endpoint AS e ON e.id = l.endpoint_id AND (e.state = 'live' OR (e.state <> 'deleted' AND l.backlog > 0))
ORDER BY l.backlog DESC, l.settled, l.endpoint_id
LIMIT $1;

-- name: retries
SELECT count(*) FROM (SELECT FROM webhook.retry LIMIT $1) AS r;

-- name: dead_letters
SELECT count(*) FROM (SELECT FROM webhook.dead_letter WHERE state = 'open' LIMIT $1) AS d;
