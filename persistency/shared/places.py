"""Places: which collections and pools there are, by their ids, when they end, and how they are removed.

Their rows, besides those that each has for itself (see `sequenced`):

| category | key | payload, in CBOR |
|---|---|---|
| shared | (number,) | [type, id]; ends when the place does, and nothing of it is seen without |
| shared.ids | () | the last number given |
| shared.ids | (type, id) | [number, kind, primary, expires_ms] |
| shared.ends | (expires_ms, number) | [type, id]: the temporary ones, in the order in which they end |

Rules:
  1. A number is never given twice, so that what was opened under an id that has ended never meets what has it next.
  2. The job's clock says what has ended, and an end is never moved.
  3. Removing goes by slices, each a transaction of its own: the job's other callers come in between.

Doesn't know: what a place holds, who follows it. All functions here are run by `Job.run`.
"""

from __future__ import annotations

from itertools import islice
from typing import Literal, NamedTuple, TypeAlias

from persistency.codec.keys import KeyRange, key
from persistency.codec.values import decode, encode
from persistency.errors import Corrupt, Misuse
from persistency.ops import Ttl
from persistency.transaction import Transaction

Kind: TypeAlias = Literal["temp", "permanent"]

DATA, IDS, ENDS = "shared", "shared.ids", "shared.ends"
SLICE_ROWS = 1_000
"""How many rows are removed in one transaction."""


class Place(NamedTuple):
    """Which one it is, and what it was opened as. `expires_ms` is Unix time; `None`: it is permanent."""

    number: int
    type: str
    id: str
    kind: Kind
    primary: str
    expires_ms: int | None

    def ended(self, now_ms: int) -> bool:
        """Whether it has expired."""
        return self.expires_ms is not None and now_ms >= self.expires_ms


class Wanted(NamedTuple):
    """What is to be opened, its arguments checked."""

    type: str
    id: str
    kind: Kind
    primary: str
    ttl: Ttl | None


def find(tx: Transaction, what: str, id_: str) -> Place | None:
    """Return the place of an id, if there is one and it hasn't ended."""
    place = _named(tx, what, id_)
    return place if place is not None and tx.exists(DATA, (place.number,)) else None


def _named(tx: Transaction, what: str, id_: str) -> Place | None:
    payload = tx.get(IDS, (what, id_))
    if payload is None:
        return None
    match decode(payload):
        case [int(number), "temp" | "permanent" as kind, str(primary), int() | None as expires_ms]:
            return Place(number, what, id_, kind, primary, expires_ms)
        case _:
            raise Corrupt(f"{IDS}, {(what, id_)!r}: that isn't what a shared store writes")


def open_place(tx: Transaction, wanted: Wanted) -> tuple[Place, bool]:
    """Return what is there, or was made, and whether it is live: what isn't has to be purged first."""
    place = _named(tx, wanted.type, wanted.id)
    if place is not None:
        live = tx.exists(DATA, (place.number,))
        for name in ("kind", "primary"):
            had, want = getattr(place, name), getattr(wanted, name)
            if live and had != want:
                raise Misuse(f"{wanted.type} {wanted.id!r} was opened with {name}={had!r}, not {want!r}: open it so")
        return place, live
    number = tx.increment(IDS, ())
    tx.put(DATA, (number,), encode([wanted.type, wanted.id]), ttl=wanted.ttl)
    root = tx.entry(DATA, (number,))
    assert root is not None
    if root.expires_ms is not None:
        tx.put(ENDS, (root.expires_ms, number), encode([wanted.type, wanted.id]))
    row = [number, wanted.kind, wanted.primary, root.expires_ms]
    tx.put(IDS, (wanted.type, wanted.id), encode(row))
    return Place(number, *wanted[:4], root.expires_ms), True


def find_expired(tx: Transaction) -> Place | None:
    """Return one that has expired and isn't purged yet."""
    for row in tx.scan(ENDS, KeyRange(None, key(tx.now_ms + 1)), limit=1):
        match row.key.parts, decode(row.payload):
            case (int(expires_ms), int(number)), [str(what), str(id_)]:
                return Place(number, what, id_, "temp", "", expires_ms)
            case _:
                raise Corrupt(f"{ENDS}, {row.key!r}: that isn't what a shared store writes")
    return None


def purge_slice(tx: Transaction, place: Place) -> bool | None:
    """Remove a slice of what has expired: `None` if there is more, else whether it was still there to be removed."""
    rows = KeyRange.prefix((place.number,))
    keys = list(islice(tx.iterate(DATA, rows, keys_only=True, page=SLICE_ROWS + 1), SLICE_ROWS + 1))
    if len(keys) > SLICE_ROWS:
        tx.delete_range(DATA, KeyRange(rows.start, keys[-1]))
        return None
    tx.delete_range(DATA, rows)
    named = _named(tx, place.type, place.id)
    if named is not None and named.number == place.number:
        tx.delete(IDS, (place.type, place.id))
    return tx.delete_acked(ENDS, (place.expires_ms, place.number))
