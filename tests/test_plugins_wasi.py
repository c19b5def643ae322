"""The wasi permission: a clock, randomness and output are there; files, arguments, environment and sockets aren't.

Two functions are the package's own: output becomes lines in the log, so many and no more; and no sleep is longer than
the call that it is part of.
"""

from __future__ import annotations

import logging
import random
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persistency import Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

import wasmtime

from persistency.plugins import CallFailed, PermissionDenied, PluginHost, PluginTimeout, PluginTrapped, WasiGrant, wasi
from persistency.plugins.context import CallContext, current
from persistency.plugins.wasi import LINE_BYTES_MAX, LINES_PER_CALL_MAX
from tests.crash.running import PROJECT
from tests.plugins.guests import FAIL, FILLING, PAGE_BYTES, PAYLOAD, WAIT, Guest, Import, load, payload_at

SEED = random.SystemRandom().getrandbits(32)

SUCCESS, BADF, FAULT, INTR, INVAL, IO, NOTDIR, NOTSOCK = 0, 8, 21, 27, 28, 29, 54, 57

KINDS = {
    "args_get": "i32 i32", "args_sizes_get": "i32 i32", "clock_res_get": "i32 i32", "clock_time_get": "i32 i64 i32",
    "environ_get": "i32 i32", "environ_sizes_get": "i32 i32", "fd_advise": "i32 i64 i64 i32",
    "fd_allocate": "i32 i64 i64", "fd_close": "i32", "fd_datasync": "i32", "fd_fdstat_get": "i32 i32",
    "fd_fdstat_set_flags": "i32 i32", "fd_fdstat_set_rights": "i32 i64 i64", "fd_filestat_get": "i32 i32",
    "fd_filestat_set_size": "i32 i64", "fd_filestat_set_times": "i32 i64 i64 i32", "fd_pread": "i32 i32 i32 i64 i32",
    "fd_prestat_dir_name": "i32 i32 i32", "fd_prestat_get": "i32 i32", "fd_pwrite": "i32 i32 i32 i64 i32",
    "fd_read": "i32 i32 i32 i32", "fd_readdir": "i32 i32 i32 i64 i32", "fd_renumber": "i32 i32",
    "fd_seek": "i32 i64 i32 i32", "fd_sync": "i32", "fd_tell": "i32 i32", "fd_write": "i32 i32 i32 i32",
    "path_create_directory": "i32 i32 i32", "path_filestat_get": "i32 i32 i32 i32 i32",
    "path_filestat_set_times": "i32 i32 i32 i32 i64 i64 i32", "path_link": "i32 i32 i32 i32 i32 i32 i32",
    "path_open": "i32 i32 i32 i32 i32 i64 i64 i32 i32", "path_readlink": "i32 i32 i32 i32 i32 i32",
    "path_remove_directory": "i32 i32 i32", "path_rename": "i32 i32 i32 i32 i32 i32",
    "path_symlink": "i32 i32 i32 i32 i32", "path_unlink_file": "i32 i32 i32", "poll_oneoff": "i32 i32 i32 i32",
    "proc_exit": "i32", "proc_raise": "i32", "random_get": "i32 i32", "sched_yield": "", "sock_accept": "i32 i32 i32",
    "sock_recv": "i32 i32 i32 i32 i32 i32", "sock_send": "i32 i32 i32 i32 i32", "sock_shutdown": "i32 i32",
}  # fmt: skip
IMPORTS = tuple(
    Import(wasi.MODULE, name, parameters, "" if name == "proc_exit" else "i32") for name, parameters in KINDS.items()
)
CLOCKS = {"realtime": 0, "monotonic": 1}
ABSOLUTE = 1
SUBSCRIPTION, EVENT = 48, 32  # bytes


@pytest.fixture
def host(compiled: Path) -> Iterator[PluginHost]:
    """Give a host in memory."""
    with Persistency(":memory:") as persistency, PluginHost(persistency, cache_dir=compiled) as opened:
        yield opened


@pytest.fixture
def guest(host: PluginHost) -> Guest:
    """Give a guest that imports all there is."""
    return load(host, "plugin", wasi=WasiGrant(), imports=IMPORTS)


def ask(
    guest: Guest, name: str, *numbers: int, payload: bytes = b"", timeout: float | None = None
) -> tuple[int, bytes]:
    """Have one function called; return its error number, and the memory from the payload's place on."""
    (result,), _, after = guest.memory_after((name, *numbers), payload=payload, function=name, timeout=timeout)
    return result, after[PAYLOAD:]


# -- what is there, and what isn't ------------------------------------------------------------------------------------


