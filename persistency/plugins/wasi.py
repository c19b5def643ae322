"""The wasi permission: a clock, randomness, and output that becomes lines in the host's log; nothing else.

It is wasmtime's WASI preview 1 with no arguments, no environment, no files and no sockets: those functions are there,
because the libraries of languages ask for them, and answer that there is nothing. Three of them are ours:

- `fd_write`. wasmtime would hand output to Python in threads of its own, which abort the process if it ends just then.
- `poll_oneoff`. wasmtime's sleeps for as long as it is told, and nothing interrupts a guest that is in there. Ours
  sleeps until the end of the call at most, and then answers `INTR`. Of files only the three that are always there are
  ever ready.
- `random_get`. wasmtime's fills gigabytes at one go, and nothing interrupts a guest that is in there. Ours looks at the
  time after each piece.

Rules:
  1. A call has its own output: so many lines, of so many bytes, and then it is only counted.
  2. What a guest writes reaches the log as printable characters, a record for each line, with the plugin's id.
  3. Our functions never raise: what nobody foresaw is kept in the call's context, and the guest gets `IO`. When the
     call is over they do nothing: the guest gets `INTR`, and is stopped at its next loop or call of its own.

Doesn't know: which plugin may have it, how a call is made, where the log goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from wasmtime import Caller, FuncType, Linker, Memory, ValType, WasiConfig

from persistency.logfields import about
from persistency.plugins import abi
from persistency.plugins.context import CallContext, current
from persistency.plugins.guestmemory import Fault, GuestMemory
from persistency.plugins.services import SLICE_S, printable

log: logging.Logger = logging.getLogger("persistency.plugins")

MODULE: Final = "wasi_snapshot_preview1"
FUNCTIONS: Final = frozenset(
    """
    args_get args_sizes_get clock_res_get clock_time_get environ_get environ_sizes_get fd_advise fd_allocate fd_close
    fd_datasync fd_fdstat_get fd_fdstat_set_flags fd_fdstat_set_rights fd_filestat_get fd_filestat_set_size
    fd_filestat_set_times fd_pread fd_prestat_dir_name fd_prestat_get fd_pwrite fd_read fd_readdir fd_renumber fd_seek
    fd_sync fd_tell fd_write path_create_directory path_filestat_get path_filestat_set_times path_link path_open
    path_readlink path_remove_directory path_rename path_symlink path_unlink_file poll_oneoff proc_exit proc_raise
    random_get sched_yield sock_accept sock_recv sock_send sock_shutdown
    """.split()  # noqa: SIM905  # a list would take a line for each
)

LINES_PER_CALL_MAX: Final = 100
LINE_BYTES_MAX: Final = 4_096
_WRITE_BYTES_MAX = 16_384  # taken by one `fd_write`; libraries write the rest by another
_BUFFERS_MAX = 1_024  # of one `fd_write`, and subscriptions of one `poll_oneoff`
_RANDOM_BYTES = 65_536  # between two looks at the time

# WASI's error numbers.
_SUCCESS, _BADF, _FAULT, _INTR, _INVAL, _IO = 0, 8, 21, 27, 28, 29

_STREAMS = {1: "stdout", 2: "stderr"}
_SUBSCRIPTION = struct.Struct("<Q B 7x I 4x Q Q H 6x")  # userdata, kind; of a clock: which, timeout, precision, flags
_EVENT = struct.Struct("<Q H B 5x Q H 6x")  # userdata, error, kind; of a file: bytes, flags
_CLOCK, _READ, _WRITE = 0, 1, 2  # kinds of subscriptions
_REALTIME, _MONOTONIC = 0, 1
_ABSOLUTE = 1
_HANGUP = 1


class _Here(threading.local):
    """What belongs to the call on this thread: it stays there from its beginning to its end."""

    output: Output | None = None
    begun_ns = 0  # on the host's monotonic clock: when the guest's was 0


_here = _Here()


def define(linker: Linker) -> None:
    """Give a linker what the permission grants. A call then needs a `config`."""
    linker.define_wasi()
    linker.allow_shadowing = True
    kind = FuncType([ValType.i32()] * 4, [ValType.i32()])
    linker.define_func(MODULE, "fd_write", kind, _guarded(_fd_write), access_caller=True)
    linker.define_func(MODULE, "poll_oneoff", kind, _guarded(_poll_oneoff), access_caller=True)
    kind = FuncType([ValType.i32()] * 2, [ValType.i32()])
    linker.define_func(MODULE, "random_get", kind, _guarded(_random_get), access_caller=True)
    linker.allow_shadowing = False


def config(plugin_id: str) -> WasiConfig:
    """Return what the store of one call gets; to be made by the thread that makes the call, and closed after it."""
    return _Config(plugin_id)


class _Config(WasiConfig):
    """WASI as wasmtime has it when it is told nothing: empty. Its `close` ends the call's output."""

    def __init__(self, plugin_id: str) -> None:
        super().__init__()
        self._output = _here.output = Output(plugin_id)
        _here.begun_ns = time.monotonic_ns()

    def close(self) -> None:
        if _here.output is self._output:
            _here.output = None
        with contextlib.suppress(Exception):  # a filter that fails is no reason for a call to fail
            self._output.close()
        super().close()


