"""Forks: in a child all that was inherited is refused, its own jobs work, and the parent loses nothing.

Each case is a process of its own (`tests.crash.forking`), and so is the storm (`tests.crash.forkstorm`); children have
a time limit, and a hang is a finding. `python -m tests.soak forks` is the long form, on every Python there is.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from persistency import Job, Persistency
from persistency.reader import Reader
from tests.crash.forked import ENDS, play
from tests.crash.forking import PLANTED, play_case, unseen
from tests.crash.inherited import JOB, PERSISTENCY, READS, uncovered

SEED = random.SystemRandom().getrandbits(32)


# -- what was inherited -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["idle", "busy", "settling", "resting", "memory"])
def test_what_was_inherited_is_refused(tmp_path: Path, case: str) -> None:
    """Promise 7: every verb of every handle raises `Forked` and touches no file; every pending reply is settled so.

    The parent's job has nothing to do, is in the middle of a group, has answers on their way, rests, is in memory.
    """
    assert play_case(tmp_path, case) == []


def test_every_verb_is_tried() -> None:
    """A verb that is new has to be tried in a child as well."""
    assert uncovered(Job, {*JOB, "backup"}) == set()
    assert uncovered(Reader, {*READS, "backup"}) == set()
    assert uncovered(Persistency, PERSISTENCY) == set()


@pytest.mark.parametrize("where", ["caller", "worker"])
def test_fork_inside_of_run(tmp_path: Path, where: str) -> None:
    """The child is refused the transaction too, and the parent's goes on and is committed."""
    assert play_case(tmp_path, "in_run", where) == []


def test_what_fails_is_told_once(tmp_path: Path) -> None:
    """A failure of the parent's is told by the parent, and by no child that has a copy of it."""
    assert play_case(tmp_path, "reports") == []


# -- what is the child's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
def test_child_has_jobs_of_its_own(tmp_path: Path, end: str) -> None:
    """However it ends, the 10,000 rows it has posted to jobs in both roots are written, and all of its parent's."""
    assert play_case(tmp_path, "own_jobs", end) == []


@pytest.mark.parametrize(
    ("situation", "end"),
    [
        *((situation, "closed") for situation in ("nothing", "reader", "backup", "run")),
        ("nothing", "killed"),
    ],
)
def test_child_outlives_its_parent(tmp_path: Path, situation: str, end: str) -> None:
    """It can open the job when its parent has given it up, and a stranger's connection beside it does no harm.

    In the middle of a transaction the job was its parent's for good, as far as this process goes: then it is refused.
    """
    assert play_case(tmp_path, "outlive", situation, end) == []


# -- locks ------------------------------------------------------------------------------------------------------------


def test_locks_are_the_parents(tmp_path: Path) -> None:
    """A third process is told the parent's pid, whatever its children do, and gets the job when the parent is done."""
    assert play_case(tmp_path, "locks") == []


@pytest.mark.parametrize("beside", ["forks", "programs"])
def test_reopening_beside_new_processes(tmp_path: Path, beside: str) -> None:
    """A job that was closed is free at once, though a process that is being started has a copy of everything."""
    assert play_case(tmp_path, "reopening", beside) == []


def test_programs_are_started(tmp_path: Path) -> None:
    """Programs that are handed every descriptor keep no lock."""
    assert play_case(tmp_path, "spawning") == []


# -- awkward places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "in_handler", "nested", "in_threads", "in_callbacks", "in_hooks"])
def test_fork_in_an_awkward_place(tmp_path: Path, case: str) -> None:
    """In signal handlers, in the middle of another fork, in several threads, in callbacks and loops, in exit hooks."""
    assert play_case(tmp_path, case) == []


# -- at random --------------------------------------------------------------------------------------------------------


def test_forks_beside_a_busy_worker(tmp_path: Path) -> None:
    """Promise 7, at random moments beside eight producers, errands, and jobs that open, close and rest."""
    done, _ = play("forkstorm", tmp_path, "--forks", 6, "--seed", SEED, timeout=110)
    print(f"seed {SEED}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].endswith('"wrong": []}')
    assert not done.stderr


# -- planted defects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_defect_is_seen(tmp_path: Path, plant: str) -> None:
    """The cases report an engine that was spoilt on purpose, and as what it is."""
    assert unseen(tmp_path, plant) == []
