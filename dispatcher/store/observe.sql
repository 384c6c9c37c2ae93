-- What a dispatcher looks at every few seconds to tell of it (metrics, readiness). Index descents and counts that stop at a bound.

-- name: primary
SELECT NOT pg_is_in_recovery();

-- name: oldest
-- The age, by the database's clock, of the oldest event that may still have to be sent: above the position, which is the dispatcher's own
-- lateness, and behind the marks of the 100 live endpoints that are furthest behind, which may be the endpoints'. Paused and disabled ones wait
-- because somebody said so.
SELECT extract(epoch FROM clock_timestamp() - (
           SELECT created_at FROM webhook.outbox WHERE id > (SELECT position FROM webhook.checkpoint) ORDER BY id LIMIT 1
       ))::double precision AS log_s,
       extract(epoch FROM clock_timestamp() - (
           SELECT min(n.created_at)
           FROM (
               SELECT e.account_id, least(l.settled + 1, lower(l.holes)) AS next_id
               FROM webhook.lane AS l JOIN webhook.endpoint AS e ON e.id = l.endpoint_id AND e.state = 'live'
               ORDER BY 2 LIMIT 100
           ) AS b
           CROSS JOIN LATERAL (
               SELECT created_at FROM webhook.outbox WHERE account_id = b.account_id AND id >= b.next_id ORDER BY id LIMIT 1
           ) AS n
       ))::double precision AS behind_s;
