"""The Django cache in several processes: taking turns, reading past the owner, forks, the end of a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parent.parent
BEGIN = """
import json, os, sys
from django.conf import settings

OPTIONS = json.loads(sys.argv[2])
settings.configure(
    SECRET_KEY="of the tests",
    CACHES={
        "default": {
            "BACKEND": "persistency.integrations.django.PersistencyCache",
            "LOCATION": sys.argv[1],
            "OPTIONS": OPTIONS,
        }
    },
)
from django.core.cache import cache
"""


def start(program: str, root: Path, **options: Any) -> subprocess.Popen[str]:
    """Start a process of a site; a warning is an error there."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", BEGIN + program, str(root), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def communicated(process: subprocess.Popen[str], text: str | None = None) -> tuple[str, str]:
    """Send a process some text, wait for its end, and return what it has said, and what it complains of."""
    try:
        return process.communicate(text, timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children too
        _, complaints = process.communicate()
        pytest.fail(f"it hangs: {complaints}")


def ended(process: subprocess.Popen[str], *, but: str | None = None) -> str:
    """Wait for a process' end, and return what it has said; it has nothing to complain of, `but` what is allowed."""
    said, told = communicated(process)
    assert process.returncode == 0, told
    assert [line for line in told.splitlines() if but is None or but not in line] == []
    return said


def test_four_processes_share_a_cache(tmp_path: Path) -> None:
    """Each counts, adds and reads what the others write; not one count is lost, and one alone has added."""
    program = """
from concurrent.futures import ThreadPoolExecutor

cache.add("count", 0, None)
def work(number):
    cache.set(f"mine-{os.getpid()}-{number}", (os.getpid(), number))  # a tuple: signed by one, read by others
    return cache.incr("count")
with ThreadPoolExecutor(4) as pool:
    seen = list(pool.map(work, range(25)))
assert len(set(seen)) == 25
print(json.dumps([os.getpid(), cache.add("first", os.getpid(), None), seen]))
"""
    processes = [start(program, tmp_path) for _ in range(4)]
    # That others read all the time may be warned of here; whether there was a moment without is up to the machine.
    said = [json.loads(ended(process, but="its log can't be cut off")) for process in processes]
    assert sorted(number for _, _, seen in said for number in seen) == list(range(1, 101))
    assert sum(added for _, added, _ in said) == 1
    (first,) = [pid for pid, added, _ in said if added]
    check = f"""
assert cache.get("count") == 100
assert cache.get("first") == {first}
for pid in {[pid for pid, _, _ in said]}:
    mine = [f"mine-{{pid}}-{{number}}" for number in range(25)]
    assert list(cache.get_many(mine)) == mine
    assert cache.get(f"mine-{{pid}}-7") == (pid, 7)
"""
    ended(start(check, tmp_path))


def test_reading_waits_for_no_other_process(tmp_path: Path) -> None:
    """While another process keeps the job a read gives what is committed; a write is told, in the end, who has it."""
    holder = start(
        """
cache.set("a", 1, None)
print("mine", flush=True)
sys.stdin.read()
""",
        tmp_path,
        KEEP=600,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        said = ended(
            start(
                """
from persistency import JobLocked
assert cache.get("a") == 1
try:
    cache.set("b", 2)
except JobLocked as locked:
    print(locked.pid)
assert cache.get_many(["a", "b"]) == {"a": 1}
""",
                tmp_path,
                WAIT=0.05,
            )
        )
        assert said == f"{holder.pid}\n"
    finally:
        communicated(holder, "")


def test_a_value_that_is_refused_is_a_miss_at_once_whoever_has_the_job(tmp_path: Path) -> None:
    """Its removal, which waits for the job, is nobody's business; if it fails the log says so."""
    holder = start('cache.set("x", (1, 2), None); print("mine", flush=True); sys.stdin.read()', tmp_path, KEEP=600)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        program = """
import logging, threading
told = threading.Semaphore(0)
class Handler(logging.Handler):
    def emit(self, record):
        if "couldn't be removed" in record.getMessage():
            told.release()
log = logging.getLogger("persistency.django")
log.addHandler(Handler())
log.propagate = False
for ask in (lambda: cache.get("x", "miss"), lambda: cache.has_key("x"), lambda: cache.get_many(["x"])):
    print(ask(), told.acquire(timeout=30))
"""
        assert ended(start(program, tmp_path, PICKLE=False, WAIT=0.05)) == "miss True\nFalse True\n{} True\n"
    finally:
        communicated(holder, "")


def test_many_reads_of_what_is_refused_ask_once_for_its_removal(tmp_path: Path) -> None:
    """Or they would fill the queue of writes while another process has the job."""
    holder = start('cache.set("x", (1, 2), None); print("mine", flush=True); sys.stdin.read()', tmp_path, KEEP=600)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        program = """
import logging
from django.core.cache import caches
from persistency.integrations.django.places import place_of
logging.disable()
for _ in range(100):
    assert cache.get("x") is None
print(len(place_of(caches["default"]._settings)._baton._calls) <= 1, flush=True)
os._exit(0)
"""
        assert ended(start(program, tmp_path, PICKLE=False)) == "True\n"
    finally:
        communicated(holder, "")


def test_a_full_disk_holds_a_write_up_as_long_as_it_may_wait(tmp_path: Path) -> None:
    """Not for the engine's minute; reads go on, and so do writes that have room."""
    program = """
import logging, resource, signal
from persistency import Poisoned
logging.disable()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache.set("a", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    cache.set("large", "y" * 400_000)
except Poisoned:
    print("told")
print(cache.get("a"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
cache.set("b", 2)
print(cache.get("b"))
"""
    assert ended(start(program, tmp_path, WAIT=0.2)) == "told\n1\n2\n"


def test_readers_are_closed_at_the_end_of_a_process(tmp_path: Path) -> None:
    """And none is opened any more, whoever reads then: Python would complain of it, as at a reload of `runserver`."""
    program = """
import atexit
def look():  # the last of all hooks
    from persistency import Closed
    print(place._reader.closed)
    try:
        cache.get("a")
    except Closed:
        print(place._reader.closed)
atexit.register(look)
from django.core.cache import caches
cache.set("a", 1)
assert cache.get("a") == 1
from persistency.integrations.django.places import place_of
place = place_of(caches["default"]._settings)
"""
    assert ended(start(program, tmp_path)) == "True\nTrue\n"


def test_a_cache_of_one_alone_says_what_another_process_has_to_do(tmp_path: Path) -> None:
    """`JobLocked`, with the owner's pid and the option that would let them share."""
    holder = start('cache.set("a", 1); print("mine", flush=True); sys.stdin.read()', tmp_path, SHARED=False)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        other = """
import asyncio
from persistency import JobLocked
for ask in (lambda: cache.get("a"), lambda: asyncio.run(cache.aset("a", 1))):
    try:
        ask()
    except JobLocked as locked:
        print(locked.pid, locked, locked.hint)
"""
        lines = ended(start(other, tmp_path, SHARED=False)).splitlines()
        assert len(lines) == 2
        for line in lines:
            assert line.startswith(f"{holder.pid} process {holder.pid} has the job 'cache'")
            assert 'it has "SHARED": False Leave out "SHARED"' in line
    finally:
        _, complaints = communicated(holder, "")
    assert complaints == ""
    assert ended(start('print(cache.get("a"))', tmp_path, SHARED=False)) == "1\n"


@pytest.mark.parametrize("shared", [True, False])
def test_a_forked_child_opens_its_own(tmp_path: Path, shared: bool) -> None:
    """As with a server that loads the site before it forks its workers: all of them go on, shared or in turn."""
    program = """
from django.core.cache import caches
from persistency.integrations.django import release

cache.set_many({"before": (1, 2), "count": 0}, None)
assert cache.get("before") == (1, 2)
if not OPTIONS["SHARED"]:
    release()  # one process has it at a time
children = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        assert cache.get("before") == (1, 2)
        cache.set(f"child-{number}", [number], None)
        assert cache.get(f"child-{number}") == [number]
        cache.incr("count")
        release()
        os._exit(0)
    if not OPTIONS["SHARED"]:
        assert os.waitpid(pid, 0)[1] == 0
    else:
        children.append(pid)
if OPTIONS["SHARED"]:
    cache.incr("count")
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
assert cache.get_many([f"child-{n}" for n in range(3)]) == {f"child-{n}": [n] for n in range(3)}
print(cache.get("count"))
"""
    # Four processes that share a file read there at once: that its log grows meanwhile may be told.
    process = start(program, tmp_path, SHARED=shared)
    said = ended(process, but="its log can't be cut off" if shared else None)
    assert said == ("4\n" if shared else "3\n")


def test_a_fork_in_the_middle_of_everything_harms_nobody(tmp_path: Path) -> None:
    """Other threads of the parent write, read and open caches meanwhile; a child finds no lock taken."""
    program = """
import threading

ending = threading.Event()
def work(number):
    count = 0
    while not ending.is_set():
        count += 1
        cache.set(f"t{number}", count, None)
        assert cache.get(f"t{number}") == count
    counts.append(count)
counts = []
cache.set("first", 1)  # all is imported: who forks in the middle of an import is lost, whatever it imports
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
for number in range(8):
    pid = os.fork()
    if pid == 0:
        cache.set(f"child-{number}", number, None)
        assert cache.get(f"child-{number}") == number
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
ending.set()
for thread in threads:
    thread.join()
assert sorted(cache.get(f"t{n}") for n in range(3)) == sorted(counts)
assert len(cache.get_many([f"child-{n}" for n in range(8)])) == 8
"""
    process = start(program, tmp_path)
    _, complaints = communicated(process)
    assert process.returncode == 0, complaints
    assert "Traceback" not in complaints  # from Python 3.12 on it warns of forks beside threads


def test_the_end_of_a_process_is_quiet_and_loses_nothing(tmp_path: Path) -> None:
    """Without anything closed, shared or alone, and with a thread that is still at it."""
    program = """
import threading
cache.set("a", 1, None)
assert cache.get("a") == 1
def go_on():
    while True:
        try:
            cache.get("a")
        except Exception:
            return
threading.Thread(target=go_on, daemon=True).start()
"""
    for shared in (True, False):
        root = tmp_path / str(shared)
        ended(start(program, root, SHARED=shared))
        assert ended(start('print(cache.get("a"))', root, SHARED=shared)) == "1\n"


def test_what_another_process_has_put_in_the_place_of_the_file_is_read(tmp_path: Path) -> None:
    """A reader that has the old file open notices, and reads the new one."""
    process = start(
        """
from persistency.integrations.django import release
cache.set("a", "old", None)
release()  # nobody has it open to write, only to read
assert cache.get("a") == "old"
print("ready", flush=True)
sys.stdin.readline()
from django.core.cache import caches
from persistency.integrations.django.places import place_of
census = place_of(caches["default"]._settings).census
print(cache.get("a"), cache.get_many(["a"]), flush=True)
assert place_of(caches["default"]._settings).census is not census  # versions of the old file say nothing
cache.set("a", "newest", None)
print(cache.get("a"), flush=True)
""",
        tmp_path,
        KEEP=0,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    for path in tmp_path.iterdir():
        path.unlink()
    ended(start('cache.set("a", "new", None)', tmp_path))
    said, complaints = communicated(process, "\n")
    assert (said, complaints) == ("new {'a': 'new'}\nnewest\n", "")