def test_all_of_preview_1_is_there_when_it_is_granted(guest: Guest) -> None:
    """A guest that imports every function of it loads, and those are the functions that are granted."""
    assert set(KINDS) == wasi.FUNCTIONS
    assert set(guest.plugin.functions) >= wasi.FUNCTIONS


def test_nothing_of_it_is_there_when_it_is_not(host: PluginHost) -> None:
    """Each function is refused by its name; so is one that preview 1 doesn't have, with the permission."""
    with pytest.raises(PermissionDenied) as caught:
        load(host, "plugin", imports=IMPORTS)
    assert set(caught.value.functions) == {f"{wasi.MODULE}.{name}" for name in KINDS}
    for other in (Import(wasi.MODULE, "sock_open", "i32", "i32"), Import("wasi_unstable", "fd_write", "", "i32")):
        with pytest.raises(PermissionDenied) as caught:
            load(host, "plugin", wasi=WasiGrant(), imports=(FAIL, other))
        assert caught.value.functions == (f"{other.module}.{other.name}",)


def test_the_clock_is_the_hosts(guest: Guest) -> None:
    """S1-55: the wall clock tells what the host's tells; the other one begins with the call, and goes on."""
    before = time.time_ns()
    result, memory = ask(guest, "clock_time_get", CLOCKS["realtime"], 1, PAYLOAD)
    assert result == SUCCESS
    assert before <= int.from_bytes(memory[:8], "little") <= time.time_ns()
    at = payload_at(2)
    results, _, after = guest.memory_after(
        *(("clock_time_get", CLOCKS["monotonic"], 1, at + place) for place in (0, 8))
    )
    first, second = struct.unpack_from("<QQ", after, at)
    assert results == [SUCCESS, SUCCESS]
    assert first <= second < WAIT * 1e9


def test_random_bytes_are_random(guest: Guest) -> None:
    """S1-55: as many as are asked for, and other ones each time."""
    found = [ask(guest, "random_get", PAYLOAD, 32) for _ in range(20)]
    assert {result for result, _ in found} == {SUCCESS}
    assert len({memory[:32] for _, memory in found}) == 20
    assert {memory[32:64] for _, memory in found} == {bytes((FILLING,)) * 32}


def test_random_bytes_fill_their_place_and_no_more(guest: Guest) -> None:
    """Of any length, over the edges of the pieces that are made at once too; a place outside is a fault."""
    end = guest.pages * PAGE_BYTES
    for size in (0, 1, 65_535, 65_536, 65_537):
        (result,), before, after = guest.memory_after(("random_get", 8_192, size), function="random_get")
        assert result == SUCCESS
        assert after[8_192 : 8_192 + size].count(FILLING) < max(1, size / 64)
        assert (after[:8_192], after[8_192 + size :]) == (before[:8_192], before[8_192 + size :])
    for at, size in ((end - 9, 10), (0, end + 1), (0, 2**32 - 1), (2**32 - 1, 1)):
        (result,), before, after = guest.memory_after(("random_get", at, size), function="random_get")
        assert (result, after) == (FAULT, before)


