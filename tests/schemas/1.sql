-- The webhook schema, version 1.
--
-- Apply it with `dispatcher migrate` or with `psql -v ON_ERROR_STOP=1 -f schema.sql`; both do the same and both are safe to repeat.
-- PostgreSQL 15 or newer, server_encoding UTF8.
--
-- The idea in five lines. `outbox` is a log that other systems append to in their own transactions; it is never updated. One dispatcher
-- reads it in id order and POSTs each event to every endpoint that subscribed to it. A delivered event costs one appended row in
-- `attempt`, which is acknowledgement, history and de-duplication in one. Nothing on that path is updated or deleted besides the one row
-- of `checkpoint`, about once a second. Rows in `retry`, `dead_letter`, `lane` exist only where something is not as it should be.
--
-- A producer needs one statement and one role:
--
--     GRANT webhook_producer TO my_app;
--     INSERT INTO webhook.outbox (account_id, type, payload) VALUES ('acct_42', 'message.delivered', '{"message": {"id": "m_1"}}');

BEGIN;

CREATE SCHEMA IF NOT EXISTS webhook;

-- Roles. Where the installing role may not create roles (managed servers), they are skipped with a notice: create them by hand, or grant
-- the same privileges to roles of your own; nothing below depends on their existence.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['webhook_producer', 'webhook_dispatcher'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role_name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
            EXCEPTION
                WHEN insufficient_privilege THEN
                    RAISE NOTICE 'role % was not created (no CREATEROLE): grant its privileges by hand, see the end of schema.sql', role_name;
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this cluster is being installed at the same moment; roles are shared
            END;
        END IF;
    END LOOP;
END
$$;

CREATE TABLE IF NOT EXISTS webhook.schema_version (
    version    integer     NOT NULL CONSTRAINT schema_version_pkey PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- What belongs to this installation as a whole. `id_key` turns (created_at, id) into the `evt_…` ids that customers see; it is
-- made once and must be kept with the data, or the same event would get another public id after a restore.
CREATE TABLE IF NOT EXISTS webhook.instance (
    only_row boolean NOT NULL DEFAULT true CONSTRAINT instance_pkey PRIMARY KEY,
    id_key   bytea   NOT NULL DEFAULT substring(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())) FROM 1 FOR 16),
    CONSTRAINT instance_one_row CHECK (only_row),
    CONSTRAINT instance_id_key_is_aes128 CHECK (octet_length(id_key) = 16)
);
INSERT INTO webhook.instance DEFAULT VALUES ON CONFLICT DO NOTHING;


-- ─── The log ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- One row an event. `json`, not `jsonb`: the bytes that a producer wrote are the bytes that a receiver gets. Partitioned by id, so that
-- the key is unique, look-ups prune, and retention is a TRUNCATE; the DEFAULT partition means that an insert never fails for want of one.
-- The identity sequence must keep CACHE 1: with cached ids a session could commit an old id long after its neighbours were read.
CREATE TABLE IF NOT EXISTS webhook.outbox (
    id           bigint      GENERATED ALWAYS AS IDENTITY,
    account_id   text        NOT NULL,
    type         text        NOT NULL,
    payload      json        NOT NULL,
    occurred_at  timestamptz,                                       -- when it happened, if the producer knows better than created_at
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- These wait for their features and cost nothing while they are NULL.
    ordering_key text,
    expires_at   timestamptz,
    priority     smallint,
    traceparent  text,
    CONSTRAINT outbox_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT outbox_type_form CHECK (type ~ '^[a-z0-9_]+(\.[a-z0-9_]+)+$' AND octet_length(type) <= 128),
    -- `dispatcher migrate` replaces this bound when DISPATCHER_PAYLOAD_BYTES_MAX differs. The text's length, not pg_column_size():
    -- a value that comes compressed out of another table would read as a fraction of its size.
    CONSTRAINT outbox_payload_size CHECK (octet_length(payload::text) <= 262144)
) PARTITION BY RANGE (id);

-- Never compressed, so that pg_column_size() tells the reader the true size of a page before it fetches it.
ALTER TABLE webhook.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;

-- A lane that catches up, and "what happened to this account", read by account.
CREATE INDEX IF NOT EXISTS outbox_account_id_id ON webhook.outbox (account_id, id);

-- One row an attempt (one POST) of a delivery (event × endpoint) in a run (0 = the original, others = resends and replays).
-- number 0 = settled without a POST. fault IS NULL means delivered; response_head is kept for failures only.
CREATE TABLE IF NOT EXISTS webhook.attempt (
    event_id      bigint      NOT NULL,
    endpoint_id   bigint      NOT NULL,
    started_at    timestamptz NOT NULL,
    run           integer     NOT NULL,
    duration_us   integer     NOT NULL,
    number        smallint    NOT NULL,
    status        smallint,
    fault         text,
    response_head bytea,
    CONSTRAINT attempt_pkey PRIMARY KEY (event_id, endpoint_id, run, number),
    CONSTRAINT attempt_number_counts CHECK (number >= 0 AND run >= 0 AND duration_us >= 0),
    CONSTRAINT attempt_delivered_is_2xx CHECK (fault IS NOT NULL OR (status IS NOT NULL AND status BETWEEN 200 AND 299))
) PARTITION BY RANGE (event_id);

