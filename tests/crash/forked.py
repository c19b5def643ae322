"""Forking a child, watching it to its end, and what there is to see afterwards.

A child reports through a pipe what wasn't as promised, as it finds it; its end is seen by the end of the pipe. One that
is still there after its time is killed, and that is a finding, with the stacks of its threads. Findings are texts,
"kind: what".
"""

from __future__ import annotations

import atexit
import faulthandler
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from tests.crash.held import KEPT
from tests.crash.running import PROJECT, replace_method

if TYPE_CHECKING:
    from persistency import Job, Reply
    from persistency.actor.worker import Worker
    from persistency.storage.port import Group
    from persistency.storage.sqlite import SqliteStore

CHILD_SECONDS = 10.0  # for a child, if nothing else was said
WAIT = 20.0  # seconds for whatever else must come
# A complaint of any kind is an error, but for the one that says what is tried here: a fork beside threads. What is left
# open is left so on purpose.
FLAGS = ("-W", "error", "-W", "ignore:This process:DeprecationWarning", "-W", "ignore:unclosed:ResourceWarning")

Act = Callable[[], "Iterable[str]"]

_limit = [CHILD_SECONDS]


def limit_children(seconds: float) -> None:
    """Say how long children may be there."""
    _limit[0] = seconds


def play(
    module: str, *arguments: object, python: str = sys.executable, timeout: float = 60.0
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a program of this folder to its end; return that, and the complaints it has printed."""
    command = [python, *FLAGS, "-m", f"tests.crash.{module}", *map(str, arguments)]
    try:
        done = subprocess.run(
            command, cwd=PROJECT, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, -9, "", str(error.stderr)), [f"hang: still there after {timeout} s"]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done, [wrong for one in told for wrong in one["wrong"]]


# -- a child ----------------------------------------------------------------------------------------------------------


class Leave(BaseException):
    """Unwinds a child's stack to the end of its program, which then returns."""


def end_by_return() -> NoReturn:
    """Return from main."""
    raise Leave


def end_by_exit() -> NoReturn:
    """Call sys.exit(5)."""
    sys.exit(5)


def end_by_exception() -> NoReturn:
    """End by an exception nobody catches."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it is known what it says
    raise LookupError("nobody catches this")


def end_at_once() -> NoReturn:
    """Call os._exit(0)."""
    os._exit(0)


# Each way a child can end, and the return code it then has.
ENDS: dict[str, tuple[Callable[[], NoReturn], int]] = {
    "return": (end_by_return, 0),
    "exit": (end_by_exit, 5),
    "exception": (end_by_exception, 1),
    "_exit": (end_at_once, 0),
}


def forked(act: Act, *, end: str = "_exit", name: str = "the child") -> list[str]:
    """Fork; have the child act and come to its end; return what it complains of, and what is wrong with its end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        be_child(act, write, end)
    os.close(write)
    return watch(pid, read, ENDS[end][1], name)


def be_child(act: Act, write: int, end: str) -> NoReturn:
    """Act, telling every complaint, and come to an end."""
    faulthandler.register(signal.SIGUSR2, file=write)  # a timer of faulthandler's wouldn't survive another fork
    try:
        for complaint in act():
            os.write(write, json.dumps(complaint).encode() + b"\n")
    except BaseException:
        os.write(write, json.dumps("raised: " + traceback.format_exc()).encode() + b"\n")
    ENDS[end][0]()


def watch(pid: int, read: int, code: int, name: str) -> list[str]:
    """Wait for a child's end; return its complaints."""
    with open(read, "rb", buffering=0) as pipe:
        text, ended = _read(pipe, _limit[0])
        if not ended:
            os.kill(pid, signal.SIGUSR2)  # it tells where it is
            text += _read(pipe, 1.0)[0]
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = text.decode(errors="replace").splitlines()
    wrong = [json.loads(line) for line in lines if line.startswith('"')]
    if not ended:
        stacks = "\n".join(line for line in lines if not line.startswith('"'))
        wrong.append(f"hang: {name} was still there after {_limit[0]} s\n{stacks}")
    elif status != code:
        wrong.append(f"end: {name} ended with {status}, not {code}")
    return wrong


def _read(pipe: Any, seconds: float) -> tuple[bytes, bool]:
    """Read for so long; return the bytes, and whether they have come to an end."""
    text, deadline = b"", monotonic() + seconds
    while select.select([pipe], [], [], max(0.0, deadline - monotonic()))[0]:
        data = pipe.read(65536)
        if not data:
            return text, True
        text += data
    return text, False


# -- what there is to see ---------------------------------------------------------------------------------------------


def files(root: Path) -> dict[str, tuple[Any, ...]]:
    """Return what there is to see of every file under a root."""
    seen: dict[str, tuple[Any, ...]] = {}
    for path in sorted(root.rglob("*")):
        found = path.lstat()
        text = hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
        seen[str(path.relative_to(root))] = (found.st_ino, found.st_size, found.st_mtime_ns, text)
    return seen


def touched(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> list[str]:
    """Return which files were made, removed or changed."""
    return [f"file: {name} was touched" for name in sorted(before | after) if before.get(name) != after.get(name)]


def numbers(job: Job, category: str = "rows") -> list[int]:
    """Return the numbers of a job's rows."""
    return [key.parts[0] for key in job.keys(category).result(WAIT)]


def missing(name: str, job: Job, count: int, category: str = "rows") -> list[str]:
    """Complain unless a job has the rows 0, 1, ... up to a count, and is sound."""
    found = numbers(job, category)
    wrong = [] if found == list(range(count)) else [f"lost: {name} has {len(found)} rows of {count}"]
    return wrong + [f"unsound: {name}: {problem}" for problem in job.check().result(WAIT)]


FOREIGN = """
import contextlib, json, os, sqlite3, sys
root, foreign = sys.argv[1:]
told = {}
if foreign == "foreign":
    with contextlib.closing(sqlite3.connect(root + "/alpha.db")) as connection:
        told["count"] = connection.execute("SELECT count(*) FROM kv").fetchone()[0]
from persistency import JobLocked, Persistency
with Persistency(root) as persistency:
    try:
        with persistency.open_job("alpha") as job:
            told["open"] = job.count("rows").result()
    except JobLocked as error:
        told["pid"] = error.pid
print(json.dumps(told))
"""


def third_process(root: Path, *, foreign: bool = False) -> dict[str, int]:
    """Have another process try to open the job `alpha`; a `foreign` one opens and closes its file with sqlite3 first.

    Returns the `pid` that it was told of, or the rows it found in the `open` job, and the `count` of the foreign one.
    """
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(root), "foreign" if foreign else ""],
        capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the third process: {done.stderr}")
    told: dict[str, int] = json.loads(done.stdout)
    return told


# -- holding workers --------------------------------------------------------------------------------------------------


def no_upkeep() -> None:
    """Have no worker look after its file by itself, so that nobody touches it but who is watched."""
    from persistency.actor.upkeep import Upkeep

    replace_method(Upkeep, "next_step", lambda *_args, **_how: None)
    replace_method(Upkeep, "pause", lambda _upkeep: None)


class Gate:
    """Holds the worker of one job before every group, from `close` on, until it is let through."""

    def __init__(self) -> None:
        from persistency.storage.sqlite import SqliteStore

        self.reached, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._held = False
        apply = SqliteStore.apply

        def held(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
            if self._held and threading.current_thread().name == "persistency:alpha":
                self.reached.release()
                self._go.acquire(timeout=WAIT)
            return apply(store, group, now_ms)

        replace_method(SqliteStore, "apply", held)

    def close(self) -> None:
        """Hold the next group."""
        self._held = True

    def wait(self) -> None:
        """Wait until a group is held."""
        assert self.reached.acquire(timeout=WAIT)

    def let_one_through(self) -> None:
        """Let the group go that is held."""
        self._go.release()

    def open(self) -> None:
        """Hold nothing any more."""
        self._held = False
        self._go.release()


def hold_until_retired() -> threading.Event:
    """Have every worker of this process wait, before its next group, for the exit hook, or for the event."""
    from persistency.actor.worker import Worker
    from persistency.storage.sqlite import SqliteStore

    retiring = threading.Event()
    retire, apply = Worker.retire, SqliteStore.apply

    def retire_and_tell(worker: Worker, patience: float) -> Reply[None]:
        reply = retire(worker, patience)
        retiring.set()
        return reply

    def held(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        if threading.current_thread().name.startswith("persistency:"):
            retiring.wait()
        return apply(store, group, now_ms)

    replace_method(Worker, "retire", retire_and_tell)
    replace_method(SqliteStore, "apply", held)
    return retiring


# -- planted defects --------------------------------------------------------------------------------------------------


def _without_hooks() -> None:
    """Have nothing done about forks: as if no hook had ever been registered."""
    from unittest import mock

    for name in ("concurrent.futures.thread", "logging", "random"):  # these register hooks of their own
        importlib.import_module(name)
    with mock.patch.object(os, "register_at_fork"):
        importlib.import_module("persistency")


def _connection_carried_over() -> None:
    """Have the child close the inherited connection as if it were its own: carrying the log over."""
    from persistency.storage.sqlite import SqliteStore

    def disown(store: SqliteStore, *, quiet: bool) -> None:
        store._connection.pragma("wal_checkpoint(truncate)")
        store._connection.close()

    replace_method(SqliteStore, "disown", disown)


def _connection_kept() -> None:
    """Have the child keep the inherited connection open."""
    from persistency.storage.sqlite import SqliteStore

    replace_method(SqliteStore, "disown", lambda store, *, quiet: KEPT.append(store))


def _lock_kept() -> None:
    """Have the child keep the descriptors of the parent's locks."""
    from persistency.storage import files

    class Forgetful(set[Any]):
        """A set that keeps nothing."""

        def add(self, _one: Any) -> None:
            """Forget it at once."""

    files._claims = Forgetful()  # type: ignore[assignment]


def _replies_left() -> None:
    """Have nobody settle in the child what nobody will answer there."""
    from persistency import lifecycle

    lifecycle.abandon = lambda _replies, _error: None


def _handles_left() -> None:
    """Have the engine not told of the fork."""
    from persistency import lifecycle

    lifecycle.in_child.clear()


def _no_exit_hook() -> None:
    from persistency import lifecycle

    atexit.unregister(lifecycle._at_exit)


def _no_finalize() -> None:
    from persistency import lifecycle

    lifecycle._finalize_child = lambda: None


PLANTS: dict[str, Callable[[], None]] = {
    "no fork hooks": _without_hooks,
    "connection carried over": _connection_carried_over,
    "connection kept": _connection_kept,
    "lock kept": _lock_kept,
    "replies left": _replies_left,
    "handles left": _handles_left,
    "no exit hook": _no_exit_hook,
    "no Finalize": _no_finalize,
}