def test_there_are_no_arguments_and_no_environment(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the host's are seen; there are just none."""
    monkeypatch.setenv("PERSISTENCY_SECRET", "seen")
    for name in ("args_sizes_get", "environ_sizes_get"):
        result, memory = ask(guest, name, PAYLOAD, PAYLOAD + 4)
        assert (result, memory[:8]) == (SUCCESS, bytes(8))
    for name in ("args_get", "environ_get"):
        result, memory = ask(guest, name, PAYLOAD, PAYLOAD + 8)
        assert (result, set(memory[:1_000])) == (SUCCESS, {FILLING})


def test_there_are_no_files(guest: Guest) -> None:
    """No descriptor but the three of the streams is open, so no function that needs one does anything."""
    taking = [name for name in KINDS if name.startswith(("fd_", "path_", "sock_"))]
    for fd in (3, 4, 5, 10, 2**31 - 1):
        answers = {name: ask(guest, name, fd, *[0] * (len(KINDS[name].split()) - 1))[0] for name in taking}
        assert set(answers.values()) <= {BADF, INVAL, NOTSOCK}, answers
    path = b"etc/passwd"
    for fd in range(8):
        result, _ = ask(guest, "path_open", fd, 0, PAYLOAD, len(path), 0, 2, 2, 0, PAYLOAD + 16, payload=path)
        assert result in (BADF, NOTDIR)
        assert ask(guest, "fd_prestat_get", fd, PAYLOAD)[0] == BADF
    result, memory = ask(guest, "fd_read", 0, PAYLOAD, 1, PAYLOAD + 8, payload=struct.pack("<II", PAYLOAD + 16, 100))
    assert (result, memory[8:12], set(memory[16:116])) == (SUCCESS, bytes(4), {FILLING})  # it is at its end


def test_there_are_no_sockets(guest: Guest) -> None:
    """None can be made, and none of the streams is one."""
    for fd in range(4):
        for name in ("sock_accept", "sock_recv", "sock_send", "sock_shutdown"):
            assert ask(guest, name, fd, *[0] * (len(KINDS[name].split()) - 1))[0] in (BADF, INVAL, NOTSOCK)


def test_an_exit_is_the_end_of_a_call(guest: Guest) -> None:
    """A guest that ends itself is told as such, and ends nothing else."""
    for status in (0, 1):
        with pytest.raises(PluginTrapped) as caught:
            guest.memory_after(("proc_exit", status), ("random_get", 0, 0))
        assert caught.value.reason == "exit"
    assert ask(guest, "sched_yield")[0] == SUCCESS


# -- output -----------------------------------------------------------------------------------------------------------


def writing(*writes: tuple[int, bytes]) -> tuple[list[tuple[Any, ...]], bytes]:
    """Return steps that write to streams, and the payload they are written from; how much was taken comes first."""
    at = payload_at(len(writes))
    buffers_at = at + 4 * len(writes)
    data_at = buffers_at + 8 * len(writes)
    steps: list[tuple[Any, ...]] = []
    buffers, data = b"", b""
    for number, (fd, text) in enumerate(writes):
        buffers += struct.pack("<II", data_at + len(data), len(text))
        data += text
        steps.append(("fd_write", fd, buffers_at + 8 * number, 1, at + 4 * number))
    return steps, bytes(4 * len(writes)) + buffers + data


def write(guest: Guest, *writes: tuple[int, bytes]) -> list[int]:
    """Write in one call; return how many bytes of each were taken."""
    steps, payload = writing(*writes)
    results, _, after = guest.memory_after(*steps, payload=payload)
    assert set(results) == {SUCCESS}
    return list(struct.unpack_from(f"<{len(writes)}I", after, payload_at(len(writes))))


class Output(logging.Handler):
    """The records of what guests wrote: streams and texts, by plugin."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.__dict__["persistency_event"].startswith("guest_output"):
            self.records.append(record)

    def lines(self, plugin: str = "plugin") -> list[tuple[str, str]]:
        """Return (stream, text) of a plugin's lines, and forget all records."""
        found = [each.__dict__ for each in self.records if each.__dict__["persistency_plugin"] == plugin]
        self.records.clear()
        return [
            (each.get("persistency_stream", ""), str(each["message"]).partition(": ")[2] or each["message"])
            for each in found
        ]


@pytest.fixture
def output() -> Iterator[Output]:
    """Listen to what guests write, as a service would."""
    handler = Output()
    handler.setFormatter(logging.Formatter())
    handler.addFilter(lambda record: record.__dict__.update(message=record.getMessage()) or True)
    log = logging.getLogger("persistency.plugins")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def test_what_a_guest_writes_is_logged_by_lines(guest: Guest, output: Output) -> None:
    """S1-48: a record for each line, when it is whole; at the end of the call the rest of one; empty ones are none."""
    assert write(guest, (1, b"one\ntw"), (2, b"other\n"), (1, b"o\n\n  \nthree\r\n"), (2, b"left")) == [6, 6, 13, 4]
    assert output.lines() == [
        ("stdout", "one"), ("stderr", "other"), ("stdout", "two"), ("stdout", "three"), ("stderr", "left"),
    ]  # fmt: skip
    write(guest, (1, "grüße ✓\n".encode()))
    assert output.lines() == [("stdout", "grüße ✓")]


def test_a_record_says_who_wrote_it(guest: Guest, output: Output) -> None:
    """Its text and its fields name the plugin and the stream; its level is INFO."""
    write(guest, (2, b"hello"))
    [record] = output.records
    assert record.getMessage() == "plugin 'plugin', stderr: hello"
    assert record.levelno == logging.INFO
    fields = {name: value for name, value in record.__dict__.items() if name.startswith("persistency_")}
    assert fields == {
        "persistency_event": "guest_output", "persistency_job": None, "persistency_plugin": "plugin",
        "persistency_stream": "stderr",
    }  # fmt: skip


def test_a_line_is_printable_and_nothing_else(guest: Guest, output: Output) -> None:
    """Escape sequences, NUL, line breaks of other kinds and what isn't UTF-8 can't be taken for what they aren't."""
    write(guest, (1, b"\x1b[2Ja\rb\0c\x7f\n"), (1, "d\u2028e\u202ef\x85g\n".encode()), (1, b"h\xff\xc3\n\ti\tj\n"))
    assert [text for _, text in output.lines()] == [
        r"\x1b[2Ja\rb\x00c\x7f", r"d\u2028e\u202ef\x85g", r"h\xff\xc3", "\ti\tj",
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_a_long_line_is_cut_off(parts: int, guest: Guest, output: Output) -> None:
    """Its beginning is told, and that it went on; what comes behind it is the next line, however it was written."""
    line = b"x" * (LINE_BYTES_MAX + 900) + b"\nnext\n" + b"y" * LINE_BYTES_MAX + b"\n"
    size = -(-len(line) // parts)
    write(guest, *((1, line[at : at + size]) for at in range(0, len(line), size)))
    assert output.lines() == [
        ("stdout", "x" * LINE_BYTES_MAX + " ..."), ("stdout", "next"), ("stdout", "y" * LINE_BYTES_MAX),
    ]  # fmt: skip


def test_a_long_line_that_ends_with_another_write_is_cut_off_too(guest: Guest, output: Output) -> None:
    """What shows that a line went on is kept until it ends."""
    write(guest, (1, b"x" * (LINE_BYTES_MAX + 1)), (1, b"\n"), (2, b"y" * LINE_BYTES_MAX), (2, b"\n"))
    assert output.lines() == [("stdout", "x" * LINE_BYTES_MAX + " ..."), ("stderr", "y" * LINE_BYTES_MAX)]


def test_a_line_without_an_end_costs_no_more_than_is_told_of_it(output: Output) -> None:
    """A guest that writes and writes, without an end of a line or with nothing else, fills no memory of its host."""
    made = wasi.Output("plugin")
    tracemalloc.start()
    try:
        for data in (b"x" * 16_384, b"\n" * 16_384):
            for _ in range(500):
                made.write("stdout", data)
        made.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert output.lines() == [("stdout", "x" * LINE_BYTES_MAX + " ...")]


def test_so_many_lines_are_logged_and_the_rest_counted(guest: Guest, output: Output) -> None:
    """Both streams count together; each call has lines of its own."""
    for _ in range(2):
        write(guest, (1, b"a\n" * 60), (2, b"b\n" * 60), (1, b"c\n" * 5_000), (2, b"end"))
        lines = output.lines()
        assert lines[:-1] == [("stdout", "a")] * 60 + [("stderr", "b")] * (LINES_PER_CALL_MAX - 60)
        assert lines[-1] == ("", "plugin 'plugin' wrote 5021 more lines, which are left out")


def test_what_was_written_before_the_end_is_not_lost(guest: Guest, output: Output) -> None:
    """S1-48: a guest that exits, or traps, has told what it had to say, also in a line without an end."""
    steps, payload = writing((2, b"panicked at src/lib.rs:1"), (1, b"x"))
    with pytest.raises(PluginTrapped):
        guest.memory_after(steps[0], ("proc_exit", 3), payload=payload)
    assert output.lines() == [("stderr", "panicked at src/lib.rs:1")]
    with pytest.raises(CallFailed, match="out of bounds"):  # of wasmtime's own functions
        guest.memory_after(steps[0], ("args_sizes_get", 2**32 - 16, 96), payload=payload)
    assert output.lines() == [("stderr", "panicked at src/lib.rs:1")]


def test_plugins_at_once_have_their_own_output(host: PluginHost, output: Output) -> None:
    """Calls in several threads, of two plugins: each line is of the plugin and the call that wrote it, and whole."""
    guests = [load(host, name, wasi=WasiGrant(), imports=IMPORTS) for name in ("a", "b")]

    def work(number: int) -> None:
        text = b"%d." % number
        write(guests[number % 2], *[(1, text)] * 20, (1, b"\n"), (2, text))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(40))) == [None] * 40
    told = [
        (each.__dict__["persistency_plugin"], text) for each, text in zip(output.records, texts(output), strict=True)
    ]
    expected = Counter({("ab"[number % 2], f"{number}." * count): 1 for number in range(40) for count in (20, 1)})
    assert Counter(told) == expected


def texts(output: Output) -> list[str]:
    """Return what was written, of all plugins."""
    return [each.getMessage().partition(": ")[2] for each in output.records]


def test_where_nobody_listens_nothing_is_logged(guest: Guest, output: Output) -> None:
    """With the logger's level above INFO the guest writes as before, and no record is made."""
    logging.getLogger("persistency.plugins").setLevel(logging.WARNING)
    assert write(guest, (1, b"unheard\n" * 200), (2, b"rest")) == [1_600, 4]
    assert output.records == []


def test_a_log_that_fails_is_an_error_of_the_write_alone(guest: Guest, output: Output) -> None:
    """A filter that raises makes the write fail, and neither the call, nor the next one, nor the end of a line."""

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError(f"not {record.getMessage()!r}")

    steps, payload = writing((1, b"line\n"), (1, b"rest"))
    output.addFilter(refuse)
    results, _, _ = guest.memory_after(*steps, payload=payload)
    assert results == [IO, SUCCESS]
    output.removeFilter(refuse)
    assert write(guest, (1, b"heard")) == [5]
    assert output.lines() == [("stdout", "heard")]


def test_a_write_is_taken_in_parts(guest: Guest, output: Output) -> None:
    """Several buffers are one text; a large one is taken in part, as POSIX allows; none at all is fine too."""
    at = PAYLOAD + 24
    buffers = struct.pack("<6I", at, 3, at, 0, at + 3, 4)
    result, memory = ask(guest, "fd_write", 1, PAYLOAD, 3, PAYLOAD + 100, payload=buffers + b"onetwo\n")
    assert (result, memory[100:104]) == (SUCCESS, struct.pack("<I", 7))
    assert ask(guest, "fd_write", 1, PAYLOAD, 0, PAYLOAD + 4)[0] == SUCCESS
    assert ask(guest, "fd_write", 1, PAYLOAD, 1, PAYLOAD + 8, payload=bytes(8))[0] == SUCCESS
    assert output.lines() == [("stdout", "onetwo")]
    taken = write(guest, (1, b"x" * 50_000))
    assert 0 < taken[0] < 50_000
    buffers = struct.pack("<II", 0, PAGE_BYTES) * 1_024
    assert ask(guest, "fd_write", 2, PAYLOAD, 1_024, PAYLOAD - 4, payload=buffers)[0] == SUCCESS


def test_a_write_to_nowhere_is_refused(guest: Guest, output: Output) -> None:
    """Other descriptors, buffers outside of the memory and too many of them are error numbers; nothing is logged."""
    end = guest.pages * PAGE_BYTES
    good = struct.pack("<II", PAYLOAD, 8)
    for fd in (0, 3, 2**32 - 1):
        assert ask(guest, "fd_write", fd, PAYLOAD, 1, PAYLOAD + 8, payload=good)[0] == BADF
    for buffers, count, written in (
        (end, 1, 0), (end - 4, 1, 0), (2**32 - 8, 1, 0), (end - 8_000, 1_024, 0), (PAYLOAD, 1, end - 3),
        (PAYLOAD, 1, 2**32 - 1),
    ):  # fmt: skip
        assert ask(guest, "fd_write", 1, buffers, count, written, payload=good)[0] == FAULT
    for place in ((end, 1), (end - 1, 2), (0, end + 1), (2**32 - 1, 2**32 - 1)):
        assert ask(guest, "fd_write", 1, PAYLOAD, 1, PAYLOAD + 8, payload=struct.pack("<II", *place))[0] == FAULT
    assert ask(guest, "fd_write", 1, 0, 1_025, 0)[0] == INVAL
    assert output.records == []


# -- sleeping ---------------------------------------------------------------------------------------------------------


def clock(userdata: int, nanoseconds: int, which: str = "monotonic", flags: int = 0) -> bytes:
    """Return a subscription to a clock."""
    return struct.pack("<Q B 7x I 4x Q Q H 6x", userdata, 0, CLOCKS[which], nanoseconds, 0, flags)


def file(userdata: int, kind: int, fd: int) -> bytes:
    """Return a subscription to a file: kind 1 to read it, 2 to write it."""
    return struct.pack("<Q B 7x I 28x", userdata, kind, fd)


def poll(guest: Guest, *wanted: bytes, timeout: float | None = None) -> tuple[int, list[tuple[int, ...]]]:
    """Poll for things; return the error number, and (userdata, error, kind, flags) of each event."""
    assert all(len(each) == SUBSCRIPTION for each in wanted)
    at = PAYLOAD + SUBSCRIPTION * len(wanted)
    count_at = at + EVENT * len(wanted)
    result, memory = ask(
        guest, "poll_oneoff", PAYLOAD, at, len(wanted), count_at, payload=b"".join(wanted), timeout=timeout
    )
    if result != SUCCESS:
        assert set(memory[at - PAYLOAD : count_at + 4 - PAYLOAD]) <= {FILLING}
        return result, []
    count = int.from_bytes(memory[count_at - PAYLOAD : count_at - PAYLOAD + 4], "little")
    events = memory[at - PAYLOAD : at - PAYLOAD + EVENT * count]
    return result, [
        (userdata, error, kind, flags)
        for userdata, error, kind, _, flags in struct.iter_unpack("<Q H B 5x Q H 6x", events)
    ]


@pytest.mark.parametrize("which", CLOCKS)
def test_a_sleep_lasts_as_long_as_it_is_told(which: str, guest: Guest) -> None:
    """By either clock: not less than that, and the event says whose it was."""
    before = time.monotonic_ns()
    assert poll(guest, clock(77, 20_000_000, which)) == (SUCCESS, [(77, 0, 0, 0)])
    assert time.monotonic_ns() - before >= 20_000_000


def test_a_sleep_ends_at_a_time(guest: Guest) -> None:
    """A time on either clock: one that is over is no sleep, one to come is reached, and none ends before."""
    until = time.time_ns() + 20_000_000
    assert poll(guest, clock(1, until, "realtime", ABSOLUTE)) == (SUCCESS, [(1, 0, 0, 0)])
    assert time.time_ns() >= until
    for which in CLOCKS:
        assert poll(guest, clock(2, 1, which, ABSOLUTE)) == (SUCCESS, [(2, 0, 0, 0)])


def test_the_monotonic_clock_is_the_one_that_is_told(guest: Guest) -> None:
    """A guest that sleeps until a time of that clock finds the clock there; to do so once more is no sleep."""
    until = 20_000_000  # after the call's beginning
    at = payload_at(3)
    told_at, events_at, count_at = at + 2 * SUBSCRIPTION, at + 200, at + 300
    results, _, after = guest.memory_after(
        ("poll_oneoff", at, events_at, 1, count_at),
        ("clock_time_get", CLOCKS["monotonic"], 1, told_at),
        ("poll_oneoff", at, events_at, 2, count_at),
        payload=clock(1, until, "monotonic", ABSOLUTE) + clock(2, until // 2),
    )
    assert results == [SUCCESS] * 3
    assert int.from_bytes(after[told_at : told_at + 8], "little") >= until
    assert int.from_bytes(after[events_at : events_at + 8], "little") == 1  # and not the other one, which comes later


def test_the_first_of_several_ends_the_sleep(guest: Guest) -> None:
    """Events of all that have come about, and of no others; those needn't be the first that were named."""
    hour = 3_600 * 10**9
    assert poll(guest, clock(1, hour), clock(2, 1_000), clock(3, hour, "realtime")) == (SUCCESS, [(2, 0, 0, 0)])
    assert poll(guest, clock(1, 0), clock(2, 0), clock(3, hour)) == (SUCCESS, [(1, 0, 0, 0), (2, 0, 0, 0)])


def test_of_files_the_streams_are_ready(guest: Guest) -> None:
    """At once, whatever clock is beside them: stdin at its end, the others to be written; all others are no files."""
    hour = 3_600 * 10**9
    assert poll(guest, clock(1, hour), file(2, 1, 0)) == (SUCCESS, [(2, SUCCESS, 1, 1)])
    assert poll(guest, file(3, 2, 1), clock(1, hour), file(4, 2, 2)) == (SUCCESS, [(3, 0, 2, 0), (4, 0, 2, 0)])
    for kind, fd in ((1, 1), (2, 0), (1, 3), (2, 3), (2, 2**32 - 1)):
        assert poll(guest, file(5, kind, fd)) == (SUCCESS, [(5, BADF, kind, 0)])


def test_what_cannot_be_waited_for_is_refused(guest: Guest) -> None:
    """No subscription, a clock or a kind there isn't, and places outside of the memory."""
    assert poll(guest)[0] == INVAL
    assert poll(guest, b"\xa5" * SUBSCRIPTION) == (INVAL, [])
    unknown = struct.pack("<Q B 7x I 4x Q Q H 6x", 9, 0, 2, 3_600 * 10**9, 0, 0)
    assert poll(guest, unknown) == (SUCCESS, [(9, INVAL, 0, 0)])
    end = guest.pages * PAGE_BYTES
    for numbers in (
        (end - 47, 0, 1, 0), (0, end - 31, 1, 0), (0, 0, 1, end - 3), (0, 0, 2**32 - 1, 0), (2**32 - 1, 0, 1, 0),
        (0, 2**32 - 32, 1, 0), (0, 0, 10_000, 0),
    ):  # fmt: skip
        assert ask(guest, "poll_oneoff", *numbers)[0] == FAULT
    assert ask(guest, "poll_oneoff", 0, 0, 1_025, 0)[0] == INVAL


@pytest.mark.parametrize(
    "wanted",
    [
        clock(1, 2**64 - 1), clock(1, 10**18, "realtime"), clock(1, 2**64 - 1, "realtime", ABSOLUTE),
        clock(1, 10**18, "monotonic", ABSOLUTE),
    ],
    ids=["relative", "realtime", "at a time", "at a monotonic time"],
)  # fmt: skip
def test_no_sleep_is_longer_than_the_call(wanted: bytes, guest: Guest) -> None:
    """However far away the time is: the call ends when its time is over, and the next one finds nobody asleep."""
    try:
        result, _ = poll(guest, wanted, timeout=0.1)
    except PluginTimeout:
        result = INTR
    assert result == INTR
    assert ask(guest, "sched_yield")[0] == SUCCESS


class Calling:
    """A guest that is called on the test's own thread, without a host: its memory, and a function for each of ours."""

    def __init__(self) -> None:
        engine = wasmtime.Engine()
        linker = wasmtime.Linker(engine)
        wasi.define(linker)
        self.store = wasmtime.Store(engine)
        self._config = wasi.config("plugin")
        self.store.set_wasi(self._config)
        self._exports = linker.instantiate(self.store, wasmtime.Module(engine, CALLING)).exports(self.store)
        memory = self._exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        self.memory = memory

    def __call__(self, name: str) -> int:
        function = self._exports[name]
        assert isinstance(function, wasmtime.Func)
        return int(function(self.store))

    def read(self) -> bytes:
        """Return all the memory."""
        return bytes(self.memory.read(self.store))

    def close(self) -> None:
        """Give it back."""
        current.call = None
        self.store.close()
        self._config.close()


CALLING = """(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 100)
  (data (i32.const 200) "\\d0\\00\\00\\00\\06\\00\\00\\00hello\\n")
  (func (export "sleep") (result i32)
    (call $poll (i32.const 0) (i32.const 48) (i32.const 1) (i32.const 80)))
  (func (export "random") (result i32) (call $random (i32.const 1024) (i32.const 6400000)))
  (func (export "write") (result i32)
    (call $write (i32.const 1) (i32.const 200) (i32.const 1) (i32.const 220))))"""


@pytest.fixture
def calling() -> Iterator[Calling]:
    """Give that guest."""
    made = Calling()
    yield made
    made.close()


def test_a_sleep_ends_when_the_end_of_its_call_is_moved(calling: Calling) -> None:
    """INTR, at once when the call is over, and soon when it is while the guest sleeps; nothing is written."""
    calling.memory.write(calling.store, bytearray(clock(1, 10**18)))
    current.call = CallContext(0.0)
    assert calling("sleep") == INTR
    current.call = call = CallContext(time.monotonic() + 1_000)  # longer than any test may take
    cut_short = threading.Timer(0.01, setattr, (call, "deadline", 0.0))
    cut_short.start()
    assert calling("sleep") == INTR
    cut_short.join(WAIT)
    assert not any(calling.memory.read(calling.store, SUBSCRIPTION, 100))
    current.call = None
    assert calling("sleep") == IO  # outside of any call: that can't be, and isn't raised through the guest
    assert calling("random") == IO


def test_random_bytes_end_when_the_call_is_over(calling: Calling, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of megabytes: INTR after the piece that was being made, and the rest is as it was."""
    current.call = call = CallContext(time.monotonic() + 1_000)  # longer than any test may take
    made: list[int] = []

    def some(size: int) -> bytes:
        made.append(size)
        if len(made) == 3:
            call.deadline = 0.0
        return b"r" * size

    monkeypatch.setattr(wasi.os, "urandom", some)
    assert calling("random") == INTR
    assert (set(made), len(made)) == ({65_536}, 3)
    assert calling.read().count(b"r") == 3 * 65_536
    current.call = CallContext(time.monotonic() + WAIT)
    assert calling("random") == SUCCESS
    assert calling.read().count(b"r") == sum(made[3:]) == 6_400_000


@pytest.mark.parametrize("name", ["sleep", "random", "write"])
@pytest.mark.parametrize("ended", [0.0, -1.0])
def test_a_call_that_is_over_gets_nothing_done(name: str, ended: float, calling: Calling, output: Output) -> None:
    """INTR, and nothing is written, slept or logged: with a time that is over, and when all calls are to end."""
    current.call = CallContext(time.monotonic() + ended if ended else 0.0)
    calling.memory.write(calling.store, bytearray(clock(1, 0)))
    before = calling.read()
    assert calling(name) == INTR
    assert calling.read() == before
    assert texts(output) == []
    current.call = CallContext(time.monotonic() + WAIT)
    assert calling(name) == SUCCESS
    assert calling.read() != before
    assert texts(output) == (["hello"] if name == "write" else [])


# -- wild arguments ---------------------------------------------------------------------------------------------------


def wild(source: random.Random, end: int) -> int:
    """Return a number that may be a pointer, a length, or anything."""
    edges = (0, 1, 2, 48, PAYLOAD, PAYLOAD + 8, end - 48, end - 1, end, end + 1, 2**31, 2**32 - 1)
    return source.choice([*edges, source.randrange(end), source.getrandbits(32)])


def test_wild_arguments_write_nothing_but_what_was_asked(guest: Guest, output: Output) -> None:
    """3,000 tuples for two functions of ours: error numbers, and no byte that isn't the answer's has changed."""
    print(f"seed {SEED}")
    source, end = random.Random(SEED), guest.pages * PAGE_BYTES
    outcomes = Counter[tuple[str, int]]()
    for number in range(3_000):
        name = source.choice(["fd_write", "poll_oneoff"])
        payload = source.choice([clock(1, 0), struct.pack("<II", PAYLOAD, 40) * 6, file(1, 2, 1), source.randbytes(48)])
        numbers = [wild(source, end) for _ in range(4)]
        if name == "fd_write":
            numbers[0] = source.choice([1, 2, 1, 2, 3])
            numbers[2] = source.choice([0, 1, 2, 6, numbers[2]])
        else:
            numbers[2] = source.choice([1, 1, numbers[2]])
        if source.random() < 0.5:
            numbers[0 if name == "poll_oneoff" else 1] = PAYLOAD
        at = f"seed {SEED}, call {number}: {name}{tuple(numbers)}"
        try:
            step = (name, *numbers)
            (result,), before, after = guest.memory_after(step, payload=payload, function=name, timeout=3)
        except PluginTimeout:  # anything may be taken for a clock that is years away
            assert name == "poll_oneoff", at
            continue
        assert result in (SUCCESS, BADF, FAULT, INTR, INVAL), at
        outcomes[name, result] += 1
        mine = [slice(PAYLOAD - 8, PAYLOAD)]  # where the guest has put the result
        if result == SUCCESS:
            mine.append(slice(numbers[3], numbers[3] + 4))
            if name == "poll_oneoff":
                mine.append(slice(numbers[1], numbers[1] + EVENT * numbers[2]))
        masked = bytearray(after)
        for place in mine:
            masked[place] = before[place]
        assert masked == before, at
    assert {(name, result) for name in ("fd_write", "poll_oneoff") for result in (SUCCESS, FAULT, INVAL)} <= set(
        outcomes
    )


# -- the process ------------------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, sys
from persistency import Persistency
from persistency.plugins import PluginHost, WasiGrant
from tests.plugins.guests import load
from tests.test_plugins_wasi import IMPORTS, clock, poll, write

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
persistency = Persistency(":memory:")
host = PluginHost(persistency, call_timeout=1_000)
guest = load(host, "plugin", wasi=WasiGrant(), imports=IMPORTS)
write(guest, (1, b"hello\\n" * 50), (2, b"rest"))
poll(guest, clock(1, 1))
if os.path.isdir("/proc/self/task"):
    names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
    print("threads", sorted(set(names)))
"""
ASLEEP = """
from persistency.plugins.context import current
import persistency.plugins.wasi as wasi, threading
asleep, sleep = threading.Event(), wasi._sleep
def telling(call, end_ns):
    asleep.set()
    return sleep(call, end_ns)
wasi._sleep = telling
def sleep_for_days():
    try:
        poll(guest, clock(1, 10**15))
    except Exception:
        pass  # it is stopped, or this thread is, whichever comes first
threading.Thread(target=sleep_for_days, daemon=True).start()
assert asleep.wait(30)
print("asleep")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, beside this one."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=PROJECT, check=False
    )


def test_a_process_that_had_output_ends_in_peace() -> None:
    """Output needs no thread that isn't ours, which could come out of nowhere when the interpreter is gone."""
    ended = run(PROGRAM)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("plugin 'plugin', stdout: hello") == 50
    assert "plugin 'plugin', stderr: rest" in ended.stdout
    assert "tokio" not in ended.stdout


def test_a_process_ends_though_a_guest_is_asleep() -> None:
    """A guest that sleeps for days is woken, and stopped, before the interpreter goes away."""
    ended = run(PROGRAM + ASLEEP)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == "asleep"
