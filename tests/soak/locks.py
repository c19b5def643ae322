"""The soak's locks: contenders for one lock are killed and paused, and a witness file says who had it when.

Two forms: processes that pass the job to one another by a `Baton`, two threads in each, and the threads of one process
over a `Job`. Holders kill themselves inside, some stay for longer than their lease, and whole processes are killed and
paused from outside at random moments.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from tests.crash.holders import KILLS, OVERSTAYS, STOP, WITNESS
from tests.crash.running import PROJECT, command
from tests.soak.part import Part, Tell

PROCESSES = {"processes": 4, "threads": 1}
LEASE_MS = 500
_LOOK_S = 0.01
_DISTURBED_S = 0.3  # how many are killed from outside in a second, and as many are paused
_END_S = 60.0  # how long the contenders may take to end


@dataclass
class Judged:
    """What a witness file says: how many rounds, and what was wrong."""

    rounds: int = 0
    contended: int = 0  # somebody else had the lock when it was asked for
    left: int = 0
    lost: int = 0
    killed: int = 0  # processes
    wrong: list[str] = field(default_factory=list)

    @property
    def died(self) -> int:
        """How many were killed inside: they neither left nor were refused."""
        return self.rounds - self.left - self.lost


class Judge:
    """Reads a witness file: nobody enters while somebody is inside who may still be there, and tokens grow.

    Somebody who has entered is inside until he leaves, or until his lease is over: the last one that was seen. Who was
    killed, or stayed too long, doesn't leave; then the next one's lease must have begun when that was over.
    """

    def __init__(self) -> None:
        self.judged = Judged()
        self._inside: tuple[int, int] | None = None  # the token, and when its lease ends
        self._free_since = 0
        self._entered: list[tuple[int, int]] = []  # tokens, growing, each with when its lease began
        self._known: set[int] = set()
        self._held: list[tuple[int, float]] = []

    def read(self, line: str) -> None:
        """Take in the next line."""
        what, _, rest = line.partition(" ")
        if what == "wrong":
            self.judged.wrong.append(rest)
        elif what == "lost":
            self.judged.lost += int(rest) in self._known
        elif what == "held":
            token, at = rest.split()
            self._held.append((int(token), float(at)))
        else:
            self._fenced(what, *map(int, rest.split()))

    def _fenced(self, what: str, token: int, began: int, ends: int, moment: int) -> None:
        wrong = self.judged.wrong
        if what == "enter":
            if self._entered and token <= self._entered[-1][0]:
                wrong.append(f"token {token} was given after {self._entered[-1][0]}")
            if self._inside is not None:
                other, self._free_since = self._inside
                if began < self._free_since:
                    wrong.append(f"{token} got it at {began} while {other} had it until {self._free_since}")
            self.judged.rounds += 1
            self.judged.contended += moment < self._free_since
            self._inside = token, ends
            self._entered.append((token, began))
            self._known.add(token)
        elif self._inside is None or self._inside[0] != token:
            wrong.append(f"{token} could {what} after {self._entered[-1][0]} had entered")
        elif what == "leave":
            self.judged.left += 1
            self._inside, self._free_since = None, moment
        else:
            self._inside = token, max(ends, self._inside[1])

    def end(self) -> Judged:
        """Look at what the holders believed: until the next one got it, which is told in whole milliseconds."""
        for token, at in self._held:
            later = bisect_right(self._entered, (token, 1 << 62))
            if later < len(self._entered) and at >= self._entered[later][1] + 1:
                next_, began = self._entered[later]
                self.judged.wrong.append(f"{token} believed at {at} that it had it, and {next_} had it since {began}")
        return self.judged


def judge(lines: list[str]) -> Judged:
    """Judge a whole file."""
    judge = Judge()
    for line in lines:
        judge.read(line)
    return judge.end()


class Storm:
    """Contenders of one form, started again when they are killed, until there were enough rounds."""

    def __init__(self, root: Path, form: str, seed: int, lease_ms: int, options: list[str], count: int) -> None:
        self.root = root
        self.rng = random.Random(seed)
        self.options = ["--form", form, "--lease", str(lease_ms), *options]
        self.count = count
        self.lease_s = lease_ms / 1000
        self.running: list[subprocess.Popen[str]] = []
        self.frozen: dict[subprocess.Popen[str], float] = {}
        self.killed = 0
        self.wrong: list[str] = []
        self.rounds = 0
        self._seen = 0

    def start(self) -> None:
        """Have as many processes as there are to be."""
        while len(self.running) < self.count:
            options = [*self.options, "--seed", str(self.rng.getrandbits(32))]
            line = command("tests.crash.holders", str(self.root), *options)
            self.running.append(subprocess.Popen(line, cwd=PROJECT, stderr=subprocess.PIPE, text=True))

    def look(self) -> None:
        """Count the rounds, and bury the dead."""
        witness = self.root / WITNESS
        if witness.exists():
            with witness.open("rb") as file:
                file.seek(self._seen)
                new = file.read()
            self._seen += len(new)
            self.rounds += new.count(b"enter ")
        for child in [child for child in self.running if child.poll() is not None]:
            self.bury(child)

    def bury(self, child: subprocess.Popen[str]) -> None:
        """Note how a process has ended."""
        self.running.remove(child)
        self.frozen.pop(child, None)
        _, told = child.communicate()
        if child.returncode == -signal.SIGKILL:
            self.killed += 1
        elif child.returncode:
            self.wrong.append(f"a process ended with {child.returncode}: {told[-2000:]}")

    def disturb(self) -> None:
        """Kill a process, or pause it for about as long as a lease, now and then."""
        now = monotonic()
        for child in [child for child, until in self.frozen.items() if until <= now]:
            child.send_signal(signal.SIGCONT)
            del self.frozen[child]
        luck, awake = self.rng.random(), [child for child in self.running if child not in self.frozen]
        if awake and luck < 2 * _DISTURBED_S * _LOOK_S:
            child = self.rng.choice(awake)
            if luck < _DISTURBED_S * _LOOK_S:
                child.kill()
            else:
                child.send_signal(signal.SIGSTOP)
                self.frozen[child] = now + self.rng.uniform(0.2, 2.0) * self.lease_s

    def end(self) -> None:
        """Have all of them end by themselves; one that doesn't is a finding."""
        (self.root / STOP).touch()
        for child in self.frozen:
            child.send_signal(signal.SIGCONT)
        until = monotonic() + _END_S
        for child in list(self.running):
            try:
                child.wait(max(0.1, until - monotonic()))
            except subprocess.TimeoutExpired:
                self.wrong.append(f"process {child.pid} doesn't end")
                child.kill()
                child.wait()
                self.killed -= 1
            self.bury(child)


