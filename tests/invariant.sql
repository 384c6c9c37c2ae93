-- DESIGN §4's invariant, to be asked from outside at any instant: one row a violation, in one snapshot.
--
-- For every committed event and every subscription that matches it: its id is above the checkpoint, or in its gaps, or above the lane's
-- settled mark, or in the lane's holes, or the subscription isn't taken up, or it has an attempt row in run 0. And where the newest attempt
-- of a run isn't final, its retry row exists, for the next number; where it is final there is none. Attempts of a run are numbered from 1
-- without a gap, and nothing follows a success.
WITH wanted AS (
    SELECT DISTINCT o.id AS event_id, e.id AS endpoint_id
    FROM webhook.outbox AS o
    JOIN webhook.endpoint AS e ON e.account_id = o.account_id AND e.state <> 'deleted'
    JOIN webhook.subscription AS s ON s.endpoint_id = e.id AND s.taken_up AND o.id > s.since_id AND (s.until_id IS NULL OR o.id <= s.until_id)
     AND (s.pattern = '*' OR s.pattern = o.type OR (s.pattern LIKE '%.*' AND starts_with(o.type, left(s.pattern, -1))))
), run AS (
    SELECT a.event_id, a.endpoint_id, a.run, count(*) AS attempts, max(a.number) AS last, count(*) FILTER (WHERE a.fault IS NULL) AS successes,
           max(a.number) FILTER (WHERE a.fault IS NULL) AS succeeded,
           EXISTS (
               SELECT FROM webhook.dead_letter AS d
               WHERE d.endpoint_id = a.endpoint_id AND d.event_id = a.event_id AND d.run = a.run
           ) AS dead
    FROM webhook.attempt AS a
    JOIN webhook.endpoint AS e ON e.id = a.endpoint_id AND e.state <> 'deleted'
    GROUP BY a.event_id, a.endpoint_id, a.run
)
SELECT 'passed over without an attempt' AS violation, w.event_id, w.endpoint_id
FROM wanted AS w
CROSS JOIN webhook.checkpoint AS c
LEFT JOIN webhook.lane AS l ON l.endpoint_id = w.endpoint_id
WHERE w.event_id <= c.position
  AND NOT w.event_id <@ c.gaps
  AND (l.endpoint_id IS NULL OR (w.event_id <= l.settled AND NOT w.event_id <@ l.holes))
  AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = w.event_id AND a.endpoint_id = w.endpoint_id AND a.run = 0)
UNION ALL
SELECT 'failed, and no retry row follows', r.event_id, r.endpoint_id
FROM run AS r
LEFT JOIN webhook.retry AS t ON t.endpoint_id = r.endpoint_id AND t.event_id = r.event_id AND t.run = r.run
WHERE r.successes = 0 AND NOT r.dead AND t.number IS DISTINCT FROM r.last + 1
UNION ALL
SELECT 'settled, and a retry row is there', t.event_id, t.endpoint_id
FROM webhook.retry AS t
LEFT JOIN run AS r ON r.endpoint_id = t.endpoint_id AND r.event_id = t.event_id AND r.run = t.run
WHERE r.event_id IS NULL OR r.successes > 0 OR r.dead
UNION ALL
SELECT 'attempts are not 1, 2, 3 … up to a success', r.event_id, r.endpoint_id
FROM run AS r
WHERE r.attempts <> r.last OR r.successes > 1 OR r.succeeded < r.last;
