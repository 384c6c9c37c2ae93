-- The webhook schema, version 2.
--
-- Apply it with `dispatcher migrate` or with `psql -v ON_ERROR_STOP=1 -f schema.sql`; both do the same and both are safe to repeat; beside
-- producers by `migrate`, which waits for no lock for long. An older version is brought up to this one by that only (dispatcher/store/migrations).
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

-- One installation at a time: who comes second waits, and finds everything there. An older version is not upgraded here: CREATE … IF NOT
-- EXISTS would pass over the tables that must change.
DO $$
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 4);
    IF to_regclass('webhook.schema_version') IS NOT NULL THEN
        IF (SELECT max(version) FROM webhook.schema_version) < 2 THEN
            RAISE EXCEPTION 'this database has an older version of the webhook schema' USING HINT = 'run `dispatcher migrate`';
        END IF;
    END IF;
END
$$;

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
    web_key  bytea   NOT NULL DEFAULT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),  -- signs the panel's cookies
    operator_account text,                                            -- whose endpoints get what every account's are told of them
    CONSTRAINT instance_one_row CHECK (only_row),
    CONSTRAINT instance_operator_account_length CHECK (octet_length(operator_account) BETWEEN 1 AND 255),
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
    -- These cost nothing while they are NULL.
    ordering_key text,                                              -- endpoints that ask for it get the events of one key one by one
    expires_at   timestamptz,                                       -- worth nothing to a receiver afterwards: settled unsent
    priority     smallint,                                          -- above 0: goes first where an endpoint is behind
    traceparent  text,                                              -- W3C Trace Context; passed on to receivers, if it is one
    CONSTRAINT outbox_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT outbox_type_form CHECK (type ~ '^[a-z0-9_]+(\.[a-z0-9_]+)+$' AND octet_length(type) <= 128),
    CONSTRAINT outbox_ordering_key_length CHECK (octet_length(ordering_key) BETWEEN 1 AND 255),
    -- `dispatcher migrate` replaces this bound when DISPATCHER_PAYLOAD_BYTES_MAX differs. The text's length, not pg_column_size():
    -- a value that comes compressed out of another table would read as a fraction of its size.
    CONSTRAINT outbox_payload_size CHECK (octet_length(payload::text) <= 262144)
) PARTITION BY RANGE (id);

-- Never compressed, so that pg_column_size() tells the reader the true size of a page before it fetches it.
ALTER TABLE webhook.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;

-- A lane that catches up, and "what happened to this account", read by account.
CREATE INDEX IF NOT EXISTS outbox_account_id_id ON webhook.outbox (account_id, id);

-- What is next of a key that was held back, and what goes first of a long backlog. No row without them is in these.
CREATE INDEX IF NOT EXISTS outbox_ordering_key ON webhook.outbox (account_id, ordering_key, id) WHERE ordering_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS outbox_urgent ON webhook.outbox (account_id, id) WHERE priority > 0;

-- One row an attempt (one POST) of a delivery (event × endpoint) in a run (0 = the original, others = resends and replays).
-- number 0 = settled without a POST (expired). fault IS NULL means delivered; response_head is kept for failures only.
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

-- The first partitions, each wider than the one before, and the DEFAULT. A partition is what retention takes away, so the first ones are
-- narrow: the dispatcher measures how fast the log grows and makes the next ones to fit. A partition bears its lowest id in its name.
DO $$
DECLARE
    bounds CONSTANT bigint[] := ARRAY[0, 100000, 1000000, 10000000, 40000000];
    parent text;
BEGIN
    FOREACH parent IN ARRAY ARRAY['outbox', 'attempt'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = format('webhook.%I', parent)::regclass) THEN
            FOR n IN 1 .. 4 LOOP
                EXECUTE format('CREATE TABLE webhook.%I PARTITION OF webhook.%I FOR VALUES FROM (%L) TO (%L)',
                               parent || '_p' || bounds[n], parent, bounds[n], bounds[n + 1]);
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
    ordering_key     text,                                           -- it holds back this key of its endpoint; NULL: none
    CONSTRAINT retry_pkey PRIMARY KEY (endpoint_id, event_id, run),
    CONSTRAINT retry_number_follows CHECK (number >= 2)
);
CREATE INDEX IF NOT EXISTS retry_endpoint_id_due_at ON webhook.retry (endpoint_id, due_at);
CREATE INDEX IF NOT EXISTS retry_run ON webhook.retry (run) WHERE run <> 0;  -- a run has ended when none is left
CREATE INDEX IF NOT EXISTS retry_ordering_key ON webhook.retry (endpoint_id) WHERE ordering_key IS NOT NULL;

-- A delivery that was given up. It keeps its own copy of the event, so that it outlives the outbox's retention. open → resent (by the run
-- `resent_run`, which reads these copies), discarded or erased; only the last two give up the payload.
CREATE TABLE IF NOT EXISTS webhook.dead_letter (
    id               bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_pkey PRIMARY KEY,
    endpoint_id      bigint      NOT NULL,
    event_id         bigint      NOT NULL,
    run              integer     NOT NULL,
    account_id       text        NOT NULL,
    type             text        NOT NULL,
    payload          json,
    occurred_at      timestamptz,
    created_at       timestamptz NOT NULL,                           -- of the event
    attempts         smallint    NOT NULL,
    first_attempt_at timestamptz NOT NULL,
    died_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason           text        NOT NULL,
    status           smallint,
    fault            text        NOT NULL,
    state            text        NOT NULL DEFAULT 'open',
    state_changed_at timestamptz,
    resent_run       integer,
    CONSTRAINT dead_letter_once UNIQUE (endpoint_id, event_id, run),
    CONSTRAINT dead_letter_state_known CHECK (state IN ('open', 'resent', 'discarded', 'erased')),
    CONSTRAINT dead_letter_keeps_payload CHECK (payload IS NOT NULL OR state IN ('discarded', 'erased')),
    CONSTRAINT dead_letter_resent_by_a_run CHECK (state <> 'resent' OR resent_run IS NOT NULL)
);
CREATE INDEX IF NOT EXISTS dead_letter_open ON webhook.dead_letter (endpoint_id, id) WHERE state = 'open';
CREATE INDEX IF NOT EXISTS dead_letter_resent ON webhook.dead_letter (resent_run, event_id) WHERE resent_run IS NOT NULL;
CREATE INDEX IF NOT EXISTS dead_letter_account_id ON webhook.dead_letter (account_id, id);

