"""`run`: a function that travels to the data, all or nothing, and what it may not do there."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import apsw
import pytest

from persistency import (
    Check,
    Closed,
    Conflict,
    Delete,
    DeletePrefix,
    DeleteRange,
    Entry,
    Failure,
    Job,
    KeyRange,
    Misuse,
    Persistency,
    Put,
    QuotaExceeded,
    Reply,
    Row,
    WriteFailed,
    key,
)
from persistency.storage.sqlite import SqliteStore
from persistency.transaction import Transaction
from tests.loops import LOOPS, InLoop, Task, bounded, turns
from tests.storage.conftest import FaultyDisk

WAIT = 20.0
K = key("k")
T = TypeVar("T")
Ask = Callable[[Callable[[], Reply[Any]]], Any]


@pytest.fixture
def persistency(root: str) -> Iterator[Persistency]:
    """Give an empty root."""
    with Persistency(root) as opened:
        yield opened


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job."""
    return persistency.open_job("job")


def in_task(request_it: Callable[[], Reply[Any]], loop: str = "asyncio") -> Any:
    """Make a request and take its answer within an event loop, where the worker runs it."""

    async def main() -> Any:
        try:
            return await request_it(), None
        except BaseException as error:  # an interrupt that left the loop would end it too
            return None, error

    answer, error = LOOPS[loop](bounded, main)
    if error is not None:
        raise error
    return answer


@pytest.fixture(params=["thread", *LOOPS])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Make a request and take its answer: in place in a plain thread, or through the worker from an event loop."""
    if request.param == "thread":
        return lambda request_it: request_it().result(WAIT)
    return partial(in_task, loop=request.param)


def payloads(job: Job, category: str = "c") -> list[bytes]:
    """Return a category's payloads in key order."""
    return [row.payload for row in job.scan(category).result(WAIT)]


def assert_alive(job: Job) -> None:
    """Check that a job's worker and its turn go on: by an event, in place and through the worker."""
    job.put("alive", K, b"x")
    job.flush().result(WAIT)
    assert job.get("alive", K).result(WAIT) == b"x"
    assert in_task(lambda: job.run(lambda tx: tx.get("alive", K))) == b"x"
    assert job.statistics().state == "live"
    assert job.statistics().pending == 0


# -- all or nothing -----------------------------------------------------------------------------------------------


def test_what_it_writes_is_committed_together(job: Job, ask: Ask) -> None:
    """The reply gives what the function returns, once all it wrote is committed; its arguments are passed on."""

    def fn(tx: Transaction, *names: str) -> list[str]:
        for name in names:
            tx.put("c", (name,), name.encode())
        return [row.payload.decode() for row in tx.scan("c", reverse=True)]

    assert ask(lambda: job.run(fn, "a", "b", "c")) == ["c", "b", "a"]
    assert payloads(job) == [b"a", b"b", b"c"]
    assert job.version().result(WAIT) == 3
    assert ask(lambda: job.run(lambda tx: None)) is None
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed) == (2, 2, 0)


class Own(BaseException):
    """An exception that is no Exception."""