CREATE INDEX IF NOT EXISTS attempt_failed ON webhook.attempt (endpoint_id, event_id) WHERE fault IS NOT NULL;

-- The first partitions: four of ten million ids each, and the DEFAULT.
DO $$
DECLARE
    width CONSTANT bigint := 10000000;
    parent text;
BEGIN
    FOREACH parent IN ARRAY ARRAY['outbox', 'attempt'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = format('webhook.%I', parent)::regclass) THEN
            FOR n IN 0 .. 3 LOOP
                EXECUTE format('CREATE TABLE webhook.%I PARTITION OF webhook.%I FOR VALUES FROM (%L) TO (%L)',
                               parent || '_p' || n, parent, n * width, (n + 1) * width);
            END LOOP;
            EXECUTE format('CREATE TABLE webhook.%I PARTITION OF webhook.%I DEFAULT', parent || '_default', parent);
        END IF;
    END LOOP;
END
$$;


-- ─── What is not settled ────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Exists only after a failed attempt, written in the same transaction as that attempt; gone when the delivery is settled.
CREATE TABLE IF NOT EXISTS webhook.retry (
    endpoint_id      bigint      NOT NULL,
    event_id         bigint      NOT NULL,
    run              integer     NOT NULL,
    number           smallint    NOT NULL,                           -- of the attempt to make
    first_attempt_at timestamptz NOT NULL,                           -- the age limit counts from here
    due_at           timestamptz NOT NULL,
    reason           text        NOT NULL,
    CONSTRAINT retry_pkey PRIMARY KEY (endpoint_id, event_id, run),
    CONSTRAINT retry_number_follows CHECK (number >= 2)
);
CREATE INDEX IF NOT EXISTS retry_endpoint_id_due_at ON webhook.retry (endpoint_id, due_at);

-- A delivery that was given up. It keeps its own copy of the event, so that it outlives the outbox's retention.
CREATE TABLE IF NOT EXISTS webhook.dead_letter (
    id               bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_pkey PRIMARY KEY,
    endpoint_id      bigint      NOT NULL,
    event_id         bigint      NOT NULL,
    run              integer     NOT NULL,
    account_id       text        NOT NULL,
    type             text        NOT NULL,
    payload          json        NOT NULL,
    occurred_at      timestamptz,
    created_at       timestamptz NOT NULL,                           -- of the event
    attempts         smallint    NOT NULL,
    first_attempt_at timestamptz NOT NULL,
    died_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason           text        NOT NULL,
    status           smallint,
    fault            text        NOT NULL,
    CONSTRAINT dead_letter_once UNIQUE (endpoint_id, event_id, run)
);

-- The one row that moves. For every endpoint without a row in `lane`, every id at or below `position` and outside `gaps` is settled.
-- `gaps` are ids that were not visible yet when the reader passed them, and late ones found since but not settled yet.
CREATE TABLE IF NOT EXISTS webhook.checkpoint (
    only_row     boolean        NOT NULL DEFAULT true CONSTRAINT checkpoint_pkey PRIMARY KEY,
    position     bigint         NOT NULL DEFAULT 0,
    gaps         int8multirange NOT NULL DEFAULT '{}',
    epoch        bigint         NOT NULL DEFAULT 0,                  -- raised by every start; a recorder of an older one is refused
    heartbeat_at timestamptz,
    owner        text,                                               -- host and process id, for people
    CONSTRAINT checkpoint_one_row CHECK (only_row),
    CONSTRAINT checkpoint_position_counts CHECK (position >= 0 AND epoch >= 0)
) WITH (fillfactor = 10);                                            -- room for HOT updates of its one row
INSERT INTO webhook.checkpoint DEFAULT VALUES ON CONFLICT DO NOTHING;

-- Only for endpoints that are behind: every id at or below `settled`, outside `holes` and outside the checkpoint's gaps, is settled.
-- Written by the recorder alone; `settled` may fall.
CREATE TABLE IF NOT EXISTS webhook.lane (
    endpoint_id bigint         NOT NULL CONSTRAINT lane_pkey PRIMARY KEY,
    settled     bigint         NOT NULL,
    holes       int8multirange NOT NULL DEFAULT '{}',
    backlog     bigint         NOT NULL DEFAULT 0,                   -- events waiting, counted as the reader passes them
    updated_at  timestamptz    NOT NULL DEFAULT now(),
    CONSTRAINT lane_settled_counts CHECK (settled >= 0 AND backlog >= 0)
);