-- What will never be sent and has no attempt row that says so: each time a range, and how many deliveries it was.
CREATE TABLE IF NOT EXISTS webhook.discard (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT discard_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL,
    reason      text        NOT NULL,
    after_id    bigint      NOT NULL,                                -- of ids in (after_id, upto_id]
    upto_id     bigint      NOT NULL,
    deliveries  bigint      NOT NULL,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT discard_reason_known CHECK (reason IN ('expired', 'skipped', 'deleted', 'erased')),
    CONSTRAINT discard_range_ordered CHECK (after_id <= upto_id AND deliveries >= 0)
);
CREATE INDEX IF NOT EXISTS discard_endpoint_id ON webhook.discard (endpoint_id, id);

-- The one row that moves. For every endpoint without a row in `lane`, every id at or below `position` and outside `gaps` is settled.
-- `gaps` are ids that were not visible yet when the reader passed them, and late ones found since but not settled yet.
CREATE TABLE IF NOT EXISTS webhook.checkpoint (
    only_row     boolean        NOT NULL DEFAULT true CONSTRAINT checkpoint_pkey PRIMARY KEY,
    position     bigint         NOT NULL DEFAULT 0,
    gaps         int8multirange NOT NULL DEFAULT '{}',
    epoch        bigint         NOT NULL DEFAULT 0,                  -- raised by every start; a recorder of an older one is refused
    heartbeat_at timestamptz,
    owner        text,                                               -- host and process id, for people
    owned_since  timestamptz,
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
    json_schema json,                                                -- of `data`; told, not enforced
    filter_fields jsonb     NOT NULL DEFAULT '{}',                   -- name → JSON pointers into `data`: what endpoints may filter by
    updated_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT event_type_name_form CHECK (name ~ '^[a-z0-9_]+(\.[a-z0-9_]+)+$' AND octet_length(name) <= 128),
    CONSTRAINT event_type_filter_fields_form CHECK (
        jsonb_typeof(filter_fields) = 'object'
        AND NOT jsonb_path_exists(filter_fields, 'strict $.* ? (@.type() != "array")')
        AND NOT jsonb_path_exists(filter_fields, 'strict $.*[*] ? (@.type() != "string" || !(@ starts with "/"))')
    )
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
    signing          text        NOT NULL DEFAULT 'v1',              -- schemes, with commas
    body_format      text        NOT NULL DEFAULT 'envelope',        -- or the payload alone
    omit             text[]      NOT NULL DEFAULT '{}',              -- JSON pointers to what `data` is sent without
    extra_signature  text,                                           -- one of the receiver's own kind besides: form, header, prefix
    credentials      text,                                           -- headers, authentication, client key: JSON, or that sealed
    ordering         text        NOT NULL DEFAULT 'off',             -- of events with a key: off, block, or 'give_up_after N' attempts
    state            text        NOT NULL DEFAULT 'draft',
    state_reason     text,
    state_changed_at timestamptz NOT NULL DEFAULT now(),
    paused_at_id     bigint,                                         -- the log's last id when it was paused
    draft            jsonb,
    tested_hash      text,
    failing_since    timestamptz,                                    -- no success since; written when that changes
    created_at       timestamptz NOT NULL DEFAULT now(),
    filters          jsonb       NOT NULL DEFAULT '{}',              -- name → values; names by event_type.filter_fields
    response_control boolean     NOT NULL DEFAULT false,             -- an answer's webhook-delivery header is obeyed
    failing_told_at  timestamptz,                                    -- its account knows; until it delivers again
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
    CONSTRAINT endpoint_signing_known CHECK (signing IN ('v1', 'v1a', 'v1,v1a')),
    CONSTRAINT endpoint_body_format_known CHECK (body_format IN ('envelope', 'payload')),
    CONSTRAINT endpoint_omit_form CHECK (cardinality(omit) <= 32 AND array_position(omit, NULL) IS NULL),
    CONSTRAINT endpoint_extra_signature_form CHECK (extra_signature ~ '^(hex:[^:]+(:[!-~]+)?|timestamped:[^:]+)$'),
    CONSTRAINT endpoint_credentials_form CHECK (credentials ~ '^(\{.*\}|sealed:[0-9a-f]{8}:[A-Za-z0-9+/]+={0,2})$'),
    CONSTRAINT endpoint_ordering_known CHECK (ordering ~ '^(off|block|give_up_after [1-9][0-9]?)$'),
    CONSTRAINT endpoint_filters_form CHECK (
        jsonb_typeof(filters) = 'object'
        AND NOT jsonb_path_exists(filters, 'strict $.* ? (@.type() != "array" || @.size() == 0)')
        AND NOT jsonb_path_exists(filters, 'strict $.*[*] ? (@.type() != "string")')
    ),
    CONSTRAINT endpoint_state_known CHECK (state IN ('draft', 'live', 'paused', 'disabled', 'deleted')),
    CONSTRAINT endpoint_paused_knows_where CHECK (state <> 'paused' OR paused_at_id IS NOT NULL)
);
CREATE INDEX IF NOT EXISTS endpoint_account_id ON webhook.endpoint (account_id);

-- Every secret of the endpoint's scheme that has not expired signs: that is rotation with overlap. With a key for encryption, `secret` is
-- sealed (dispatcher/domain/sealing.py); the public key of an asymmetric one is for everybody to see.
CREATE TABLE IF NOT EXISTS webhook.endpoint_secret (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT endpoint_secret_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL CONSTRAINT endpoint_secret_endpoint REFERENCES webhook.endpoint,
    scheme      text        NOT NULL DEFAULT 'v1',
    secret      text        NOT NULL,
    public_key  text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    CONSTRAINT endpoint_secret_scheme_known CHECK (scheme IN ('v1', 'v1a')),
    CONSTRAINT endpoint_secret_form CHECK (
        secret ~ CASE scheme WHEN 'v1' THEN '^whsec_[A-Za-z0-9+/]+={0,2}$' ELSE '^whsk_[A-Za-z0-9+/]+={0,2}$' END
        OR secret ~ '^sealed:[0-9a-f]{8}:[A-Za-z0-9+/]+={0,2}$'
    ),
    CONSTRAINT endpoint_secret_public_key CHECK ((scheme = 'v1a') = (public_key IS NOT NULL) AND public_key ~ '^whpk_[A-Za-z0-9+/]+={0,2}$')
);
CREATE INDEX IF NOT EXISTS endpoint_secret_endpoint_id ON webhook.endpoint_secret (endpoint_id);

