"""The kill: a child process is killed with SIGKILL while it writes, and what it leaves behind is checked.

Rules:
  1. It is killed at a word of its own, `posted N` some rows after `flushed M`: no clock is involved.
  2. The kill must have fallen in the middle: rows had been posted that are not there afterwards, and the child wasn't
     through. If it fell between two groups by chance, that proves nothing, and another child is killed.
  3. The child is the same program: it has this process' interpreter and import path, whatever installed them.
  4. No child survives its parent's interest: it is killed however the waiting ends.

Doesn't know: the terminal, what the child does between its words.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import count

from persistency import Persistency
from persistency.cli import victim
from persistency.cli.ending import Fault
from persistency.cli.verify import prefix_faults, survival_faults

ROWS_TOTAL = 1_000_000
_FLUSHED_MIN = 1_000
_UNFLUSHED_MIN = 20_000  # more than waits in a mailbox: some of them are committed, some aren't
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Killed:
    """What a killed writer had done, by its own words and the shared counter, and what was found afterwards."""

    posted: int
    flushed: int
    recovered: int
    total: int
    faults: list[str]

    @property
    def midway(self) -> bool:
        """Whether the kill fell in the middle of the work."""
        return self.recovered < self.posted < self.total and self.flushed >= _FLUSHED_MIN


def kill_writer(persistency: Persistency, job_id: str) -> Killed:
    """Kill a child while it writes into a job of this root, open the job and compare.

    Raises `Fault` if the child ends by itself, or if no kill falls in the middle.
    """
    for _ in range(_ATTEMPTS):
        persistency.drop_job(job_id)
        posted, flushed = _run_and_kill(persistency.root, job_id)
        with persistency.open_job(job_id) as job:
            expected = map(victim.row_of, count())
            recovered, faults = prefix_faults(job.iterate(victim.CATEGORY), expected)
        killed = Killed(posted, flushed, recovered, ROWS_TOTAL, faults + survival_faults(posted, flushed, recovered))
        if killed.faults or killed.midway:
            return killed
    raise Fault(f"{_ATTEMPTS} processes were killed, and none of them in the middle of its work", "Try again.")


def _run_and_kill(root: str, job_id: str) -> tuple[int, int]:
    """Start a child, kill it in the middle; return how many rows it had posted, and how many it said were flushed."""
    with tempfile.TemporaryFile() as counter, tempfile.TemporaryFile() as errors:
        counter.truncate(victim.COUNTER_BYTES)
        command = [sys.executable, "-P", "-m", victim.__name__, root, job_id, str(ROWS_TOTAL), str(counter.fileno())]
        child = subprocess.Popen(  # noqa: S603  # this interpreter, with a module of this package
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[counter.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which then ends the child
        )
        with child:
            try:
                flushed = _kill_at_its_word(child)
            finally:
                child.kill()
        if child.returncode != -signal.SIGKILL:
            errors.seek(0)
            said = errors.read(2_000).decode(errors="replace").strip()
            raise Fault(f"the child process ended by itself, with exit code {child.returncode}", said)
        with mmap.mmap(counter.fileno(), victim.COUNTER_BYTES) as page, memoryview(page).cast("Q") as posted:
            return posted[0], flushed


def _kill_at_its_word(child: subprocess.Popen[bytes]) -> int:
    """Kill a child some rows after a flush; return the last number it said was flushed."""
    assert child.stdout is not None
    flushed = 0
    for line in child.stdout:  # goes on after the kill, up to the child's last word
        word, _, number = line.decode().partition(" ")
        if word == "flushed":
            flushed = int(number)
        elif flushed >= _FLUSHED_MIN and int(number) >= flushed + _UNFLUSHED_MIN:
            child.kill()
    return flushed
