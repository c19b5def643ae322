"""Owners paused past their lease, and woken when somebody else has the job: `python -m tests.soak.postgres_fence`.

Each cycle has two owners of one job, in processes of their own. The first one writes and is stopped (SIGSTOP) at a
random moment. When its lease is over the second one takes the job, writes, and is acknowledged. Then the first one
goes on (SIGCONT): it must be told that it has lost its lease, and nothing that it writes from then on may be there. In
one cycle of four nobody takes the job meanwhile: then the first one goes on as if nothing had been.

It prints the totals as the last line, one object of JSON. This process opens nothing and stays single-threaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from time import monotonic, sleep
from typing import Any

from persistency import Job, Persistency, PersistencyError, Put, Transaction, WriteFailed
from persistency.errors import LeaseLost
from tests.crash.running import PROJECT, command
from tests.postgres import Server, with_parameters
from tests.soak.part import Part, Tell
from tests.soak.postgres_fence_plants import PLANTS
from tests.soak.postgres_kills import HANG_SECONDS, LEASE_SECONDS, open_when_free

FIRST, SECOND = "first", "second"
ROWS = "rows"
FINDINGS_MAX = 20
STALL_SECONDS = 5.0  # for so long an owner takes what it is told for something that passes
ROUNDS_AFTER = 20  # that the first one writes when it was woken, if nobody tells it


@dataclass
class Totals:
    """What came of all the cycles: `amid` counts stops that left something posted and not acknowledged."""

    cycles: int = 0
    amid: int = 0
    told: int = 0  # owners that were told they had lost their lease
    unharmed: int = 0  # owners that nobody had taken the job from, and that went on
    rows: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


def write_round(job: Job, who: str, number: int, rng: random.Random) -> int:
    """Post some rows, alone and in batches, each with who has written it; return the number of the next one."""
    for _ in range(rng.randint(1, 30)):
        size = rng.choice((1, 1, 1, 3))
        ops = [Put(ROWS, (number + at,), f"{who} {number + at}".encode()) for at in range(size)]
        if size == 1 and rng.random() < 0.3:
            job.compare_and_set(ROWS, (number,), None, ops[0].payload)  # needs a transaction of several steps
        elif size == 1:
            job.put(ROWS, (number,), ops[0].payload)
        else:
            job.persist(ops)
        if rng.random() < 0.1:
            job.get(ROWS, (number,))
        number += size
    return number


def stop_inside(tx: Transaction, me: Owner, number: int) -> None:
    """Write a row in a transaction, and stop the process before that is over; done again it doesn't stop again."""
    tx.put(ROWS, (number,), f"{FIRST} {number}".encode())
    if not me.stopped:
        me.stopped = True
        me.say("inside")
        os.kill(os.getpid(), signal.SIGSTOP)


def lost_lease(error: BaseException | None) -> bool:
    """Say whether an error is, or comes from, a lease that was lost."""
    seen: list[BaseException | None] = [error]
    while seen:
        at = seen.pop()
        if isinstance(at, LeaseLost):
            return True
        if isinstance(at, WriteFailed):
            seen += [failure.error for failure in at.failures]
        if at is not None:
            seen.append(at.__cause__)
    return False