-- endpoint × pattern × the ids it is valid for: an event matches iff since_id < id ≤ until_id and it passes `rule`, on every path, also years
-- later: `rule` is what the endpoint's filters came to when it was opened, and an edit of them closes it.
-- `taken_up` is false until the dispatcher has sent the endpoint's lane back to since_id and written that down.
CREATE TABLE IF NOT EXISTS webhook.subscription (
    id          bigint  GENERATED ALWAYS AS IDENTITY CONSTRAINT subscription_pkey PRIMARY KEY,
    endpoint_id bigint  NOT NULL CONSTRAINT subscription_endpoint REFERENCES webhook.endpoint,
    pattern     text    NOT NULL,
    since_id    bigint  NOT NULL,
    until_id    bigint,
    taken_up    boolean NOT NULL DEFAULT false,
    rule        jsonb,                                               -- NULL: no filters
    CONSTRAINT subscription_pattern_form CHECK (pattern ~ '^(\*|[a-z0-9_]+(\.[a-z0-9_]+)*\.\*|[a-z0-9_]+(\.[a-z0-9_]+)+)$'),
    CONSTRAINT subscription_bounds_ordered CHECK (since_id >= 0 AND until_id >= since_id)
);
CREATE INDEX IF NOT EXISTS subscription_endpoint_id ON webhook.subscription (endpoint_id);

-- A resend or a replay: the endpoint's lane reads the ids in (after_id, upto_id] once more, and skips those that have an attempt of this run.
-- Run 0 is the original and has no row here. `total` was counted when it was made. This row belongs to people; how far it is, to the recorder.
CREATE TABLE IF NOT EXISTS webhook.run (
    id          integer     GENERATED ALWAYS AS IDENTITY CONSTRAINT run_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL CONSTRAINT run_endpoint REFERENCES webhook.endpoint,
    source      text        NOT NULL DEFAULT 'log',                  -- dead_letter: the dead letters with this resent_run
    after_id    bigint      NOT NULL,
    upto_id     bigint      NOT NULL,
    patterns    text[]      NOT NULL DEFAULT '{*}',
    only_failed boolean     NOT NULL DEFAULT false,                  -- with a failed attempt, none that succeeded, and no retry to come
    rate_per_s  double precision,                                    -- NULL: as fast as the endpoint takes it
    total       bigint      NOT NULL,
    state       text        NOT NULL DEFAULT 'running',
    note        text        NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    rule        jsonb,                                               -- the endpoint's filters when it was made; NULL: none, or a resend
    CONSTRAINT run_source_known CHECK (source IN ('log', 'dead_letter')),
    CONSTRAINT run_state_known CHECK (state IN ('running', 'paused', 'canceled')),
    CONSTRAINT run_range_ordered CHECK (0 <= after_id AND after_id <= upto_id),
    CONSTRAINT run_patterns_some CHECK (cardinality(patterns) BETWEEN 1 AND 100),
    CONSTRAINT run_rate_range CHECK (rate_per_s > 0 AND rate_per_s <= 100000)
);
CREATE INDEX IF NOT EXISTS run_endpoint_id ON webhook.run (endpoint_id, id);

-- Every delivery of the run at or below `settled` has an attempt in it. Finished once nothing of it waits for a retry either.
CREATE TABLE IF NOT EXISTS webhook.run_progress (
    run_id      integer     NOT NULL CONSTRAINT run_progress_pkey PRIMARY KEY CONSTRAINT run_progress_run REFERENCES webhook.run,
    settled     bigint      NOT NULL,
    attempted   bigint      NOT NULL DEFAULT 0,                      -- deliveries, not attempts
    delivered   bigint      NOT NULL DEFAULT 0,
    dead        bigint      NOT NULL DEFAULT 0,
    finished_at timestamptz,
    CONSTRAINT run_progress_counts CHECK (settled >= 0 AND delivered >= 0 AND dead >= 0 AND delivered + dead <= attempted)
);
CREATE INDEX IF NOT EXISTS run_progress_open ON webhook.run_progress (run_id) WHERE finished_at IS NULL;

-- What happened to an endpoint in a minute. One row a dispatcher (epoch), so that writing it twice changes nothing; readers add them up.
CREATE TABLE IF NOT EXISTS webhook.endpoint_stat (
    minute      timestamptz NOT NULL,                                -- when it began
    endpoint_id bigint      NOT NULL,
    epoch       bigint      NOT NULL,
    delivered   integer     NOT NULL,                                -- attempts
    failed      integer     NOT NULL,                                -- attempts
    dead        integer     NOT NULL,                                -- deliveries given up
    expired     integer     NOT NULL DEFAULT 0,                      -- deliveries whose events' expires_at had passed
    duration_ms bigint      NOT NULL,                                -- of all attempts together
    durations   integer[]   NOT NULL,                                -- attempts that took < 1 ms, < 2, < 4, … the last: all longer ones
    backlog     bigint      NOT NULL DEFAULT 0,                      -- events that waited for their first attempt when it was written
    CONSTRAINT endpoint_stat_pkey PRIMARY KEY (minute, endpoint_id, epoch)
);
CREATE INDEX IF NOT EXISTS endpoint_stat_endpoint_id ON webhook.endpoint_stat (endpoint_id, minute);

-- What was erased, by whom, and how much: the record that remains.
CREATE TABLE IF NOT EXISTS webhook.erasure (
    id             bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT erasure_pkey PRIMARY KEY,
    account_id     text        NOT NULL,
    event_id       bigint,                                           -- NULL: the whole account
    events         bigint      NOT NULL DEFAULT 0,
    response_heads bigint      NOT NULL DEFAULT 0,
    dead_letters   bigint      NOT NULL DEFAULT 0,
    tests          bigint      NOT NULL DEFAULT 0,
    endpoints      bigint      NOT NULL DEFAULT 0,
    erased_by      text        NOT NULL DEFAULT session_user,
    began_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at       timestamptz                                       -- NULL: it was interrupted; repeat it
);

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
    response_head bytea,                                             -- status line and headers, of a success too
    event_type    text        NOT NULL DEFAULT 'endpoint.test',
    at_fault      text,                                              -- in a word: redirect, certificate, address, timeout, receiver, answer
    timing        jsonb       NOT NULL DEFAULT '{}',                 -- dns, connect, tls, first_byte, total: ms, or null
    response_body bytea                                              -- its beginning
);
CREATE INDEX IF NOT EXISTS test_attempt_endpoint_id ON webhook.test_attempt (endpoint_id, id);

-- How a running dispatcher learns what to reload. Appended under a lock, so that its numbers commit in order: a reader that saw n has
-- seen everything below n.
CREATE TABLE IF NOT EXISTS webhook.config_change (
    seq         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT config_change_pkey PRIMARY KEY,
    endpoint_id bigint      NOT NULL,
    changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    forget      boolean     NOT NULL DEFAULT false                   -- events were erased: what the endpoint's lane has in memory is read again
);