-- UNLOGGED on purpose: a server that crashed, or was promoted, comes back with this empty. That is how a dispatcher which outlived the
-- crash learns that the tail of asynchronous commits may be gone and that its memory is worth nothing.
CREATE UNLOGGED TABLE IF NOT EXISTS webhook.life (
    only_row boolean NOT NULL DEFAULT true CONSTRAINT life_pkey PRIMARY KEY,
    token    uuid    NOT NULL DEFAULT gen_random_uuid(),
    CONSTRAINT life_one_row CHECK (only_row)
);


-- ─── Who gets what ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- The catalogue is data: what exists, for the panel and for samples. An event of an unlisted type is delivered all the same.
CREATE TABLE IF NOT EXISTS webhook.event_type (
    name        text        NOT NULL CONSTRAINT event_type_pkey PRIMARY KEY,
    title       text        NOT NULL,
    description text        NOT NULL DEFAULT '',
    default_on  boolean     NOT NULL DEFAULT true,
    sample      json,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT event_type_name_form CHECK (name ~ '^[a-z0-9_]+(\.[a-z0-9_]+)+$' AND octet_length(name) <= 128)
);

-- draft → live ⇄ paused; live → disabled → live; any → deleted. The columns are the configuration in force; `draft` holds what an edit
-- of a live endpoint proposes until its own test has passed. `tested_hash` is the configuration's hash at the last passed test.
CREATE TABLE IF NOT EXISTS webhook.endpoint (
    id               bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT endpoint_pkey PRIMARY KEY,
    account_id       text        NOT NULL,
    name             text        NOT NULL DEFAULT '',
    url              text        NOT NULL,
    event_types      text[]      NOT NULL DEFAULT '{*}',
    timeout_ms       integer     NOT NULL DEFAULT 10000,
    rate_per_s       double precision,                               -- NULL: unlimited
    rate_burst       integer,                                        -- NULL: one second's worth
    in_flight_max    integer,                                        -- NULL: the setting's
    retry_schedule_s integer[],                                      -- NULL: the setting's
    state            text        NOT NULL DEFAULT 'draft',
    state_reason     text,
    state_changed_at timestamptz NOT NULL DEFAULT now(),
    paused_at_id     bigint,                                         -- the log's last id when it was paused
    draft            jsonb,
    tested_hash      text,
    failing_since    timestamptz,                                    -- no success since; written when that changes
    created_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT endpoint_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT endpoint_name_length CHECK (char_length(name) <= 200),
    CONSTRAINT endpoint_url_length CHECK (octet_length(url) BETWEEN 8 AND 2048),
    CONSTRAINT endpoint_event_types_some CHECK (cardinality(event_types) BETWEEN 1 AND 100),
    CONSTRAINT endpoint_timeout_range CHECK (timeout_ms BETWEEN 100 AND 60000),
    CONSTRAINT endpoint_rate_range CHECK (rate_per_s > 0 AND rate_per_s <= 100000),
    CONSTRAINT endpoint_burst_range CHECK (rate_burst BETWEEN 1 AND 100000),
    CONSTRAINT endpoint_in_flight_range CHECK (in_flight_max BETWEEN 1 AND 4000),
    CONSTRAINT endpoint_retry_schedule_range CHECK (
        cardinality(retry_schedule_s) BETWEEN 1 AND 50 AND array_position(retry_schedule_s, NULL) IS NULL AND 0 < ALL (retry_schedule_s)
    ),
    CONSTRAINT endpoint_state_known CHECK (state IN ('draft', 'live', 'paused', 'disabled', 'deleted')),
    CONSTRAINT endpoint_paused_knows_where CHECK (state <> 'paused' OR paused_at_id IS NOT NULL)
);
CREATE INDEX IF NOT EXISTS endpoint_account_id ON webhook.endpoint (account_id);

-- Every secret that has not expired signs: that is rotation with overlap.
CREATE TABLE IF NOT EXISTS webhook.endpoint_secret (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT endpoint_secret_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL CONSTRAINT endpoint_secret_endpoint REFERENCES webhook.endpoint,
    secret      text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    CONSTRAINT endpoint_secret_form CHECK (secret ~ '^whsec_[A-Za-z0-9+/]+={0,2}$')
);
CREATE INDEX IF NOT EXISTS endpoint_secret_endpoint_id ON webhook.endpoint_secret (endpoint_id);