class Output:
    """The output of one call, as it becomes lines."""

    def __init__(self, plugin_id: str) -> None:
        self._plugin_id = plugin_id
        self._begun = dict.fromkeys(_STREAMS.values(), b"")
        self._told = 0
        self._left_out = 0

    def write(self, stream: str, data: bytes) -> None:
        """Take in what the guest wrote, and log the lines that are whole."""
        *lines, rest = (self._begun[stream] + data).split(b"\n")
        self._begun[stream] = rest[: LINE_BYTES_MAX + 1]  # one more than is told, so that it shows that there was more
        for line in lines:
            self._tell(stream, line)

    def close(self) -> None:
        """Log what is left: lines without an end, and how many there was no room for."""
        begun, self._begun = self._begun, dict.fromkeys(_STREAMS.values(), b"")
        for stream, line in begun.items():
            self._tell(stream, line)
        left_out, self._left_out = self._left_out, 0
        if left_out:
            log.info(
                "plugin %r wrote %d more lines, which are left out", self._plugin_id, left_out,
                extra=about("guest_output_left_out", None, plugin=self._plugin_id, lines=left_out),
            )  # fmt: skip

    def _tell(self, stream: str, line: bytes) -> None:
        if not line.strip():
            return
        if self._told == LINES_PER_CALL_MAX:
            self._left_out += 1
            return
        self._told += 1
        if log.isEnabledFor(logging.INFO):
            log.info(
                "plugin %r, %s: %s", self._plugin_id, stream, _shown(line),
                extra=about("guest_output", None, plugin=self._plugin_id, stream=stream),
            )  # fmt: skip


def _shown(line: bytes) -> str:
    """Return a line as it is logged."""
    text = printable(line[:LINE_BYTES_MAX].decode(errors="backslashreplace").rstrip())
    return f"{text} ..." if len(line) > LINE_BYTES_MAX else text


def _guarded(body: Callable[..., int]) -> Callable[..., int]:
    """Return a function for wasmtime that never raises."""

    def guarded(caller: Caller, *arguments: int) -> int:
        try:
            if current.call is not None and not current.call.remaining():
                return _INTR
            memory = caller.get(abi.MEMORY)
            if not isinstance(memory, Memory):
                return _FAULT
            return body(GuestMemory(caller, memory), *(argument & 0xFFFF_FFFF for argument in arguments))
        except Fault:
            return _FAULT
        except BaseException as error:
            if current.call is not None:
                current.call.fault = error.with_traceback(None)  # its frames hold the caller
            return _IO

    return guarded


