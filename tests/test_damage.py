"""Damaged files: whatever bits flip and bytes are missing, only our own errors come, soon, and nothing crashes.

The cases run in processes of their own (`tests.crash.damaged`, which says what a case is). Before they are believed
they are shown engines with a planted defect, each of which they have to report. Behind them stand, one by one and
without chance, the kinds of damage that need an answer of their own.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from persistency import Corrupt, Job, Key, Persistency, Poisoned, Put, StorageError, key
from persistency.actor.accounts import Accounts
from persistency.codec.fixed import fixed_key
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Group, ScanRange
from persistency.storage.sqlite import SqliteStore
from tests.crash.damaged import ADDRESS_BYTES_MAX, CASE_SECONDS, KINDS, PAGE, REPLY_SECONDS
from tests.crash.running import last_json, replace_method, run
from tests.test_original_files import write_original

SEED = random.SystemRandom().getrandbits(32)
CASES = 14
PLANTED_CASES, PLANTED_SEED = 60, "7"
WAIT = 20.0  # seconds a test waits for what must come


def damage(kind: str, *arguments: str, seed: int = SEED) -> dict[str, Any]:
    """Run cases of a kind and return their totals."""
    given = (kind, "--seed", str(seed), *arguments)
    done = run("tests.crash.damaged", *given, timeout=100, flags=("-W", "error"))
    print(f"python -m tests.crash.damaged {' '.join(given)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    totals = last_json(done)
    assert done.returncode == (1 if totals["kinds"] else 0)
    return totals


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_only_our_errors(kind: str) -> None:
    """Flipped bits, cuts, lost and swapped pages: errors of ours, right answers, or what SQLite can't see; no more."""
    totals = damage(kind, "--cases", str(CASES))
    assert not totals["findings"], totals["findings"]
    assert totals["cases"] == CASES


class Plant(NamedTuple):
    """A defect that is put into the engine of a process: how, where it shows, and as what it must be reported."""

    spoil: Callable[[], None]
    kind: str
    finding: str
    patience: float = REPLY_SECONDS
    limit: float = CASE_SECONDS


_point_read, _read, _apply, _open = SqliteStore.point_read, SqliteStore.read, SqliteStore.apply, DirectoryRoot.open


