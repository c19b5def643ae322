"""The messaging example: one job for all channels, statement by statement, and the example itself as a program."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples.messaging import JOB, LOG, META, Channel, Channels, Message, Meta, open_channels
from persistency import (
    Closed,
    Corrupt,
    Delete,
    DiskFull,
    Job,
    Key,
    Misuse,
    Persistency,
    Poisoned,
    Put,
    RawKey,
    WriteFailed,
    key,
)
from persistency.codec.values import decode, encode
from persistency.storage.memory import MemoryStore
from tests.loops import InLoop, bounded, together

WAIT = 20.0  # seconds a test waits for what must come
EXAMPLE = Path(__file__).parent.parent / "examples" / "messaging.py"

HELLO = Message(1, "m-a", "ada", b"hello")
LATE = Message(2, "m-b", "bob", b"late")
ANSWER = Message(2, "m-c", "ada", b"there you are")


@pytest.fixture(params=["memory", "directory"])
def channels(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Channels]:
    """Give the channels of an empty root of either kind."""
    with open_channels(None if request.param == "memory" else tmp_path / "root") as opened:
        yield opened


def loaded(channels: Channels, channel: str) -> Channel:
    """Load a channel and wait for it."""
    return channels.load(channel).result(WAIT)


def test_one_job_serves_all_channels(tmp_path: Path) -> None:
    """S3-126: all channels are in the job "sds", one file, and a channel's id is the first part of its keys."""
    names = ["general", "general-2", "General", "", "a/b", "ü\0%"]
    with open_channels(tmp_path) as channels:
        for name in names:
            channels.update_history(name, appends=[HELLO])
            channels.save_meta(name, Meta(1))
        assert channels.job.id == JOB == "sds"
        assert sorted(channels.job.categories().result(WAIT)) == ["sds.log", "sds.meta"]
        for category in (META, LOG):
            first_parts = [k.parts[0] for k in channels.job.iterate(category, keys_only=True)]
            assert first_parts == sorted(names)
        assert all(loaded(channels, name) == Channel(Meta(1), [HELLO]) for name in names)
    assert [path.name for path in tmp_path.glob("*.db")] == ["sds.db"]


def test_the_rows_are_where_they_are_documented(channels: Channels) -> None:
    """S3-127: a channel's meta is one blob under (channel,), its log has a row for each message; all of it CBOR."""
    for lamport in (1, 2, 3):
        channels.save_meta("general", Meta(lamport, b"\0\xff"))
    channels.update_history("general", appends=[HELLO, LATE])
    [meta] = channels.job.scan(META).result(WAIT)
    assert meta.key == key("general")
    assert decode(meta.payload) == {"lamport": 3, "bloom": b"\0\xff"}
    log = channels.job.scan(LOG).result(WAIT)
    assert [row.key.parts for row in log] == [("general", 1, "m-a"), ("general", 2, "m-b")]
    assert [decode(row.payload) for row in log] == [
        {"sender": "ada", "content": b"hello"},
        {"sender": "bob", "content": b"late"},
    ]


def test_an_update_is_one_batch(channels: Channels) -> None:
    """S3-128: appends and evicts are applied together, or not at all if one of them is wrong."""
    channels.update_history("general", appends=[HELLO, LATE])
    before = channels.job.version().result(WAIT)
    wrong = Message(9, object(), "eve", b"")  # type: ignore[arg-type]  # what can't be a part of a key
    with pytest.raises(Misuse, match="object"):
        channels.update_history("general", appends=[ANSWER, wrong], evicts=[HELLO])
    assert loaded(channels, "general").history == [HELLO, LATE]
    assert channels.job.version().result(WAIT) == before
    channels.update_history("general", appends=[ANSWER], evicts=[HELLO, LATE])
    assert loaded(channels, "general").history == [ANSWER]
    assert channels.job.version().result(WAIT) == before + 3


def test_nobody_sees_half_an_update(channels: Channels) -> None:
    """S3-128: a reader beside updates that append one message and evict another always finds exactly one."""
    messages = [Message(at, f"m-{at}", "ada", b"") for at in range(500)]
    channels.update_history("general", appends=messages[:1])

    def move() -> None:
        for old, new in pairwise(messages):
            channels.update_history("general", appends=[new], evicts=[old])

    writer = threading.Thread(target=move)
    writer.start()
    seen = [loaded(channels, "general").history]
    while writer.is_alive():
        seen.append(loaded(channels, "general").history)
    writer.join()
    assert {len(history) for history in seen} == {1}
    assert loaded(channels, "general").history == messages[-1:]


