"""The schema: the tables of a root, and every statement that is run against them.

    meta(name, value)       the format of the tables
    jobs(job, ...)          a row per job: who owns it, under which generation and until when, and its numbers
    rows(job, category, key, payload, version, expires_ms)
    changes(job, version, kind, category, key, payload, stop)
    takes(job, generation, version, mark)   at which version a job that keeps its changes was taken, the last times

Rules:
  1. The job is the first column of every key, so that engines which shard do it by job.
  2. Plain SQL, which every engine that speaks the protocol understands: no trigger, no sequence, no advisory lock.
  3. Tables are made once, by whoever comes first; who comes at the same time tries again and finds them.
  4. Leases go by the server's clock alone, and whatever commits asks for its generation.

Doesn't know: connections, messages.
"""

from __future__ import annotations

from hashlib import sha256

from persistency.storage.port import ChangeKind
from persistency.storage.postgres.session import Statement

FORMAT = 2
TAKES_MAX = 1_000  # of a job, that are kept
GENERATION_BITS = 20  # of a generation count how often a job was taken; the others are drawn when it is made
LABEL_CHARS_MAX = 40

_TABLES = """
CREATE TABLE IF NOT EXISTS {s}.jobs (
    job text PRIMARY KEY, generation bigint NOT NULL, owner text, lease_ends timestamptz,
    last_version bigint NOT NULL, latest_ms bigint NOT NULL, last_used_ms bigint NOT NULL, ends_ms bigint,
    used_bytes bigint, used_ms bigint NOT NULL, feed_dropped bigint, attempt bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS {s}.rows (
    job text NOT NULL, category bytea NOT NULL, key bytea NOT NULL, payload bytea NOT NULL,
    version bigint NOT NULL, expires_ms bigint, PRIMARY KEY (job, category, key)
);
CREATE INDEX IF NOT EXISTS rows_expires ON {s}.rows (job, expires_ms) WHERE expires_ms IS NOT NULL;
CREATE TABLE IF NOT EXISTS {s}.changes (
    job text NOT NULL, version bigint NOT NULL, kind smallint NOT NULL, category bytea NOT NULL,
    key bytea NOT NULL, payload bytea, stop bytea, PRIMARY KEY (job, version)
);
CREATE TABLE IF NOT EXISTS {s}.takes (
    job text NOT NULL, generation bigint NOT NULL, version bigint NOT NULL, mark bigint NOT NULL,
    PRIMARY KEY (job, generation)
)
"""
KINDS: tuple[ChangeKind, ...] = ("put", "delete", "expire", "delete_range")  # by their number in the table

# Of the generation that a job is under: drawn at random, so that one that the server has lost, and that was counted
# again, is another.
_MARK = "(SELECT t.mark FROM {s}.takes t WHERE t.job = j.job AND t.generation = j.generation)"
_LIVE = "(expires_ms IS NULL OR expires_ms > {now})"
_UPSERT = (
    " ON CONFLICT (job, category, key) DO UPDATE SET payload = excluded.payload, version = excluded.version,"
    " expires_ms = excluded.expires_ms"
)
# The lease and the fence, in the statement that commits: without its generation an owner writes nothing.
_LEASE = "lease_ends = statement_timestamp() + ${at}::bigint * interval '1 millisecond'"

