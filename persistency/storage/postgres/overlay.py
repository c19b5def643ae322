"""The overlay: what a group has changed so far, laid over what the server has; answers see both as one.

Rules:
  1. Nothing is sent before the group is over. Each change is noted, so that a batch or a run can be taken back.
  2. What was dropped by a range hides the server's rows there, and none that is written later.

Doesn't know: messages, versions, quotas, what is sent in the end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TypeAlias

from persistency.storage.port import StoredRow
from persistency.storage.postgres.cover import Cover
from persistency.storage.postgres.reads import Entry, Place, Reads, Row, Span, distinct, live

Note: TypeAlias = tuple[Place, "Row | type[Overlay] | None"]


class Overlay:
    """The rows as a group sees them in its middle. `written` has what it changed: a row, or `None` for no row."""

    def __init__(self, reads: Reads) -> None:
        self.reads: Reads = reads
        self.now_ms: int = reads.now_ms
        self.written: dict[Place, Row | None] = {}
        self.holes: list[Span] = []  # what was dropped by range, in order
        self._gone: dict[bytes, Cover] = {}  # the same, by category
        self._before: list[tuple[bytes, Cover | None]] = []  # what each hole has taken the place of
        self._keys: dict[bytes, list[bytes]] = {}  # all that was ever written in a category; some may be out of order
        self._sorted: set[bytes] = set()  # the categories whose keys are in order
        self._known: dict[Place, Row | None] = {}  # what the server has
        self._notes: list[Note] = []

    # -- one row ---------------------------------------------------------------------------------------------------

    def learn(self, places: list[Place], found: dict[Place, Row]) -> None:
        """Take in what the server has at some places."""
        for place in places:
            self._known[place] = found.get(place)

    def _server(self, place: Place, *, payload: bool) -> Row | None:
        if place in self._known:
            row = self._known[place]
            if row is None or row.payload is not None or not payload:
                return row
        row = self._known[place] = self.reads.rows([place], payloads=payload).get(place)
        return row

    def row(self, place: Place, *, payload: bool = False) -> Row | None:
        """Return a row, ended or not, with its payload if that is asked for."""
        if place in self.written:
            row = self.written[place]
            if row is not None and payload and row.payload is None:
                of_server = self._server(place, payload=True)
                assert of_server is not None
                row = self.written[place] = row._replace(payload=of_server.payload)
            return row
        if self.holes and self._is_gone(place):
            return None
        return self._server(place, payload=payload)

    def live_row(self, place: Place, *, payload: bool = False) -> Row | None:
        """Return a row that hasn't ended, or `None`."""
        row = self.row(place, payload=payload)
        return row if live(row, self.now_ms) else None

    def write(self, place: Place, row: Row | None) -> None:
        """Put a row, or none, in a place."""
        before = self.written.get(place, Overlay)
        if before is Overlay:
            category, key = place
            self._keys.setdefault(category, []).append(key)
            self._sorted.discard(category)
        self._notes.append((place, before))
        self.written[place] = row

    def _is_gone(self, place: Place) -> bool:
        cover = self._gone.get(place[0])
        return cover is not None and cover.has(place[1])

    # -- taking back -----------------------------------------------------------------------------------------------

    def mark(self) -> tuple[int, int]:
        """Return where it stands, to go back to."""
        return len(self._notes), len(self.holes)

    def back_to(self, mark: tuple[int, int]) -> None:
        """Undo what was done since then, the newest first."""
        for place, row in reversed(self._notes[mark[0] :]):
            if isinstance(row, Row) or row is None:
                self.written[place] = row
            else:
                del self.written[place]
        del self._notes[mark[0] :]
        del self.holes[mark[1] :]
        while len(self._before) > len(self.holes):
            category, cover = self._before.pop()
            if cover is None:
                del self._gone[category]
            else:
                self._gone[category] = cover

    # -- ranges ----------------------------------------------------------------------------------------------------

    def _within(self, span: Span) -> list[Place]:
        """Return the places in a range that were written, in order."""
        category, start, stop = span
        keys = self._keys.get(category)
        if keys is None:
            return []
        if category not in self._sorted:
            self._keys[category] = keys = sorted(set(keys))
            self._sorted.add(category)
        end = len(keys) if stop is None else bisect_left(keys, stop)
        some = keys[bisect_left(keys, start) : end]
        return [place for key in some if (place := (category, key)) in self.written]

    def _gaps(self, span: Span) -> list[Span]:
        """Return the parts of a range that no hole covers, in order."""
        category, start, stop = span
        cover = self._gone.get(category)
        return [span] if cover is None else [(category, *gap) for gap in cover.gaps(start, stop)]

    def entries(self, span: Span, limit: int | None = None) -> list[Entry]:
        """Return the live rows of a range, in order."""
        mine = self._within(span)
        more = None if limit is None else limit + len(mine)
        found = [entry for gap in self._gaps(span) for entry in self.reads.entries(gap, more)]
        if mine:
            keys = {key for _, key in mine}
            found = [entry for entry in found if entry[0] not in keys]
            for place in mine:
                row = self.live_row(place, payload=True)
                if row is not None:
                    assert row.payload is not None
                    found.append((place[1], row.payload, row.version, row.expires_ms))
            found.sort(key=lambda entry: entry[0])
        return found[:limit]

    def pairs(self, span: Span, limit: int | None, *, reverse: bool, keys_only: bool) -> list[tuple[bytes, bytes]]:
        """Return the keys and payloads of a range's live rows; with `keys_only` no payload."""
        mine = self._within(span)
        more = None if limit is None else limit + len(mine)
        gaps = self._gaps(span)
        found = [
            pair
            for gap in (reversed(gaps) if reverse else gaps)
            for pair in self.reads.pairs(gap, more, reverse=reverse, keys_only=keys_only)
        ]
        if mine:
            keys = {key for _, key in mine}
            found = [pair for pair in found if pair[0] not in keys]
            for place in mine:
                row = self.live_row(place, payload=not keys_only)
                if row is not None:
                    found.append((place[1], b"" if keys_only else row.payload or b""))
            found.sort(key=lambda pair: pair[0], reverse=reverse)
        return found[:limit]

    def count(self, span: Span) -> tuple[int, int]:
        """Return how many live rows a range has, and how many bytes their payloads."""
        count = nbytes = 0
        for part in self._gaps(span):
            some = self.reads.count(part)
            count, nbytes = count + some[0], nbytes + some[1]
        for row in self._hidden(span):
            count, nbytes = count - 1, nbytes - row.size
        for place in self._within(span):
            mine = self.live_row(place)
            if mine is not None:
                count, nbytes = count + 1, nbytes + mine.size
        return count, nbytes

    def _hidden(self, span: Span) -> Iterator[Row]:
        """Go through the server's live rows in a range that were written over, holes apart."""
        mine = [place for place in self._within(span) if not self._is_gone(place)]
        unknown = [place for place in mine if place not in self._known]
        if unknown:
            self.learn(unknown, self.reads.rows(distinct(unknown), payloads=False))
        for place in mine:
            row = self._known[place]
            if row is not None and live(row, self.now_ms):
                yield row

    def drop(self, span: Span, *, ended_too: bool) -> tuple[int, int]:
        """Drop a range; return how many live rows it had, and their bytes. Without `ended_too` the ended stay."""
        found = self.count(span)
        for place in self._within(span):
            row = self.written[place]
            if ended_too or live(row, self.now_ms):
                self.write(place, None)
        category, start, stop = span
        cover = self._gone.get(category)
        self._before.append((category, cover))
        self.holes.append(span)
        self._gone[category] = Cover((), ()).with_(start, stop) if cover is None else cover.with_(start, stop)
        return found

    # -- all of it -------------------------------------------------------------------------------------------------

    def categories(self) -> list[bytes]:
        """Return the categories that have a live row, in order."""
        found = set(self.reads.categories())
        for category in {place[0] for place in self.written} | {hole[0] for hole in self.holes}:
            found.discard(category)
            if self.count((category, b"", None))[0]:
                found.add(category)
        return sorted(found)

    def all_bytes(self) -> int:
        """Return how many bytes the payloads of all live rows have."""
        changed = {place[0] for place in self.written} | {hole[0] for hole in self.holes}
        total = self.reads.all_bytes()
        for category in changed:
            span = (category, b"", None)
            total += self.count(span)[1] - self.reads.count(span)[1]
        return total

    def page(self, category: bytes, start: bytes, rows_max: int, bytes_max: int) -> list[StoredRow]:
        """Return so many rows from a key on, and none behind the one that makes them come to so many bytes."""
        span = (category, start, None)
        limit = rows_max
        if not self.written and not self.holes:  # first how long they are: not all of a page need be in memory
            total = limit = 0
            for size in self.reads.sizes(span, rows_max):
                total, limit = total + size, limit + 1
                if total >= bytes_max:
                    break
        rows: list[StoredRow] = []
        nbytes = 0
        for entry in self.entries(span, limit):
            rows.append(StoredRow(*entry))
            nbytes += len(entry[0]) + len(entry[1])
            if nbytes >= bytes_max:
                break
        return rows
