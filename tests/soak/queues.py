"""The soak's queue: processes of threads over one queue that they pass to one another, some of them killed.

Several producers put numbers; consumers do them, fail, take too long, and are killed with SIGKILL at random. At the end
every number was done, those that were acknowledged together with their effect exactly once, and nothing that somebody
acknowledged was delivered afterwards.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from persistency import CBOR, Persistency
from persistency.recipes import Baton, Queue
from tests.crash.running import PROJECT, command
from tests.soak.part import Part, Tell
from tests.soak.queue_worker import queue_of


@dataclass
class Plan:
    """One run. Everything about it follows from the seed, but for who is faster."""

    processes: int
    threads: int
    producers: int
    messages: int
    kills: int
    seed: int
    plant: str | None = None
    seconds: float = 100.0


@dataclass
class Outcome:
    """What came of a run."""

    wrong: list[str] = field(default_factory=list)
    killed: int = 0
    deliveries: int = 0
    again: int = 0


class Consumers:
    """The consuming processes."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root = root
        self._plan = plan
        self._begun = 0
        self.running = [self._start() for _ in range(plan.processes)]
        self.failed: list[str] = []

    def _start(self) -> tuple[subprocess.Popen[bytes], Path]:
        self._begun += 1
        plan, seed = self._plan, self._plan.seed + 1000 * self._begun
        notes = self._root.parent / f"notes-{self._begun}"
        options = ["--threads", str(plan.threads), "--seed", str(seed)]
        if plan.plant is not None:
            options += ["--plant", plan.plant]
        arguments = command("tests.soak.queue_worker", str(self._root), str(notes), *options)
        return subprocess.Popen(arguments, cwd=PROJECT, stdin=subprocess.PIPE, stderr=subprocess.PIPE), notes

    def notes(self) -> list[str]:
        """What all of them have noted down."""
        return [path.read_text() for path in sorted(self._root.parent.glob("notes-*"))]

    def kill(self, chance: random.Random) -> bool:
        """Kill one of them that is at work, and start another one; return whether there was one."""
        at = chance.randrange(len(self.running))
        process, notes = self.running[at]
        if not notes.exists() or not notes.stat().st_size:
            return False
        process.kill()
        process.communicate()
        self.running[at] = self._start()
        return True

    def end(self) -> None:
        """Have them end in order."""
        for process, _ in self.running:
            assert process.stdin is not None
            process.stdin.close()
        for process, _ in self.running:
            process.stdin = None
            try:
                _, said = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
                self.failed.append("a consumer didn't end")
            if process.returncode != 0 or said:
                self.failed.append(f"a consumer ended with {process.returncode}: {said.decode()[-2000:]}")


def produce(queue: Queue[int], numbers: list[int], seed: int) -> None:
    """Put numbers, alone and several at once, some of them delayed."""
    chance = random.Random(seed)
    while numbers:
        batch = [numbers.pop() for _ in range(min(len(numbers), chance.choice([1, 1, 5, 20])))]
        queue.put_many(batch, delay=chance.choice([None, None, 0.05])).result()


def run(plan: Plan, directory: Path) -> Outcome:
    """Run a plan in an empty directory."""
    root, chance, outcome, since = directory / "root", random.Random(plan.seed), Outcome(), monotonic()
    until = since + plan.seconds
    with Persistency(root) as p, Baton(p, "shared", poll=0.05) as baton:
        queue = queue_of(baton)
        consumers = Consumers(root, plan)
        outcome.wrong = consumers.failed
        shares = [list(range(n, plan.messages, plan.producers)) for n in range(plan.producers)]
        producers = [
            threading.Thread(target=produce, args=(queue, share, plan.seed + n)) for n, share in enumerate(shares)
        ]
        try:
            for thread in producers:
                thread.start()
            while monotonic() < until:
                sleep(chance.uniform(0.02, 0.1))
                outcome.deliveries = sum(notes.count("T") for notes in consumers.notes())
                # Spread over the whole run: each falls somewhere into the next share of the messages.
                due = outcome.deliveries * (plan.kills + 1) >= outcome.killed * plan.messages
                if outcome.killed < plan.kills and due and consumers.kill(chance):
                    outcome.killed += 1
                if not any(thread.is_alive() for thread in producers) and not any(queue.counts().result()[:3]):
                    break
            else:
                outcome.wrong.append(f"after {plan.seconds:.0f} s there were still messages: {queue.counts().result()}")
            for thread in producers:
                thread.join()
        finally:
            consumers.end()
        done = baton.run(lambda tx: {row.key.parts[0]: CBOR.decode(row.payload) for row in tx.scan("done")}).result()
    judge(plan, done, consumers.notes(), outcome)
    return outcome


def judge(plan: Plan, done: dict[int, int], notes: list[str], outcome: Outcome) -> None:
    """Say what is wrong with what was done, and with what the consumers noted down."""
    for value in range(plan.messages):
        times = done.get(value, 0)
        if times == 0:
            outcome.wrong.append(f"message {value} was lost")
        elif times > 1 and value % 2 == 0:
            outcome.wrong.append(f"message {value}: its effect is there {times} times")
    delivered: dict[int, int] = {}
    acked: dict[int, list[int]] = {}
    for line in "".join(notes).splitlines():
        kind, id_, attempt = line.split()
        if kind == "T":
            delivered[int(id_)] = max(delivered.get(int(id_), 0), int(attempt))
        else:
            acked.setdefault(int(id_), []).append(int(attempt))
    outcome.deliveries = "".join(notes).count("T")
    outcome.again = outcome.deliveries - len(delivered)
    for id_, attempts in acked.items():
        if len(attempts) > 1:
            outcome.wrong.append(f"id {id_} was acknowledged {len(attempts)} times")
        if delivered.get(id_, 0) > min(attempts):
            outcome.wrong.append(f"id {id_} was acknowledged at attempt {min(attempts)}, and delivered again after it")


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Sixteen consumers, as processes and as threads of processes."""
    cycles = max(4, int(min(given.cycles, 2 * given.seconds)))  # a cycle takes half a second at most, mostly much less
    begun = monotonic()
    for processes, threads in ((16, 1), (4, 4), (1, 16)):
        if monotonic() - begun >= given.seconds:
            return
        name = f"queue, {processes} processes of {threads} threads"
        plan = Plan(
            processes,
            threads,
            producers=4,
            messages=5 * cycles,
            kills=max(2, cycles // 10),
            seed=given.seed,
            seconds=120 + cycles,  # a hang, not a slow machine
        )
        tell(f"{name}: {plan.messages:,} messages, {plan.kills} kills")
        since = monotonic()
        with tempfile.TemporaryDirectory() as directory:
            outcome = run(plan, Path(directory))
        part = Part(name, wrong=[f"{name}: {complaint}" for complaint in outcome.wrong])
        lost = sum("lost" in complaint for complaint in outcome.wrong)
        part.cells = {
            "cycles": f"{outcome.killed:,}",
            "lost": str(lost),
            "other": str(len(outcome.wrong) - lost),
            "rows": f"{plan.messages:,} in {outcome.deliveries:,}",
            "seconds": f"{monotonic() - since:.1f}",
        }
        yield part
