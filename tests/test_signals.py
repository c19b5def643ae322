"""Signals: a process that is told to end by one ends in order, and an interrupt that comes anywhere leaves a job whole.

Each case is a process of its own (`tests.crash.signalled`) with a time limit; then its job is opened again. `python -m
tests.soak forks` repeats them on every Python there is.
"""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest

from persistency import Misuse, install_signal_handlers
from tests.crash.forked import play
from tests.crash.signalled import ORDERLY, judge, rows, signal_from_outside

SEED = random.SystemRandom().getrandbits(32)


def end(name: str, root: Path, number: int) -> list[str]:
    """Run a case to its end; return what is wrong with it."""
    done, wrong = play("signalled", name, root, number)
    print(f"python -m tests.crash.signalled {name} {root} {number}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return wrong or judge(name, number, root, done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_process_in_order(tmp_path: Path, number: int) -> None:
    """Promise 6: with the handlers a signal loses nothing of 10,000 rows that wait, and the exit code tells of it."""
    assert end("idle", tmp_path, number) == []


@pytest.mark.parametrize("name", [name for name in ORDERLY if name != "idle"])
def test_signal_comes_at_any_moment(tmp_path: Path, name: str) -> None:
    """In a flush, in an event loop, before `finally` blocks that post, between main and the hook, twice."""
    assert end(name, tmp_path, signal.SIGTERM) == []


def test_signal_while_waiting_for_room(tmp_path: Path) -> None:
    """A post that waits for room is given up, and not made; all those before it are written."""
    assert end("waiting_for_room", tmp_path, signal.SIGTERM) == []


def test_third_signal_gives_up(tmp_path: Path) -> None:
    """Of a store that never comes back, stderr names the job and the exact count."""
    assert end("three_times", tmp_path, signal.SIGTERM) == []


def test_signals_from_outside(tmp_path: Path) -> None:
    """Whenever it comes, beside threads that go on posting: no row is lost whose `put` had returned."""
    print(f"seed {SEED}")
    for at in range(3):
        assert signal_from_outside(tmp_path / str(at), signal.SIGTERM, random.Random(SEED + at)) == []


def test_terminated_children(tmp_path: Path) -> None:
    """`Process.terminate()` ends children of multiprocessing in order, however they were started."""
    assert end("terminated_child", tmp_path, 0) == []


def test_without_handlers_a_prefix_is_left(tmp_path: Path) -> None:
    """Promise 6: SIGTERM without the handlers takes only what wasn't committed, and leaves a prefix."""
    assert end("without", tmp_path, signal.SIGTERM) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_handlers_are_left_alone(tmp_path: Path, number: int) -> None:
    """A handler that is set already stays; so does the ignoring of a signal, as `nohup` has it."""
    assert end("own_handlers", tmp_path, number) == []


def test_handlers_are_for_the_main_thread() -> None:
    """`Misuse` in any other thread, and nothing is changed."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    raised: list[BaseException] = []

    def install() -> None:
        try:
            install_signal_handlers()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert [type(error) for error in raised] == [Misuse]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_interrupts_leave_a_job_whole(tmp_path: Path) -> None:
    """After hundreds of Ctrl-C, at any moment of any call, each was made or not, and the job goes on."""
    print(f"seed {SEED}")
    assert end("interrupts", tmp_path, SEED) == []
    assert rows(tmp_path, "beside")


def test_interrupts_in_the_exit_hook(tmp_path: Path) -> None:
    """Beside a storm of Ctrl-C at the end of a process, what isn't written is told on stderr."""
    print(f"seed {SEED}")
    assert end("hook_storm", tmp_path, SEED) == []


def test_interrupt_at_the_entry_of_the_hook(tmp_path: Path) -> None:
    """A Ctrl-C as the exit hook begins, before it can count it, loses nothing."""
    assert end("hook_begins", tmp_path, signal.SIGINT) == []


# -- planted defects --------------------------------------------------------------------------------------------------


def test_planted_defects_are_seen(tmp_path: Path) -> None:
    """Without the exit hook the rows are lost, and that is what is complained of."""
    done, _ = play("signalled", "idle", tmp_path, signal.SIGTERM, "no exit hook")
    assert [wrong for wrong in judge("idle", signal.SIGTERM, tmp_path, done) if wrong.startswith("lost: 10000")]
