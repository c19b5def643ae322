"""A collection: records by their primary key, which the server alone changes and many clients follow.

Rules:
  1. A record is replaced as a whole; it is the last one set, in the order of seq.
  2. A snapshot says at which seq it was taken; with the changes since, it makes the state again, deletes included.

Doesn't know: who follows, what is done with changes, when a collection ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from persistency.actor.reply import Reply
from persistency.codec.values import decode, encode
from persistency.errors import Misuse
from persistency.ops import Row
from persistency.shared.places import DATA
from persistency.shared.sequenced import Accepted, Sequenced, pack
from persistency.transaction import Transaction


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a collection.

    `data` is a copy, `seq` that of its last change, `updated` the Unix time in seconds of that. `subscribers` is
    answered by `set` alone: who followed when it was made, in the order in which they came.
    """

    key: str
    data: dict[Any, Any]
    seq: int
    updated: float
    subscribers: tuple[str, ...] = field(default=(), compare=False)


class Snapshot(list[Record]):
    """The records of a collection in the order of their seqs, and its own last `seq`: ask for the changes since it."""

    __slots__ = ("seq",)

    def __init__(self, records: list[Record], seq: int) -> None:
        super().__init__(records)
        self.seq: int = seq


class Collection(Sequenced):
    """Records, each a dict with its key in it, under the name `primary`. Opened by `SharedStore.open`."""

    __slots__ = ()

    @property
    def primary(self) -> str:
        """The name of the field that is a record's key."""
        return self._place.primary

    def set(self, data: dict[Any, Any], *, client: str | None = None) -> Reply[Record]:
        """Store a record under the key it holds, whatever was there, and answer with it; it has a fresh seq.

        `data` is JSON-like, or anything CBOR has; `client` is told along with the change. Raises `Misuse` if it is no
        dict, or its primary field is missing, empty or no str; `Closed` if the collection has expired.
        """
        name = self._name_in(data)
        body, row = encode(data), self._row_key(name)

        def write(tx: Transaction, seq: int, updated_ms: int) -> bool:
            tx.put(DATA, row, pack(seq, updated_ms, body))
            return True

        def made(accepted: Accepted | None) -> Record:
            assert accepted is not None
            return Record(name, decode(body), accepted.seq, accepted.updated_ms / 1000, accepted.subscribers)

        return self._mutate("set", name, body, client, write).map(made)

    def delete(self, key: str, *, client: str | None = None) -> Reply[int | None]:
        """Remove a record and answer with the seq of that; `None` if there was none, and then no seq is taken."""
        name = _as_name(key)
        row = self._row_key(name)

        def write(tx: Transaction, _seq: int, _updated_ms: int) -> bool:
            return tx.delete_acked(DATA, row)

        return self._mutate("delete", name, None, client, write).map(
            lambda accepted: None if accepted is None else accepted.seq
        )

    def get(self, key: str) -> Reply[Record | None]:
        """Ask for a record; `None` if there is none."""
        self._check()
        name = _as_name(key)
        row = self._row_key(name)

        def found(payloads: dict[Any, bytes]) -> Record | None:
            if self._root not in payloads:
                raise self._gone()
            return self._record(name, *self._unpack(Row(row, payloads[row]))) if row in payloads else None

        return self._job.get_many(DATA, [self._root, row]).map(found)

    def snapshot(self) -> Reply[Snapshot]:
        """Ask for all records, in the order of their seqs: the last changed last."""

        def taken(state: tuple[int, list[tuple[str, int, int, Any]]]) -> Snapshot:
            seq, rows = state
            return Snapshot(sorted((self._record(*row) for row in rows), key=lambda record: record.seq), seq)

        return self._read_state().map(taken)

    def _record(self, name: str, seq: int, updated_ms: int, data: Any) -> Record:
        return Record(name, data, seq, updated_ms / 1000)

    def _name_in(self, data: Any) -> str:
        if not isinstance(data, dict):
            raise Misuse(f"data must be a dict, not {type(data).__name__}: pass the record with its key in it")
        if self.primary not in data:
            raise Misuse(f"data has no {self.primary!r}, the collection's primary field: put the record's key in it")
        name = data[self.primary]
        if not isinstance(name, str) or not name:
            raise Misuse(f"data[{self.primary!r}] must be a str that isn't empty, not {name!r:.40}: it is the key")
        return str.__str__(name)


def _as_name(value: Any) -> str:
    if not isinstance(value, str):
        raise Misuse(f"key must be a str, not {type(value).__name__}: pass what the primary field holds")
    return str.__str__(value)