-- endpoint × pattern × the ids it is valid for: an event matches iff since_id < id ≤ until_id, on every path, also years later.
-- `taken_up` is false until the dispatcher has sent the endpoint's lane back to since_id and written that down.
CREATE TABLE IF NOT EXISTS webhook.subscription (
    id          bigint  GENERATED ALWAYS AS IDENTITY CONSTRAINT subscription_pkey PRIMARY KEY,
    endpoint_id bigint  NOT NULL CONSTRAINT subscription_endpoint REFERENCES webhook.endpoint,
    pattern     text    NOT NULL,
    since_id    bigint  NOT NULL,
    until_id    bigint,
    taken_up    boolean NOT NULL DEFAULT false,
    CONSTRAINT subscription_pattern_form CHECK (pattern ~ '^(\*|[a-z0-9_]+(\.[a-z0-9_]+)*\.\*|[a-z0-9_]+(\.[a-z0-9_]+)+)$'),
    CONSTRAINT subscription_bounds_ordered CHECK (since_id >= 0 AND until_id >= since_id)
);
CREATE INDEX IF NOT EXISTS subscription_endpoint_id ON webhook.subscription (endpoint_id);

-- Tests of an endpoint: real POSTs, but never events, attempts or statistics.
CREATE TABLE IF NOT EXISTS webhook.test_attempt (
    id            bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT test_attempt_pkey PRIMARY KEY,
    endpoint_id   bigint      NOT NULL CONSTRAINT test_attempt_endpoint REFERENCES webhook.endpoint,
    config_hash   text        NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    duration_us   integer     NOT NULL,
    status        smallint,
    fault         text,
    verdict       text        NOT NULL,
    request       bytea       NOT NULL,
    response_head bytea
);
CREATE INDEX IF NOT EXISTS test_attempt_endpoint_id ON webhook.test_attempt (endpoint_id, id);

-- How a running dispatcher learns what to reload. Appended under a lock, so that its numbers commit in order: a reader that saw n has
-- seen everything below n.
CREATE TABLE IF NOT EXISTS webhook.config_change (
    seq         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT config_change_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL,
    changed_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);


-- ─── Functions and triggers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
-- Advisory locks are (9324665, n): 1 doorbell, 2 owner, 3 configuration changes. (9324665 is "webhook" on a telephone's keys.)

-- The last id handed out. A fresh sequence has handed out none, though its last_value reads 1.
CREATE OR REPLACE FUNCTION webhook.last_id() RETURNS bigint
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog
    AS $$ SELECT coalesce(pg_sequence_last_value('webhook.outbox_id_seq'::regclass), 0) $$;

-- The doorbell. A dispatcher holds lock 1 exclusively only while it sleeps; so a producer that gets it shared knows that the dispatcher is
-- awake and polling, and spares itself the NOTIFY, whose commit takes a database-wide lock. The dispatcher can fall asleep only when
-- every transaction that chose silence has ended, and looks once more after it has the lock: no wake-up is lost.
CREATE OR REPLACE FUNCTION webhook.ring_doorbell() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog
    AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(9324665, 1) THEN
        PERFORM pg_notify('webhook_doorbell', '');
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER outbox_doorbell AFTER INSERT ON webhook.outbox
    FOR EACH STATEMENT EXECUTE FUNCTION webhook.ring_doorbell();

CREATE OR REPLACE FUNCTION webhook.note_config_change() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog
    AS $$
DECLARE
    changed record := CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 3);
    INSERT INTO webhook.config_change (endpoint_id)
        VALUES (CASE TG_TABLE_NAME WHEN 'endpoint' THEN (to_jsonb(changed) ->> 'id')::bigint ELSE (to_jsonb(changed) ->> 'endpoint_id')::bigint END);
    PERFORM pg_notify('webhook_config', '');
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER endpoint_changed
    AFTER INSERT OR DELETE OR UPDATE OF account_id, url, timeout_ms, rate_per_s, rate_burst, in_flight_max, retry_schedule_s, state
    ON webhook.endpoint FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();
CREATE OR REPLACE TRIGGER endpoint_secret_changed
    AFTER INSERT OR DELETE OR UPDATE ON webhook.endpoint_secret FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();
CREATE OR REPLACE TRIGGER subscription_changed
    AFTER INSERT OR DELETE OR UPDATE OF pattern, since_id, until_id
    ON webhook.subscription FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();


-- ─── Privileges ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_producer') THEN
        GRANT USAGE ON SCHEMA webhook TO webhook_producer;
        -- Not id, not created_at. SELECT (id) so that INSERT … RETURNING id works, which ORMs use.
        GRANT INSERT (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent), SELECT (id)
            ON webhook.outbox TO webhook_producer;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_dispatcher') THEN
        GRANT USAGE ON SCHEMA webhook TO webhook_dispatcher;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA webhook TO webhook_dispatcher;
        GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA webhook TO webhook_dispatcher;
    END IF;
END
$$;

INSERT INTO webhook.schema_version (version) VALUES (1) ON CONFLICT DO NOTHING;

COMMIT;