class Owner:
    """A process that owns the job; what it says comes as lines of JSON, what it may do is told by lines too."""

    def __init__(self, run: Callable[[Owner], None]) -> None:
        self.stopped = False
        heard, say = os.pipe()
        hear, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(heard)
            os.close(told)
            self._in, self._out = hear, say
            self._data = b""
            try:
                run(self)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(70)
        os.close(hear)
        os.close(say)
        self._in, self._out = heard, told
        self._data = b""

    def say(self, *what: Any) -> None:
        """Send a line to the other side."""
        os.write(self._out, json.dumps(what).encode() + b"\n")

    def hear(self, seconds: float = HANG_SECONDS) -> list[Any] | None:
        """Return the next line from the other side; None at its end, and if none comes in time."""
        limit = monotonic() + seconds
        while b"\n" not in self._data:
            if not select.select([self._in], [], [], max(0.0, limit - monotonic()))[0]:
                return None
            piece = os.read(self._in, 65536)
            if not piece:
                return None
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        found: list[Any] = json.loads(line)
        return found

    def heard(self) -> list[list[Any]]:
        """Return all lines that are there by now."""
        lines = []
        while (line := self.hear(0.0)) is not None:
            lines.append(line)
        return lines

    def end(self) -> None:
        """Kill it if need be, and close everything."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._in)
        os.close(self._out)


def first(url: str, seed: int, *, inside: bool) -> Callable[[Owner], None]:
    """Return the program of the first owner: it writes, and tells how far it was acknowledged, until it is told off.

    `inside`: it stops by itself, in the middle of a transaction.
    """

    def run(me: Owner) -> None:
        rng = random.Random(seed)
        persistency = Persistency(url)
        job = persistency.open_job("job", stall_timeout=STALL_SECONDS)
        number = 0
        stops_at = rng.randint(0, 3) if inside else -1
        rounds_left: int | None = None
        error: BaseException | None = None
        while rounds_left != 0:
            try:
                if not stops_at:
                    number += 1
                    job.run(stop_inside, me, number - 1).result(HANG_SECONDS)
                    me.say("acked", number)
                stops_at -= 1
                number = write_round(job, FIRST, number, rng)
                me.say("posted", number)
                job.flush(sync=rng.random() < 0.1).result(HANG_SECONDS)
                me.say("acked", number)
            except (PersistencyError, TimeoutError) as caught:
                error = caught
                break
            if rounds_left is None and me.heard():
                rounds_left = ROUNDS_AFTER
            elif rounds_left is not None:
                rounds_left -= 1
        me.say("over", None if error is None else repr(error), lost_lease(error), job.statistics().state)
        refused = 0
        if error is not None:
            try:
                job.put(ROWS, (number,), b"after the end")
            except PersistencyError:
                refused = 1
            try:
                job.get(ROWS, (0,)).result(HANG_SECONDS)
            except PersistencyError:
                refused += 1
        try:
            persistency.close(HANG_SECONDS)
            closing = None
        except (PersistencyError, TimeoutError) as caught:
            closing = repr(caught)
        me.say("closed", refused, closing)

    return run


def second(url: str, seed: int) -> Callable[[Owner], None]:
    """Return the program of the second owner: it takes the job, writes, waits, writes again and shows everything."""

    def run(me: Owner) -> None:
        rng = random.Random(seed)
        with Persistency(url) as persistency:
            job = open_when_free(persistency, "job")
            number = job.count(ROWS).result()
            me.say("taken", number)
            for _ in range(3):
                number = write_round(job, SECOND, number, rng)
            job.flush().result(HANG_SECONDS)
            me.say("acked", number)
            if me.hear(2 * HANG_SECONDS) is not None:  # the first one has been woken, and is through
                number = write_round(job, SECOND, number, rng)
                job.flush(sync=True).result(HANG_SECONDS)
                me.say("acked", number)
            rows = sorted((row.version, row.key.parts[0], row.payload.decode()) for row in job.snapshot(ROWS).result())
            me.say("rows", job.version().result(), rows)

    return run


def judge(rows: list[list[Any]], last_version: int, acked: dict[str, int], taken: int | None) -> list[str]:
    """Return what is wrong with the rows of both: a prefix of the first one's, then all of the second one's."""
    wrong = []
    if [row[0] for row in rows] != list(range(1, len(rows) + 1)) or last_version != len(rows):
        wrong.append(f"the versions aren't 1 to {len(rows)}, the last one {last_version}")
    if [row[1] for row in rows] != list(range(len(rows))):
        wrong.append("there is a hole in the rows")
    own = len(rows) if taken is None else taken
    for at, (_version, number, payload) in enumerate(rows):
        who = FIRST if at < own else SECOND
        if payload != f"{who} {number}":
            wrong.append(f"row {at} is {payload!r}, where it is the {who} owner's turn: both have committed")
            break
    if acked.get(FIRST, 0) > own:
        wrong.append(f"the first owner was acknowledged {acked[FIRST]} rows, {own} are there")
    if acked.get(SECOND, 0) > len(rows):
        wrong.append(f"the second owner was acknowledged {acked[SECOND]} rows, {len(rows)} are there")
    return wrong


class Cycle:
    """Both owners of one job, and what they have said."""

    def __init__(self, url: str, rng: random.Random, totals: Totals, plant: str) -> None:
        self._url = url
        self._rng = rng
        self._totals = totals
        self._taken_over = bool(plant) or rng.random() < 0.75
        self._acked = {FIRST: 0, SECOND: 0}
        self._posted = 0
        self._where = "anywhere"
        # Half of the stops fall anywhere, the others inside a function that the job runs in a transaction.
        self._inside = rng.random() < 0.5
        program = first(url, rng.getrandbits(32), inside=self._inside)

        def planted(me: Owner) -> None:
            if plant:
                PLANTS[plant]()
            program(me)

        self._owners = [Owner(planted)]

    def run(self) -> list[str]:
        """Run both owners once; return what is wrong."""
        try:
            return self._run()
        except EOFError as error:
            return [str(error)]
        finally:
            for owner in self._owners:
                owner.end()

    def _hear(self, owner: Owner, missing: str) -> list[Any]:
        line = owner.hear(2 * HANG_SECONDS)
        if line is None:
            raise EOFError(missing)
        if owner is self._owners[0]:
            self._note(line)
        return line

    def _note(self, line: list[Any]) -> None:
        if line[0] == "acked":
            self._acked[FIRST] = line[1]
        elif line[0] == "posted":
            self._posted = line[1]

    def _run(self) -> list[str]:
        one, totals = self._owners[0], self._totals
        self._stop(one)
        totals.amid += self._posted > self._acked[FIRST]
        taken = None
        if self._taken_over:
            taken = self._take_over(f"nobody could take the job from an owner that was stopped {self._where}")
        else:
            sleep(1.5 * LEASE_SECONDS)  # nothing comes to pass meanwhile that could be waited for
        one.say("woken")
        os.kill(one.pid, signal.SIGCONT)
        over = self._hear(one, "the first owner hangs after it was woken")
        while over[0] != "over":
            over = self._hear(one, "the first owner hangs after it was woken")
        closed = self._hear(one, "the first owner hangs as it closes")
        wrong = _told(over, closed, totals, taken_over=self._taken_over)
        if taken is None:
            taken = self._take_over("nobody could take the job after it was closed")
        two = self._owners[1]
        two.say("go on")
        self._acked[SECOND] = self._hear(two, "the second owner couldn't go on")[1]
        _, last_version, rows = self._hear(two, "the second owner couldn't show the rows")
        totals.rows += len(rows)
        return [*wrong, *judge(rows, last_version, self._acked, taken)]

    def _stop(self, one: Owner) -> None:
        """Have the first owner write for a while, and stop it; one that stops by itself isn't stopped twice."""
        for _ in count() if self._inside else range(self._rng.randint(2, 12)):
            line = self._hear(one, "the first owner has said nothing for too long")
            if line[0] == "over":
                raise EOFError(f"the first owner ended by itself: {line}")
            if line[0] == "inside":
                self._where = "inside a transaction"
                break
        else:
            sleep(self._rng.random() * 0.004)  # where the stop falls is left to chance
            os.kill(one.pid, signal.SIGSTOP)
        os.waitpid(one.pid, os.WUNTRACED)
        for line in one.heard():
            self._note(line)

    def _take_over(self, missing: str) -> int:
        """Have the second owner take the job; return how many rows it has found."""
        two = Owner(second(self._url, self._rng.getrandbits(32)))
        self._owners.append(two)
        taken = self._hear(two, missing)
        self._acked[SECOND] = self._hear(two, "the second owner couldn't write")[1]
        return int(taken[1])


