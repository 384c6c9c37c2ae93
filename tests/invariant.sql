-- DESIGN §4's invariant, to be asked from outside at any instant: one row a violation, in one snapshot.
--
-- For every committed event and every subscription that matches it, its filters too: its id is above the checkpoint, or in its gaps, or above the lane's
-- settled mark, or in the lane's holes, or the subscription isn't taken up, or it has an attempt row in run 0. And where the newest attempt
-- of a run isn't final, its retry row exists, for the next number, unless the run was canceled; where it is final there is none. Attempts of
-- a run are numbered from 1 without a gap, and nothing follows a success. Number 0 is final too: the event had expired. What a resend or replay has passed has an attempt in it, and its
-- counts are those of its attempts. What retention has taken, events and attempts, says nothing any more.
WITH wanted AS (
    SELECT DISTINCT o.id AS event_id, e.id AS endpoint_id
    FROM webhook.outbox AS o
    JOIN webhook.endpoint AS e ON e.account_id = o.account_id AND e.state <> 'deleted'
    JOIN webhook.subscription AS s ON s.endpoint_id = e.id AND s.taken_up AND o.id > s.since_id AND (s.until_id IS NULL OR o.id <= s.until_id)
     AND (s.pattern = '*' OR s.pattern = o.type OR (s.pattern LIKE '%.*' AND starts_with(o.type, left(s.pattern, -1))))
     AND webhook.passes(s.rule, o.type, o.payload)
), run AS (
    SELECT a.event_id, a.endpoint_id, a.run, count(*) FILTER (WHERE a.number > 0) AS attempts, max(a.number) AS last, count(*) FILTER (WHERE a.fault IS NULL) AS successes,
           max(a.number) FILTER (WHERE a.fault IS NULL) AS succeeded,
           bool_or(a.number = 0) AS expired,
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
SELECT 'sent, though no subscription is for it', a.event_id, a.endpoint_id
FROM webhook.attempt AS a
JOIN webhook.endpoint AS e ON e.id = a.endpoint_id AND e.state <> 'deleted'
JOIN webhook.outbox AS o ON o.id = a.event_id
WHERE a.run = 0 AND EXISTS (SELECT FROM webhook.subscription AS s WHERE s.endpoint_id = a.endpoint_id AND s.rule IS NOT NULL) AND NOT EXISTS (
    SELECT FROM webhook.subscription AS s
    WHERE s.endpoint_id = a.endpoint_id AND o.id > s.since_id AND (s.until_id IS NULL OR o.id <= s.until_id)
      AND (s.pattern = '*' OR s.pattern = o.type OR (s.pattern LIKE '%.*' AND starts_with(o.type, left(s.pattern, -1))))
      AND webhook.passes(s.rule, o.type, o.payload)
)
UNION ALL
SELECT 'failed, and no retry row follows', r.event_id, r.endpoint_id
FROM run AS r
LEFT JOIN webhook.retry AS t ON t.endpoint_id = r.endpoint_id AND t.event_id = r.event_id AND t.run = r.run
WHERE r.successes = 0 AND NOT r.dead AND NOT r.expired AND t.number IS DISTINCT FROM r.last + 1
  AND NOT EXISTS (SELECT FROM webhook.run AS u WHERE u.id = r.run AND u.state = 'canceled')
  AND NOT EXISTS (
      SELECT FROM webhook.discard AS g
      WHERE g.endpoint_id = r.endpoint_id AND g.reason = 'erased' AND r.event_id > g.after_id AND r.event_id <= g.upto_id
  )
UNION ALL
SELECT 'settled, and a retry row is there', t.event_id, t.endpoint_id
FROM webhook.retry AS t
LEFT JOIN run AS r ON r.endpoint_id = t.endpoint_id AND r.event_id = t.event_id AND r.run = t.run
WHERE (r.event_id IS NULL AND EXISTS (SELECT FROM webhook.outbox AS o WHERE o.id = t.event_id)) OR r.successes > 0 OR r.dead OR r.expired
UNION ALL
SELECT 'settled unsent, though it had not expired', a.event_id, a.endpoint_id
FROM webhook.attempt AS a
JOIN webhook.outbox AS o ON o.id = a.event_id
WHERE a.number = 0 AND (a.run <> 0 OR o.expires_at IS NULL OR o.expires_at > a.started_at)
UNION ALL
SELECT 'attempts are not 1, 2, 3 … up to a success', r.event_id, r.endpoint_id
FROM run AS r
WHERE r.attempts <> r.last OR r.successes > 1 OR r.succeeded < r.last OR (r.expired AND r.successes > 0)
UNION ALL
SELECT 'passed over by run ' || u.id, o.id, u.endpoint_id
FROM webhook.run AS u
JOIN webhook.run_progress AS p ON p.run_id = u.id
JOIN webhook.endpoint AS e ON e.id = u.endpoint_id AND e.state <> 'deleted'
JOIN webhook.outbox AS o ON o.account_id = e.account_id AND o.id > u.after_id AND o.id <= least(u.upto_id, p.settled)
 AND EXISTS (
    SELECT FROM unnest(u.patterns) AS s (pattern)
    WHERE s.pattern = '*' OR s.pattern = o.type OR (s.pattern LIKE '%.*' AND starts_with(o.type, left(s.pattern, -1)))
 )
WHERE u.source = 'log' AND NOT u.only_failed AND u.state <> 'canceled' AND webhook.passes(u.rule, o.type, o.payload)
  AND NOT EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = o.id AND a.endpoint_id = u.endpoint_id AND a.run = u.id)
UNION ALL
SELECT 'run ' || p.run_id || ' counts otherwise than its attempts say', NULL, u.endpoint_id
FROM webhook.run_progress AS p
JOIN webhook.run AS u ON u.id = p.run_id
JOIN webhook.endpoint AS e ON e.id = u.endpoint_id AND e.state <> 'deleted'
WHERE u.after_id >= (SELECT coalesce(min(o.id), 0) - 1 FROM webhook.outbox AS o) AND (p.attempted, p.delivered) <> (
    SELECT count(DISTINCT a.event_id), count(*) FILTER (WHERE a.fault IS NULL)
    FROM webhook.attempt AS a WHERE a.endpoint_id = u.endpoint_id AND a.run = u.id
);
