-- Resends and replays, as people make, follow and change them. The rows of a run that move (run_progress) are the recorder's.
-- Event types are matched by ($n exact types, $n+1 prefixes); exact NULL means every type, and the plan is then made without the column.

-- name: target
-- The endpoint that a run would go to, also one that is deleted: the error says so.
SELECT e.id, e.account_id, e.url, e.state, e.event_types, e.rate_per_s, coalesce(l.backlog, 0) AS backlog,
       webhook.filter_rule(e.filters)::text AS rule,
       (
           SELECT count(*) FROM webhook.run_progress AS p JOIN webhook.run AS r ON r.id = p.run_id
           WHERE p.finished_at IS NULL AND r.endpoint_id = e.id
       ) AS unfinished
FROM webhook.endpoint AS e
LEFT JOIN webhook.lane AS l ON l.endpoint_id = e.id
WHERE e.id = $1;

-- name: lock_target
-- So that neither a delete nor another run slips in between the look at the endpoint and the new run's row.
SELECT FROM webhook.endpoint WHERE id = $1 FOR NO KEY UPDATE;

-- name: is_dispatching
SELECT coalesce(heartbeat_at > clock_timestamp() - interval '5 seconds', false) FROM webhook.checkpoint;

-- name: now
SELECT clock_timestamp();

-- name: limit_time
-- For what is left of the transaction; a number of milliseconds.
SELECT set_config('statement_timeout', $1, true);

-- name: last_id
SELECT webhook.last_id();


-- ═══ what a range holds ═══

-- name: first_event_from
-- One step of a binary search by time over the account's index: 0.05 ms, about 30 of them for a billion ids.
SELECT id, created_at FROM webhook.outbox WHERE ($1::text IS NULL OR account_id = $1) AND id >= $2 ORDER BY id LIMIT 1;

-- name: first_since
-- The exact bound within the few seconds in which ids and times may disagree.
SELECT min(id) FROM webhook.outbox WHERE ($1::text IS NULL OR account_id = $1) AND id >= $2 AND id < $3 AND created_at >= $4;

-- name: last_until
SELECT max(id) FROM webhook.outbox WHERE ($1::text IS NULL OR account_id = $1) AND id >= $2 AND id < $3 AND created_at <= $4;

-- name: count_all
SELECT count(*) FROM (
    SELECT FROM webhook.outbox AS o
    WHERE account_id = $1 AND id > $2 AND id <= $3 AND ($4::text[] IS NULL OR type = ANY ($4::text[]) OR type ^@ ANY ($5::text[]))
      AND CASE WHEN $7::text IS NULL THEN true ELSE webhook.passes($7::text::jsonb, o.type, o.payload) END
    LIMIT $6
) AS q;

-- name: count_failed
-- As the dispatcher evaluates `only_failed`: with a failed attempt, none that succeeded in any run, and no retry to come; not what expired. LATERAL with LIMIT and
-- EXISTS with OFFSET can't become joins: on tables without statistics a join of 30,000 failures took over a minute, this 0.3 s.
SELECT count(*) FROM (
    SELECT
    FROM (
        SELECT DISTINCT event_id FROM webhook.attempt
        WHERE endpoint_id = $7 AND fault IS NOT NULL AND event_id > $2 AND event_id <= $3
    ) AS f
    CROSS JOIN LATERAL (
        SELECT FROM webhook.outbox AS o
        WHERE o.id = f.event_id AND o.account_id = $1 AND ($4::text[] IS NULL OR o.type = ANY ($4::text[]) OR o.type ^@ ANY ($5::text[]))
          AND CASE WHEN $8::text IS NULL THEN true ELSE webhook.passes($8::text::jsonb, o.type, o.payload) END
        LIMIT 1
    ) AS o
    WHERE NOT EXISTS (
          SELECT FROM webhook.attempt AS a WHERE a.event_id = f.event_id AND a.endpoint_id = $7 AND (a.fault IS NULL OR a.number = 0) OFFSET 0
      )
      AND NOT EXISTS (SELECT FROM webhook.retry AS r WHERE r.endpoint_id = $7 AND r.event_id = f.event_id OFFSET 0)
    LIMIT $6
) AS q;

-- name: event
SELECT id, account_id, created_at FROM webhook.outbox WHERE id = $1;

-- name: may_have
-- Whether event $1 may go to endpoint $2 by name: its filters let it pass now, or it was owed before.
SELECT webhook.passes($3::text::jsonb, o.type, o.payload)
    OR EXISTS (SELECT FROM webhook.attempt AS a WHERE a.event_id = $1 AND a.endpoint_id = $2 OFFSET 0)
FROM webhook.outbox AS o WHERE o.id = $1;


-- ═══ making one ═══

-- name: new_run_id
-- Before the run's row: dead letters are marked with it first. The row comes last, because its trigger takes the lock under which every
-- change of configuration is appended, and holds it until the transaction ends.
SELECT nextval('webhook.run_id_seq')::integer;

-- name: insert_run
WITH made AS (
    INSERT INTO webhook.run (id, endpoint_id, source, after_id, upto_id, patterns, only_failed, rate_per_s, total, note, rule)
    OVERRIDING SYSTEM VALUE
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::text::jsonb)
)
INSERT INTO webhook.run_progress (run_id, settled) VALUES ($1, $4);

-- name: dead_letters_bound
-- Where a page of the endpoint's dead letters ends, in the order of events.
SELECT max(event_id) FROM (
    SELECT event_id FROM webhook.dead_letter WHERE endpoint_id = $1 AND event_id > $2 AND event_id <= $3 ORDER BY event_id LIMIT $4
) AS q;