_SQL: dict[str, str] = {
    # -- the tables
    "format": "SELECT value FROM {s}.meta WHERE name = 'format'",
    "locked_format": "SELECT value FROM {s}.meta WHERE name = 'format' FOR UPDATE",
    "new_meta": "INSERT INTO {s}.meta (name, value) VALUES ('format', 0) ON CONFLICT (name) DO NOTHING",
    "set_format": "UPDATE {s}.meta SET value = $1::bigint WHERE name = 'format'",
    # -- who owns a job
    "take": (
        "INSERT INTO {s}.jobs (job, generation, owner, lease_ends, last_version, latest_ms, last_used_ms, used_ms,"
        " attempt) VALUES ($1::text, $2::bigint, $3::text,"
        " statement_timestamp() + $4::bigint * interval '1 millisecond', 0, 0, $5::bigint, 0, 0)"
        " ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, generation = jobs.generation + 1,"
        " lease_ends = excluded.lease_ends, last_used_ms = excluded.last_used_ms, attempt = 0"
        " WHERE jobs.owner IS NULL OR jobs.owner = excluded.owner OR jobs.lease_ends < statement_timestamp()"
        " RETURNING generation, last_version, latest_ms, ends_ms, used_bytes, used_ms, feed_dropped"
    ),
    "owner": "SELECT owner FROM {s}.jobs WHERE job = $1::text",
    "begin_anew": (
        "UPDATE {s}.jobs SET generation = $2::bigint, last_version = 0, ends_ms = NULL, used_bytes = NULL,"
        " used_ms = 0, feed_dropped = NULL WHERE job = $1::text"
    ),
    "set_end": "UPDATE {s}.jobs SET ends_ms = $2::bigint WHERE job = $1::text",
    "set_feed": "UPDATE {s}.jobs SET feed_dropped = $2::bigint WHERE job = $1::text",
    "renew": (
        "UPDATE {s}.jobs SET lease_ends = statement_timestamp() + $3::bigint * interval '1 millisecond'"
        " WHERE job = ANY($1::text[]) AND owner = $2::text RETURNING job, generation"
    ),
    "give_back": (
        "UPDATE {s}.jobs SET owner = NULL, latest_ms = greatest(latest_ms, $3::bigint),"
        " last_used_ms = greatest(last_used_ms, $4::bigint) WHERE job = $1::text AND generation = $2::bigint"
    ),
    "where": "SELECT generation, last_version, attempt FROM {s}.jobs WHERE job = $1::text",
    "reading": (
        f"SELECT j.generation, j.last_version, {_MARK}, j.latest_ms, j.ends_ms, j.feed_dropped FROM {{s}}.jobs j"
        " WHERE j.job = $1::text"
    ),
    "versions": (
        f"SELECT j.generation, j.last_version, {_MARK}, j.job FROM {{s}}.jobs j WHERE j.job = ANY($1::text[])"
    ),
    "note_take": (
        "WITH old AS (DELETE FROM {s}.takes WHERE job = $1::text AND generation <= $2::bigint - $5::bigint)"
        " INSERT INTO {s}.takes (job, generation, version, mark) VALUES ($1::text, $2::bigint, $3::bigint, $4::bigint)"
        " ON CONFLICT (job, generation) DO UPDATE SET version = excluded.version, mark = excluded.mark"
    ),
    "takes_since": (
        "SELECT count(*)::bigint, coalesce(min(version), 0)::bigint,"
        " (SELECT mark FROM {s}.takes WHERE job = $1::text AND generation = $2::bigint)"
        " FROM {s}.takes WHERE job = $1::text AND generation > $2::bigint"
    ),
    # What rings for those who follow, and is nothing where nobody does.
    "ring": "SELECT pg_notify('{c}', $1::text)",
    "drop_rows": "DELETE FROM {s}.rows WHERE job = $1::text",
    "drop_changes": "DELETE FROM {s}.changes WHERE job = $1::text",
    "drop_takes": "DELETE FROM {s}.takes WHERE job = $1::text",
    "drop_job": "DELETE FROM {s}.jobs WHERE job = $1::text",
    "stored": (
        "SELECT j.job, coalesce((SELECT sum(octet_length(r.payload) + octet_length(r.key))::bigint FROM {s}.rows r"
        " WHERE r.job = j.job), 0) + coalesce((SELECT sum(coalesce(octet_length(c.payload), 0)"
        " + octet_length(c.key))::bigint FROM {s}.changes c WHERE c.job = j.job), 0), j.last_used_ms, j.ends_ms"
        " FROM {s}.jobs j"
    ),
    # -- transactions
    # Where it finds no row it fails, with a division by zero: nothing that was sent behind it is done then.
    "fence": (
        "WITH fence AS (UPDATE {s}.jobs SET last_version = $4::bigint, latest_ms = $5::bigint,"
        " last_used_ms = $6::bigint, used_bytes = $7::bigint, used_ms = $8::bigint, feed_dropped = $9::bigint,"
        " attempt = $10::bigint, "
        + _LEASE.format(at=11)
        + " WHERE job = $1::text AND generation = $2::bigint AND last_version = $3::bigint RETURNING 1)"
        " SELECT 1 / count(*) FROM fence"
    ),
    "put": (
        "WITH fence AS (UPDATE {s}.jobs SET last_version = $4::bigint, latest_ms = $5::bigint,"
        " last_used_ms = $6::bigint, attempt = $8::bigint, "
        + _LEASE.format(at=7)
        + " WHERE job = $1::text AND generation = $2::bigint AND last_version = $3::bigint RETURNING 1)"
        " INSERT INTO {s}.rows (job, category, key, payload, version, expires_ms)"
        " SELECT $1::text, $9::bytea, u.k, u.p, u.v, NULL"
        " FROM fence, unnest($10::bytea[], $11::bytea[], $12::bigint[]) AS u(k, p, v)" + _UPSERT
    ),
    "put_one": (
        "WITH fence AS (UPDATE {s}.jobs SET last_version = $4::bigint, latest_ms = $5::bigint,"
        " last_used_ms = $6::bigint, attempt = $8::bigint, "
        + _LEASE.format(at=7)
        + " WHERE job = $1::text AND generation = $2::bigint AND last_version = $3::bigint RETURNING 1)"
        " INSERT INTO {s}.rows (job, category, key, payload, version, expires_ms)"
        " SELECT $1::text, $9::bytea, $10::bytea, $11::bytea, $4::bigint, $12::bigint FROM fence" + _UPSERT
    ),
    "put_mixed": (
        "WITH fence AS (UPDATE {s}.jobs SET last_version = $4::bigint, latest_ms = $5::bigint,"
        " last_used_ms = $6::bigint, attempt = $8::bigint, "
        + _LEASE.format(at=7)
        + " WHERE job = $1::text AND generation = $2::bigint AND last_version = $3::bigint RETURNING 1)"
        " INSERT INTO {s}.rows (job, category, key, payload, version, expires_ms)"
        " SELECT $1::text, u.c, u.k, u.p, u.v, u.e FROM fence,"
        " unnest($9::bytea[], $10::bytea[], $11::bytea[], $12::bigint[], $13::bigint[]) AS u(c, k, p, v, e)" + _UPSERT
    ),
    # -- writes within a transaction
    "touch": (
        "UPDATE {s}.rows SET expires_ms = u.e FROM unnest($2::bytea[], $3::bytea[], $4::bigint[]) AS u(c, k, e)"
        " WHERE rows.job = $1::text AND rows.category = u.c AND rows.key = u.k"
    ),
    "upsert": (
        "INSERT INTO {s}.rows (job, category, key, payload, version, expires_ms)"
        " SELECT $1::text, u.c, u.k, u.p, u.v, u.e FROM"
        " unnest($2::bytea[], $3::bytea[], $4::bytea[], $5::bigint[], $6::bigint[]) AS u(c, k, p, v, e)" + _UPSERT
    ),
    "delete": (
        "DELETE FROM {s}.rows WHERE job = $1::text AND (category, key) IN"
        " (SELECT u.c, u.k FROM unnest($2::bytea[], $3::bytea[]) AS u(c, k))"
    ),
    "add_changes": (
        "INSERT INTO {s}.changes (job, version, kind, category, key, payload, stop)"
        " SELECT $1::text, u.v, u.n::smallint, u.c, u.k, u.p, u.s FROM unnest($2::bigint[], $3::bigint[],"
        " $4::bytea[], $5::bytea[], $6::bytea[], $7::bytea[]) AS u(v, n, c, k, p, s)"
    ),
    "drop_old_changes": "DELETE FROM {s}.changes WHERE job = $1::text AND version <= $2::bigint",
    "try": (
        "INSERT INTO {s}.rows (job, category, key, payload, version) VALUES ($1::text, $2::bytea, $3::bytea, '', 0)"
        " ON CONFLICT (job, category, key) DO NOTHING"
    ),
    # -- reads
    "get": (
        "SELECT payload, expires_ms FROM {s}.rows WHERE job = $1::text AND category = $2::bytea AND key = $3::bytea"
    ),
    "heads": (
        "SELECT r.category, r.key, r.version, r.expires_ms, octet_length(r.payload)::bigint"
        " FROM unnest($2::bytea[], $3::bytea[]) AS u(c, k)"
        " JOIN {s}.rows r ON r.job = $1::text AND r.category = u.c AND r.key = u.k"
    ),
    "whole": (
        "SELECT r.category, r.key, r.version, r.expires_ms, r.payload"
        " FROM unnest($2::bytea[], $3::bytea[]) AS u(c, k)"
        " JOIN {s}.rows r ON r.job = $1::text AND r.category = u.c AND r.key = u.k"
    ),
    "categories": (
        "WITH RECURSIVE found(category) AS ("
        "(SELECT category FROM {s}.rows WHERE job = $1::text ORDER BY category LIMIT 1) UNION ALL"
        " SELECT (SELECT r.category FROM {s}.rows r WHERE r.job = $1::text AND r.category > found.category"
        " ORDER BY r.category LIMIT 1) FROM found WHERE found.category IS NOT NULL)"
        " SELECT category FROM found WHERE category IS NOT NULL AND EXISTS (SELECT 1 FROM {s}.rows e"
        " WHERE e.job = $1::text AND e.category = found.category AND "
        + _LIVE.format(now="$2::bigint")
        + ") ORDER BY category"
    ),
    "all_bytes": (
        "SELECT coalesce(sum(octet_length(payload)), 0)::bigint FROM {s}.rows WHERE job = $1::text AND "
        + _LIVE.format(now="$2::bigint")
    ),
    "ended_bytes": (
        "SELECT coalesce(sum(octet_length(payload)), 0)::bigint FROM {s}.rows WHERE job = $1::text"
        " AND expires_ms > $2::bigint AND expires_ms <= $3::bigint"
    ),
    "extent": (
        "SELECT coalesce(sum(octet_length(payload) + octet_length(key)), 0)::bigint FROM {s}.rows WHERE job = $1::text"
    ),
    "next_end": (
        "SELECT expires_ms FROM {s}.rows WHERE job = $1::text AND expires_ms IS NOT NULL"
        " ORDER BY job, expires_ms LIMIT 1"
    ),
    "ended": (
        "SELECT category, key FROM {s}.rows WHERE job = $1::text AND expires_ms <= $2::bigint"
        " ORDER BY expires_ms, category, key LIMIT $3::bigint"
    ),
    "kept": "SELECT version FROM {s}.changes WHERE job = $1::text ORDER BY version",
    "has_changes": "SELECT 1 FROM {s}.changes WHERE job = $1::text LIMIT 1",
    "changes": (
        "SELECT version, kind::bigint, category, key, payload, stop FROM {s}.changes"
        " WHERE job = $1::text AND version > $2::bigint ORDER BY version LIMIT $3::bigint"
    ),
}
# Over a range: what is asked of it, with an upper bound and without, in order and reversed.
_SPAN = " FROM {s}.rows WHERE job = $1::text AND category = $2::bytea AND key >= $3::bytea"
_SPANS = {
    "pairs": "SELECT key, payload",
    "keys": "SELECT key",
    "entries": "SELECT key, payload, version, expires_ms",
    "sizes": "SELECT octet_length(key)::bigint + octet_length(payload)::bigint",
}
for _name, _columns in _SPANS.items():
    for _stop in (False, True):
        _live = " AND " + _LIVE.format(now="$4::bigint") + (" AND key < $6::bytea" if _stop else "")
        for _back in (False, True):
            _order = " ORDER BY key" + (" DESC" if _back else "") + " LIMIT $5::bigint"
            _SQL[f"{_name}{'_to' * _stop}{'_back' * _back}"] = _columns + _SPAN + _live + _order
