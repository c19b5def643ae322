"""Reads: what the server has of a job's rows and changes, as of what was committed, and of this transaction's past.

Rules:
  1. An answer has no row that has ended, except where one is asked for by its key: there its end comes with it.
  2. Ranges are half open and come in the order of keys, which is that of bytes.

Doesn't know: what a group has changed and not sent yet, transactions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from psycopg.pq.abc import PGresult

from persistency.errors import Corrupt
from persistency.storage.port import StoredChange
from persistency.storage.postgres.packing import blobs, int8, number, number_or_none
from persistency.storage.postgres.schema import KINDS, Statements
from persistency.storage.postgres.session import Params, Session, Statement

LIMIT_NONE = 2**62

Place: TypeAlias = tuple[bytes, bytes]  # category and key


class Row(NamedTuple):
    """A row: without its payload, if nobody has asked for that yet. `touched`: but for its end it is the server's."""

    version: int
    expires_ms: int | None
    size: int
    payload: bytes | None
    touched: bool = False


class State(NamedTuple):
    """How a job stands: under which generation, with which last version, and the mark of its taking if it has one."""

    generation: int
    version: int
    mark: int | None


Span: TypeAlias = tuple[bytes, bytes, bytes | None]  # category, start, stop
Pair: TypeAlias = tuple[bytes, bytes]
Entry: TypeAlias = tuple[bytes, bytes, int, int | None]


def value(result: PGresult, row: int, column: int) -> bytes:
    """Return a value that isn't NULL."""
    found = result.get_value(row, column)
    if found is None:
        raise Corrupt("a column that always has a value has none")
    return found


def whole(result: PGresult, row: int = 0, column: int = 0) -> int:
    """Return a bigint that isn't NULL."""
    return number(value(result, row, column))


def state_of(result: PGresult, at: int = 0) -> State:
    """Return how a job stands, from a row that begins with that."""
    return State(whole(result, at, 0), whole(result, at, 1), number_or_none(result.get_value(at, 2)))


def row_of(result: PGresult, at: int) -> tuple[Place, Row]:
    """Return a row of those that are asked for by key: with its payload, or with that's length."""
    place = value(result, at, 0), value(result, at, 1)
    last = value(result, at, 4)
    version, expires_ms = whole(result, at, 2), number_or_none(result.get_value(at, 3))
    with_payload = result.ftype(4) == 17  # bytea
    return place, Row(version, expires_ms, len(last) if with_payload else number(last), last if with_payload else None)


