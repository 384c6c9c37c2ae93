-- What version 2 adds to the log, in their order, before 2.sql and without holding producers up (store/online.py). Each bears its object's name.

-- name: outbox_ordering_key
CREATE INDEX {how} {index} ON {table} (account_id, ordering_key, id) WHERE ordering_key IS NOT NULL;

-- name: outbox_urgent
CREATE INDEX {how} {index} ON {table} (account_id, id) WHERE priority > 0;

-- name: outbox_ordering_key_length
ALTER TABLE webhook.outbox ADD CONSTRAINT outbox_ordering_key_length CHECK (octet_length(ordering_key) BETWEEN 1 AND 255) NOT VALID;
