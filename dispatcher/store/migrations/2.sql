-- Version 1 → 2: runs (resend and replay), states of dead letters, counted discards, statistics by the minute, erasure, who owns since when,
-- the shape of an endpoint's requests, secrets encrypted at rest.
--
-- `dispatcher migrate` applies it in one transaction, after 2.online.sql, which has what the log itself needs. Nothing here holds producers up.

ALTER TABLE webhook.endpoint
    ADD COLUMN ordering text NOT NULL DEFAULT 'off',
    ADD CONSTRAINT endpoint_ordering_known CHECK (ordering ~ '^(off|block|give_up_after [1-9][0-9]?)$');

ALTER TABLE webhook.retry ADD COLUMN ordering_key text;
CREATE INDEX retry_ordering_key ON webhook.retry (endpoint_id) WHERE ordering_key IS NOT NULL;

ALTER TABLE webhook.checkpoint ADD COLUMN owned_since timestamptz;

-- What is particular about an endpoint's requests, and secrets encrypted at rest.
ALTER TABLE webhook.endpoint
    ADD COLUMN signing text NOT NULL DEFAULT 'v1',
    ADD COLUMN body_format text NOT NULL DEFAULT 'envelope',
    ADD COLUMN omit text[] NOT NULL DEFAULT '{}',
    ADD COLUMN extra_signature text,
    ADD COLUMN credentials text,
    ADD CONSTRAINT endpoint_signing_known CHECK (signing IN ('v1', 'v1a', 'v1,v1a')),
    ADD CONSTRAINT endpoint_body_format_known CHECK (body_format IN ('envelope', 'payload')),
    ADD CONSTRAINT endpoint_omit_form CHECK (cardinality(omit) <= 32 AND array_position(omit, NULL) IS NULL),
    ADD CONSTRAINT endpoint_extra_signature_form CHECK (extra_signature ~ '^(hex:[^:]+(:[!-~]+)?|timestamped:[^:]+)$'),
    ADD CONSTRAINT endpoint_credentials_form CHECK (credentials ~ '^(\{.*\}|sealed:[0-9a-f]{8}:[A-Za-z0-9+/]+={0,2})$');
ALTER TABLE webhook.endpoint_secret
    ADD COLUMN scheme text NOT NULL DEFAULT 'v1',
    ADD COLUMN public_key text,
    DROP CONSTRAINT endpoint_secret_form;
ALTER TABLE webhook.endpoint_secret
    ADD CONSTRAINT endpoint_secret_scheme_known CHECK (scheme IN ('v1', 'v1a')),
    ADD CONSTRAINT endpoint_secret_form CHECK (
        secret ~ CASE scheme WHEN 'v1' THEN '^whsec_[A-Za-z0-9+/]+={0,2}$' ELSE '^whsk_[A-Za-z0-9+/]+={0,2}$' END
        OR secret ~ '^sealed:[0-9a-f]{8}:[A-Za-z0-9+/]+={0,2}$'
    ),
    ADD CONSTRAINT endpoint_secret_public_key CHECK ((scheme = 'v1a') = (public_key IS NOT NULL) AND public_key ~ '^whpk_[A-Za-z0-9+/]+={0,2}$');
CREATE OR REPLACE TRIGGER endpoint_secret_changed
    AFTER INSERT OR DELETE OR UPDATE OF endpoint_id, scheme, expires_at
    ON webhook.endpoint_secret FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();

ALTER TABLE webhook.test_attempt
    ADD COLUMN event_type text NOT NULL DEFAULT 'endpoint.test',
    ADD COLUMN at_fault text,
    ADD COLUMN timing jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN response_body bytea;

ALTER TABLE webhook.config_change ADD COLUMN forget boolean NOT NULL DEFAULT false;

CREATE INDEX retry_run ON webhook.retry (run) WHERE run <> 0;

ALTER TABLE webhook.dead_letter
    ALTER COLUMN payload DROP NOT NULL,
    ADD COLUMN state text NOT NULL DEFAULT 'open',
    ADD COLUMN state_changed_at timestamptz,
    ADD COLUMN resent_run integer,
    ADD CONSTRAINT dead_letter_state_known CHECK (state IN ('open', 'resent', 'discarded', 'erased')),
    ADD CONSTRAINT dead_letter_keeps_payload CHECK (payload IS NOT NULL OR state IN ('discarded', 'erased')),
    ADD CONSTRAINT dead_letter_resent_by_a_run CHECK (state <> 'resent' OR resent_run IS NOT NULL);