class Interrupted:
    """A job behind whose every request somebody else writes at once."""

    def __init__(self, job: Job, write: Callable[[], object]) -> None:
        self._job = job
        self._write = write

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._job, name)

        def ask(*arguments: Any, **options: Any) -> Any:
            reply = verb(*arguments, **options)
            self._write()
            return reply

        return ask


def test_a_channel_is_loaded_as_of_one_moment(channels: Channels) -> None:
    """S3-129: meta and history belong together, whatever others write while they are being asked for."""

    def write() -> None:
        at = channels.job.count(LOG).result(WAIT) + 1
        channels.update_history("general", appends=[Message(at, "m", "ada", b"")])
        channels.save_meta("general", Meta(at))

    interrupted = Channels(Interrupted(channels.job, write))  # type: ignore[arg-type]  # a job in all that is used
    for before in range(5):
        found = loaded(interrupted, "general")
        assert (found.meta.lamport, len(found.history)) == (before, before)


def test_an_empty_update_writes_nothing(channels: Channels) -> None:
    """S3-128: an update of nothing is fine and leaves no trace, but for a closed job it is refused as any other."""
    channels.update_history("general", appends=[HELLO])
    before = channels.job.version().result(WAIT), channels.job.statistics().accepted
    channels.update_history("general")
    channels.update_history("general", appends=[], evicts=iter(()))
    assert (channels.job.version().result(WAIT), channels.job.statistics().accepted) == before
    channels.job.close(WAIT)
    with pytest.raises(Closed):
        channels.update_history("general")


def test_a_fresh_channel_is_empty(channels: Channels) -> None:
    """S3-129: loading what was never written gives empty data, no error, and creates nothing."""
    assert loaded(channels, "general") == Channel(Meta(lamport=0, bloom=b""), [])
    assert channels.job.categories().result(WAIT) == []
    channels.update_history("general", appends=[HELLO])
    assert loaded(channels, "general").meta == Meta()
    channels.save_meta("other", Meta(5))
    assert loaded(channels, "other") == Channel(Meta(5), [])


def test_history_is_sorted_whatever_the_order_of_arrival(channels: Channels) -> None:
    """S3-130: history comes by (Lamport time, message id), as the keys sort, over a round trip of every field."""
    rng = random.Random(130)
    ids = ["", "a", "aa", "b", "Z", "é", "m\0n", "\U0001f600"]
    lamports = [0, 1, 2, 9, 10, 255, 256, 2**32, 2**63, 2**80]
    messages = [Message(lamport, name, name * 2, rng.randbytes(20)) for lamport in lamports for name in ids]
    arrived = rng.sample(messages, len(messages))
    for at in range(0, len(arrived), 7):
        channels.update_history("general", appends=arrived[at : at + 7])
    channels.save_meta("general", Meta(2**80, rng.randbytes(64)))
    assert arrived != messages
    assert loaded(channels, "general").history == sorted(messages, key=lambda m: (m.lamport, m.message_id.encode()))
    in_log = [row.key.parts[1:] for row in channels.job.scan(LOG).result(WAIT)]
    assert in_log == [(message.lamport, message.message_id) for message in loaded(channels, "general").history]


def test_evicting_removes_exactly_that_row(channels: Channels) -> None:
    """S3-131: its neighbours, the same id at another time, and the same message of another channel stay."""
    twin = Message(3, HELLO.message_id, "ada", b"the same id, later")
    for name in ("general", "general-2"):
        channels.update_history(name, appends=[HELLO, LATE, ANSWER, twin])
    channels.update_history("general", evicts=[HELLO])
    assert loaded(channels, "general").history == [LATE, ANSWER, twin]
    assert loaded(channels, "general-2").history == [HELLO, LATE, ANSWER, twin]
    channels.update_history("general", evicts=[HELLO])  # what isn't there any more
    assert loaded(channels, "general").history == [LATE, ANSWER, twin]