def _told(over: list[Any], closed: list[Any], totals: Totals, *, taken_over: bool) -> list[str]:
    """Return what is wrong with how the first owner ended."""
    _, error, lost, state = over
    if not taken_over:
        totals.unharmed += error is None
        return [] if error is None else [f"nobody had taken the job, and its owner failed: {error}"]
    totals.told += lost
    wrong = []
    if not lost:
        wrong.append(f"the owner that was paused wasn't told that it had lost its lease: {error}")
    elif state != "poisoned":
        wrong.append(f"the owner that was paused is {state}, not poisoned")
    elif closed[1] != 2:
        wrong.append("the owner that has lost its lease still takes posts, or answers")
    return wrong


def main(given: list[str] | None = None) -> int:
    """Run the cycles; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--plant", default="")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args(given)
    rng = random.Random(arguments.seed)
    totals = Totals()
    begun = monotonic()
    while totals.cycles < arguments.cycles and totals.seconds < arguments.seconds:
        schema = f"{arguments.plant.replace('-', '_')}fence_{arguments.seed}_{totals.cycles}"
        url = with_parameters(arguments.url, persistency_schema=schema, persistency_lease=LEASE_SECONDS)
        wrong = Cycle(url, rng, totals, arguments.plant).run()
        totals.findings += [f"cycle {totals.cycles}: {text}" for text in wrong]
        totals.cycles += 1
        totals.seconds = round(monotonic() - begun, 3)
        print(json.dumps(asdict(totals)), flush=True)
        if len(totals.findings) >= FINDINGS_MAX or (arguments.plant and totals.findings):
            break
    return 1 if totals.findings else 0


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Pause N // 10 owners (100)."""
    name, cycles = "postgres, owners paused past their lease", max(1, given.cycles // 10)
    totals: dict[str, Any] = {}
    with Server() as server:
        arguments = ["--url", server.url, "--cycles", str(cycles), "--seed", str(given.seed)]
        with subprocess.Popen(
            command("tests.soak.postgres_fence", *arguments, "--seconds", str(given.seconds)),
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                totals = json.loads(line)
                tell(f"{name}: {totals['cycles']} of {cycles}")
    if not totals:
        yield Part(name, wrong=[f"{name}: the loop ended with return code {child.returncode}"])
        return
    part = Part(name, wrong=list(totals["findings"]))
    part.cells = {
        "cycles": f"{totals['cycles']:,}",
        "in between": f"{totals['amid']:,}",
        "other": str(len(totals["findings"])),
        "rows": f"{totals['rows']:,}; {totals['told']} told, {totals['unharmed']} unharmed",
        "seconds": f"{totals['seconds']:.1f}",
    }
    yield part


if __name__ == "__main__":
    sys.exit(main())