for _stop in (False, True):
    _upper = " AND key < $5::bytea" if _stop else ""
    _live = " AND " + _LIVE.format(now="$4::bigint")
    _SQL["count" + "_to" * _stop] = (
        "SELECT count(*)::bigint, coalesce(sum(octet_length(payload)), 0)::bigint" + _SPAN + _live + _upper
    )
    _SQL["drop_live" + "_to" * _stop] = "DELETE" + _SPAN + _live + _upper
    # The time is asked for, so that the parameters are the same.
    _SQL["drop_all" + "_to" * _stop] = "DELETE" + _SPAN + " AND $4::bigint IS NOT NULL" + _upper


def _label(schema: str) -> str:
    """Return what names a schema within other names, which the server cuts off behind 63 bytes without a word: itself,
    or for a long one its digest, marked as no schema's name can be.
    """
    return (
        schema if len(schema) <= LABEL_CHARS_MAX else ":" + sha256(schema.encode()).hexdigest()[: LABEL_CHARS_MAX - 1]
    )


class Statements:
    """The statements of a schema, by name."""

    def __init__(self, schema: str) -> None:
        self.schema: str = schema
        label = _label(schema)
        self.channel: str = f"persistency_{label}"
        self._of = {
            name: Statement(
                f"{label}.{name}".encode(), sql.replace("{s}", schema).replace("{c}", self.channel).encode()
            )
            for name, sql in _SQL.items()
        }

    def __getitem__(self, name: str) -> Statement:
        return self._of[name]

    def making(self) -> list[str]:
        """Return what makes the schema and its tables where they are missing, in order."""
        meta = f"CREATE TABLE IF NOT EXISTS {self.schema}.meta (name text PRIMARY KEY, value bigint NOT NULL)"
        return [f"CREATE SCHEMA IF NOT EXISTS {self.schema}", meta]

    def tables(self) -> list[str]:
        """Return what makes the tables of this format, in order."""
        return [" ".join(sql.split()) for sql in _TABLES.replace("{s}", self.schema).split(";")]