-- ─── Panel and API ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Keys are 256 random bits and shown once; here is their SHA-256. No account: an operator's.
CREATE TABLE IF NOT EXISTS webhook.api_key (
    id           bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT api_key_pkey PRIMARY KEY,
    account_id   text,
    name         text        NOT NULL DEFAULT '',
    prefix       text        NOT NULL,                               -- its first characters, so that people know which is which
    hash         bytea       NOT NULL CONSTRAINT api_key_hash UNIQUE,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by   text        NOT NULL,
    expires_at   timestamptz,
    last_used_at timestamptz,                                        -- within a minute
    revoked_at   timestamptz,
    CONSTRAINT api_key_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT api_key_name_length CHECK (char_length(name) <= 200)
);
CREATE INDEX IF NOT EXISTS api_key_account_id ON webhook.api_key (account_id, id);

-- An address that lets its bearer in: the platform's backend asks for one and sends its customer there. No account: an operator's.
CREATE TABLE IF NOT EXISTS webhook.login_link (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT login_link_pkey PRIMARY KEY,
    account_id text,
    hash       bytea       NOT NULL CONSTRAINT login_link_hash UNIQUE,
    uses_left  integer     NOT NULL,
    session_s  integer     NOT NULL,                                 -- how long a login by it lasts
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text        NOT NULL,
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,                                          -- its logins end too
    CONSTRAINT login_link_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT login_link_uses_count CHECK (uses_left >= 0)
);
CREATE INDEX IF NOT EXISTS login_link_account_id ON webhook.login_link (account_id, id);
CREATE INDEX IF NOT EXISTS login_link_expires_at ON webhook.login_link (expires_at);