CREATE INDEX dead_letter_open ON webhook.dead_letter (endpoint_id, id) WHERE state = 'open';
CREATE INDEX dead_letter_resent ON webhook.dead_letter (resent_run, event_id) WHERE resent_run IS NOT NULL;
CREATE INDEX dead_letter_account_id ON webhook.dead_letter (account_id, id);

CREATE TABLE webhook.discard (
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
CREATE INDEX discard_endpoint_id ON webhook.discard (endpoint_id, id);

CREATE TABLE webhook.run (
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
CREATE INDEX run_endpoint_id ON webhook.run (endpoint_id, id);

CREATE TABLE webhook.run_progress (
    run_id      integer     NOT NULL CONSTRAINT run_progress_pkey PRIMARY KEY CONSTRAINT run_progress_run REFERENCES webhook.run,
    settled     bigint      NOT NULL,
    attempted   bigint      NOT NULL DEFAULT 0,                      -- deliveries, not attempts
    delivered   bigint      NOT NULL DEFAULT 0,
    dead        bigint      NOT NULL DEFAULT 0,
    finished_at timestamptz,
    CONSTRAINT run_progress_counts CHECK (settled >= 0 AND delivered >= 0 AND dead >= 0 AND delivered + dead <= attempted)
);
CREATE INDEX run_progress_open ON webhook.run_progress (run_id) WHERE finished_at IS NULL;

CREATE TABLE webhook.endpoint_stat (
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
CREATE INDEX endpoint_stat_endpoint_id ON webhook.endpoint_stat (endpoint_id, minute);

CREATE TABLE webhook.erasure (
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

CREATE OR REPLACE TRIGGER run_changed
    AFTER INSERT OR DELETE OR UPDATE OF rate_per_s, state
    ON webhook.run FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();

CREATE OR REPLACE FUNCTION webhook.note_erasure(endpoint_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(9324665, 3);
    INSERT INTO webhook.config_change (endpoint_id, forget) SELECT unnest(endpoint_ids), true;
    PERFORM pg_notify('webhook_config', '');
END
$$;

-- The built-in receiver: addresses of ours that show what they get, to people who have no server yet. They end after a day.
CREATE TABLE webhook.receiver (
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
CREATE INDEX receiver_account_id ON webhook.receiver (account_id, id);

-- What a receiver got: the newest hundred, with the beginning of each body.
CREATE TABLE webhook.received (
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
CREATE INDEX received_receiver_id ON webhook.received (receiver_id, id);

-- Who is told by mail what happens to endpoints: of one account's, or (audience '') operators, of all.
CREATE TABLE webhook.alert_recipient (
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
CREATE TABLE webhook.alert (
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
CREATE INDEX alert_due ON webhook.alert (due_at) WHERE state IN ('waiting', 'held');
CREATE INDEX alert_mailed ON webhook.alert (audience, mailed_at) WHERE state = 'mailed';
CREATE INDEX alert_audience ON webhook.alert (audience, id);

ALTER TABLE webhook.endpoint ADD COLUMN failing_told_at timestamptz;

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

ALTER TABLE webhook.instance
    ADD COLUMN web_key bytea NOT NULL DEFAULT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
    ADD COLUMN operator_account text,
    ADD CONSTRAINT instance_operator_account_length CHECK (octet_length(operator_account) BETWEEN 1 AND 255);

ALTER TABLE webhook.event_type
    ADD COLUMN json_schema json,
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now();

-- Keys are 256 random bits and shown once; here is their SHA-256. No account: an operator's.
CREATE TABLE webhook.api_key (
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
CREATE INDEX api_key_account_id ON webhook.api_key (account_id, id);

-- An address that lets its bearer in: the platform's backend asks for one and sends its customer there. No account: an operator's.
CREATE TABLE webhook.login_link (
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
CREATE INDEX login_link_account_id ON webhook.login_link (account_id, id);
CREATE INDEX login_link_expires_at ON webhook.login_link (expires_at);

-- A login in a browser. The cookie has the id and a signature; what it may do is here.
CREATE TABLE webhook.login (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT login_pkey PRIMARY KEY,
    account_id text,
    actor      text        NOT NULL,
    key_id     bigint,                                               -- it ends when this key is revoked or expires
    link_id    bigint,
    proxy_user text,                                                 -- the trusted proxy must go on saying so
    began_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX login_expires_at ON webhook.login (expires_at);

-- Who changed what through panel and API. Written before the change, and its status after it: none is a change that was interrupted.
CREATE TABLE webhook.audit (
    id         bigint      GENERATED ALWAYS AS IDENTITY CONSTRAINT audit_pkey PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor      text        NOT NULL,
    account_id text,                                                 -- whose key or login it was; NULL: an operator
    action     text        NOT NULL,
    subject    text        NOT NULL,
    address    text        NOT NULL,
    status     smallint
);
CREATE INDEX audit_account_id ON webhook.audit (account_id, id);

-- What was answered under an Idempotency-Key, in the transaction that did it.
CREATE TABLE webhook.idempotency_key (
    scope        text        NOT NULL,                               -- whose: an account's, or the operators'
    key          text        NOT NULL,
    request_hash bytea       NOT NULL,
    answer       json        NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (scope, key)
);
CREATE INDEX idempotency_key_created_at ON webhook.idempotency_key (created_at);

-- Events that were given a key by their producer: which event came of it. Kept for a day. Not idempotency_key: that one remembers a request and its
-- whole answer for whoever asked the API; this is written by producers' own transactions, a row an event, so it is as narrow as it can be.
CREATE TABLE webhook.event_key (
    account_id text        NOT NULL,
    key        text        NOT NULL,
    event_id   bigint,                                               -- NULL only within the transaction that writes it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT event_key_pkey PRIMARY KEY (account_id, key),
    CONSTRAINT event_key_length CHECK (octet_length(key) BETWEEN 1 AND 255)
);
CREATE INDEX event_key_created_at ON webhook.event_key (created_at);

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

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_producer') THEN
        GRANT EXECUTE ON FUNCTION webhook.emit(text, text, json, timestamptz, text, timestamptz, integer, text, text) TO webhook_producer;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'webhook_dispatcher') THEN
        GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA webhook TO webhook_dispatcher;
        GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA webhook TO webhook_dispatcher;
        GRANT EXECUTE ON FUNCTION webhook.attach_partition(text, bigint, bigint), webhook.recut_partition(text, bigint, bigint[]),
            webhook.expire_partition(bigint, bigint, bigint), webhook.adopt_default(text, bigint, bigint) TO webhook_dispatcher;
    END IF;
END
$$;

-- Field filters. What is subscribed already has none.
ALTER TABLE webhook.event_type
    ADD COLUMN filter_fields jsonb NOT NULL DEFAULT '{}',
    ADD CONSTRAINT event_type_filter_fields_form CHECK (
        jsonb_typeof(filter_fields) = 'object'
        AND NOT jsonb_path_exists(filter_fields, 'strict $.* ? (@.type() != "array")')
        AND NOT jsonb_path_exists(filter_fields, 'strict $.*[*] ? (@.type() != "string" || !(@ starts with "/"))')
    );
ALTER TABLE webhook.endpoint
    ADD COLUMN filters jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN response_control boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT endpoint_filters_form CHECK (
        jsonb_typeof(filters) = 'object'
        AND NOT jsonb_path_exists(filters, 'strict $.* ? (@.type() != "array" || @.size() == 0)')
        AND NOT jsonb_path_exists(filters, 'strict $.*[*] ? (@.type() != "string")')
    );
ALTER TABLE webhook.subscription ADD COLUMN rule jsonb;

CREATE OR REPLACE TRIGGER endpoint_changed
    AFTER INSERT OR DELETE OR UPDATE OF account_id, url, timeout_ms, rate_per_s, rate_burst, in_flight_max, retry_schedule_s, ordering, state,
        signing, body_format, omit, extra_signature, response_control
    ON webhook.endpoint FOR EACH ROW EXECUTE FUNCTION webhook.note_config_change();

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

-- Names of relations are looked for among temporary tables first, unless these have their place.
ALTER FUNCTION webhook.last_id() SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION webhook.ring_doorbell() SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION webhook.note_config_change() SET search_path = pg_catalog, pg_temp;
-- Else whoever may make temporary tables could give one this trigger, and write by it as the schema's owner.
REVOKE ALL ON FUNCTION webhook.note_config_change() FROM PUBLIC;

INSERT INTO webhook.schema_version (version) VALUES (2);
