"""Rows as the package's own export stream, `docs/transfer.md`: written from what a reader sees, and handed to a job.

Rules:
  1. What is written here is an export to the letter, of a job that somebody else may have open.
  2. It is read by the job itself, which believes nothing before it is checked. The bytes come from this thread, piece
     by piece, so that Ctrl-C is heard while a pipe gives nothing; batches that were committed before stay.

Doesn't know: files but for their pieces, the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from queue import Full, Queue

from persistency import Entry, Job, Reader
from persistency.cli.ending import Fault, Stop
from persistency.codec.values import encode

FORMAT = 1
_ROW = b"\x84"  # an array of four
_PIECES_MAX = 16
_LOOK_SECONDS = 0.1


def write_stream(
    reader: Reader | Job, rows: Iterable[tuple[str, Entry]], write: Callable[[bytes], object]
) -> Iterator[int]:
    """Write an export of rows; give how many were written, after each."""
    digest = sha256()

    def write_item(data: bytes) -> None:
        digest.update(data)
        write(data)

    opening = {"persistency": "export", "format": FORMAT, "job_id": reader.id}
    write_item(encode({**opening, "last_version": reader.version().result(), "exported_ms": reader.now_ms}))
    count = 0
    for category, (key, payload, _version, expires_ms) in rows:
        write_item(_ROW + b"".join(map(encode, (category, bytes(key), payload, expires_ms))))
        count += 1
        yield count
    write_item(encode({"rows": count, "sha256": digest.digest()}))


class Interrupted(Exception):
    """Somebody has asked for an end, by `stop`; `rows` were read and dealt with before."""

    def __init__(self, rows: int, stop: Stop) -> None:
        super().__init__(rows, stop)
        self.rows = rows
        self.stop = stop


def read_stream(job: Job, pieces: Iterator[bytes], advance: Callable[[int], None]) -> int:
    """Take an export in; return how many rows were taken. Raises `Interrupted` for `Stop`, once all is at rest."""
    source = _Handed()
    seen = 0

    def tell(done: int, _total: int | None) -> None:
        nonlocal seen
        seen = done
        advance(done)
        source.check()

    reply = job.import_(source, tell)
    reply.add_done_callback(lambda _reply: source.leave())
    try:
        for piece in pieces:
            if not source.hand(piece):
                break  # it has failed, and wants no more
        source.hand(b"")
        return reply.result()
    except (KeyboardInterrupt, SystemExit) as stop:
        source.interrupt()
        if reply.exception() is None and isinstance(stop, KeyboardInterrupt):  # it was through already
            return reply.result()
        raise Interrupted(seen, stop) from None
    except Fault as fault:  # the file can't be read on
        source.interrupt()
        reply.exception()
        fault.hint = f"{fault.hint}\nThe rows before it, {seen:,}, are stored.".strip()
        raise


class _Stopped(Exception):
    """What ends the job's side of an import that was interrupted."""


class _Handed:
    """A file whose bytes another thread hands over."""

    def __init__(self) -> None:
        self._pieces: Queue[bytes] = Queue(_PIECES_MAX)
        self._rest = b""
        self._left = self._stopped = self._ended = False

    def hand(self, piece: bytes) -> bool:
        """Hand a piece over, none for the end; return whether somebody still wants it."""
        while not self._left:
            try:
                self._pieces.put(piece, timeout=_LOOK_SECONDS)
            except Full:
                continue
            return True
        return False

    def interrupt(self) -> None:
        """Have whoever reads end."""
        self._stopped = True
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self._pieces.put(b"")

    def leave(self) -> None:
        """Take no more: whoever has read is through."""
        self._left = True

    def check(self) -> None:
        """Raise if an end was asked for."""
        if self._stopped:
            raise _Stopped

    def read(self, size: int) -> bytes:
        """Give up to so many bytes."""
        if not self._rest and not self._ended:
            self._rest = self._pieces.get()
            self._ended = not self._rest
        self.check()
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece
