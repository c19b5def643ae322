"""Transfer: a job's rows as a stream of CBOR items, written out and taken in again, step by step beside its work.

The stream outlives the formats of files: first a map that says what it is, then an array for each row, last a map that
says how many there were and what all before it amounts to. `docs/transfer.md` has it to the letter.

Rules:
  1. Rows are asked for and handed over in pages, bounded in rows and in bytes; nothing is held between two of them.
  2. Writing beside it is safe: a row that is there throughout is in the stream once, with an expiry and a payload that
     it had at one moment.
  3. Nothing a stream says is believed before it is checked, and rows are taken in a batch at a time, all or nothing.

Doesn't know: threads, SQL, who runs the steps, what kind of file it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

from persistency.actor.errand import Steps
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.arguments import CATEGORY_BYTES_MAX, as_category, shown
from persistency.codec.keys import KEY_BYTES_MAX
from persistency.codec.stream import ARRAY, BYTES, MAP, NUMBER, Items, head
from persistency.codec.values import encode
from persistency.errors import Corrupt, Overloaded, SchemaTooNew
from persistency.messages import names
from persistency.outside import reading, writing
from persistency.storage.port import (
    PAYLOAD_BYTES_MAX,
    PLACES,
    Batch,
    Group,
    LastVersion,
    ListCategories,
    ListRows,
    SetRow,
    StoredRow,
)

FORMAT = 1
PAGE_ROWS_MAX = 256
"""How many rows an export reads at a time."""
BATCH_ROWS_MAX = 1024
"""How many rows an import reads at a time, and commits together."""
BYTES_MAX = 1024 * 1024
"""How many bytes of keys and payloads either has read before it stops; the last row may have any number."""
EXPIRES_MS_MAX = 2**53 - 1  # far beyond every clock's end

_NAME = "export"
_COUNTS = ("last_version", "exported_ms")
_COLUMNS = 4  # of a row
_NO_END = encode(None)
_ITEM_BYTES_MAX = 64 * 1024  # of the first item and the last
_ALONE_BYTES_MIN = 64 * 1024  # a payload so long is written as it is, not copied into the rest of its page
_AGAIN = "Get a sound copy and import that: rows that are there already are replaced."


# -- the job -----------------------------------------------------------------------------------------------------


class _Line:
    """A job's mailbox, asked with patience: where it is full this waits for room, whatever `on_full` says."""

    def __init__(self, mailbox: Callable[[], Mailbox]) -> None:
        self._mailbox = mailbox

    def read(self, message: Any) -> Any:
        """Return the answer of a read."""
        return self._ask(lambda mailbox: mailbox.read(message))

    def write(self, message: Any, ops: int, nbytes: int) -> Any:
        """Return the answer of so many operations once they are committed."""
        return self._ask(lambda mailbox: mailbox.write(message, ops, nbytes))

    def _ask(self, post: Callable[[Mailbox], Reply[Any]]) -> Any:
        while True:
            try:
                reply = post(self._mailbox())
            except Overloaded:
                self._mailbox().drain().result()
                with suppress(Overloaded):  # answered when all before it is, so there is no busy waiting
                    self._mailbox().read(LastVersion()).result()
                continue
            return reply.result()


# -- export ------------------------------------------------------------------------------------------------------


def exported(job_id: str, mailbox: Callable[[], Mailbox], now_ms: Callable[[], int], file: Any) -> Steps[int]:
    """Write every row to a file, or to one of that path; return how many there were."""
    opening = {"persistency": _NAME, "format": FORMAT, "job_id": job_id}
    with writing(file) as write:
        return (yield from _written(_Line(mailbox), opening, now_ms, _Sink(write)))


def _written(line: _Line, opening: dict[str, Any], now_ms: Callable[[], int], sink: _Sink) -> Steps[int]:
    sink.write(encode({**opening, "last_version": line.read(LastVersion()), "exported_ms": now_ms()}))
    count = 0
    for category in line.read(ListCategories()):
        opening_of_row = head(ARRAY, _COLUMNS) + encode(names([category])[0])
        start = b""
        while rows := line.read(ListRows(category, start, PAGE_ROWS_MAX, BYTES_MAX)):
            sink.write_rows(opening_of_row, rows)
            if rows[-1].key < start:  # or a damaged file would be walked round for ever
                raise Corrupt("rows are out of order", hint="Restore the job from a backup.")
            count, start = count + len(rows), rows[-1].key + b"\0"
            del rows  # before there are others
            yield count, None
    sink.write(encode({"rows": count, "sha256": sink.sha256()}))
    return count