-- A login in a browser. The cookie has the id and a signature; what it may do is here.
CREATE TABLE IF NOT EXISTS webhook.login (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT login_pkey PRIMARY KEY,
    account_id text,
    actor      text        NOT NULL,
    key_id     bigint,                                               -- it ends when this key is revoked or expires
    link_id    bigint,
    proxy_user text,                                                 -- the trusted proxy must go on saying so
    began_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX IF NOT EXISTS login_expires_at ON webhook.login (expires_at);

-- Who changed what through panel and API. Written before the change, and its status after it: none is a change that was interrupted.
CREATE TABLE IF NOT EXISTS webhook.audit (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT audit_pkey PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor      text        NOT NULL,
    account_id text,                                                 -- whose key or login it was; NULL: an operator
    action     text        NOT NULL,
    subject    text        NOT NULL,
    address    text        NOT NULL,
    status     smallint
);
CREATE INDEX IF NOT EXISTS audit_account_id ON webhook.audit (account_id, id);

-- Who is told by mail what happens to endpoints: of one account's, or (audience '') operators, of all.
CREATE TABLE IF NOT EXISTS webhook.alert_recipient (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT alert_recipient_pkey PRIMARY KEY,
    audience   text        NOT NULL,
    address    text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text        NOT NULL,
    CONSTRAINT alert_recipient_once UNIQUE (audience, address),
    CONSTRAINT alert_recipient_audience_length CHECK (octet_length(audience) <= 255),
    CONSTRAINT alert_recipient_address_form CHECK (address ~ '^[!-?A-~]+@[!-?A-~]+$' AND octet_length(address) <= 254)
);

-- What an audience is to be told by mail: waiting → mailed or given_up; held, while its hour's mails are used up. Written with the event that says
-- the same; a mail that tells of several has its Message-ID in all of them.
CREATE TABLE IF NOT EXISTS webhook.alert (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT alert_pkey PRIMARY KEY,
    audience    text        NOT NULL,
    account_id  text        NOT NULL,
    endpoint_id bigint      NOT NULL,
    type        text        NOT NULL,
    said        json        NOT NULL,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    state       text        NOT NULL DEFAULT 'waiting',
    tries       smallint    NOT NULL DEFAULT 0,
    due_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    mail        text,
    mailed_at   timestamptz,
    CONSTRAINT alert_state_known CHECK (state IN ('waiting', 'held', 'mailed', 'given_up')),
    CONSTRAINT alert_mailed_by_a_mail CHECK (state <> 'mailed' OR (mail IS NOT NULL AND mailed_at IS NOT NULL))
);
CREATE INDEX IF NOT EXISTS alert_due ON webhook.alert (due_at) WHERE state IN ('waiting', 'held');
CREATE INDEX IF NOT EXISTS alert_mailed ON webhook.alert (audience, mailed_at) WHERE state = 'mailed';
CREATE INDEX IF NOT EXISTS alert_audience ON webhook.alert (audience, id);

-- The built-in receiver: addresses of ours that show what they get, to people who have no server yet. They end after a day.
CREATE TABLE IF NOT EXISTS webhook.receiver (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT receiver_pkey PRIMARY KEY,
    account_id text        NOT NULL,
    token      text        NOT NULL CONSTRAINT receiver_token UNIQUE,
    answer     text        NOT NULL DEFAULT 'ok',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text        NOT NULL,
    expires_at timestamptz NOT NULL,
    CONSTRAINT receiver_account_id_length CHECK (octet_length(account_id) BETWEEN 1 AND 255),
    CONSTRAINT receiver_token_form CHECK (token ~ '^[A-Za-z0-9_-]{43}$'),
    CONSTRAINT receiver_answer_known CHECK (answer IN ('ok', 'error', 'gone', 'throttle', 'slow'))
);
CREATE INDEX IF NOT EXISTS receiver_account_id ON webhook.receiver (account_id, id);

-- What a receiver got: the newest hundred, with the beginning of each body.
CREATE TABLE IF NOT EXISTS webhook.received (
    id          bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT received_pkey PRIMARY KEY,
    receiver_id bigint      NOT NULL CONSTRAINT received_receiver REFERENCES webhook.receiver ON DELETE CASCADE,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    headers     jsonb       NOT NULL,                                -- [[name, value]], in their order
    body        bytea       NOT NULL,
    body_bytes  integer     NOT NULL,                                -- of all of it
    signature   text        NOT NULL,
    endpoint_id bigint,                                              -- whose keys it was held against
    status      smallint    NOT NULL,
    CONSTRAINT received_signature_known CHECK (signature IN ('valid', 'missing', 'old', 'wrong', 'unknown'))
);
CREATE INDEX IF NOT EXISTS received_receiver_id ON webhook.received (receiver_id, id);

-- What was answered under an Idempotency-Key, in the transaction that did it.
CREATE TABLE IF NOT EXISTS webhook.idempotency_key (
    scope        text        NOT NULL,                               -- whose: an account's, or the operators'
    key          text        NOT NULL,
    request_hash bytea       NOT NULL,
    answer       json        NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (scope, key)
);
CREATE INDEX IF NOT EXISTS idempotency_key_created_at ON webhook.idempotency_key (created_at);

-- Events that were given a key by their producer: which event came of it. Kept for a day. Not idempotency_key: that one remembers a request and its
-- whole answer for whoever asked the API; this is written by producers' own transactions, a row an event, so it is as narrow as it can be.
CREATE TABLE IF NOT EXISTS webhook.event_key (
    account_id text        NOT NULL,
    key        text        NOT NULL,
    event_id   bigint,                                               -- NULL only within the transaction that writes it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT event_key_pkey PRIMARY KEY (account_id, key),
    CONSTRAINT event_key_length CHECK (octet_length(key) BETWEEN 1 AND 255)
);
CREATE INDEX IF NOT EXISTS event_key_created_at ON webhook.event_key (created_at);


-- ─── Functions and triggers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
-- Advisory locks are (9324665, n): 1 doorbell, 2 owner, 3 configuration changes, 4 migration. (9324665 is "webhook" on a telephone's keys.)

-- The last id handed out. A fresh sequence has handed out none, though its last_value reads 1.
CREATE OR REPLACE FUNCTION webhook.last_id() RETURNS bigint
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ SELECT coalesce(pg_sequence_last_value('webhook.outbox_id_seq'::regclass), 0) $$;

-- The doorbell. A dispatcher holds lock 1 exclusively only while it sleeps; so a producer that gets it shared knows that the dispatcher is
-- awake and polling, and spares itself the NOTIFY, whose commit takes a database-wide lock. The dispatcher can fall asleep only when
-- every transaction that chose silence has ended, and looks once more after it has the lock: no wake-up is lost.
CREATE OR REPLACE FUNCTION webhook.ring_doorbell() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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

-- Insert an event and return its id; under a key that the account used within 24 hours, insert nothing and return the id of then. Of two
-- transactions with one key the second waits for the first: it gets the first one's id, or inserts where that was rolled back. Without a
-- key it is the INSERT and nothing else.
--
-- The key's row comes first and is filled in afterwards, because the event's id may only be taken by an INSERT: what the dispatcher knows of
-- an id that nobody can see yet is who holds the outbox's lock. A key that is used again within its day is found by the first SELECT; whoever
-- comes at the same moment locks the row that won, so that it can't be swept before it is read. SECURITY DEFINER, because producers may see
-- neither keys nor other people's ids; it does no more for them than the INSERT that they are granted.
CREATE OR REPLACE FUNCTION webhook.emit(
    account_id text, type text, payload json, occurred_at timestamptz DEFAULT NULL, ordering_key text DEFAULT NULL,
    expires_at timestamptz DEFAULT NULL, priority integer DEFAULT NULL, traceparent text DEFAULT NULL, event_key text DEFAULT NULL
) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$
DECLARE
    is_first boolean := true;
    emitted  bigint;
BEGIN
    IF emit.event_key IS NOT NULL THEN
        SELECT k.event_id INTO emitted FROM webhook.event_key AS k
        WHERE k.account_id = emit.account_id AND k.key = emit.event_key AND k.created_at > clock_timestamp() - interval '24 hours';
        IF FOUND THEN
            RETURN emitted;
        END IF;
        INSERT INTO webhook.event_key AS k (account_id, key) VALUES (emit.account_id, emit.event_key)
        ON CONFLICT ON CONSTRAINT event_key_pkey DO UPDATE SET event_id = NULL, created_at = excluded.created_at
            WHERE k.created_at <= excluded.created_at - interval '24 hours'
        RETURNING true INTO is_first;
        IF is_first IS NULL THEN
            SELECT k.event_id INTO STRICT emitted FROM webhook.event_key AS k
            WHERE k.account_id = emit.account_id AND k.key = emit.event_key;
            RETURN emitted;
        END IF;
    END IF;
    INSERT INTO webhook.outbox (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent)
    VALUES (
        emit.account_id, emit.type, emit.payload, emit.occurred_at, emit.ordering_key, emit.expires_at, emit.priority::smallint,
        emit.traceparent
    )
    RETURNING id INTO emitted;
    IF emit.event_key IS NOT NULL THEN
        UPDATE webhook.event_key AS k SET event_id = emitted
        WHERE k.account_id = emit.account_id AND k.key = emit.event_key;
    END IF;
    RETURN emitted;
END
$$;

REVOKE ALL ON FUNCTION webhook.emit(text, text, json, timestamptz, text, timestamptz, integer, text, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION webhook.note_config_change() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
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

-- Else whoever may make temporary tables could give one this trigger, and write by it as the schema's owner.
REVOKE ALL ON FUNCTION webhook.note_config_change() FROM PUBLIC;

-- Not of `credentials` or `secret` alone: to encrypt them under another key changes nothing. Who edits credentials writes `signing` as well.
CREATE OR REPLACE TRIGGER endpoint_changed
    AFTER INSERT OR DELETE OR UPDATE OF account_id, url, timeout_ms, rate_per_s, rate_burst, in_flight_max, retry_schedule_s, ordering, state,
        signing, body_format, omit, extra_signature, response_control
    ON webhook.endpoint FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();
CREATE OR REPLACE TRIGGER endpoint_secret_changed
    AFTER INSERT OR DELETE OR UPDATE OF endpoint_id, scheme, expires_at
    ON webhook.endpoint_secret FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();
CREATE OR REPLACE TRIGGER subscription_changed
    AFTER INSERT OR DELETE OR UPDATE OF pattern, since_id, until_id
    ON webhook.subscription FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();
CREATE OR REPLACE TRIGGER run_changed
    AFTER INSERT OR DELETE OR UPDATE OF rate_per_s, state
    ON webhook.run FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();

-- Tell the dispatcher to let go of what it has in memory for the endpoints, because events were erased.
CREATE OR REPLACE FUNCTION webhook.note_erasure(endpoint_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 3);
    INSERT INTO webhook.config_change (endpoint_id, forget) SELECT unnest(endpoint_ids), true;
    PERFORM pg_notify('webhook_config', '');
END
$$;

-- Tell of one of an account's endpoints, once to each of three: the account's endpoints, by an event; the endpoints of the operators' account, if
-- there is one, by an event that says whose it was; and people, by mails that wait to be sent. Returns the id of the account's event.
CREATE OR REPLACE FUNCTION webhook.tell(about bigint, event_type text, said json) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
DECLARE
    whose text;
    told  bigint;
BEGIN
    INSERT INTO webhook.outbox (account_id, type, payload)
    SELECT e.account_id, event_type, said FROM webhook.endpoint AS e WHERE e.id = about
    RETURNING account_id, id INTO whose, told;
    INSERT INTO webhook.outbox (account_id, type, payload)
    SELECT i.operator_account, event_type, (jsonb_build_object('account_id', whose) || said::jsonb)::json
    FROM webhook.instance AS i WHERE i.operator_account <> whose;
    INSERT INTO webhook.alert (audience, account_id, endpoint_id, type, said)
    SELECT a.audience, whose, about, event_type, said
    FROM (SELECT DISTINCT r.audience FROM webhook.alert_recipient AS r WHERE r.audience IN ('', whose)) AS a;
    RETURN told;
END
$$;

-- Tell an account about one of its endpoints, by an event for its *other* endpoints: the subscriptions of the endpoint itself are divided
-- around that one id, so that the event matches them on no path. Of its URL they get the origin: path and query may hold a secret.
CREATE OR REPLACE FUNCTION webhook.tell_of_endpoint(about bigint, event_type text, why text, failed_since timestamptz) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
DECLARE
    since CONSTANT text := to_char(failed_since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"');
    told  bigint;
BEGIN
    SELECT webhook.tell(about, event_type, CASE event_type
               WHEN 'endpoint.disabled' THEN json_build_object(
                   'endpoint', who, 'reason', why, 'failing_since', since, 'held_events',
                   coalesce((SELECT l.backlog FROM webhook.lane AS l WHERE l.endpoint_id = about), 0))
               ELSE json_build_object('endpoint', who, 'reason', why, 'failing_since', since)
           END) INTO told
    FROM webhook.endpoint AS e
    CROSS JOIN LATERAL json_build_object('id', e.id, 'name', e.name, 'url', substring(e.url FROM '^[^:]+://[^/?#]+') || '/') AS who
    WHERE e.id = about;
    WITH own AS (
        UPDATE webhook.subscription SET until_id = told - 1
        WHERE endpoint_id = about AND until_id IS NULL AND pattern IN ('*', 'endpoint.*', event_type)
        RETURNING pattern
    )
    INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT about, pattern, told FROM own;
END
$$;

-- What an endpoint's filters come to with the catalogue as it is: {"values": {name: [value]}, "fields": {type: {name: [[path]]}}}, each JSON
-- pointer taken apart. NULL: no filters. Subscriptions and replays keep it by value (dispatcher/domain/filters.py).
CREATE OR REPLACE FUNCTION webhook.filter_rule(filters jsonb) RETURNS jsonb
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
    AS $$
    SELECT jsonb_build_object('values', filters, 'fields', coalesce(jsonb_object_agg(t.name, t.fields) FILTER (WHERE t.fields IS NOT NULL), '{}'))
    FROM (
        SELECT e.name, (
            SELECT jsonb_object_agg(f.key, (
                SELECT jsonb_agg(to_jsonb(ARRAY(
                    SELECT replace(replace(n.name, '~1', '/'), '~0', '~')
                    FROM unnest(string_to_array(substr(p.pointer, 2), '/')) WITH ORDINALITY AS n (name, at) ORDER BY n.at
                )))
                FROM jsonb_array_elements_text(f.value) AS p (pointer)
            ))
            FROM jsonb_each(e.filter_fields) AS f
            WHERE filters ? f.key
        ) AS fields
        FROM webhook.event_type AS e
    ) AS t
    HAVING filters <> '{}'
$$;

-- Whether an event passes a rule. As dispatcher/domain/filters.py has it: fields are compared as text; strings, whole numbers of up to 18
-- digits and true/false have one; in a payload that can't be read there are no fields. `\u0000` is JSON, but no text here.
CREATE OR REPLACE FUNCTION webhook.passes(rule jsonb, event_type text, payload json) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
    AS $$
DECLARE
    readable json;
    field    text;
BEGIN
    IF rule IS NULL OR starts_with(event_type, 'endpoint.') THEN
        RETURN true;
    END IF;
    readable := replace(payload::text, '\u0000', '\ufffd')::json;
    FOR field IN SELECT jsonb_object_keys(rule -> 'values') LOOP
        IF NOT EXISTS (
            SELECT FROM jsonb_array_elements(rule #> ARRAY['fields', event_type, field]) AS p (steps)
            CROSS JOIN LATERAL (SELECT ARRAY(SELECT jsonb_array_elements_text(p.steps)) AS path) AS q
            WHERE (rule #> ARRAY['values', field]) ? (readable #>> q.path)
              AND CASE json_typeof(readable #> q.path)
                  WHEN 'string' THEN true WHEN 'boolean' THEN true
                  WHEN 'number' THEN (readable #>> q.path) ~ '^-?[0-9]{1,18}$'
                  ELSE false END
        ) THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
EXCEPTION
    WHEN data_exception THEN
        RETURN false;
END
$$;

-- A subscription has the filters that its endpoint has when it is opened. It and a change of the catalogue wait for one another, by the lock that
-- both take anyway: whichever comes second sees the other.
CREATE OR REPLACE FUNCTION webhook.give_rule() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 3);
    NEW.rule := (SELECT webhook.filter_rule(e.filters) FROM webhook.endpoint AS e WHERE e.id = NEW.endpoint_id);
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER subscription_has_rule BEFORE INSERT ON webhook.subscription
    FOR EACH ROW EXECUTE FUNCTION webhook.give_rule();

-- The catalogue says otherwise where a field is: what that changes for a subscription holds from the next id on.
CREATE OR REPLACE FUNCTION webhook.renew_rules() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
DECLARE
    at bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 3);
    at := webhook.last_id();
    -- A rule for each set of filters, not for each endpoint that has it.
    WITH rules AS MATERIALIZED (
        SELECT f.filters, webhook.filter_rule(f.filters) AS rule
        FROM (SELECT DISTINCT e.filters FROM webhook.endpoint AS e WHERE e.filters <> '{}' AND e.state <> 'deleted') AS f
    ), closed AS (
        UPDATE webhook.subscription AS s SET until_id = greatest(s.since_id, at)
        FROM webhook.endpoint AS e
        JOIN rules AS r ON r.filters = e.filters
        WHERE e.id = s.endpoint_id AND s.until_id IS NULL AND e.filters <> '{}' AND s.rule IS DISTINCT FROM r.rule
        RETURNING s.endpoint_id, s.pattern
    )
    INSERT INTO webhook.subscription (endpoint_id, pattern, since_id) SELECT endpoint_id, pattern, at FROM closed;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER event_type_changed AFTER INSERT OR DELETE OR UPDATE OF name, filter_fields ON webhook.event_type
    FOR EACH STATEMENT EXECUTE FUNCTION webhook.renew_rules();

-- ─── Partitions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
-- What a running dispatcher needs done to the partitions, whoever owns them. Each function sees for itself that what it is asked is safe.
-- Behind one that waits for a table's exclusive lock everybody waits: so it waits for 20 ms and fails with lock_not_available, which means
-- "not now". The leaves of outbox and attempt have the same bounds; each table is changed in a transaction of its own.

-- The leaves, with bounds where they are numbers: not the DEFAULT partition's.
CREATE OR REPLACE FUNCTION webhook.leaves(OUT parent text, OUT leaf regclass, OUT low bigint, OUT high bigint) RETURNS SETOF record
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
    AS $$
    SELECT p.relname::text, c.oid::regclass, b.found[1]::bigint, b.found[2]::bigint
    FROM pg_inherits AS i
    JOIN pg_class AS p ON p.oid = i.inhparent
    JOIN pg_class AS c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \(''?(\d+)''?\) TO \(''?(\d+)''?\)$') AS b (found)
    WHERE i.inhparent IN ('webhook.outbox'::regclass, 'webhook.attempt'::regclass)
$$;

-- Make an empty leaf for ids that have not been handed out. LIKE and ATTACH, because CREATE … PARTITION OF needs the parent exclusively; the
-- DEFAULT partition is locked and, unless it is empty or fenced (adopt_default), read through.
CREATE OR REPLACE FUNCTION webhook.attach_partition(parent text, low bigint, high bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms'
    AS $$
DECLARE
    leaf CONSTANT text := parent || '_p' || low;
BEGIN
    IF parent NOT IN ('outbox', 'attempt') OR low >= high THEN
        RAISE EXCEPTION 'no such partition: % from % to %', parent, low, high USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- A statement goes by the partitions that it saw when it began: if it came to an id of the new one, it would fail. So there must be
    -- none, or it must be far off.
    IF parent = 'outbox' AND low - webhook.last_id() < 100000 THEN
        LOCK TABLE ONLY webhook.outbox IN ACCESS EXCLUSIVE MODE;
    END IF;
    IF low <= webhook.last_id() THEN
        RAISE EXCEPTION 'ids from % on have been handed out', low USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    EXECUTE format('CREATE TABLE webhook.%I (LIKE webhook.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING INDEXES)', leaf, parent);
    EXECUTE format('ALTER TABLE webhook.%I ATTACH PARTITION webhook.%I FOR VALUES FROM (%L) TO (%L)', parent, leaf, low, high);
END
$$;

-- Replace an empty leaf by those between the cuts, if it lies above all ids handed out and is too wide; or, without cuts, by nothing, if it is
-- settled. Attempts still come for events that are gone, of dead letters that are resent: their oldest leaf stays, and takes in the range of the
-- one that goes. The parent's lock is needed: nobody may insert for a moment.
CREATE OR REPLACE FUNCTION webhook.recut_partition(parent text, lowest bigint, cuts bigint[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms'
    AS $$
DECLARE
    old      record;
    oldest   record;
    is_empty boolean;
    is_safe  boolean;
BEGIN
    IF parent NOT IN ('outbox', 'attempt') THEN
        RAISE EXCEPTION 'no such table: %', parent USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('LOCK TABLE ONLY webhook.%I IN ACCESS EXCLUSIVE MODE', parent);
    SELECT l.leaf, l.low, l.high INTO old FROM webhook.leaves() AS l WHERE l.parent = recut_partition.parent AND l.low = lowest;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no partition of % begins at %', parent, lowest USING ERRCODE = 'undefined_object';
    END IF;
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', old.leaf);
    EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s)', old.leaf) INTO is_empty;
    IF cardinality(cuts) = 0 THEN
        SELECT is_empty AND old.high - 1 <= k.position AND NOT k.gaps && int8range(old.low, old.high) INTO is_safe FROM webhook.checkpoint AS k;
        IF parent = 'attempt' THEN
            SELECT l.leaf, l.low INTO oldest FROM webhook.leaves() AS l WHERE l.parent = 'attempt' AND l.high = old.low;
            is_safe := FOUND AND is_safe AND NOT EXISTS (
                SELECT FROM webhook.leaves() AS l WHERE l.parent = 'outbox' AND l.low < old.high AND l.high > oldest.low
            );
        END IF;
    ELSE
        is_safe := is_empty AND old.low > webhook.last_id() AND cuts[1] = old.low AND cuts[cardinality(cuts)] = old.high
            AND cuts = ARRAY(SELECT DISTINCT c FROM unnest(cuts) AS c ORDER BY c);
    END IF;
    IF is_safe IS NOT TRUE THEN
        RAISE EXCEPTION 'partition % is in use, or the cuts % don''t fit it', old.leaf, cuts USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    EXECUTE format('DROP TABLE %s', old.leaf);
    IF oldest IS NOT NULL THEN
        EXECUTE format('ALTER TABLE webhook.attempt DETACH PARTITION %s', oldest.leaf);
        EXECUTE format('ALTER TABLE webhook.attempt ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)', oldest.leaf, oldest.low, old.high);
    END IF;
    FOR n IN 1 .. cardinality(cuts) - 1 LOOP
        PERFORM webhook.attach_partition(parent, cuts[n], cuts[n + 1]);
    END LOOP;
END
$$;

-- Empty a leaf of the log and the attempts of its events, for the dispatcher that rules: NULL if another does. What in it is not settled
-- must have been counted in this transaction. Touches nothing but the two leaves, so nobody's open transaction on the log is in the way.
-- The checkpoint's row is held, so that no other dispatcher can begin to read before this is committed. Returns the bytes that it freed.
CREATE OR REPLACE FUNCTION webhook.expire_partition(low bigint, high bigint, ruling bigint) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s'
    AS $$
DECLARE
    old    record;
    tables text;
    freed  bigint;
    safe   boolean;
BEGIN
    SELECT l.leaf, l.low, l.high INTO old FROM webhook.leaves() AS l
        WHERE l.parent = 'outbox' AND l.low = expire_partition.low AND l.high = expire_partition.high;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no partition of outbox goes from % to %', low, high USING ERRCODE = 'undefined_object';
    END IF;
    SELECT old.high - 1 <= k.position AND NOT k.gaps && int8range(old.low, old.high) INTO safe
        FROM webhook.checkpoint AS k WHERE k.epoch = ruling FOR SHARE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF safe IS NOT TRUE THEN
        RAISE EXCEPTION 'partition % is not settled', old.leaf USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    SELECT string_agg(l.leaf::text, ', ' ORDER BY l.parent DESC, l.low), sum(pg_total_relation_size(l.leaf)) INTO tables, freed
        FROM webhook.leaves() AS l WHERE l.low >= old.low AND l.high <= old.high;
    PERFORM set_config('lock_timeout', '20ms', true);
    EXECUTE 'TRUNCATE ' || tables;
    RETURN freed - (SELECT sum(pg_total_relation_size(l.leaf)) FROM webhook.leaves() AS l WHERE l.low >= old.low AND l.high <= old.high);
END
$$;

-- The DEFAULT partition has got rows, because the log outran its leaves: make it the leaf from `low` to `upto`, where there is none, and put
-- an empty one in its place. No row moves, so no reader can miss one. In steps, one a call:
--   fenced     a CHECK with these bounds bars ids beyond them, of which none can come for a while
--   validated  … and is known to hold for the rows that are there, which took reading them, but no lock that anybody waits for
--   adopted    so the exchange is a matter of the catalogue: 4 ms under the parent's lock, for any number of rows
-- Or `below`: there are rows below `low`; `unfenced`: there are others, or the ids have come too close to the fence.
CREATE OR REPLACE FUNCTION webhook.adopt_default(parent text, low bigint, upto bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms'
    AS $$
DECLARE
    spare   CONSTANT text := parent || '_default';
    key     CONSTANT text := CASE parent WHEN 'outbox' THEN 'id' ELSE 'event_id' END;
    fence   record;
    leaf    text;
    found   boolean;
BEGIN
    IF parent NOT IN ('outbox', 'attempt') THEN
        RAISE EXCEPTION 'no such table: %', parent USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT k.conname, k.convalidated, split_part(k.conname, '_', 3)::bigint AS low, split_part(k.conname, '_', 4)::bigint AS upto INTO fence
        FROM pg_constraint AS k WHERE k.conrelid = format('webhook.%I', spare)::regclass AND k.conname LIKE parent || '\_fence\_%';
    IF fence.conname IS NULL THEN
        EXECUTE format('SELECT EXISTS (SELECT FROM webhook.%I WHERE %I < $1)', spare, key) INTO found USING low;
        IF found THEN
            RETURN 'below';
        END IF;
        IF EXISTS (
            SELECT FROM webhook.leaves() AS l WHERE l.parent = adopt_default.parent AND l.low < adopt_default.upto AND l.high > adopt_default.low
        ) OR (upto - webhook.last_id() < 100000 AND NOT EXISTS (
            SELECT FROM webhook.leaves() AS l WHERE l.parent = adopt_default.parent AND l.low = adopt_default.upto
        )) THEN
            RAISE EXCEPTION '% can''t reach from % to %', spare, low, upto USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
        EXECUTE format('ALTER TABLE webhook.%I ADD CONSTRAINT %I CHECK (%I >= %L AND %I < %L) NOT VALID',
                       spare, parent || '_fence_' || low || '_' || upto, key, low, key, upto);
        RETURN 'fenced';
    END IF;
    IF fence.upto - webhook.last_id() < 100000 AND NOT EXISTS (
        SELECT FROM webhook.leaves() AS l WHERE l.parent = adopt_default.parent AND l.low = fence.upto
    ) THEN
        EXECUTE format('ALTER TABLE webhook.%I DROP CONSTRAINT %I', spare, fence.conname);
        RETURN 'unfenced';
    END IF;
    IF NOT fence.convalidated THEN
        BEGIN
            EXECUTE format('ALTER TABLE webhook.%I VALIDATE CONSTRAINT %I', spare, fence.conname);
        EXCEPTION WHEN check_violation THEN
            EXECUTE format('ALTER TABLE webhook.%I DROP CONSTRAINT %I', spare, fence.conname);
            RETURN 'unfenced';
        END;
        RETURN 'validated';
    END IF;
    leaf := parent || '_p' || fence.low;
    EXECUTE format('LOCK TABLE ONLY webhook.%I IN ACCESS EXCLUSIVE MODE', parent);
    EXECUTE format('ALTER TABLE webhook.%I DETACH PARTITION webhook.%I', parent, spare);
    EXECUTE format('ALTER TABLE webhook.%I ATTACH PARTITION webhook.%I FOR VALUES FROM (%L) TO (%L)', parent, spare, fence.low, fence.upto);
    EXECUTE format('ALTER TABLE webhook.%I DROP CONSTRAINT %I', spare, fence.conname);
    EXECUTE format('ALTER TABLE webhook.%I RENAME TO %I', spare, leaf);
    EXECUTE format('CREATE TABLE webhook.%I (LIKE webhook.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING INDEXES)', spare, parent);
    EXECUTE format('ALTER TABLE webhook.%I ATTACH PARTITION webhook.%I DEFAULT', parent, spare);
    RETURN 'adopted';
END
$$;

REVOKE ALL ON FUNCTION webhook.attach_partition(text, bigint, bigint), webhook.recut_partition(text, bigint, bigint[]),
    webhook.expire_partition(bigint, bigint, bigint), webhook.adopt_default(text, bigint, bigint) FROM PUBLIC;


-- ─── Privileges ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_producer') THEN
        GRANT USAGE ON SCHEMA webhook TO webhook_producer;
        -- Not id, not created_at. SELECT (id) so that INSERT … RETURNING id works, which ORMs use.
        GRANT INSERT (account_id, type, payload, occurred_at, ordering_key, expires_at, priority, traceparent), SELECT (id)
            ON webhook.outbox TO webhook_producer;
        GRANT EXECUTE ON FUNCTION webhook.emit(text, text, json, timestamptz, text, timestamptz, integer, text, text) TO webhook_producer;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_dispatcher') THEN
        GRANT USAGE ON SCHEMA webhook TO webhook_dispatcher;
        GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA webhook TO webhook_dispatcher;
        GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA webhook TO webhook_dispatcher;
        GRANT EXECUTE ON FUNCTION webhook.attach_partition(text, bigint, bigint), webhook.recut_partition(text, bigint, bigint[]),
            webhook.expire_partition(bigint, bigint, bigint), webhook.adopt_default(text, bigint, bigint) TO webhook_dispatcher;
    END IF;
END
$$;

INSERT INTO webhook.schema_version (version) VALUES (1), (2) ON CONFLICT DO NOTHING;

COMMIT;
