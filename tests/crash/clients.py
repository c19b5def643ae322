"""The clients of a concurrent history: threads and tasks that call a job at random, and stamp what they do.

The threads of this process take turns as often as the interpreter lets them, while a history is made; and in half of
the histories the job's turn is held at first, so that the calls stand in line.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import anyio.lowlevel

from persistency import Conflict, Job, Overloaded, Persistency, Reply
from persistency.codec.values import encode
from tests.crash.histories import KEYS, NUMBER, TEXT, VERBS, Call, History, Item, State, Undone, overlap
from tests.loops import LOOPS, together

WAIT = 20.0  # seconds for what must come
SWITCH_SECONDS = 1e-6

# What a client does, the usual more often.
CHOICES = (
    *(3 * ("put", "commit", "compare_and_set", "increment", "get")),
    *(2 * ("persist", "exchange", "get_many", "scan", "entry")),
    *("delete", "touch", "delete_acked", "delete_prefix_acked", "write_and_raise", "flush"),
    *("exists", "count", "scan_range", "scan_prefix", "snapshot", "version"),
)


def _key(rng: random.Random) -> int:
    return rng.randrange(len(KEYS))


def _items(rng: random.Random, maker: Maker, checks: int) -> tuple[Item, ...]:
    """Return what a batch consists of: up to three writes, and at random places among them so many checks."""
    items: list[Item] = []
    for _ in range(rng.randint(1, 3)):
        at = _key(rng)
        items.append(("delete", at, None) if rng.randrange(4) == 0 else ("put", at, maker.value()))
    for _ in range(checks):
        at = _key(rng)
        items.insert(rng.randrange(len(items)), ("check", at, maker.versions[at]))
    return tuple(items)


ARGUMENTS: dict[str, Callable[[random.Random, Maker], tuple[Any, ...]]] = {
    "put": lambda rng, maker: (_key(rng), maker.value()),
    "persist": lambda rng, maker: (_items(rng, maker, 0),),
    "commit": lambda rng, maker: (_items(rng, maker, rng.choice((0, 0, 1, 2))),),
    "compare_and_set": lambda rng, maker: (
        (at := _key(rng)),
        maker.payloads[at],
        None if rng.randrange(6) == 0 else maker.value(),
    ),
    "increment": lambda rng, _maker: (_key(rng), rng.randint(-3, 3)),
    "exchange": lambda rng, _maker: tuple(rng.sample(range(len(KEYS)), 2)),
    "write_and_raise": lambda rng, maker: (_key(rng), maker.value()),
    "get_many": lambda rng, _maker: (tuple(rng.sample(range(len(KEYS)), rng.randint(2, 3))),),
    "scan": lambda rng, _maker: (rng.randrange(2) == 1, rng.choice((None, 1, 2))),
    **{
        verb: lambda rng, _maker: (_key(rng),) for verb in ("delete", "touch", "delete_acked", "get", "entry", "exists")
    },
}


class Client:
    """One thread or task of a history: it posts calls, and takes their answers at once or some calls later."""

    def __init__(self, maker: Maker, name: str, rng: random.Random) -> None:
        self._maker = maker
        self._name = name
        self._rng = rng
        self._steps = rng.randint(3, 10)
        self._window = rng.choice((1, 2, 4, 6))
        self._waiting: list[tuple[Call, Reply[Any]]] = []

    def in_thread(self) -> None:
        """Make the calls in a plain thread."""
        for _ in range(self._steps):
            self._post()
            if len(self._waiting) >= self._window:
                self._take_all()
        self._take_all()

    def _take_all(self) -> None:
        self._maker.about_to_wait()
        for call, reply in self._waiting:
            with self._noting(call):
                self._note(call, reply.result(WAIT))
        self._waiting.clear()

    async def in_loop(self) -> None:
        """Make the calls in a task of an event loop."""
        for _ in range(self._steps):
            self._post()
            if len(self._waiting) >= self._window:
                await self._atake_all()
            elif self._rng.randrange(2):
                await anyio.lowlevel.checkpoint()
        await self._atake_all()

    async def _atake_all(self) -> None:
        self._maker.about_to_wait()
        waiting, self._waiting = self._waiting, []
        for call, reply in waiting:
            with self._noting(call):
                with anyio.fail_after(WAIT):
                    self._note(call, await reply)

    def _post(self) -> None:
        maker, rng = self._maker, self._rng
        verb = rng.choice(CHOICES)
        arguments = ARGUMENTS.get(verb, lambda _rng, _maker: ())(rng, maker)
        post = VERBS[verb].post
        call = Call(self._name, verb, arguments, next(maker.stamps))
        try:
            reply = post(maker.job, maker.category, *arguments)
        except Overloaded:  # refused whole: as if it had never been
            return
        call.posted = call.settled = next(maker.stamps)
        maker.calls.append(call)
        if reply is None:
            return
        if not reply.done():
            call.settled = 0
            if rng.randrange(2):
                reply.add_done_callback(lambda _reply: maker.stamp(call))
        self._waiting.append((call, reply))

    def _note(self, call: Call, answer: Any) -> None:
        call.answer = VERBS[call.verb].noted(answer)
        maker = self._maker
        if call.verb == "get":
            maker.payloads[call.arguments[0]] = answer
        elif call.verb == "entry":
            maker.versions[call.arguments[0]] = None if answer is None else answer.version
        elif call.verb == "commit":
            maker.versions[call.arguments[0][-1][1]] = answer

    @contextmanager
    def _noting(self, call: Call) -> Iterator[None]:
        try:
            yield
        except Conflict as error:
            at = NUMBER[error.key]
            call.answer = (
                ("conflict", at) if call.verb == "increment" else ("conflict", at, error.expected, error.actual)
            )
        except Undone:
            call.answer = "undone"
        except Exception as error:
            call.answer = repr(error)
            self._maker.failures.append(f"raised {error!r} at {call}")
        finally:
            self._maker.stamp(call)


class Maker:
    """Makes one history with a job."""

    def __init__(self, job: Job, name: str, seed: str, *, holds: bool) -> None:
        self.job = job
        self.category = self.name = name
        self.stamps = itertools.count(1)
        self.calls: list[Call] = []
        self.failures: list[str] = []
        # What was seen last, so that a comparison has a chance.
        self.payloads: list[bytes | None] = [None] * len(KEYS)
        self.versions: list[int | None] = [None] * len(KEYS)
        self._fresh = itertools.count()
        self._rng = random.Random(seed)
        self._holds = holds
        self._go = threading.Event()
        self._wait_left = 0

    def value(self) -> bytes:
        """Return a payload that is nowhere else, mostly."""
        return encode(1000 * next(self._fresh)) if self._rng.randrange(8) else TEXT

    def stamp(self, call: Call) -> None:
        """Note that a call has its answer, unless that was noted before."""
        stamp = next(self.stamps)
        call.settled = call.settled or stamp

    def about_to_wait(self) -> None:
        """Be told of a client that won't go on without answers."""
        self._wait_left -= 1
        if self._wait_left <= 0:
            self._go.set()

    def make(self) -> History:
        """Make the history."""
        version = self.job.version().result(WAIT)
        history = History(self.name, State(version, (None,) * len(KEYS)), self.calls)
        clients = self._clients()
        start = threading.Barrier(len(clients) + 1)
        threads = [threading.Thread(target=self._run, args=(start, client)) for client in clients]
        for thread in threads:
            thread.start()
        if self._holds and self._rng.randrange(2):
            # The turn is held until some of the clients have to wait, so that the others' calls stand in line.
            self._wait_left = self._rng.randint(1, len(clients))
            self.job.run(lambda _tx: (start.wait(WAIT), self._go.wait(WAIT))).result(WAIT)
        else:
            start.wait(WAIT)
        for thread in threads:
            thread.join(2 * WAIT)
        history.wrong = self.failures + [self._left(thread) for thread in threads if thread.is_alive()]
        for verb in ("snapshot", "version") if not history.wrong else ():
            began = next(self.stamps)
            reply = VERBS[verb].post(self.job, self.category)
            assert reply is not None
            answer = VERBS[verb].noted(reply.result(WAIT))
            history.last.append(Call("end", verb, (), began, next(self.stamps), next(self.stamps), answer))
        return history

    def _left(self, thread: threading.Thread) -> str:
        frame = sys._current_frames().get(thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        return f"has left {thread} with {self.job.statistics()} at\n{stack}"

    def _clients(self) -> list[Callable[[], None]]:
        clients: list[Callable[[], None]] = []
        for number in range(self._rng.randint(2, 4)):
            if self._rng.randrange(2):
                clients.append(Client(self, f"thread {number}", self._other()).in_thread)
            else:
                tasks = [
                    Client(self, f"task {number}.{task}", self._other()) for task in range(self._rng.randint(1, 2))
                ]
                run = LOOPS["trio" if number % 2 else "asyncio"]
                clients.append(partial(run, _gather, tasks))
        return clients

    def _other(self) -> random.Random:
        return random.Random(self._rng.getrandbits(64))

    def _run(self, start: threading.Barrier, client: Callable[[], None]) -> None:
        try:
            start.wait(WAIT)
            client()
        except BaseException as error:
            self.failures.append(f"ended with {error!r}")
        finally:
            self._go.set()


async def _gather(tasks: list[Client]) -> None:
    await together(*(task.in_loop() for task in tasks))


# -- many of them -----------------------------------------------------------------------------------------------------

# Options, and whether the turn may be held: in a narrow mailbox a thread that waits for room would wait for ever.
VARIANTS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({}, True),
    ({"inline": False}, True),
    ({"mailbox_ops_max": 2, "requests_max": 3}, False),
    ({"feed_changes_max": 100, "max_bytes": 1_000_000}, True),
)