BAD_ROWS = {
    "no value at all": (key("general", 5, "x"), b"\xff\x00 garbage"),
    "cut short": (key("general", 5, "x"), encode({"sender": "eve", "content": b"hello"})[:-2]),
    "empty": (key("general", 5, "x"), b""),
    "no map": (key("general", 5, "x"), encode([1, 2])),
    "a field is missing": (key("general", 5, "x"), encode({"sender": "eve"})),
    "a field of another type": (key("general", 5, "x"), encode({"sender": "eve", "content": "text"})),
    "a key of other parts": (key("general", "5", "x"), encode({"sender": "eve", "content": b""})),
    "a key of more parts": (key("general", 5, "x", 1), encode({"sender": "eve", "content": b""})),
    "a key of fewer parts": (key("general", 5), encode({"sender": "eve", "content": b""})),
    "a key of no parts": (RawKey(bytes(key("general")) + b"\x02x"), encode({"sender": "eve", "content": b""})),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_log_row_that_can_not_be_read_is_skipped(
    bad: str, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    """S3-132: the other messages are loaded, and a warning names the one that isn't."""
    where, payload = BAD_ROWS[bad]
    channels.update_history("general", appends=[HELLO, Message(9, "m-z", "cy", b"the last")])
    channels.job.put(LOG, where, payload)
    with caplog.at_level(logging.WARNING, logger="messaging"):
        history = loaded(channels, "general").history
    assert [message.message_id for message in history] == ["m-a", "m-z"]
    [record] = [record for record in caplog.records if record.name == "messaging"]
    assert record.levelname == "WARNING"
    assert repr(Key(where)) in record.getMessage()


@pytest.mark.parametrize(
    "payload", [b"", b"\xff", encode({"lamport": 1}), encode({"lamport": "1", "bloom": b""}), encode(None)]
)
def test_a_corrupt_meta_is_an_error(payload: bytes, channels: Channels) -> None:
    """S3-132: a meta that can't be read is `Corrupt`, with the channel's name; others load as ever."""
    channels.update_history("general", appends=[HELLO])
    channels.save_meta("other", Meta(7))
    channels.job.put(META, ("general",), payload)
    with pytest.raises(Corrupt, match="'general'") as caught:
        loaded(channels, "general")
    assert isinstance(caught.value.__cause__, Corrupt)
    assert loaded(channels, "other") == Channel(Meta(7), [])


def test_fields_of_a_later_release_are_ignored(channels: Channels) -> None:
    """S3-132: a payload with more fields than this release knows isn't undecodable."""
    channels.job.put(META, ("general",), encode({"lamport": 4, "bloom": b"", "colour": "red"}))
    channels.job.put(LOG, ("general", 1, "m-a"), encode({"sender": "ada", "content": b"hello", "edited": True}))
    assert loaded(channels, "general") == Channel(Meta(4), [HELLO])


def test_dropping_takes_meta_and_history_of_one_channel(channels: Channels) -> None:
    """S3-133: both are gone in one batch; channels whose names begin alike, or differ in case, keep theirs."""
    names = ["general", "general-2", "genera", "General", "general\0x", ""]
    for name in names:
        channels.update_history(name, appends=[HELLO, LATE])
        channels.save_meta(name, Meta(2))
    before = channels.job.version().result(WAIT)
    assert channels.drop("general").result(WAIT) == before + 2
    assert loaded(channels, "general") == Channel()
    assert all(loaded(channels, name) == Channel(Meta(2), [HELLO, LATE]) for name in names[1:])
    channels.drop("general").result(WAIT)  # a channel that isn't there
    channels.update_history("general", appends=[ANSWER])
    assert loaded(channels, "general") == Channel(Meta(), [ANSWER])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Channels]:
    """Give channels in memory with one message, whose medium is full from now on and isn't waited for."""

    def full(*_arguments: object) -> list[object]:
        raise DiskFull("no room")

    caplog.set_level(logging.CRITICAL, logger="persistency")
    with Persistency(":memory:") as persistency:
        channels = Channels(persistency.open_job(JOB, stall_timeout=0))
        channels.update_history("general", appends=[HELLO])
        channels.job.flush().result(WAIT)
        monkeypatch.setattr(MemoryStore, "apply", full)
        yield channels


def test_a_failed_save_is_told_at_the_end(failing: Channels) -> None:
    """S3-134: a save that fails raises nothing at its call, but isn't lost silently: closing names it."""
    failing.save_meta("general", Meta(1))
    with pytest.raises(WriteFailed) as caught:
        failing.job.close(WAIT)
    [failure] = caught.value.failures
    assert failure.op == Put(META, key("general"), encode({"lamport": 1, "bloom": b""}))
    assert (type(failure.error), failure.outcome) == (Poisoned, "not applied")


def test_a_failed_update_is_told_at_the_end(failing: Channels) -> None:
    """S3-134: of an update that fails every operation is named."""
    failing.update_history("general", appends=[LATE], evicts=[HELLO])
    with pytest.raises(WriteFailed) as caught:
        failing.job.close(WAIT)
    assert [type(failure.op) for failure in caught.value.failures] == [Put, Delete]


def test_a_failed_drop_raises_why(failing: Channels) -> None:
    """S3-134: a drop raises what went wrong to whoever asked; so does a load of a job that can't go on."""
    with pytest.raises(Poisoned, match="no room") as caught:
        failing.drop("general").result(WAIT)
    assert isinstance(caught.value.__cause__, DiskFull)
    with pytest.raises(Poisoned, match="no room"):
        failing.load("general").result(WAIT)


def test_a_closed_job_refuses_every_call() -> None:
    """S3-134: what comes after the end is refused at the call, by events and requests alike."""
    with open_channels() as channels:
        pass
    for call in (
        lambda: channels.save_meta("general", Meta()),
        lambda: channels.update_history("general", appends=[HELLO]),
        lambda: channels.load("general"),
        lambda: channels.drop("general"),
    ):
        with pytest.raises(Closed):
            call()


def test_without_a_root_all_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-135: no root given: everything works, no file is made, and the end of the block is the end of the data."""
    monkeypatch.chdir(tmp_path)
    with open_channels() as channels, open_channels() as others:
        channels.update_history("general", appends=[HELLO])
        channels.save_meta("general", Meta(1))
        assert channels.job.path is None
        assert loaded(channels, "general") == Channel(Meta(1), [HELLO])
        assert loaded(others, "general") == Channel()
    with open_channels() as channels:
        assert loaded(channels, "general") == Channel()
    assert list(tmp_path.iterdir()) == []


def test_channels_survive_reopening(tmp_path: Path) -> None:
    """S3-127: what was posted before the end of the block is there in the next one, and in the file."""
    with open_channels(tmp_path) as channels:
        channels.update_history("general", appends=[ANSWER, HELLO])
        channels.save_meta("general", Meta(2, b"\1"))
    connection = sqlite3.connect(tmp_path / "sds.db")
    rows = connection.execute("SELECT category, key FROM kv ORDER BY category, key").fetchall()
    connection.close()
    assert rows == [
        (b"sds.log", bytes(key("general", 1, "m-a"))),
        (b"sds.log", bytes(key("general", 2, "m-c"))),
        (b"sds.meta", bytes(key("general"))),
    ]
    with open_channels(tmp_path) as channels:
        assert loaded(channels, "general") == Channel(Meta(2, b"\1"), [HELLO, ANSWER])


def test_the_same_in_event_loops(in_loop: InLoop) -> None:
    """S3-129, S3-130, S3-133: replies of the example are awaited as they are waited for."""

    async def session() -> None:
        async with Persistency(":memory:") as persistency:
            channels = Channels(await persistency.aopen_job(JOB))
            assert await channels.load("general") == Channel()
            channels.update_history("general", appends=[ANSWER, HELLO])
            channels.save_meta("general", Meta(2))
            both = await together(channels.load("general"), channels.load("other"))
            assert both == [Channel(Meta(2), [HELLO, ANSWER]), Channel()]
            await channels.drop("general")
            assert await channels.load("general") == Channel()
            channels.job.put(META, ("general",), b"\xff")
            with pytest.raises(Corrupt, match="'general'"):
                await channels.load("general")

    in_loop(bounded, session)


SESSION = """\
#general, Lamport time 2: 3 messages
    1 m-a  ada: hello
    2 m-b  bob: my network was down
    2 m-c  ada: there you are
#general, Lamport time 2: 3 messages
    2 m-b  bob: my network was down
    2 m-c  ada: there you are
    3 m-d  bob: bye
#general, Lamport time 0: 0 messages
#general-2, Lamport time 0: 1 messages
    1 m-x  cy: another channel
"""


@pytest.mark.parametrize("named", [False, True])
def test_the_example_is_a_program(named: bool, tmp_path: Path) -> None:
    """S3-126: run as a script, with a directory or without, it shows its session and leaves no file but its job's."""
    root = tmp_path / "root"
    command = [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLE), *([str(root)] if named else [])]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", SESSION)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.db"))
    assert left == (["root/sds.db"] if named else [])


def test_the_example_is_short_and_uses_public_names_only() -> None:
    """A new user can read it in one go and copy it."""
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 250
    imported = {line.split()[1] for line in text.splitlines() if line.startswith("from persistency")}
    assert imported == {"persistency", "persistency.codec.values"}