def _fd_write(memory: GuestMemory, fd: int, buffers_at: int, buffers: int, written_at: int) -> int:
    """Take what a guest writes to stdout or stderr, or the beginning of it, and say how much that was."""
    memory.check(written_at, 4)
    if fd not in _STREAMS:
        return _BADF
    if buffers > _BUFFERS_MAX:
        return _INVAL
    output = _here.output
    assert output is not None, "no config was made on this thread"
    data = b""
    for at, size in struct.iter_unpack("<II", memory.read(buffers_at, 8 * buffers)):
        memory.check(at, size)
        data += memory.read(at, min(size, _WRITE_BYTES_MAX - len(data)))
    output.write(_STREAMS[fd], data)
    memory.write(written_at, struct.pack("<I", len(data)))
    return _SUCCESS


def _random_get(memory: GuestMemory, at: int, size: int) -> int:
    """Fill a place with random bytes; when the call is over in the middle of it, the rest is left as it is."""
    memory.check(at, size)
    call = current.call
    assert call is not None, "no call is noted down for this thread"
    for place in range(at, at + size, _RANDOM_BYTES):
        if not call.remaining():
            return _INTR
        memory.write(place, os.urandom(min(_RANDOM_BYTES, at + size - place)))
    return _SUCCESS


def _poll_oneoff(memory: GuestMemory, wanted_at: int, events_at: int, count: int, events_count_at: int) -> int:
    """Wait until one of the things wanted has come about, or the call is over, and say which have."""
    memory.check(wanted_at, count * _SUBSCRIPTION.size)
    memory.check(events_at, count * _EVENT.size)
    memory.check(events_count_at, 4)
    if not 0 < count <= _BUFFERS_MAX:
        return _INVAL
    call = current.call
    assert call is not None, "no call is noted down for this thread"
    events = []
    clocks: list[tuple[int, int]] = []
    for userdata, kind, which, timeout_ns, _precision, flags in _SUBSCRIPTION.iter_unpack(
        memory.read(wanted_at, count * _SUBSCRIPTION.size)
    ):
        if kind == _CLOCK and which in (_REALTIME, _MONOTONIC):
            clocks.append((_end_ns(which, timeout_ns, flags), userdata))
        elif kind in (_CLOCK, _READ, _WRITE):
            events.append(_at_once(userdata, kind, which))
        else:
            return _INVAL
    if clocks and not events and not _sleep(call, min(clocks)[0]):
        return _INTR
    now_ns = time.monotonic_ns()
    events += [_EVENT.pack(userdata, _SUCCESS, _CLOCK, 0, 0) for end_ns, userdata in clocks if end_ns <= now_ns]
    memory.write(events_at, b"".join(events))
    memory.write(events_count_at, struct.pack("<I", len(events)))
    return _SUCCESS


def _end_ns(clock: int, timeout_ns: int, flags: int) -> int:
    """Return when a clock's time has come, on the host's monotonic clock."""
    now_ns = time.monotonic_ns()
    if not flags & _ABSOLUTE:
        return now_ns + timeout_ns
    return timeout_ns + (_here.begun_ns if clock == _MONOTONIC else now_ns - time.time_ns())


def _at_once(userdata: int, kind: int, which: int) -> bytes:
    """Return the event of what needn't be waited for: a file that is always ready, or an error."""
    if kind == _CLOCK:
        return _EVENT.pack(userdata, _INVAL, kind, 0, 0)
    if kind == _READ and which == 0:
        return _EVENT.pack(userdata, _SUCCESS, kind, 0, _HANGUP)
    ready = kind == _WRITE and which in _STREAMS
    return _EVENT.pack(userdata, _SUCCESS if ready else _BADF, kind, 0, 0)


def _sleep(call: CallContext, end_ns: int) -> bool:
    """Sleep until then, and say whether that came before the end of the call."""
    while (left_ns := end_ns - time.monotonic_ns()) > 0:
        remaining = call.remaining()
        if not remaining:
            return False
        # In slices, because the end of the call may be moved to an earlier time.
        time.sleep(min(left_ns / 1e9, remaining, SLICE_S))
    return True