def _at_a_failed_read(act: Callable[[SqliteStore, StorageError], Any]) -> Callable[[], None]:
    def reading(read: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(self: SqliteStore, *message: Any) -> Any:
            try:
                return read(self, *message)
            except StorageError as error:
                act(self, error)
                raise

        return attempt

    def pointing(self: SqliteStore, now_ms: Callable[[], int]) -> Callable[..., Any]:
        read = _point_read(self, now_ms)
        return partial(reading(lambda _self, *row: read(*row)), self)

    def spoil() -> None:
        replace_method(SqliteStore, "point_read", pointing)
        replace_method(SqliteStore, "read", reading(_read))

    return spoil


def _let_sqlite_speak(_store: SqliteStore, error: StorageError) -> None:
    assert error.__cause__ is not None
    raise error.__cause__


def _fail_elsewhere(_store: SqliteStore, _error: StorageError) -> None:
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()


def _keep_a_file_open(store: SqliteStore, _error: StorageError) -> None:
    os.open(store._connection.db_filename("main"), os.O_RDONLY)


def _answer_nobody() -> None:
    replace_method(Accounts, "fail", lambda _self, *_groups: [])


def _delete_what_cannot_be_read() -> None:
    def open_store(self: DirectoryRoot, job_id: str, *how: Any) -> Any:
        try:
            return _open(self, job_id, *how)
        except Corrupt:
            self.path(job_id).unlink()
            raise

    replace_method(DirectoryRoot, "open", open_store)


def _tell_the_others() -> None:
    broken: list[StorageError] = []

    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        if broken:
            raise broken[0]
        try:
            return _apply(self, group, now_ms)
        except Corrupt as error:
            broken.append(error)
            raise

    replace_method(SqliteStore, "apply", apply)


def _stumble() -> None:
    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return _apply(self, group, now_ms)
        except StorageError as error:
            raise AttributeError("in an error handler that was never run") from error

    replace_method(SqliteStore, "apply", apply)


def _wait_it_out() -> None:
    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return _apply(self, group, now_ms)
        except Corrupt as error:
            raise StorageError(str(error)) from error

    replace_method(SqliteStore, "apply", apply)


def _lose_a_row() -> None:
    def read(self: SqliteStore, message: Any, now_ms: int) -> Any:
        answer = _read(self, message, now_ms)
        return answer[:-1] if isinstance(message, ScanRange) else answer

    replace_method(SqliteStore, "read", read)


PLANTS = {
    "lets sqlite speak": Plant(_at_a_failed_read(_let_sqlite_speak), "closed", "foreign"),
    "fails in another thread": Plant(_at_a_failed_read(_fail_elsewhere), "closed", "thread"),
    "takes all memory": Plant(_at_a_failed_read(lambda *_: bytearray(2 * ADDRESS_BYTES_MAX)), "closed", "foreign"),
    "keeps a file open": Plant(_at_a_failed_read(_keep_a_file_open), "closed", "left"),
    "dies": Plant(_at_a_failed_read(lambda *_: os.kill(os.getpid(), signal.SIGSEGV)), "closed", "crash"),
    "never comes back": Plant(_at_a_failed_read(lambda *_: threading.Event().wait()), "closed", "stuck", limit=1.0),
    "answers nobody": Plant(_answer_nobody, "closed", "hang", patience=1.0),
    "deletes what it can't read": Plant(_delete_what_cannot_be_read, "closed", "deleted"),
    "stumbles over errors": Plant(_stumble, "closed", "disguised"),
    "waits it out": Plant(_wait_it_out, "closed", "stalled"),
    "fails with its neighbour": Plant(_tell_the_others, "closed", "neighbour"),
    "loses a row": Plant(_lose_a_row, "shm", "wrong"),
    "loses a row of a log": Plant(_lose_a_row, "wal", "wrong"),
}


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Show the cases every planted defect; give what they found."""
    # The same cases each time: this is about who looks at them.
    done = run("tests.crash.damaged", "planted", "--seed", PLANTED_SEED, timeout=100, flags=("-W", "error"))
    assert done.returncode == 0, done.stderr
    return last_json(done)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(name: str, planted: dict[str, Any]) -> None:
    """The cases report an engine that was spoilt on purpose, and as what it is."""
    assert PLANTS[name].finding in planted[name]["kinds"], planted[name]


def test_a_file_cut_anywhere_is_refused_or_read() -> None:
    """Cut at every 24th sector, alone or beside its log, a file is refused, found corrupt, or right; nothing stalls."""
    for kind in ("closed", "live"):
        totals = damage(kind, "--sweep", "24")
        assert not totals["findings"], totals["findings"]
        assert totals["cases"] >= 10


def test_an_empty_file_beside_its_log_is_refused() -> None:
    """A file that has lost all its bytes is no new job as long as its log is there, and the log stays."""
    totals = damage("live", "--sweep", "100000")
    assert not totals["findings"], totals["findings"]
    assert (totals["cases"], totals["refused"]) == (1, 1)


# -- damage without chance --------------------------------------------------------------------------------------------

ROWS = 300


def key_of(at: int) -> Key:
    """Return a row's key, of eight bytes, so that it could be taken for a number."""
    return key(f"k{at:05}")


def payload_of(at: int) -> bytes:
    """Return a row's payload, which is found nowhere else."""
    return b"<%06d>" % at * 20


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """Give the file of a closed job with a category of rows, whose payloads say which they are, and its changes."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("alpha", feed_changes_max=10 * ROWS)
        job.commit([Put("c", key_of(at), payload_of(at)) for at in range(ROWS)]).result(WAIT)
        assert job.path is not None
        return job.path


def opened(closed: Path) -> Persistency:
    """Return the root of a closed file."""
    return Persistency(closed.parent)


def pages_with(data: bytes, at: int) -> list[int]:
    """Return the numbers of the pages that hold a row's payload: in the table, and in the log of changes."""
    return [number for number in range(len(data) // PAGE) if b"<%06d>" % at in data[number * PAGE :][:PAGE]]


def swap_leaves(closed: Path) -> None:
    """Swap two leaves of the table, and two of the log of changes."""
    data = bytearray(closed.read_bytes())
    for one, other in zip(pages_with(data, ROWS // 3), pages_with(data, ROWS // 2), strict=True):
        first, second = (slice(number * PAGE, (number + 1) * PAGE) for number in (one, other))
        assert one != other
        data[first], data[second] = data[second], data[first]
    closed.write_bytes(data)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_walk_over_rows_out_of_order_comes_to_an_end(closed: Path, reverse: bool) -> None:
    """Where the leaves of a table are out of order a walk ends, with `Corrupt` if it would go in circles."""
    swap_leaves(closed)
    with opened(closed) as persistency:
        job = persistency.open_job("alpha")
        ended = 0
        for page in range(1, 60):
            given = 0
            try:
                for _ in islice(job.iterate("c", reverse=reverse, page=page), 10 * ROWS):
                    given += 1
            except Corrupt:
                ended += 1
            assert given < 10 * ROWS, f"a walk in pages of {page} doesn't end"
        assert ended, "nothing was out of order"


def follow(job: Job, limit: int) -> None:
    """Follow a job's changes to their end; they must come in order."""
    after = given = 0
    while changes := job.changes(after, limit).result(WAIT):
        versions = [change.version for change in changes]
        assert versions == sorted(set(versions))
        assert versions[0] > after
        after = versions[-1]
        given += len(changes)
        assert given < 10 * ROWS, f"following {limit} at a time doesn't end"


def test_a_follower_of_changes_out_of_order_is_told(closed: Path) -> None:
    """Where the log of changes is out of order, whoever follows it is told, and not led in circles."""
    swap_leaves(closed)
    with opened(closed) as persistency:
        job = persistency.open_job("alpha", feed_changes_max=10 * ROWS)
        ended = 0
        for limit in range(1, 60):
            try:
                follow(job, limit)
            except Corrupt:
                ended += 1
        assert ended, "nothing was out of order"


# A value's type, as SQLite writes it in front of a row: of a key of eight bytes, and of a payload of 160.
BLOB, TEXT, INTEGER, FLOAT = 28, 29, 6, 7
LONG_BLOB, LONG_TEXT = b"\x82\x4c", b"\x82\x4d"


def types_at(data: bytes, at: int) -> int:
    """Return where the types of a row's values begin: how many bytes they are, the category's, the key's, ..."""
    return data.index(b"c" + key_of(at) + payload_of(at), pages_with(data, at)[0] * PAGE) - 7


def ask_for_rows(job: Job) -> Iterator[Callable[[], Any]]:
    """Give every way to ask for all rows, those with keys alone first."""
    yield lambda: job.keys("c", reverse=True).result(WAIT)
    yield lambda: list(islice(job.iterate("c", page=7, keys_only=True), 2 * ROWS))
    yield lambda: job.scan("c").result(WAIT)
    yield lambda: job.snapshot("c").result(WAIT)
    yield lambda: list(islice(job.iterate("c", page=7), 2 * ROWS))
    yield lambda: list(job.get_many("c", [key_of(at) for at in range(ROWS)]).result(WAIT).items())
    yield lambda: [] if job.export(BytesIO()).result(WAIT) <= ROWS else None
    yield lambda: job.run(lambda transaction: transaction.scan("c")).result(WAIT)


@pytest.mark.parametrize("kind", [TEXT, INTEGER, FLOAT])
def test_a_key_that_is_none_is_corrupt(closed: Path, kind: int) -> None:
    """A key that one flipped byte has made a text or a number of is `Corrupt` where it would be given."""
    sound = closed.read_bytes()
    refused = 0
    for at in range(0, ROWS, 23):
        data = bytearray(sound)
        assert data[types_at(sound, at) + 2] == BLOB
        data[types_at(sound, at) + 2] = kind
        closed.write_bytes(data)
        with opened(closed) as persistency:
            for ask in ask_for_rows(persistency.open_job("alpha")):
                try:
                    answer = ask()
                except (Corrupt, Poisoned):
                    refused += 1
                else:  # it was passed by: it sorts before every key
                    assert {row if isinstance(row, Key) else row[0] for row in answer} < set(map(key_of, range(ROWS)))
    assert refused > 10


def make_text(data: bytearray, at: int) -> Key:
    """Make a text of a row's payload; return its key."""
    place = types_at(data, at) + 3
    assert data[place : place + 2] == LONG_BLOB
    data[place : place + 2] = LONG_TEXT
    return key_of(at)


def make_nothing(data: bytearray, at: int) -> Key:
    """Make a row end behind its key, as if it were of an older format with no more columns; return its key."""
    place = types_at(data, at)
    assert data[place] == 7
    size = 7 + 1 + len(key_of(at)) + len(payload_of(at)) + data[place + 5]  # a version of one byte, or of two
    where = (bytes(key_of(at)) + payload_of(at) * 2)[: size - 5]
    data[place : place + size] = bytes([4, 14, 0x82, 12 + 2 * len(where) - 256]) + b"c" + where
    return Key(where)


@pytest.mark.parametrize("spoil", [make_text, make_nothing])
def test_a_payload_that_is_none_is_bytes_or_corrupt(closed: Path, spoil: Callable[[bytearray, int], Key]) -> None:
    """A payload that flipped bits have made a text or nothing of is given as bytes, or is `Corrupt`, or isn't there."""
    data = bytearray(closed.read_bytes())
    where = spoil(data, ROWS // 2)
    closed.write_bytes(data)
    with opened(closed) as persistency:
        job = persistency.open_job("alpha")
        for ask in ask_for_rows(job):
            with contextlib.suppress(Corrupt):
                types = {type(row) if isinstance(row, Key) else type(row[1]) for row in ask()}
                assert types <= {Key, bytes}
        for point in (lambda: job.get("c", where), lambda: job.entry("c", where)):
            with contextlib.suppress(Corrupt):
                found = point().result(WAIT)
                assert found is None or type(getattr(found, "payload", found)) is bytes
        for post in (lambda: job.touch("c", where, 60).result(WAIT), lambda: job.put("c", where, b"anew")):
            with contextlib.suppress(Corrupt, Poisoned):
                post()
                job.flush().result(WAIT)
                assert job.count("c").result(WAIT) == ROWS


@pytest.mark.parametrize("at", [18, 19, 47])
def test_a_header_of_another_format_is_refused(closed: Path, at: int) -> None:
    """A file that SQLite takes for one of a later format, and would only read, is refused when it is opened."""
    data = bytearray(closed.read_bytes())
    data[at] ^= 0x40
    closed.write_bytes(data)
    with opened(closed) as persistency:
        with pytest.raises(Corrupt):
            persistency.open_job("alpha")
        assert closed.read_bytes() == data


def test_a_cut_file_of_the_original_is_not_passed_over(tmp_path: Path) -> None:
    """A damaged file of format 1 under its plain name is refused; no empty job is begun beside it."""
    plain = tmp_path / "Node.db"
    rows = [(fixed_key(f"ch{at}"), b"x" * 2_000) for at in range(50)]
    write_original(plain, {"log": rows})
    os.truncate(plain, plain.stat().st_size // 2)
    before = plain.read_bytes()
    with Persistency(tmp_path) as persistency, pytest.raises(Corrupt):
        persistency.open_job("Node")
    assert plain.read_bytes() == before