@dataclass
class Survey:
    """What came of many histories. `overlap` is with how many others a call was under way, on average."""

    histories: int = 0
    calls: int = 0
    overlap: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, history: History) -> None:
        """Judge one more history."""
        self.wrong += history.judge()
        self.histories += 1
        if history.calls:
            met = self.overlap * self.calls + overlap(history.calls) * len(history.calls)
            self.calls += len(history.calls)
            self.overlap = met / self.calls


def survey(
    place: Path,
    seed: int,
    count: int,
    *,
    until: str = "",
    seconds: float = inf,
    tell: Callable[[Survey], object] = lambda _survey: None,
) -> Survey:
    """Make histories, in turn with every variant of a job in memory and in a directory.

    Stops at the first one that is wrong, or at the first whose complaint has `until` in it.
    """
    told, begun = Survey(), monotonic()
    switch = sys.getswitchinterval()
    with ExitStack() as stack:
        roots = [stack.enter_context(Persistency(root)) for root in (":memory:", place)]
        jobs = [
            (root.open_job(f"variant{number}", **options), holds)
            for number, (options, holds) in enumerate(VARIANTS)
            for root in roots
        ]
        stack.callback(sys.setswitchinterval, switch)
        sys.setswitchinterval(SWITCH_SECONDS)
        while told.histories < count and monotonic() - begun < seconds:
            job, holds = jobs[told.histories % len(jobs)]
            name = f"history {told.histories} of seed {seed}"
            told.add(Maker(job, name, name, holds=holds).make())
            tell(told)
            if any(until in complaint for complaint in told.wrong):
                break
    return told