def storm(
    form: str,
    rounds: int,
    seed: int,
    *,
    lease_ms: int = LEASE_MS,
    kills: int = KILLS,
    overstays: int = OVERSTAYS,
    count: int | None = None,
    plant: str | None = None,
    seconds: float = float("inf"),
    tell: Tell = lambda _text: None,
) -> Judged:
    """Have so many rounds, or as many as there are in so many seconds, and judge them."""
    with tempfile.TemporaryDirectory(prefix="locks-") as place:
        options = ["--kills", str(kills), "--overstays", str(overstays)]
        options += [] if plant is None else ["--plant", plant]
        storm = Storm(Path(place), form, seed, lease_ms, options, PROCESSES[form] if count is None else count)
        begun = told = monotonic()
        try:
            while storm.rounds < rounds and monotonic() - begun < seconds:
                storm.start()
                sleep(_LOOK_S)  # between two looks; nothing is waited for
                storm.look()
                storm.disturb()
                if monotonic() - told > 1:
                    told = monotonic()
                    tell(f"locks, {form}: {storm.rounds:,} of {rounds:,}, {storm.killed} killed")
        finally:
            storm.end()
        witness = Path(place, WITNESS)
        judged = judge(witness.read_text().splitlines() if witness.exists() else [])
    judged.killed = storm.killed
    judged.wrong += storm.wrong
    return judged


def enough(judged: Judged, cycles: int, *, ended_early: bool) -> list[str]:
    """Say what there was too little of for the rest to mean anything; nothing, if that was asked for by `--seconds`."""
    if ended_early:
        return []
    found = []
    if judged.contended < 10 * cycles:
        found.append(f"only {judged.contended:,} rounds were contended, of at least {10 * cycles:,}")
    if not judged.died or not judged.killed:
        found.append(f"{judged.died} holders were killed inside, and {judged.killed} processes: nobody has died")
    return found


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """For each form 11 rounds for each of the cycles (11,000), of which at least 10 are contended.

    The table says under "cycles" how many were contended, of all; under "in between" how many holders were killed
    inside, and how many processes in all; under "lost" how many were refused because their lease had run out.
    """
    for form in PROCESSES:
        begun = monotonic()
        rounds = 11 * given.cycles
        judged = storm(form, rounds, given.seed, seconds=given.seconds, tell=tell)
        ended_early = judged.rounds < rounds and monotonic() - begun >= given.seconds
        judged.wrong += enough(judged, given.cycles, ended_early=ended_early)
        part = Part(f"locks, {form}", wrong=[f"locks, {form}: {wrong}" for wrong in judged.wrong])
        part.cells = {
            "cycles": f"{judged.contended:,} of {judged.rounds:,}" + (", ended early" if ended_early else ""),
            "in between": f"{judged.died} inside, {judged.killed} in all",
            "lost": str(judged.lost),
            "other": str(len(judged.wrong)),
            "seconds": f"{monotonic() - begun:.1f}",
        }
        yield part
