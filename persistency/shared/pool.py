"""A merge pool: one document that many clients change a part of at a time.

Rules:
  1. A patch is merged as RFC 7396 (JSON Merge Patch) says: a dict into a dict, field by field; `None` takes a field
     away; all else replaces what was there.
  2. Patches are merged in the order in which they arrive; of a field, the last one counts.
  3. Each field of the document is a row of its own, so a patch costs what it has, not what the document has.

Doesn't know: who follows, what is done with changes, when a pool ends.
"""

from __future__ import annotations

from typing import Any

from persistency.actor.reply import Reply
from persistency.codec.keys import Key
from persistency.codec.values import decode, encode
from persistency.errors import Misuse
from persistency.ops import Row
from persistency.shared.following import as_client
from persistency.shared.places import DATA
from persistency.shared.sequenced import Accepted, Sequenced, pack
from persistency.transaction import Transaction


class Document(dict[str, Any]):
    """The document of a pool, and the pool's last `seq`: ask for the changes since it."""

    __slots__ = ("seq",)

    def __init__(self, fields: dict[str, Any], seq: int) -> None:
        super().__init__(fields)
        self.seq: int = seq


class MergePool(Sequenced):
    """One shared document. Opened by `SharedStore.open_pool`."""

    __slots__ = ()

    def merge(self, client: str, patch: dict[str, Any]) -> Reply[int]:
        """Merge a patch into the document, and answer with the seq of that.

        An empty patch changes nothing: the answer is the last seq. Raises `Misuse` if `patch` is no dict with str keys,
        `Closed` if the pool has expired.
        """
        as_client(client)
        if not isinstance(patch, dict) or not all(isinstance(name, str) for name in patch):
            raise Misuse(f"patch must be a dict with str keys, not {patch!r:.60}: pass the fields that change")
        body = encode(patch)
        fields: dict[str, Any] = decode(body)  # a copy: the caller may go on writing into the patch
        if not fields:
            return self._read_seq()
        rows = {self._row_key(name): value for name, value in fields.items()}

        def write(tx: Transaction, seq: int, updated_ms: int) -> bool:
            for row, value in rows.items():
                self._merge_field(tx, row, value, seq, updated_ms)
            return True

        def made(accepted: Accepted | None) -> int:
            assert accepted is not None
            return accepted.seq

        return self._mutate("merge", None, body, client, write).map(made)

    def snapshot(self) -> Reply[Document]:
        """Ask for the document."""

        def taken(state: tuple[int, list[tuple[str, int, int, Any]]]) -> Document:
            seq, rows = state
            return Document({name: value for name, _, _, value in rows}, seq)

        return self._read_state().map(taken)

    def _merge_field(self, tx: Transaction, row: Key, value: Any, seq: int, updated_ms: int) -> None:
        if value is None:
            tx.delete(DATA, row)
            return
        if isinstance(value, dict):
            payload = tx.get(DATA, row)
            value = merged(None if payload is None else self._unpack(Row(row, payload))[2], value)
        tx.put(DATA, row, pack(seq, updated_ms, encode(value)))

    def _read_seq(self) -> Reply[int]:
        self._check()
        return self._job.run(self._last_seq)


def merged(target: Any, patch: Any) -> Any:
    """Return what a JSON merge patch makes of a value; neither is changed. Source: RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