class _Sink:
    """What the stream is written to, and the sum of what was."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._sum = sha256()

    def sha256(self) -> bytes:
        """Return the SHA-256 of everything that was written."""
        return self._sum.digest()

    def write(self, data: bytes) -> None:
        """Write bytes of the stream."""
        self._sum.update(data)
        self._write(data)

    def write_rows(self, opening: bytes, rows: list[StoredRow]) -> None:
        """Write rows that begin alike: with the head of their array, and their category."""
        parts: list[bytes] = []
        for key, payload, _, expires_ms in rows:
            parts += (opening, head(BYTES, len(key)), key, head(BYTES, len(payload)))
            if len(payload) >= _ALONE_BYTES_MIN:
                self.write(b"".join(parts))
                self.write(payload)
                parts = []
            else:
                parts.append(payload)
            parts.append(_NO_END if expires_ms is None else head(NUMBER, min(expires_ms, EXPIRES_MS_MAX)))
        self.write(b"".join(parts))


# -- import ------------------------------------------------------------------------------------------------------


def imported(mailbox: Callable[[], Mailbox], now_ms: Callable[[], int], file: Any) -> Steps[int]:
    """Take in every row of a file, or of the one of that path; return how many."""
    with reading(file) as read:
        return (yield from _taken_in(_Line(mailbox), now_ms, Items(read)))


def _taken_in(line: _Line, now_ms: Callable[[], int], items: Items) -> Steps[int]:
    _check_opening(items)
    count = 0
    try:
        for seen, batch, nbytes in _batches(items, now_ms):
            if batch.ops:
                line.write(batch, batch.ops, nbytes)
                count += batch.ops
            del batch  # before there is another
            yield seen, None
    except Exception as error:
        told = f"{count:,} rows were taken in before, and stay"
        if isinstance(error, Corrupt):
            raise Corrupt(f"{error}; {told}", hint=_AGAIN) from error
        error.add_note(f"import_: {told}.")
        raise
    return count


def _check_opening(items: Items) -> None:
    """Raise `Corrupt` or `SchemaTooNew` if what begins here isn't an export we can read."""
    if items.at_end():
        raise _foreign("it is empty")
    if items.kind() != MAP:
        raise _foreign("it doesn't begin with a map")
    opening = items.value(_ITEM_BYTES_MAX)
    if opening.get("persistency") != _NAME:
        raise _foreign("its first item doesn't say so")
    if not _is_count(format_ := opening.get("format")) or not format_:
        raise _foreign(f"its format is {shown(format_)}")
    if format_ > FORMAT:
        raise SchemaTooNew(f"the stream has format {shown(format_)}, and {FORMAT} is the latest one known here")
    if not isinstance(opening.get("job_id"), str) or not all(map(_is_count, map(opening.get, _COUNTS))):
        raise _foreign("its first item lacks something")


def _foreign(why: str) -> Corrupt:
    return Corrupt(f"the stream is no export of a job: {why}", hint="Pass what Job.export has written.")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _batches(items: Items, now_ms: Callable[[], int]) -> Iterator[tuple[int, Batch, int]]:
    """Give (rows read so far, a batch of those that haven't ended, its bytes); the last one once all was checked."""
    seen = 0
    while True:
        group: Group = []
        nbytes = 0
        begun, kind = seen, ARRAY
        while seen - begun < BATCH_ROWS_MAX and nbytes < BYTES_MAX and (kind := items.kind()) == ARRAY:
            category, key, payload, end = _row(items)
            seen += 1
            nbytes += len(key) + len(payload)
            if end is None:
                group += (category, key, payload)
            elif end > now_ms():
                group += (None, SetRow(category, key, payload, end), None)
            del payload  # it may be large, and is the batch's now
        if kind != ARRAY:
            _check_closing(items, seen)
        if seen > begun:
            yield seen, Batch(group, len(group) // PLACES, False, ("rows of an import",)), nbytes
        if kind != ARRAY:
            return


def _row(items: Items) -> tuple[bytes, bytes, bytes, int | None]:
    columns = items.array()
    if columns != _COLUMNS:
        raise items.wrong(f"an array of {columns} items, a row has {_COLUMNS}")
    category = items.text(CATEGORY_BYTES_MAX)
    if not category:
        raise items.wrong("a category without a name")
    key, payload, end = items.data(KEY_BYTES_MAX), items.data(PAYLOAD_BYTES_MAX), items.number_or_none()
    if end is not None and end > EXPIRES_MS_MAX:
        raise items.wrong(f"an expiry of {end} ms, at most {EXPIRES_MS_MAX} are allowed")
    return as_category(category), key, payload, end


def _check_closing(items: Items, seen: int) -> None:
    """Raise `Corrupt` unless the last item is next, bears out all that was read, and nothing follows it."""
    if items.kind() != MAP:
        raise items.wrong("neither a row nor the last item")
    found = items.sha256()
    closing = items.value(_ITEM_BYTES_MAX)
    if closing.keys() != {"rows", "sha256"}:
        raise items.wrong("a map that isn't the last item's")
    if not _is_count(closing["rows"]) or closing["rows"] != seen:
        raise Corrupt(f"{shown(closing['rows'])} rows were written, and {seen:,} have been read", hint=_AGAIN)
    if closing["sha256"] != found:
        raise Corrupt("the checksum differs: the stream was damaged", hint=_AGAIN)
    if not items.at_end():
        raise items.wrong("the end of the export, but not of the stream")