class Reads:
    """The reads of one job over a session."""

    def __init__(self, session: Session, statements: Statements, job: bytes, now_ms: int) -> None:
        self.session: Session = session
        self.now_ms: int = now_ms
        self._statements = statements
        self._job = job

    def _run(self, name: str, *params: bytes | None) -> PGresult:
        return self.session.run(self._statements[name], (self._job, *params))

    def asking(self, places: list[Place], *, payloads: bool) -> tuple[Statement, Params]:
        """Return the statement that asks for rows by their keys, with its parameters."""
        columns = blobs([place[0] for place in places]), blobs([place[1] for place in places])
        return self._statements["whole" if payloads else "heads"], (self._job, *columns)

    def rows(self, places: list[Place], *, payloads: bool) -> dict[Place, Row]:
        """Return those of some rows that there are, ended or not."""
        statement, params = self.asking(places, payloads=payloads)
        return rows_of(self.session.run(statement, params))

    # -- ranges ----------------------------------------------------------------------------------------------------

    def _span(self, name: str, span: Span, limit: int | None, reverse: bool) -> PGresult:
        category, start, stop = span
        params = [category, start, int8(self.now_ms), int8(LIMIT_NONE if limit is None else limit)]
        if stop is not None:
            name, params = name + "_to", [*params, stop]
        return self._run(name + "_back" * reverse, *params)

    def pairs(self, span: Span, limit: int | None = None, *, reverse: bool = False, keys_only: bool) -> list[Pair]:
        """Return keys and payloads, or keys and nothing."""
        result = self._span("keys" if keys_only else "pairs", span, limit, reverse)
        get, every = result.get_value, range(result.ntuples)
        if keys_only:
            return [(key, b"") for at in every if (key := get(at, 0)) is not None]
        return [
            (key, payload) for at in every if (key := get(at, 0)) is not None and (payload := get(at, 1)) is not None
        ]

    def entries(self, span: Span, limit: int | None = None) -> list[Entry]:
        """Return rows with all that is kept of them."""
        result = self._span("entries", span, limit, False)
        return [
            (value(result, at, 0), value(result, at, 1), whole(result, at, 2), number_or_none(result.get_value(at, 3)))
            for at in range(result.ntuples)
        ]

    def sizes(self, span: Span, limit: int) -> list[int]:
        """Return how many bytes each row's key and payload have."""
        result = self._span("sizes", span, limit, False)
        return [whole(result, at) for at in range(result.ntuples)]

    def count(self, span: Span) -> tuple[int, int]:
        """Return how many live rows there are, and how many bytes their payloads have."""
        category, start, stop = span
        params = [category, start, int8(self.now_ms)]
        result = self._run("count", *params) if stop is None else self._run("count_to", *params, stop)
        return whole(result, 0, 0), whole(result, 0, 1)

    # -- all of it -------------------------------------------------------------------------------------------------

    def categories(self) -> list[bytes]:
        """Return the categories that have a live row, in order."""
        result = self._run("categories", int8(self.now_ms))
        return [value(result, at, 0) for at in range(result.ntuples)]

    def all_bytes(self) -> int:
        """Return how many bytes the payloads of all live rows have."""
        return whole(self._run("all_bytes", int8(self.now_ms)))

    def ended_bytes(self, after_ms: int, until_ms: int) -> int:
        """Return how many bytes the payloads of the rows have that ended in a span of time."""
        return whole(self._run("ended_bytes", int8(after_ms), int8(until_ms)))

    def extent(self) -> int:
        """Return how many bytes all keys and payloads have, those of ended rows too."""
        return whole(self._run("extent"))

    def next_end(self) -> int | None:
        """Return when the first row ends or ended."""
        result = self._run("next_end")
        return whole(result) if result.ntuples else None

    def ended(self, limit: int) -> list[Place]:
        """Return the first rows that have ended, in the order in which they did."""
        result = self._run("ended", int8(self.now_ms), int8(limit))
        return [(value(result, at, 0), value(result, at, 1)) for at in range(result.ntuples)]

    def kept_versions(self) -> list[int]:
        """Return the versions of all changes that are kept."""
        result = self._run("kept")
        return [whole(result, at) for at in range(result.ntuples)]

    def has_changes(self) -> bool:
        """Say whether there are changes, current or not."""
        return bool(self._run("has_changes").ntuples)

    def changes(self, after: int, limit: int) -> list[StoredChange]:
        """Return the first changes behind a version."""
        result = self._run("changes", int8(min(after, LIMIT_NONE)), int8(min(limit, LIMIT_NONE)))
        found = []
        for at in range(result.ntuples):
            kind = whole(result, at, 1)
            if not 0 <= kind < len(KINDS):
                raise Corrupt(f"change {whole(result, at)} is of a kind that isn't known, {kind}")
            payload, stop = result.get_value(at, 4), result.get_value(at, 5)
            found.append(
                StoredChange(whole(result, at), KINDS[kind], value(result, at, 2), value(result, at, 3), payload, stop)
            )
        return found


def rows_of(result: PGresult) -> dict[Place, Row]:
    """Return the rows of a result by their places."""
    return dict(row_of(result, at) for at in range(result.ntuples))


def live(row: Row | None, now_ms: int) -> bool:
    """Say whether there is a row and it hasn't ended."""
    return row is not None and (row.expires_ms is None or now_ms < row.expires_ms)


def distinct(places: Iterable[Place]) -> list[Place]:
    """Return places once each."""
    return list(dict.fromkeys(places))