@pytest.mark.parametrize(
    "error",
    [KeyError("k"), ValueError("v"), TypeError("t"), MemoryError(), RecursionError("deep"), OSError(28, "disk"),
     AssertionError("a"), Own("own"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(7),
     asyncio.CancelledError(), Misuse("m"), Conflict(K, 1, 2), Closed("c"), QuotaExceeded(2, 1),
     apsw.FullError("not of this job"), apsw.IOError("nor this")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("through", ["place", "worker"])
def test_any_exception_undoes_everything_and_reaches_the_caller(job: Job, error: BaseException, through: str) -> None:
    """S2-31: it is raised to the caller, the very object; nothing of the run is left, and the worker goes on."""
    job.put("c", ("before",), b"x", ttl=1_000)
    job.put("n", K, b"x")

    def fn(tx: Transaction) -> None:
        tx.put("c", ("new",), b"x")
        tx.delete_prefix("c", ("before",))
        assert tx.touch("n", K, 5)
        assert tx.compare_and_set("n", K, b"x", b"y")
        tx.increment("i", K)
        tx.run(lambda inner: inner.put("d", K, b"x"))
        raise error

    if through == "worker":
        with job._mailbox._lock:
            job.put("c", ("neighbour",), b"x")
            reply = job.run(fn)
            job.put("c", ("other neighbour",), b"x")
    else:
        job.commit([Put("c", ("neighbour",), b"x"), Put("c", ("other neighbour",), b"x")]).result(WAIT)
        reply = job.run(fn)
    assert reply.exception(WAIT) is error
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == ["before", "neighbour", "other neighbour"]
    assert job.entry("n", K).result(WAIT) == Entry(K, b"x", 2, None)
    assert job.categories().result(WAIT) == ["c", "n"]
    assert job.version().result(WAIT) == 4
    assert_alive(job)
    assert job.statistics().failed == 1


def test_an_exception_that_is_raised_can_be_caught_as_usual(job: Job, ask: Ask) -> None:
    """`result()` and `await` raise it, with the traceback of the function."""

    def fn(tx: Transaction) -> None:
        raise LookupError("from inside")

    with pytest.raises(LookupError, match="from inside") as caught:
        ask(lambda: job.run(fn))
    assert "fn" in [entry.name for entry in caught.traceback]
    for interrupt in (KeyboardInterrupt, SystemExit):

        def ends(tx: Transaction, interrupt: type[BaseException] = interrupt) -> None:
            raise interrupt

        with pytest.raises(interrupt):
            ask(lambda ends=ends: job.run(ends))  # type: ignore[misc]  # a lambda of its own each time
    assert_alive(job)


def test_a_failure_nobody_looked_at_is_told(persistency: Persistency) -> None:
    """Promise 3: a run whose reply is dropped unseen goes to on_error; the function stands for the operation."""
    told: list[Failure] = []
    called = threading.Event()

    def on_error(_job: str, failures: Any) -> None:
        told.extend(failures)
        called.set()

    job = persistency.open_job("told", on_error=on_error)

    def fn(tx: Transaction) -> None:
        raise KeyError("no")

    job.run(fn)
    gc.collect()
    assert called.wait(WAIT)
    assert [(failure.op, type(failure.error), failure.outcome) for failure in told] == [(fn, KeyError, "not applied")]
    job.flush().result(WAIT)  # which has nothing to tell of it


def test_it_sees_its_own_writes_and_those_posted_before(job: Job, ask: Ask) -> None:
    """Promise 1: a run stands in line like everything else, and reads what it has written itself."""
    job.put("c", (1,), b"1")
    job.put("c", (2,), b"2", ttl=1_000)
    job.persist([Put("c", (3,), b"3"), Delete("c", (1,))])

    def fn(tx: Transaction) -> dict[str, Any]:
        seen: dict[str, Any] = {"before": [row.payload for row in tx.scan("c")]}
        tx.put("c", (4,), b"4")
        tx.put("c", (2,), b"two", ttl=5)
        seen["get"] = tx.get("c", (2,))
        seen["exists"] = tx.exists("c", (4,))
        seen["count"] = tx.count("c")
        seen["many"] = tx.get_many("c", [(4,), (9,)])
        seen["prefix"] = tx.scan_prefix("c", (3,))
        seen["keys"] = tx.keys("c", KeyRange((3,)))
        seen["iterated"] = [row.payload for row in tx.iterate("c", page=1)]
        tx.put("new", K, b"12345")
        seen["categories"] = tx.categories()
        seen["used"] = tx.storage_used()
        seen["version"] = tx.version()
        seen["entry"] = tx.entry("new", K)
        seen["snapshot"] = [entry.key.parts for entry in tx.snapshot("c")]
        return seen

    assert ask(lambda: job.run(fn)) == {
        "before": [b"2", b"3"],
        "get": b"two",
        "exists": True,
        "count": 3,
        "many": {key(4): b"4"},
        "prefix": [Row(key(3), b"3")],
        "keys": [key(3), key(4)],
        "iterated": [b"two", b"3", b"4"],
        "categories": ["c", "new"],
        "used": 10,
        "version": 7,
        "entry": Entry(K, b"12345", 7, None),
        "snapshot": [(3,), (4,), (2,)],
    }


def test_every_writing_verb_answers_directly(job: Job, ask: Ask) -> None:
    """The verbs of a job, as they are: what a request's reply would give, and None for an event."""

    def fn(tx: Transaction) -> list[Any]:
        return [
            tx.put("c", (1,), b"x"),
            tx.commit([Put("c", (2,), b"x"), Put("c", (3,), b"x"), Check("c", (4,), None)]),
            tx.persist(Put("c", (5,), b"x")),
            tx.commit([]),
            tx.delete("c", (1,)),
            tx.delete_acked("c", (1,)),
            tx.delete_acked("c", (2,)),
            tx.delete_prefix("c", (2,)),
            tx.delete_prefix_acked("c", (3,)),
            tx.put("c", (6, 1), b"x"),
            tx.delete_range_acked("c", KeyRange((5,))),
            tx.delete_range("c", KeyRange((5,))),
            tx.compare_and_set("c", K, None, b"x"),
            tx.compare_and_set("c", K, None, b"y"),
            tx.touch("c", K, 60),
            tx.touch("c", (9,), 60),
            tx.increment("n", K, 5),
            tx.run(lambda inner, by: inner.increment("n", K, by), 2),
        ]

    expected = [None, 4, None, 5, None, False, True, None, 1, None, 2, None, True, False, True, False, 5, 7]
    assert ask(lambda: job.run(fn)) == expected


def test_a_nested_run_is_undone_alone(job: Job, ask: Ask) -> None:
    """`tx.run` is a part of its own: what it raises can be caught, and only what it wrote is undone."""
    assert ask(lambda: job.run(_nesting)) == ["good", "deepest", 5]
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == ["deepest", "good", "outer"]
    assert job.increment("n", K, 0).result(WAIT) == 2


def _write(tx: Transaction, name: str, *, fails: bool = False) -> str:
    tx.put("c", (name,), b"x")
    tx.increment("n", K)
    if fails:
        raise LookupError(name)
    return name


def _write_twice_and_fail(tx: Transaction) -> None:
    _write(tx, "shallow")
    tx.run(_write, "deep")
    raise LookupError("both")


def _nesting(tx: Transaction) -> list[Any]:
    tx.put("c", ("outer",), b"x")
    seen: list[Any] = [tx.run(_write, "good")]
    with pytest.raises(LookupError):
        tx.run(functools.partial(_write, name="bad", fails=True))
    with pytest.raises(LookupError):
        tx.run(_write_twice_and_fail)
    seen.append(tx.run(lambda middle: middle.run(_write, "deepest")))
    return [*seen, tx.version()]


def test_runs_nest_deep(job: Job) -> None:
    """As deep as Python itself goes within its limit, and deeper is RecursionError, which undoes everything."""

    def down(tx: Transaction, depth: int) -> int:
        tx.put("c", (depth,), b"x")
        return depth if depth == 0 else tx.run(down, depth - 1)

    assert job.run(down, 60).result(WAIT) == 0
    assert job.count("c").result(WAIT) == 61

    def forever(tx: Transaction) -> None:
        tx.put("d", K, b"x")
        tx.run(forever)

    assert isinstance(job.run(forever).exception(WAIT), RecursionError)
    assert job.categories().result(WAIT) == ["c"]
    assert_alive(job)


def test_what_fails_inside_can_be_caught_and_gone_on_from(job: Job, ask: Ask) -> None:
    """A Conflict, an increment of no integer, a nested failure: nothing of it is left, and the run goes on."""
    job.put("c", K, b"no integer")

    def fn(tx: Transaction) -> str:
        tx.put("c", (1,), b"x")
        with pytest.raises(Conflict) as caught:
            tx.commit([Put("c", (2,), b"x"), Check("c", K, 77)])
        assert (caught.value.key, caught.value.expected, caught.value.actual) == (K, 77, 1)
        with pytest.raises(Conflict):
            tx.persist([Check("c", K, None)])
        with pytest.raises(Conflict):
            tx.increment("c", K)
        with pytest.raises(Misuse):
            tx.put("", K, b"x")
        with pytest.raises(Misuse):
            tx.delete_prefix("c", ())
        with pytest.raises(Misuse):
            tx.scan("c", limit=-1)
        tx.put("c", (3,), b"x")
        return "done"

    assert ask(lambda: job.run(fn)) == "done"
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == ["k", 1, 3]
    assert job.version().result(WAIT) == 3


def test_a_conflict_that_is_not_caught_undoes_the_run(job: Job, ask: Ask) -> None:
    """Checks inside look at the transaction's own state; what stands against one is raised to the caller."""

    def fn(tx: Transaction) -> None:
        tx.put("c", K, b"x")
        tx.commit([Check("c", K, 1)])
        tx.commit([Check("c", K, None)])

    with pytest.raises(Conflict) as caught:
        ask(lambda: job.run(fn))
    assert (caught.value.expected, caught.value.actual) == (None, 1)
    assert job.categories().result(WAIT) == []


def test_a_run_beside_a_batch_that_fails(job: Job) -> None:
    """Promise 2: in one group with failing batches, runs and events, each is undone alone."""
    calls: list[str] = []

    def good(tx: Transaction, name: str) -> str:
        calls.append(name)
        tx.put("c", (name,), b"x")
        return name

    def bad(tx: Transaction) -> None:
        tx.delete_range("c", KeyRange(stop=("zz",)))
        raise LookupError("bad")

    with job._mailbox._lock:
        job.put("c", ("event",), b"x")
        first = job.run(good, "first")
        conflict = job.commit([DeletePrefix("c", ("event",)), Check("c", ("no",), 7)])
        job.persist([DeleteRange("c", KeyRange(("a",))), Check("c", ("no",), 7)])
        failed = job.run(bad)
        second = job.run(good, "second")
    assert (first.result(WAIT), second.result(WAIT)) == ("first", "second")
    assert isinstance(conflict.exception(WAIT), Conflict)
    assert isinstance(failed.exception(WAIT), LookupError)
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == ["event", "first", "second"]
    assert calls == ["first", "second"]
    with pytest.raises(WriteFailed):
        job.flush().result(WAIT)
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed) == (8, 3, 5)


def test_big_results_and_many_rows(job: Job, ask: Ask) -> None:
    """What a function returns is passed on as it is, however big; what it writes may be thousands of rows."""
    big = {"blob": bytes(2**24), "rows": list(range(100_000))}

    def fn(tx: Transaction) -> Any:
        for number in range(5_000):
            tx.put("c", (number,), b"%d" % number)
        return big

    assert ask(lambda: job.run(fn)) is big
    assert job.count("c").result(WAIT) == 5_000
    assert ask(lambda: job.run(lambda tx: len(tx.scan("c")))) == 5_000


# -- what may be sent ----------------------------------------------------------------------------------------------


class Plain:
    """An object that can be called."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, tx: Transaction) -> Any:
        return self.answer

    def method(self, tx: Transaction) -> Any:
        return self.answer

    @classmethod
    def of_class(cls, tx: Transaction) -> str:
        return cls.__name__

    @staticmethod
    def of_nobody(tx: Transaction) -> int:
        return tx.count("c")


def test_whatever_can_be_called_plainly_is_run(job: Job) -> None:
    """Functions, lambdas, partials, methods, classes, objects with `__call__`, builtins: with the transaction first."""
    one = Plain(1)
    cases: list[tuple[Any, Any]] = [
        (lambda tx: 1, 1),
        (one, 1),
        (one.method, 1),
        (Plain.of_class, "Plain"),
        (one.of_nobody, 0),
        (functools.partial(lambda tx, a, b: a + b, b=2), 3),
        (functools.partial(functools.partial(lambda a, tx: type(tx).__name__, 1)), "Transaction"),
        (functools.lru_cache(lambda tx: 5), 5),
        (lambda tx: [1, 2], [1, 2]),
        (lambda tx: {"a": tx}, None),
    ]
    for fn, expected in cases:
        arguments = (1,) if isinstance(fn, functools.partial) and fn.keywords else ()
        answer = job.run(fn, *arguments).result(WAIT)
        assert answer == expected or expected is None
    assert type(job.run(list).exception(WAIT)) is TypeError  # a transaction isn't iterable
    assert job.run(repr).result(WAIT).startswith("<")


async def _coroutine(tx: Transaction) -> None:
    tx.put("c", K, b"x")


def _generator(tx: Transaction) -> Iterator[int]:
    tx.put("c", K, b"x")
    yield 1


async def _async_generator(tx: Transaction) -> Any:
    tx.put("c", K, b"x")
    yield 1


class Awaits:
    """Things that look like functions and aren't."""

    async def __call__(self, tx: Transaction) -> None:
        tx.put("c", K, b"x")

    async def method(self, tx: Transaction) -> None:
        tx.put("c", K, b"x")

    @staticmethod
    async def of_nobody(tx: Transaction) -> None:
        tx.put("c", K, b"x")

    @classmethod
    def generates(cls, tx: Transaction) -> Iterator[int]:
        tx.put("c", K, b"x")
        yield 1


class Generates:
    """An object whose call is a generator."""

    def __call__(self, tx: Transaction) -> Iterator[int]:
        tx.put("c", K, b"x")
        yield 1


NO_FUNCTIONS: dict[str, Any] = {
    "None": None,
    "text": "fn",
    "a number": 5,
    "a coroutine function": _coroutine,
    "a generator function": _generator,
    "an async generator function": _async_generator,
    "a coroutine method": Awaits().method,
    "a static coroutine": Awaits.of_nobody,
    "a generator classmethod": Awaits.generates,
    "an object with an async call": Awaits(),
    "an object with a generator call": Generates(),
    "a partial of a coroutine function": functools.partial(_coroutine),
    "a partial of a partial of a generator function": functools.partial(functools.partial(_generator)),
    "a partial of an object with an async call": functools.partial(Awaits()),
    "a partial of an object with a generator call": functools.partial(Generates()),
}
if sys.version_info >= (3, 12):

    @inspect.markcoroutinefunction
    def _marked(tx: Transaction) -> Any:
        return _coroutine(tx)

    NO_FUNCTIONS["a function that is marked as a coroutine function"] = _marked


@pytest.mark.parametrize("name", NO_FUNCTIONS)
def test_what_is_no_plain_function_is_refused_at_the_call(job: Job, name: str) -> None:
    """Misuse with a hint, before anything is posted; also from inside a run; and nothing was left un-awaited."""
    fn = NO_FUNCTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Misuse, match="fn") as caught:
            job.run(fn)
        assert caught.value.hint
        assert job.statistics().accepted == 0

        def outer(tx: Transaction) -> None:
            with pytest.raises(Misuse, match="fn"):
                tx.run(fn)

        job.run(outer).result(WAIT)
        gc.collect()
    assert job.categories().result(WAIT) == []


@pytest.mark.parametrize("fn", [_coroutine, _generator, _async_generator], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("nested", [False, True])
def test_what_returns_unfinished_work_is_undone(job: Job, ask: Ask, fn: Any, nested: bool) -> None:
    """A lambda that makes a coroutine or a generator can't be told at the call: Misuse, nothing written, no warning."""

    def makes(tx: Transaction) -> Any:
        tx.put("c", ("early",), b"x")
        return fn(tx)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Misuse, match="return") as caught:
            ask(lambda: job.run((lambda tx: tx.run(makes)) if nested else makes))
        assert "Nothing was written" in caught.value.hint
        del caught
        gc.collect()
    assert job.categories().result(WAIT) == []
    assert_alive(job)


# -- the transaction afterwards, and elsewhere -----------------------------------------------------------------------


def test_a_transaction_knows_its_job(persistency: Persistency) -> None:
    """Its id, so that whoever is given one can tell whether it is of the right job; also in a part of its own."""
    job = persistency.open_job("orders")
    assert job.run(lambda tx: (tx.job_id, tx.run(lambda inner: inner.job_id))).result(WAIT) == ("orders", "orders")


TX_VERBS: dict[str, Callable[[Transaction], Any]] = {
    "put": lambda tx: tx.put("c", K, b"x"),
    "put with a ttl": lambda tx: tx.put("c", K, b"x", ttl=5),
    "delete": lambda tx: tx.delete("c", K),
    "delete_prefix": lambda tx: tx.delete_prefix("c", K),
    "delete_range": lambda tx: tx.delete_range("c", KeyRange(K)),
    "persist": lambda tx: tx.persist(Put("c", K, b"x")),
    "commit": lambda tx: tx.commit([]),
    "delete_acked": lambda tx: tx.delete_acked("c", K),
    "delete_prefix_acked": lambda tx: tx.delete_prefix_acked("c", K),
    "delete_range_acked": lambda tx: tx.delete_range_acked("c", KeyRange(K)),
    "compare_and_set": lambda tx: tx.compare_and_set("c", K, None, b"x"),
    "increment": lambda tx: tx.increment("c", K),
    "touch": lambda tx: tx.touch("c", K, 5),
    "run": lambda tx: tx.run(lambda _tx: None),
    "get": lambda tx: tx.get("c", K),
    "entry": lambda tx: tx.entry("c", K),
    "get_many": lambda tx: tx.get_many("c", [K]),
    "exists": lambda tx: tx.exists("c", K),
    "count": lambda tx: tx.count("c"),
    "scan": lambda tx: tx.scan("c"),
    "keys": lambda tx: tx.keys("c"),
    "scan_prefix": lambda tx: tx.scan_prefix("c", K),
    "iterate": lambda tx: list(tx.iterate("c")),
    "snapshot": lambda tx: tx.snapshot("c"),
    "categories": lambda tx: tx.categories(),
    "version": lambda tx: tx.version(),
    "changes": lambda tx: tx.changes(0, 1),
    "storage_used": lambda tx: tx.storage_used(),
}


def test_every_verb_of_a_transaction_is_named_here() -> None:
    """So that what is tried below is all there is."""
    public = {name for name in vars(Transaction) if not name.startswith("_")} - {"job_id", "now_ms"}
    assert public == {name.split()[0] for name in TX_VERBS}


@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_a_transaction_is_closed_when_its_function_is_over(job: Job, ask: Ask, ending: str) -> None:
    """Whoever keeps it gets Closed from every verb, and nothing is written; an iteration that was begun ends so too."""
    kept: list[Any] = []
    job.put("c", (1,), b"x")
    job.put("c", (2,), b"x")

    def fn(tx: Transaction) -> None:
        pages = iter(tx.iterate("c", page=1))
        next(pages)
        kept.extend([tx, pages])
        tx.run(kept.append)
        if ending == "raises":
            raise LookupError("over")

    if ending == "raises":
        with pytest.raises(LookupError):
            ask(lambda: job.run(fn))
    else:
        ask(lambda: job.run(fn))
    tx, pages, inner = kept
    for one in (tx, inner):
        for name, verb in TX_VERBS.items():
            with pytest.raises(Closed) as caught:
                verb(one)
            assert caught.value.hint, name
    with pytest.raises(Closed):
        next(pages)

    def later(_tx: Transaction) -> None:
        with pytest.raises(Closed):
            tx.put("c", K, b"x")

    ask(lambda: job.run(later))
    assert len(payloads(job)) == 2


def test_a_nested_transaction_ends_before_its_outer_one(job: Job) -> None:
    """The outer one's is used while the inner function runs, and goes on afterwards; the inner one is over then."""

    def fn(tx: Transaction) -> None:
        def inner(within: Transaction) -> Transaction:
            within.put("c", (1,), b"x")
            tx.put("c", (2,), b"x")
            return within

        over = tx.run(inner)
        with pytest.raises(Closed):
            over.put("c", (3,), b"x")
        tx.put("c", (4,), b"x")

    job.run(fn).result(WAIT)
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == [1, 2, 4]


def test_a_transaction_belongs_to_its_thread(job: Job, ask: Ask) -> None:
    """From another thread every verb is Misuse, and the transaction goes on unharmed."""

    def fn(tx: Transaction) -> int:
        errors: list[BaseException] = []

        def elsewhere() -> None:
            for verb in TX_VERBS.values():
                try:
                    verb(tx)
                except BaseException as error:
                    errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(WAIT)
        assert [type(error) for error in errors] == [Misuse] * len(TX_VERBS)
        tx.put("c", K, b"x")
        return tx.count("c")

    assert ask(lambda: job.run(fn)) == 1


# -- the job itself inside -------------------------------------------------------------------------------------------


OWN_REQUESTS: dict[str, Callable[[Job], Any]] = {
    "get": lambda job: job.get("c", K),
    "entry": lambda job: job.entry("c", K),
    "exists": lambda job: job.exists("c", K),
    "count": lambda job: job.count("c"),
    "scan": lambda job: job.scan("c"),
    "keys": lambda job: job.keys("c"),
    "scan_prefix": lambda job: job.scan_prefix("c", K),
    "get_many": lambda job: job.get_many("c", [K]),
    "snapshot": lambda job: job.snapshot("c"),
    "categories": lambda job: job.categories(),
    "version": lambda job: job.version(),
    "storage_used": lambda job: job.storage_used(),
    "changes": lambda job: job.changes(0, 1),
    "changes, waiting": lambda job: job.changes(0, 1, wait=True),
    "commit": lambda job: job.commit(Put("c", K, b"x")),
    "commit of nothing": lambda job: job.commit([]),
    "delete_acked": lambda job: job.delete_acked("c", K),
    "delete_prefix_acked": lambda job: job.delete_prefix_acked("c", K),
    "delete_range_acked": lambda job: job.delete_range_acked("c", KeyRange(K)),
    "compare_and_set": lambda job: job.compare_and_set("c", K, None, b"x"),
    "increment": lambda job: job.increment("c", K),
    "touch": lambda job: job.touch("c", K, 5),
    "run": lambda job: job.run(lambda tx: None),
    "flush": lambda job: job.flush(),
    "flush, synced": lambda job: job.flush(sync=True),
    "drain": lambda job: job.drain(),
    "iterate": lambda job: next(iter(job.iterate("c"))),
    "close": lambda job: job.close(),
    "close without draining": lambda job: job.close(1.0, drain=False),
    "leaving with": lambda job: job.__exit__(None, None, None),
}


@pytest.mark.parametrize("name", OWN_REQUESTS)
@pytest.mark.parametrize("nested", [False, True])
def test_the_job_s_own_requests_are_misuse_inside(persistency: Persistency, ask: Ask, name: str, nested: bool) -> None:
    """They raise at once instead of waiting for themselves, and leave everything as it was; the run goes on."""
    job = persistency.open_job("job", feed_changes_max=10)

    def fn(tx: Transaction) -> None:
        tx.put("c", ("first",), b"x")
        with pytest.raises(Misuse) as caught:
            OWN_REQUESTS[name](job)
        assert caught.value.hint
        tx.put("c", ("last",), b"x")

    ask(lambda: job.run((lambda tx: tx.run(fn)) if nested else fn))
    assert len(payloads(job)) == 2
    assert not job.closed
    assert_alive(job)


@pytest.mark.parametrize("name", ["close", "close_job", "drop_job"])
def test_ending_the_job_from_inside_is_misuse_too(persistency: Persistency, job: Job, ask: Ask, name: str) -> None:
    """By way of the root as well: nothing is closed or deleted, of this job or of others."""
    other = persistency.open_job("other")
    ends: dict[str, Callable[[], Any]] = {
        "close": persistency.close,
        "close_job": lambda: persistency.close_job("job"),
        "drop_job": lambda: persistency.drop_job("job"),
    }

    def fn(tx: Transaction) -> None:
        tx.put("c", K, b"x")
        with pytest.raises(Misuse):
            ends[name]()

    ask(lambda: job.run(fn))
    assert payloads(job) == [b"x"]
    for open_still in (job, other):
        assert_alive(open_still)


def test_an_older_reply_can_not_be_waited_for_inside(job: Job, ask: Ask) -> None:
    """It stands behind the run itself: its result would never come. One that is there is given."""
    older: list[Reply[Any]] = []
    ready = job.version()

    def fn(tx: Transaction) -> int:
        for reply in older:
            for wait in (reply.result, lambda reply=reply: reply.result(1.0), reply.exception):
                with pytest.raises(Misuse):
                    wait()
        return ready.result(WAIT)

    with job._mailbox._lock:
        job.put("c", K, b"x")
        running = job.run(fn)
        older += [job.get("c", K), job.commit(Put("c", (1,), b"x")), job.flush(), job.version().map(str)]
    assert running.result(WAIT) == 0
    assert [reply.result(WAIT) for reply in older] == [b"x", 2, None, "2"]
    assert ask(lambda: job.run(lambda tx: tx.count("c"))) == 2


def test_its_events_are_taken_and_come_after_the_run(job: Job, ask: Ask) -> None:
    """An event waits for nobody: what is posted inside is run behind the run, even where the mailbox is full."""

    def fn(tx: Transaction) -> int:
        for number in range(20):
            job.put("c", (number,), b"x")
        job.persist([Put("c", ("batch",), b"x"), Delete("c", (0,))])
        job.delete("c", (1,))
        return tx.count("c")

    assert ask(lambda: job.run(fn)) == 0
    assert job.count("c").result(WAIT) == 19


def test_its_events_never_wait_for_room(persistency: Persistency, ask: Ask) -> None:
    """A post from inside `run` never waits: the bounds are no trap."""
    job = persistency.open_job("small", mailbox_ops_max=2, on_full="raise")

    def fn(tx: Transaction) -> None:
        for number in range(50):
            job.put("c", (number,), b"x")

    ask(lambda: job.run(fn))
    assert job.count("c").result(WAIT) == 50


def test_statistics_can_be_looked_at_inside(job: Job, ask: Ask) -> None:
    """They wait for nobody, and they balance: the run itself is still pending, or not yet accepted."""

    def fn(tx: Transaction) -> None:
        numbers = job.statistics()
        assert numbers.accepted == numbers.committed + numbers.failed + numbers.pending
        assert numbers.state == "live"

    ask(lambda: job.run(fn))


def test_other_jobs_can_be_asked_inside(persistency: Persistency, job: Job, ask: Ask) -> None:
    """Another job is another actor: its requests, its runs, and openings are fine, and are not undone with the run."""
    other = persistency.open_job("other")

    def there(tx: Transaction, name: str) -> int:
        tx.put("c", (name,), b"x")
        with pytest.raises(Misuse):
            job.get("c", K)  # it is still inside its own run
        return tx.count("c")

    def fn(tx: Transaction) -> None:
        tx.put("c", K, b"x")
        assert other.run(there, "run").result(WAIT) == 1
        assert other.commit(Put("c", ("commit",), b"x")).result(WAIT) == 2
        assert [row.key.parts for row in other.iterate("c")] == [("commit",), ("run",)]
        other.flush().result(WAIT)
        assert persistency.open_job("third").version().result(WAIT) == 0
        raise LookupError("here only")

    with pytest.raises(LookupError):
        ask(lambda: job.run(fn))
    assert job.count("c").result(WAIT) == 0
    assert other.count("c").result(WAIT) == 2
    assert_alive(job)


def test_requests_of_other_threads_wait_for_the_run(job: Job) -> None:
    """Only the thread inside is refused: others stand in line, and see all of the run or nothing."""
    inside, go_on = threading.Event(), threading.Event()

    def fn(tx: Transaction) -> None:
        tx.put("c", (1,), b"x")
        inside.set()
        assert go_on.wait(WAIT)
        tx.put("c", (2,), b"x")

    runner = threading.Thread(target=lambda: job.run(fn).result(WAIT))
    runner.start()
    assert inside.wait(WAIT)
    replies = [job.count("c"), job.commit(Check("c", (2,), 2))]
    assert not any(reply.done() for reply in replies)
    go_on.set()
    assert [reply.result(WAIT) for reply in replies] == [2, 3]
    runner.join(WAIT)


def test_runs_of_many_threads_are_one_after_the_other(job: Job) -> None:
    """D-13: read, wait for the others, write: with `run` nobody loses an update."""

    def add(tx: Transaction) -> None:
        before = int(tx.get("c", K) or b"0")
        time.sleep(0)  # a turn for the other threads
        tx.put("c", K, b"%d" % (before + 1))

    threads = [threading.Thread(target=lambda: [job.run(add).result(WAIT) for _ in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert job.get("c", K).result(WAIT) == b"800"


def test_giving_up_a_run_does_not_undo_it(job: Job, in_loop: InLoop) -> None:
    """Promise 8: a cancelled task, a timeout, a dropped reply: the run is done, once, and no transaction stays open."""
    calls = 0

    def fn(tx: Transaction) -> int:
        nonlocal calls
        calls += 1
        return tx.increment("n", K)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            task = Task(group, lambda: job.run(fn))
            await turns()
            task.cancel()
        assert calls == 1 or task.cancelled
        assert await job.increment("n", K, 0) == 1

    in_loop(bounded, main)
    job.run(fn)
    assert job.run(fn).result(WAIT) == 3
    assert job.run(fn).cancel() is False
    assert calls == 4
    assert_alive(job)


# -- faults of the environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["directory"], indirect=True)
def test_a_group_that_is_retried_calls_the_function_again(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 3: a commit that fails for want of room is tried again whole, and the answer is the last call's."""
    job = persistency.open_job("job")
    faults = iter([apsw.FullError("no room"), apsw.FullError("still none")])
    commit = SqliteStore._commit

    def failing(store: SqliteStore, before: int, *, changed: int, sync: bool) -> None:
        error = next(faults, None)
        if error is not None:
            raise error
        commit(store, before, changed=changed, sync=sync)

    monkeypatch.setattr(SqliteStore, "_commit", failing)
    calls: list[int] = []

    def fn(tx: Transaction) -> int:
        calls.append(tx.increment("n", K))
        return len(calls)

    assert job.run(fn).result(WAIT) == 3
    assert calls == [1, 1, 1]  # each time from where it was before
    assert job.get("n", K).result(WAIT) == b"\x01"
    numbers = job.statistics()
    assert (numbers.committed, numbers.failed, numbers.state) == (1, 0, "live")


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    """A disk that fails when it is told to."""
    disk = FaultyDisk()
    yield disk
    disk.unregister()


def on(disk: FaultyDisk, place: Path) -> Persistency:
    """Return a root whose jobs lie on that disk."""
    persistency = Persistency(place)
    persistency._site.root._vfs = disk.name  # type: ignore[attr-defined]  # a directory's
    return persistency


@pytest.mark.parametrize("through", ["place", "worker"])
def test_a_full_disk_under_a_run_stalls_and_goes_on(tmp_path: Path, disk: FaultyDisk, through: str) -> None:
    """Promise 3: the write fails in the midst of it, the group is run again, nothing is there twice."""
    calls = 0

    def fn(tx: Transaction) -> int:
        nonlocal calls
        calls += 1
        for number in range(300):
            tx.put("c", (number,), bytes(3_000))  # more than the page cache likes to hold
        return tx.increment("n", K)

    with on(disk, tmp_path / "root") as persistency:
        job = persistency.open_job("job")
        job.commit(Put("c", (0,), b"x")).result(WAIT)
        disk.arm("write", 3, apsw.SQLITE_FULL)
        answer = job.run(fn).result(WAIT) if through == "place" else in_task(lambda: job.run(fn))
        assert disk.fired == 1
        assert answer == 1
        assert calls >= 2
        assert job.count("c").result(WAIT) == 300
        assert job.version().result(WAIT) == 302
        assert_alive(job)


def test_a_read_that_fails_inside_fails_the_run_alone(tmp_path: Path, disk: FaultyDisk) -> None:
    """Promise 3: a read error fails what met it, even if the function looks away, and its neighbours are committed."""
    with on(disk, tmp_path / "root") as persistency:
        job = persistency.open_job("job")
        for number in range(3_000):
            job.put("c", (number,), bytes(2_000))
        job.flush().result(WAIT)
    with on(disk, tmp_path / "root") as persistency:
        job = persistency.open_job("job")

        def fn(tx: Transaction) -> str:
            tx.put("d", K, b"x")
            disk.arm("read", 1, apsw.SQLITE_IOERR_READ, sticky=True)
            try:
                tx.scan("c")
            except Exception:
                pass
            finally:
                disk.disarm()
            return "looked away"

        with job._mailbox._lock:
            job.put("e", (1,), b"x")
            reply = job.run(fn)
            job.put("e", (2,), b"x")
        error = reply.exception(WAIT)
        assert error is not None
        assert "read" in str(error)
        job.flush().result(WAIT)
        assert job.count("d").result(WAIT) == 0
        assert job.count("e").result(WAIT) == 2
        assert_alive(job)
