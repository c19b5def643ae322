"""Sequenced: what a collection and a pool have in common: an id, an end, changes that are counted, and followers.

Each has a number of its own, never given twice, and its rows in one category of the store's job:

| key | payload, in CBOR |
|---|---|
| (number,) | its type and id; ends when it does, and no request is answered without it |
| (number, 1) | the seq of its last change |
| (number, 2, key or field) | [seq, updated_ms, value, encoded] |
| (number, 3, seq) | [kind, key, client, data, encoded]: one change |

Rules:
  1. A change, its seq and the rows it changes are written in one transaction, or not at all.
  2. seq grows by exactly one per change. What changes nothing takes none.
  3. Data is encoded at the call, in the caller's thread, and decoded for each who gets it: nobody shares an object.
  4. What has expired answers nothing any more, purged or not: `Closed`, at the call or, if it ends meanwhile, in reply.

Doesn't know: what is changed, how one is opened or purged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from persistency.actor.reply import Reply
from persistency.arguments import as_count, as_limit, as_payload
from persistency.codec.keys import Key, KeyRange, as_key, key
from persistency.codec.values import decode, encode
from persistency.errors import Closed, Corrupt, FeedTruncated
from persistency.job import Job
from persistency.logfields import about
from persistency.ops import Row
from persistency.shared.following import Followers, Following, Note, SharedChange, as_client
from persistency.shared.places import DATA, Kind, Place
from persistency.transaction import Transaction

log: logging.Logger = logging.getLogger("persistency.shared")

SEQ, ROW, LOG = 1, 2, 3


class Accepted(NamedTuple):
    """A change that was made: who followed at that moment, too."""

    seq: int
    updated_ms: int
    subscribers: tuple[str, ...]


class Sequenced:
    """A collection or a pool. Made by a `SharedStore`; any thread and any event loop may use it.

    `id` is what it was opened by: whoever knows it can open it. `kind` is `"temp"` or `"permanent"`.
    """

    __slots__ = ("__weakref__", "_changes_max", "_followers", "_following", "_job", "_place", "_root")

    def __init__(self, job: Job, place: Place, following: Following, changes_max: int) -> None:
        self._job = job
        self._place = place
        self._root = key(place.number)
        self._following = following
        self._followers = Followers(following, self)
        self._changes_max = changes_max

    @property
    def id(self) -> str:
        """What it was opened by."""
        return self._place.id

    @property
    def kind(self) -> Kind:
        """`"temp"` or `"permanent"`."""
        return self._place.kind

    @property
    def expires(self) -> float | None:
        """When it ends, in Unix seconds, set when it was first opened; `None`: never."""
        return None if self._place.expires_ms is None else self._place.expires_ms / 1000

    @property
    def closed(self) -> bool:
        """Whether it has expired, or its store or job is closed."""
        return self._following.closed or self._job.closed or self._expired()

    # -- followers: in memory, and without waiting ---------------------------------------------------------------

    def subscribe(self, client: str) -> None:
        """Have a client, named by the id your service knows it by, follow; one that does already is fine."""
        self._check()
        self._followers.subscribe(client)

    def unsubscribe(self, client: str) -> None:
        """Have a client follow no more; one that doesn't is fine."""
        self._check()
        self._followers.unsubscribe(client)

    def subscribers(self) -> list[str]:
        """Return who follows, in the order in which they came."""
        self._check()
        return list(self._followers.clients())

    # -- changes -------------------------------------------------------------------------------------------------

    def changes_since(self, seq: int, limit: int | None = None) -> Reply[list[SharedChange]]:
        """Ask for the changes with a seq above `seq`, the first `limit` of them (`None`: all), in order.

        Raises `FeedTruncated` if one of them is no longer kept, and also for a `seq` that was never reached (of an
        earlier one of the same id, say): then start from `snapshot()`.
        """
        self._check()
        after, most = as_count(seq, "seq", 0), as_limit(limit)
        return self._job.run(self._list_changes, after, most).map(self._as_changes)

    def _list_changes(self, tx: Transaction, after: int, limit: int | None) -> list[tuple[Row, tuple[str, ...]]]:
        last = self._last_seq(tx)
        kept = tx.scan(DATA, KeyRange.prefix(self._root + (LOG,)), limit=1)
        oldest: int = kept[0].key.parts[2] if kept else last + 1
        if not oldest - 1 <= after <= last:
            raise FeedTruncated(oldest)
        rows = tx.scan(DATA, KeyRange(self._root + (LOG, after + 1), self._root + (LOG + 1,)), limit=limit)
        return [(row, self._followers.at(after + at)) for at, row in enumerate(rows, 1)]

    def _as_changes(self, found: list[tuple[Row, tuple[str, ...]]]) -> list[SharedChange]:
        changes = []
        for row, subscribers in found:
            match decode(row.payload):
                case ["set" | "delete" | "merge" as kind, str() | None as name, str() | None as client, data]:
                    value = None if data is None else decode(data)
                    changes.append(SharedChange(row.key.parts[2], kind, name, value, client, subscribers))
                case _:
                    raise Corrupt(f"{self!r}: change {row.key!r} isn't one")
        return changes

    # -- for those that derive from this -------------------------------------------------------------------------

    def _mutate(
        self,
        kind: Literal["set", "delete", "merge"],
        name: str | None,
        body: bytes | None,
        client: str | None,
        write: Callable[[Transaction, int, int], bool],
    ) -> Reply[Accepted | None]:
        """Request a change. `write(tx, seq, updated_ms)` makes it; the answer is `None` if it says there was none."""
        self._check()
        told = self._following.heard
        note = Note(kind, name, None if client is None else as_client(client), body, told)
        payload = as_payload(encode(note[:4]), "data")
        reply = self._job.run(self._accept, write, note, payload)
        if told:
            reply.add_done_callback(self._tell)
        return reply

    def _accept(
        self, tx: Transaction, write: Callable[[Transaction, int, int], bool], note: Note, payload: bytes
    ) -> Accepted | None:
        seq, updated_ms = self._last_seq(tx) + 1, tx.now_ms
        if not write(tx, seq, updated_ms):
            return None
        tx.put(DATA, self._root + (SEQ,), encode(seq))
        tx.put(DATA, self._root + (LOG, seq), payload)
        if seq > self._changes_max:
            tx.delete_range(DATA, KeyRange(self._root + (LOG,), self._root + (LOG, seq - self._changes_max + 1)))
        return Accepted(seq, updated_ms, self._followers.note(seq, note))

    def _tell(self, reply: Any) -> None:
        error = reply.exception()
        if error is not None:
            # To look at it was to take it from whoever drops the reply unseen; so it is told here.
            fields = about("change_failed", self._job.id, error, source=repr(self))
            log.warning("%r: a change failed: %s", self, error, extra=fields)
        elif (accepted := reply.result()) is not None:
            self._followers.committed(accepted.seq)

    def _last_seq(self, tx: Transaction) -> int:
        """Return the seq of the last change. Raises `Closed` if it has ended."""
        if not tx.exists(DATA, self._root):
            raise self._gone()
        payload = tx.get(DATA, self._root + (SEQ,))
        return 0 if payload is None else self._as_seq(payload)

    def _as_seq(self, payload: bytes) -> int:
        seq = decode(payload)
        if type(seq) is not int:
            raise Corrupt(f"{self!r}: its seq isn't a number")
        return seq

    def _row_key(self, name: str) -> Key:
        return as_key((self._root, ROW, name))

    def _read_state(self) -> Reply[tuple[int, list[tuple[str, int, int, Any]]]]:
        """Request its last seq and its rows, each as key, seq, updated_ms and value, all of one moment."""
        self._check()
        return self._job.scan(DATA, KeyRange(self._root, self._root + (LOG,))).map(self._as_state)

    def _as_state(self, rows: list[Row]) -> tuple[int, list[tuple[str, int, int, Any]]]:
        if not rows or rows[0].key != self._root:
            raise self._gone()
        if len(rows) == 1:
            return 0, []
        return self._as_seq(rows[1].payload), [(row.key.parts[2], *self._unpack(row)) for row in rows[2:]]

    def _unpack(self, row: Row) -> tuple[int, int, Any]:
        """Return what a row holds: seq, updated_ms and value."""
        match decode(row.payload):
            case [int(seq), int(updated_ms), bytes(body)]:
                return seq, updated_ms, decode(body)
            case _:
                raise Corrupt(f"{self!r}: row {row.key!r} isn't one of its own")

    def _expired(self) -> bool:
        return self._place.ended(self._job.now_ms)

    def _check(self) -> None:
        if self._following.closed or self._job.closed:
            raise Closed(f"the store of {self!r} is closed", hint="Make a new SharedStore.")
        if self._expired():
            raise self._gone()

    def _gone(self) -> Closed:
        return Closed(f"{self!r} has expired", hint="Open it again by its id: it starts empty, and seq with it.")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}>"


def pack(seq: int, updated_ms: int, body: bytes) -> bytes:
    """Return the payload of a row."""
    return encode([seq, updated_ms, body])
