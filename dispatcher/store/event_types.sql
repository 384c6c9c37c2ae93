-- The catalogue of event types: what exists, for people and for samples. An event of an unlisted type is delivered all the same.

-- name: page
SELECT name, title, description, default_on, sample::text AS sample, json_schema::text AS json_schema, filter_fields::text AS filter_fields,
       created_at, updated_at
FROM webhook.event_type
WHERE name > $1
ORDER BY name
LIMIT $2;

-- name: one
SELECT name, title, description, default_on, sample::text AS sample, json_schema::text AS json_schema, filter_fields::text AS filter_fields,
       created_at, updated_at
FROM webhook.event_type
WHERE name = $1;

-- name: put
INSERT INTO webhook.event_type (name, title, description, default_on, sample, json_schema, filter_fields)
VALUES ($1, $2, $3, $4, $5::text::json, $6::text::json, $7::text::jsonb)
ON CONFLICT (name) DO UPDATE
SET title = excluded.title, description = excluded.description, default_on = excluded.default_on, sample = excluded.sample,
    json_schema = excluded.json_schema, filter_fields = excluded.filter_fields, updated_at = clock_timestamp()
RETURNING created_at = updated_at AS is_new;

-- name: delete
DELETE FROM webhook.event_type WHERE name = $1 RETURNING name;

-- name: delete_others
DELETE FROM webhook.event_type WHERE name <> ALL ($1::text[]);

-- name: has_any
SELECT EXISTS (SELECT FROM webhook.event_type);