-- name: take_dead_letters
-- The open dead letters that a run over the log takes care of: they are open again if it is canceled before it did. Chosen by id without their
-- state, so that no plan reads all the open ones for every page. A million in one statement took 35 s, in pages of 5,000 14 to 22.
UPDATE webhook.dead_letter AS d
SET state = 'resent', state_changed_at = clock_timestamp(), resent_run = $1
WHERE d.id = ANY (ARRAY(SELECT x.id FROM webhook.dead_letter AS x WHERE x.endpoint_id = $2 AND x.event_id > $3 AND x.event_id <= $4))
  AND d.state = 'open'
  AND ($5::text[] IS NULL OR d.type = ANY ($5::text[]) OR d.type ^@ ANY ($6::text[]))
  AND CASE WHEN $8::text IS NULL THEN true ELSE webhook.passes($8::text::jsonb, d.type, d.payload) END
  AND EXISTS (SELECT FROM webhook.outbox AS o WHERE o.id = d.event_id OFFSET 0)
  AND NOT ($7 AND EXISTS (  -- as in run_page_failed: what the run passes over would be taken and never sent
      SELECT FROM webhook.attempt AS a
      WHERE a.event_id = d.event_id AND a.endpoint_id = $2 AND (a.fault IS NULL OR a.number = 0) OFFSET 0
  ))
  AND NOT ($7 AND EXISTS (SELECT FROM webhook.retry AS r WHERE r.endpoint_id = $2 AND r.event_id = d.event_id OFFSET 0));

-- name: dead_letters_of
-- The copies of one delivery, the newest first.
SELECT id, run, state, created_at, resent_run FROM webhook.dead_letter WHERE endpoint_id = $1 AND event_id = $2 ORDER BY run DESC;

-- name: take_dead_letter
UPDATE webhook.dead_letter SET state = 'resent', state_changed_at = clock_timestamp(), resent_run = $2
WHERE id = $1 AND state = 'open'
RETURNING id;


-- ═══ following and changing one ═══

-- name: runs
-- $1 some, $2 an endpoint's, $3 an account's, $4 in a state ('open': neither finished nor canceled), after id $5. A deleted endpoint's run
-- can't go on.
SELECT * FROM (
    SELECT r.id, r.endpoint_id, e.account_id, e.url, e.state AS endpoint_state, r.source, r.after_id, r.upto_id, r.patterns, r.only_failed,
           r.rate_per_s, r.total, r.note, r.created_at, p.settled, p.attempted, p.delivered, p.dead, p.finished_at,
           CASE WHEN r.state = 'canceled' THEN 'canceled'
                WHEN p.finished_at IS NOT NULL THEN 'finished'
                WHEN e.state = 'deleted' THEN 'canceled'
                ELSE r.state END AS state
    FROM webhook.run AS r
    JOIN webhook.run_progress AS p ON p.run_id = r.id
    JOIN webhook.endpoint AS e ON e.id = r.endpoint_id
    WHERE ($1::integer[] IS NULL OR r.id = ANY ($1)) AND ($2::bigint IS NULL OR r.endpoint_id = $2) AND ($3::text IS NULL OR e.account_id = $3)
      AND ($4::text IS DISTINCT FROM 'open' OR p.finished_at IS NULL) AND r.id > $5
) AS q
WHERE $4::text IS NULL OR q.state = $4 OR ($4 = 'open' AND q.state IN ('running', 'paused'))
ORDER BY q.id
LIMIT $6;

-- name: newest
-- Ids from new to old, below $2; $1 an endpoint's, NULL all.
SELECT ARRAY(SELECT id FROM webhook.run WHERE ($1::bigint IS NULL OR endpoint_id = $1) AND id < $2 ORDER BY id DESC LIMIT $3);

-- name: newest_of_account
-- The same of account $1: a look at the index for each of its endpoints.
SELECT ARRAY(
    SELECT r.id FROM webhook.endpoint AS e
    CROSS JOIN LATERAL (SELECT id FROM webhook.run WHERE endpoint_id = e.id AND id < $2 ORDER BY id DESC LIMIT $3) AS r
    WHERE e.account_id = $1
    ORDER BY r.id DESC LIMIT $3
);

-- name: next_due
SELECT min(due_at) FROM webhook.retry WHERE run = $1 AND run <> 0;

-- name: lock_run
SELECT FROM webhook.run WHERE id = $1 FOR UPDATE;

-- name: put_state
UPDATE webhook.run SET state = $2 WHERE id = $1;

-- name: put_rate
UPDATE webhook.run SET rate_per_s = $2 WHERE id = $1;

-- name: reopen_bound
-- Where a page of the dead letters of a canceled run ends.
SELECT max(event_id) FROM (
    SELECT event_id FROM webhook.dead_letter WHERE resent_run = $1 AND event_id > $2 ORDER BY event_id LIMIT $3
) AS q;

-- name: reopen
-- What the run neither delivered nor gave up is open again.
UPDATE webhook.dead_letter AS d
SET state = 'open', state_changed_at = clock_timestamp(), resent_run = NULL
WHERE d.resent_run = $1 AND d.event_id > $2 AND d.event_id <= $3 AND d.state = 'resent'
  AND NOT EXISTS (
      SELECT FROM webhook.attempt AS a
      WHERE a.event_id = d.event_id AND a.endpoint_id = d.endpoint_id AND a.run = $1 AND a.fault IS NULL OFFSET 0
  )
  AND NOT EXISTS (
      SELECT FROM webhook.dead_letter AS x WHERE x.endpoint_id = d.endpoint_id AND x.event_id = d.event_id AND x.run = $1 OFFSET 0
  );
