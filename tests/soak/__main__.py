"""The long forms of the tests that try to break the promises, as a command that prints a table:

    python -m tests.soak [PART ...] [--cycles N] [--seconds S] [--seed SEED]

    kill     N cycles (1,000) of SIGKILL and reopening for each durability level, and N more of kills while a job opens
             and closes: every job must be an exact prefix, with all that was acknowledged, and three quarters of the
             kills must have fallen between flushed and posted rows
    power    20 N simulated power cuts (20,000), half of them for each durability level, and one after every step of a
             short run: what was synced is there, and what is there is a prefix
    faults   every call of every operation on the file fails, once and for good, in every variant of a scenario; disks
             run full N // 20 times (50) in each way: what is there is what a model says, and nobody hangs
    damage   2 N flipped bits, cuts and lost pages (2,000) for each kind of file, and a cut at every sector
    exit     N // 20 processes (50) that end without closing anything, in turn by every way there is
    forks    forks beside a busy worker: the child is told, the parent unharmed
    lives    jobs addressed at random through few live ones: never more workers than allowed, every value right
    cancel   50 N requests given up (50,000): cancelled, timed out, left behind by a loop that closes
    linear   5 N histories (5,000) of calls that overlap, each with an order that explains every answer
    machine  2 N runs (2,000) of 50 steps of the state machine of tests/test_machine.py, for each of its variants: a job
             must do what a dict would
    memory   a million operations by every kind of producer, written or failing, each within its limit
    large    a million rows that end are gone from the file beside puts, in bounded slices; `storage_used` of a million
             rows costs what it costs at ten
    queue    5 N messages (5,000) through one queue by 16 consumers, as processes and threads, N // 10 of them killed:
             nothing is lost, and nothing acknowledged comes again
    lock     11 N rounds (11,000) for one lock, between processes and between threads, whose holders are killed and
             paused: never two inside, tokens grow, who has lost it is refused
    log      records appended and consumed by processes that are killed: no hole, none lost, none done twice
    plugins  8 threads call 4 plugins, among traps, timeouts, reloads and unloads: every answer right, memory flat
    graph    LangGraph: graphs whose process is killed and resumed, and random operations beside LangGraph's own
    migration  100,000 items each from a diskcache directory and a sqlitedict file, compared one by one
    postgres-kills  N // 5 owners (200) killed beside writes to a server, for each durability level, each taken over by
             another process when its lease is over
    postgres-fence  N // 10 owners (100) stopped past their lease and woken when another one has the job: never both
    postgres-restarts  a server shut down as by a crash N // 50 times (20) under load, and replaced by its copy at last
    postgres-failover  N // 200 servers (5) replaced by their copies under load
    postgres-faults  every round trip to a server fails, in every way, once and for good
    postgres-crowd  N jobs (1,000) on one server from 4 processes with at most 32 connections each

Without a PART all of them are run. `--seconds` ends each part after that time, if that comes first. A part whose tools
aren't installed is reported, and the others are run. The exit code is 1 if anything is off.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module

from tests.postgres import NoPostgres
from tests.soak.part import Part, Tell

# The module of each part, imported when its turn comes.
PARTS = {
    "kill": "kills",
    "power": "power",
    "faults": "faults",
    "damage": "damage",
    "exit": "exits",
    "forks": "forks",
    "lives": "lives",
    "cancel": "cancel",
    "linear": "linear",
    "machine": "machines",
    "memory": "memory",
    "large": "large",
    "queue": "queues",
    "lock": "locks",
    "log": "logs",
    "plugins": "plugins",
    "graph": "graphs",
    "migration": "migrations",
    "postgres-kills": "postgres_kills",
    "postgres-fence": "postgres_fence",
    "postgres-restarts": "postgres_restarts",
    "postgres-failover": "postgres_failover",
    "postgres-faults": "postgres_faults",
    "postgres-crowd": "postgres_crowd",
}

TABLE_WIDTH = 170
COLUMNS = ("cycles", "in between", "lost", "holes", "split", "other", "rows", "MiB grown", "seconds")


def run_part(name: str, given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run one part; yield its rows of the table. A part that can't be imported is a row with a finding."""
    try:
        soak: Callable[[argparse.Namespace, Tell], Iterator[Part]] = import_module(f"tests.soak.{PARTS[name]}").soak
        yield from soak(given, tell)
    except (ImportError, NoPostgres) as error:
        yield Part(name, {"other": "not run"}, [f"{name}: not run: {error}"])


def all_parts(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run what was asked for, or everything, one part after the other."""
    for name in PARTS:
        if name in (given.parts or PARTS):
            yield from run_part(name, given, tell)


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Give what shows a line of progress: one that is replaced on a terminal, else nothing."""
    try:
        from rich.console import Console
    except ImportError:
        yield lambda _text: None
        return
    console = Console(stderr=True)
    with console.status("") as status:
        yield status.update


def print_table(parts: list[Part]) -> None:
    """Print what came of it."""
    lines = [[part.name, *(part.cells.get(column, "") for column in COLUMNS)] for part in parts]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [["", *COLUMNS], *lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    else:
        table = Table("")
        for column in COLUMNS:
            table.add_column(column, no_wrap=True, justify="right")
        for line, part in zip(lines, parts, strict=True):
            table.add_row(*line, style="red" if part.wrong else None)
        # Into a file a table isn't cut to the width of a terminal that isn't there.
        Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the long forms; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--cycles", type=int, default=1_000, help="how long: all counts follow from it (1000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long for each part")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="to repeat a run")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    logging.getLogger("persistency").setLevel(logging.CRITICAL)  # failing is part of it
    # What a shell starts in the background ignores interrupts, and what `nohup` starts hang-ups; so would the children
    # that are to get them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with progress() as tell:
        parts = list(all_parts(given, tell))
    print_table(parts)
    wrong = [complaint for part in parts for complaint in part.wrong]
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    print(f"seed {given.seed}: {'all is as promised' if not wrong else f'{len(wrong)} findings'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
