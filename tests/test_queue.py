"""The queue: beside a plain model, step by step; with threads and event loops that wait; and what it promises them."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from persistency import (
    RAW,
    Closed,
    Corrupt,
    Job,
    Misuse,
    Overloaded,
    Persistency,
    PersistencyError,
    Poisoned,
    QuotaExceeded,
    Reply,
    Transaction,
    typed,
)
from persistency.recipes import Baton, Message, Queue, QueueCounts, queue_alive
from persistency.recipes import queue as queue_module
from persistency.recipes.queue_rows import LEASE_OVER
from persistency.testing import ManualClock
from tests.loops import InLoop, together
from tests.soak.queue_worker import PLANTS
from tests.soak.queues import Outcome, Plan
from tests.soak.queues import run as run_soak

WAIT = 20.0
LEASE, ATTEMPTS_MAX, BACKOFF, BACKOFF_MAX = 10, 3, 1, 3


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock) -> Iterator[Job]:
    """Give an empty job."""
    with Persistency(":memory:", clock=clock) as p, p.open_job("work") as opened:
        yield opened


@pytest.fixture
def live() -> Iterator[Job]:
    """Give an empty job whose time is the system's."""
    with Persistency(":memory:") as p, p.open_job("work") as opened:
        yield opened


def taken(queue: Queue[Any], **options: Any) -> Message[Any]:
    """The next message, which there is."""
    message = queue.take(**options).result()
    assert message is not None
    return message


# -- beside a model ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Known:
    """What the model knows of a message."""

    value: int
    kind: str = "ready"
    attempt: int = 0
    lined_up: int = 0  # the number of its place: the lower, the earlier
    when: float = 0.0
    delivery: int = 0  # which taking of it is the present one
    error: str | None = None


class Model:
    """A queue as a person would write it down: every message with its state, looked through from end to end."""

    def __init__(self) -> None:
        self.now = 0.0
        self.known: dict[int, Known] = {}
        self._number = 0

    def number(self) -> int:
        self._number += 1
        return self._number

    def settle(self) -> None:
        """Let happen what was due until now."""
        due = [(one.when, id_) for id_, one in self.known.items() if one.kind in ("delayed", "taken")]
        for when, id_ in sorted(due):
            one = self.known[id_]
            if when > self.now:
                continue
            if one.kind == "delayed":
                one.kind, one.lined_up = "ready", self.number()
            elif one.attempt < ATTEMPTS_MAX:
                one.kind, one.error = "ready", LEASE_OVER
            else:
                one.kind, one.when, one.error = "dead", self.now, LEASE_OVER

    def put(self, id_: int, value: int, delay: float) -> None:
        one = self.known[id_] = Known(value, lined_up=self.number())
        if delay:
            one.kind, one.when = "delayed", self.now + delay

    def take(self, lease: float, limit: int) -> list[int]:
        self.settle()
        ready = sorted((one.lined_up, id_) for id_, one in self.known.items() if one.kind == "ready")
        ids = [id_ for _, id_ in ready[:limit]]
        for id_ in ids:
            one = self.known[id_]
            one.kind, one.when, one.delivery = "taken", self.now + lease, self.number()
            one.attempt += 1
        return ids

    def held(self, id_: int, delivery: int) -> Known | None:
        """The message, if this taking of it is the present one."""
        one = self.known.get(id_)
        return one if one is not None and one.kind == "taken" and one.delivery == delivery else None

    def dead(self) -> list[int]:
        return [id_ for _, id_ in sorted((one.when, id_) for id_, one in self.known.items() if one.kind == "dead")]

    def counts(self) -> QueueCounts:
        self.settle()
        kinds = Counter(one.kind for one in self.known.values())
        return QueueCounts(kinds["ready"], kinds["delayed"], kinds["taken"], kinds["dead"])


class QueueMachine(RuleBasedStateMachine):
    """A queue and its model, told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.persistency = Persistency(":memory:", clock=self.clock)
        self.job = self.persistency.open_job("work")
        self.queue = self.make()
        self.model = Model()
        self.held: list[tuple[Message[int], int]] = []  # every message ever taken, with which taking it was

    def make(self) -> Queue[int]:
        return Queue(self.job, lease=LEASE, attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, backoff_max=BACKOFF_MAX)

    def teardown(self) -> None:
        self.persistency.close()

    @rule(values=st.lists(st.integers(0, 9), max_size=3), delay=st.sampled_from([None, 0, 1, 5]))
    def put(self, values: list[int], delay: int | None) -> None:
        self.model.settle()
        for id_, value in zip(self.queue.put_many(values, delay=delay).result(), values, strict=True):
            assert id_ not in self.model.known
            self.model.put(id_, value, delay or 0)

    @rule(value=st.integers(0, 9), fails=st.booleans())
    def put_in(self, value: int, fails: bool) -> None:
        def order(tx: Transaction) -> int:
            id_ = self.queue.put_in(tx, value)
            if fails:
                raise KeyError(id_)
            return id_

        reply = self.job.run(order)
        if fails:
            with pytest.raises(KeyError):
                reply.result()
        else:
            self.model.settle()
            self.model.put(reply.result(), value, 0)

    @rule(limit=st.integers(1, 3), lease=st.sampled_from([None, 2, 30]))
    def take(self, limit: int, lease: int | None) -> None:
        messages = self.queue.take_many(limit, lease=lease).result()
        ids = self.model.take(LEASE if lease is None else lease, limit)
        assert [message.id for message in messages] == ids
        for message in messages:
            one = self.model.known[message.id]
            assert (message.value, message.attempt, message.error) == (one.value, one.attempt, one.error)
            self.held.append((message, one.delivery))

    def chosen(self, data: st.DataObject) -> tuple[Message[int], Known | None]:
        """One of the messages ever taken, and what is known of it if it is still its consumer's."""
        if not self.held:
            return None, None  # type: ignore[return-value]  # the rule is left then
        message, delivery = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        return message, self.model.held(message.id, delivery)

    @rule(data=st.data(), inside=st.booleans())
    def ack(self, data: st.DataObject, inside: bool) -> None:
        message, one = self.chosen(data)
        if message is not None:
            found = self.job.run(message.ack_in).result() if inside else message.ack().result()
            assert found is (one is not None)
            if one is not None:
                del self.model.known[message.id]

    @rule(data=st.data(), delay=st.sampled_from([None, 0, 2]))
    def retry(self, data: st.DataObject, delay: int | None) -> None:
        message, one = self.chosen(data)
        if message is None:
            return
        assert message.retry(delay=delay, error="no").result() is (one is not None)
        if one is None:
            return
        one.error = "no"
        if one.attempt >= ATTEMPTS_MAX:
            one.kind, one.when = "dead", self.model.now
            return
        pause = min(BACKOFF_MAX, BACKOFF * 2 ** (one.attempt - 1)) if delay is None else delay
        if pause:
            one.kind, one.when = "delayed", self.model.now + pause
        else:
            one.kind, one.lined_up = "ready", self.model.number()

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        message, one = self.chosen(data)
        if message is not None:
            assert message.release().result() is (one is not None)
            if one is not None:
                one.kind, one.attempt = "ready", one.attempt - 1

    @rule(data=st.data(), lease=st.sampled_from([None, 1, 50]))
    def extend(self, data: st.DataObject, lease: int | None) -> None:
        message, one = self.chosen(data)
        if message is not None:
            assert message.extend(lease).result() is (one is not None)
            if one is not None:
                one.when = self.model.now + (message._lease_ms / 1000 if lease is None else lease)

    @rule(data=st.data())
    def bury(self, data: st.DataObject) -> None:
        message, one = self.chosen(data)
        if message is not None:
            assert message.bury("why").result() is (one is not None)
            if one is not None:
                one.kind, one.when, one.error = "dead", self.model.now, "why"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.model.known:
            id_ = data.draw(st.sampled_from(sorted(self.model.known)))
            waits = self.model.known[id_].kind in ("ready", "delayed")
            assert self.queue.cancel(id_).result() is waits
            if waits:
                del self.model.known[id_]

    @rule(data=st.data(), limit=st.integers(1, 2), one=st.booleans())
    def revive(self, data: st.DataObject, limit: int, one: bool) -> None:
        dead = self.model.dead()
        id_ = data.draw(st.sampled_from(sorted(self.model.known))) if one and self.model.known else None
        chosen = dead[:limit] if id_ is None else [id_] if id_ in dead else []
        assert self.queue.revive(id_, limit=limit).result() == len(chosen)
        for each in chosen:
            known = self.model.known[each]
            known.kind, known.attempt, known.lined_up = "ready", 0, self.model.number()

    @rule(age=st.sampled_from([0, 5]), limit=st.integers(1, 2))
    def purge_dead(self, age: int, limit: int) -> None:
        chosen = [one for one in self.model.dead() if self.model.known[one].when <= self.model.now - age][:limit]
        assert self.queue.purge_dead(age, limit=limit).result() == len(chosen)
        for each in chosen:
            del self.model.known[each]

    @rule(seconds=st.sampled_from([1, 2, 10, 40]))
    def advance(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds

    @rule()
    def make_anew(self) -> None:
        """What is known of a queue is in its rows."""
        self.queue = self.make()

    @rule()
    def counts(self) -> None:
        assert self.queue.counts().result() == self.model.counts()

    @rule()
    def dead(self) -> None:
        letters = self.queue.dead().result()
        assert [letter.id for letter in letters] == self.model.dead()
        for letter in letters:
            one = self.model.known[letter.id]
            assert (letter.value, letter.attempt, letter.error) == (one.value, one.attempt, one.error)

    @invariant()
    def no_row_is_left_behind(self) -> None:
        """A message has three rows, whatever has happened to it."""
        rows = self.job.count("queue").result()
        assert rows - 3 * len(self.model.known) in ((0, 1) if rows <= 1 else (1,))


def model_run(runs: int, steps: int = 40, *, planted: bool = False) -> None:
    """Run the queue beside its model."""
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            derandomize=planted,  # whether a defect is found isn't to be a matter of luck
            phases={Phase.generate} if planted else {Phase.generate, Phase.shrink},
        ),
    )


def test_a_queue_does_what_a_plain_model_does() -> None:
    """Whatever is put, taken, told and waited for, in whatever order: the queue and the model say the same."""
    model_run(60)


def test_the_model_notices_an_acknowledgement_that_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted defect: who has lost a message acknowledges it for its new owner."""
    from persistency.recipes.queue_records import Kind, State
    from persistency.recipes.queue_rows import Rows

    def held(self: Rows, tx: Transaction, id_: int, token: int) -> State | None:
        state = self._state(tx, id_)
        return state if state is not None and state.kind == Kind.TAKEN else None

    monkeypatch.setattr(Rows, "_held", held)
    with pytest.raises(AssertionError):
        model_run(1_000, 80, planted=True)


# -- order, time, attempts -----------------------------------------------------------------------------------------


def test_first_in_first_out(job: Job) -> None:
    """Messages are given in the order in which they were put, whatever happens to the clock."""
    queue = Queue[int](job)
    ids = [queue.put(n).result() for n in range(5)] + queue.put_many(range(5, 10)).result()
    assert ids == sorted(set(ids))
    assert [taken(queue).value for _ in range(10)] == list(range(10))
    assert queue.take().result() is None


def test_a_delayed_message_waits_for_its_time(job: Job, clock: ManualClock) -> None:
    """It is there at its moment, behind those that were in line by then, and before those put later."""
    queue = Queue[str](job)
    queue.put("later", delay=timedelta(seconds=5))
    queue.put("now")
    assert taken(queue).value == "now"
    clock.advance(4.999)
    assert queue.take().result() is None
    assert queue.counts().result() == QueueCounts(0, 1, 1, 0)
    clock.advance(0.001)
    queue.put("after")
    assert [taken(queue).value, taken(queue).value] == ["later", "after"]


def test_a_lease_that_ends_puts_the_message_back_to_its_place(job: Job, clock: ManualClock) -> None:
    """A consumer that dies holds up nothing but its own message, which comes first then. (S0-94)"""
    queue = Queue[str](job, lease=10)
    queue.put_many(["a", "b"])
    gone = taken(queue)
    clock.advance(10)
    again = taken(queue)
    assert (again.id, again.attempt, again.error) == (gone.id, 2, LEASE_OVER)
    assert taken(queue).value == "b"
    assert not gone.ack().result()
    assert gone.lost
    assert again.ack().result()
    assert not again.ack().result()


def test_a_lease_can_be_extended(job: Job, clock: ManualClock) -> None:
    """Work that takes longer keeps its message by asking in time."""
    queue = Queue[str](job, lease=10)
    queue.put("slow")
    message = taken(queue)
    until = message.until_ms
    clock.advance(9)
    assert message.extend().result()
    assert message.until_ms == until + 9_000
    clock.advance(9)
    assert queue.take().result() is None
    assert message.extend(timedelta(minutes=1)).result()
    clock.advance(59)
    assert message.ack().result()


def test_backoff_doubles_up_to_its_cap(job: Job, clock: ManualClock) -> None:
    """S0-94: the pause is backoff * 2^(n-1), with a cap; after the last attempt a message is a dead letter."""
    queue = Queue[str](job, attempts_max=5, backoff=1, backoff_max=3)
    queue.put("broken")
    for pause in (1, 2, 3, 3):
        assert taken(queue).retry(error="it broke").result()
        clock.advance(pause - 0.001)
        assert queue.take().result() is None
        clock.advance(0.001)
    last = taken(queue)
    assert (last.attempt, last.error) == (5, "it broke")
    assert last.retry(error="for good").result()
    clock.advance(3600)
    assert queue.take().result() is None
    (letter,) = queue.dead().result()
    assert (letter.value, letter.attempt, letter.error, letter.died_ms) == (
        "broken",
        5,
        "for good",
        job_ms(clock) - 3600_000,
    )


def job_ms(clock: ManualClock) -> int:
    """The clock's time as a job tells it."""
    return round(clock.now * 1000)


def test_a_backoff_without_end_is_its_cap(job: Job, clock: ManualClock) -> None:
    """However many attempts are allowed, the pause is a number that a row can hold."""
    queue = Queue[str](job, attempts_max=10**6, backoff=1, backoff_max=2)
    queue.put("stubborn")
    for _ in range(70):
        taken(queue).retry()
        clock.advance(2)
    assert taken(queue).attempt == 71


def test_dead_letters_are_revived_or_purged(job: Job, clock: ManualClock) -> None:
    """A dead letter stays until somebody decides (S0-94: there it is gone after its retention)."""
    queue = Queue[int](job)
    queue.put_many(range(4))
    for message in queue.take_many(4).result():
        message.bury(f"no {message.value}")
        clock.advance(1)
    letters = queue.dead().result()
    assert [letter.error for letter in letters] == ["no 0", "no 1", "no 2", "no 3"]
    assert queue.revive(letters[2].id).result() == 1
    assert queue.revive(letters[2].id).result() == 0
    again = taken(queue)
    assert (again.value, again.attempt, again.error) == (2, 1, "no 2")
    assert queue.purge_dead(older_than=3).result() == 2
    assert queue.revive().result() == 1
    assert queue.counts().result() == QueueCounts(1, 0, 1, 0)


def test_only_what_waits_can_be_cancelled(job: Job) -> None:
    """S0-94: a task that is at work or done can't be cancelled any more."""
    queue = Queue[str](job)
    at_work, ready, delayed = (queue.put(name).result() for name in ("a", "b", "c"))
    queue.cancel(delayed)
    delayed = queue.put("c", delay=60).result()
    message = taken(queue)
    assert [queue.cancel(one).result() for one in (at_work, ready, delayed, ready, 99)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert message.ack().result()
    assert queue.counts().result() == QueueCounts(0, 0, 0, 0)


def test_queues_of_other_names_are_other_queues(job: Job) -> None:
    """S0-94: a queue's name says whose tasks they are; two in one job have nothing in common."""
    one, other = Queue[str](job, "one"), Queue[str](job, "other")
    one.put("a")
    assert other.take().result() is None
    assert taken(Queue[str](job, "one")).value == "a"


def test_a_queue_survives_its_process(tmp_path: Path) -> None:
    """S0-94: tasks are persisted, and those at work come back; what was acknowledged doesn't."""
    with Persistency(tmp_path) as p, p.open_job("work") as job:
        queue = Queue[str](job)
        queue.put_many(["done", "at work", "waiting"])
        taken(queue).ack()
        taken(queue, lease=0.001)
    with Persistency(tmp_path) as p, p.open_job("work") as job:
        queue = Queue[str](job)
        messages = [queue.receive(WAIT), queue.receive(WAIT)]
        assert {message.value: message.attempt for message in messages} == {"at work": 2, "waiting": 1}


# -- transactions --------------------------------------------------------------------------------------------------


def test_a_message_is_put_if_and_only_if_the_rest_is(job: Job) -> None:
    """`put_in` is an outbox: it takes part in the transaction of its caller."""
    queue = Queue[str](job, "mails")

    def order(tx: Transaction, number: int, fails: bool) -> None:
        tx.put("order", (number,), b"")
        queue.put_in(tx, f"order {number}")
        if fails:
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        job.run(order, 1, True).result()
    job.run(order, 2, False).result()
    assert [message.value for message in queue.take_many(9).result()] == ["order 2"]


def test_effects_and_acknowledgement_are_one(job: Job, clock: ManualClock) -> None:
    """`ack_in`: what a consumer writes is there exactly once, however often the message is delivered."""
    queue = Queue[int](job, lease=10)
    queue.put(5)

    def book(tx: Transaction, message: Message[int]) -> None:
        tx.increment("balance", (), message.value)
        if not message.ack_in(tx):
            raise LookupError(message.id)

    slow = taken(queue)
    clock.advance(10)
    job.run(book, taken(queue)).result()
    with pytest.raises(LookupError):
        job.run(book, slow).result()
    assert job.increment("balance", (), 0).result() == 5
    assert queue.counts().result() == QueueCounts(0, 0, 0, 0)


def test_a_verb_costs_the_same_in_a_long_queue(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verb looks at more rows because more messages wait."""
    from persistency.recipes import queue_rows

    looked: Counter[str] = Counter()

    class Counted:
        def __init__(self, tx: Transaction) -> None:
            self.tx = tx

        @property
        def now_ms(self) -> int:
            return self.tx.now_ms

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def verb(*args: Any, **options: Any) -> Any:
                found = getattr(self.tx, name)(*args, **options)
                looked["rows"] += len(found) if isinstance(found, list) else 1
                return found

            return verb

    queue = Queue[int](job)
    costs = []
    for _ in range(2):
        looked.clear()

        def through(tx: Transaction) -> None:
            rows = queue._rows
            counted: Any = Counted(tx)
            rows.put(counted, 0, b"\x01")
            (found,), _ = rows.take(counted, 1000, 1)
            rows.extend(counted, found.id, found.state.token, 1000)
            rows.retry(counted, found.id, found.state.token, 60_000, None)
            rows.cancel(counted, found.id)
            rows.count(counted)

        queue.put(0)
        job.run(through).result()
        costs.append(looked["rows"])
        queue.put_many(range(500))
        queue.put_many(range(500), delay=60)
    assert costs[0] == costs[1]
    assert queue_rows._DUE_MAX < 500


def test_what_is_due_is_put_in_line_so_many_at_a_time(job: Job, clock: ManualClock) -> None:
    """A great many messages that are due at once don't hold up the job; none is left out."""
    queue = Queue[int](job)
    queue.put_many(range(300), delay=1)
    clock.advance(1)
    assert queue.counts().result().delayed > 0
    found = []
    while batch := queue.take_many(50).result():
        found += [message.value for message in batch]
    assert found == list(range(300))


def test_many_large_messages_are_not_taken_at_once(job: Job) -> None:
    """`take_many` gives no more than some 16 MiB, and at least one."""
    queue = Queue[bytes](job, codec=RAW)
    queue.put_many([bytes(9 * 1024 * 1024)] * 3)
    assert [len(queue.take_many(10).result()) for _ in range(3)] == [2, 1, 0]


# -- values, arguments ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Mail:
    to: str
    text: str = ""


def test_values_are_what_the_codec_says(job: Job) -> None:
    """A typed queue gives back what was put, and refuses what it couldn't give back."""
    queue = Queue(job, codec=typed(Mail))
    queue.put(Mail("ada"))
    assert taken(queue).value == Mail("ada")
    with pytest.raises(Misuse):
        queue.put("ada")  # type: ignore[arg-type]  # that is the point


def test_a_value_that_cant_be_read_harms_only_its_own_message(job: Job, clock: ManualClock) -> None:
    """It is a failed attempt like any other, and the message ends among the dead."""
    Queue[bytes](job, codec=RAW).put_many([b"\xff", b"\x01"])
    queue = Queue[Any](job, attempts_max=2, backoff=1)
    with pytest.raises(Corrupt), taken(queue) as message:
        print(message.value)
    assert taken(queue).value == 1
    clock.advance(1)
    with pytest.raises(Corrupt), taken(queue) as message:
        print(message.value)
    (letter,) = queue.dead().result()
    assert "Corrupt" in (letter.error or "")
    with pytest.raises(Corrupt):
        print(letter.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda job: Queue("job"),  # type: ignore[arg-type]  # these all are wrong
        lambda job: Queue(job, ""),
        lambda job: Queue(job, "x" * 256),
        lambda job: Queue(job, "a\ud800"),
        lambda job: Queue(job, codec="CBOR"),  # type: ignore[arg-type]
        lambda job: Queue(job).put_in(job, 1),  # type: ignore[arg-type]
        lambda job: message_of(job).ack_in(job),  # type: ignore[arg-type]
        lambda job: Queue(job, lease=0),
        lambda job: Queue(job, lease="1"),  # type: ignore[arg-type]
        lambda job: Queue(job, attempts_max=0),
        lambda job: Queue(job, attempts_max=True),
        lambda job: Queue(job, backoff=-1),
        lambda job: Queue(job).put(object()),
        lambda job: Queue(job).put(1, delay=-1),
        lambda job: Queue(job).put(1, delay=float("nan")),
        lambda job: Queue(job).put_many([0] * 10_001),
        lambda job: Queue(job).take(lease=0),
        lambda job: Queue(job).take_many(0),
        lambda job: Queue(job).receive(-1),
        lambda job: Queue(job).revive("1"),  # type: ignore[arg-type]
        lambda job: Queue(job).dead(0),
        lambda job: Queue(job).cancel(0),
        lambda job: message_of(job).retry(delay="soon"),  # type: ignore[arg-type]
        lambda job: message_of(job).bury(ValueError()),  # type: ignore[arg-type]
        lambda job: message_of(job).extend(0),
    ],
)
def test_wrong_arguments_raise_at_the_call(job: Job, call: Callable[[Job], Any]) -> None:
    """What is wrong is told where it is written, and nothing is done."""
    with pytest.raises(Misuse):
        call(job)


def message_of(job: Job) -> Message[int]:
    """A message of a queue of its own."""
    queue = Queue[int](job, "other")
    queue.put(1)
    return taken(queue)


def test_a_category_of_other_rows_is_refused(job: Job) -> None:
    """A queue in the category of something else says so, and touches nothing."""
    job.put("users", ("head",), b"\x01")
    with pytest.raises(Corrupt):
        Queue(job, "users").put(1).result()
    assert job.count("users").result() == 1
    job.put("names", ("ada",), b"x")
    for ask in (Queue(job, "names").put_many([1]), Queue(job, "names").take(), Queue(job, "names").counts()):
        with pytest.raises(Corrupt):
            ask.result()
    assert job.count("names").result() == 1


def test_a_transaction_of_another_job_is_refused(job: Job) -> None:
    """What is told there would be told to another job's queue."""
    with Persistency(":memory:") as p, p.open_job("another") as other:
        queue = Queue[int](job)
        queue.put(1)
        message = taken(queue)
        for verb in (lambda tx: queue.put_in(tx, 2), message.ack_in):
            with pytest.raises(Misuse):
                other.run(verb).result()
        assert other.categories().result() == []
        assert queue.counts().result() == QueueCounts(0, 0, 1, 0)


# -- bounds and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [False, True])
def test_what_waits_to_be_put_counts_in_the_mailbox(many: bool) -> None:
    """Values that wait for the job are held to its bound, as those of a plain `put` are."""
    inside, go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        inside.set()
        assert go.wait(WAIT)

    with Persistency(":memory:") as p, p.open_job("work", on_full="raise", mailbox_bytes_max=1 << 20) as job:
        queue = Queue(job, codec=RAW)
        holder = threading.Thread(target=lambda: job.run(hold).result())
        holder.start()
        assert inside.wait(WAIT)
        replies: list[Reply[Any]] = []
        body = bytes(1 << 18)
        with suppress(Overloaded):
            for _ in range(100):
                replies += [queue.put_many([body]) if many else queue.put(body)]
        go.set()
        holder.join(WAIT)
        for reply in replies:
            reply.result()
        assert 1 <= queue.counts().result().ready == len(replies) <= 5


def fill(job: Job, bytes_max: int) -> None:
    """Leave no byte for anything else."""
    left = bytes_max - job.storage_used().result()
    job.compare_and_set("filler", ("f",), None, b"x" * left).result()
    assert job.storage_used().result() == bytes_max


def test_a_queue_in_a_full_job_can_be_drained(clock: ManualClock) -> None:
    """What was put can be taken, and told anything; of an error's text there is as much as there is room for."""
    with Persistency(":memory:", clock=clock) as p, p.open_job("work", max_bytes=5_000) as job:
        queue = Queue[int](job, attempts_max=2, backoff=1)
        assert queue.put_many(range(8)).result()
        fill(job, 5_000)
        with pytest.raises(QuotaExceeded):
            queue.put(8).result()
        first, second, third, fourth, fifth, sixth = queue.take_many(6).result()
        assert first.ack().result()  # which makes room for a part of the text only
        assert second.retry(error="no such address: " + "é" * 300).result()
        assert third.bury("because " * 30).result()
        assert fourth.release().result()
        assert fifth.extend(1_000_000).result()
        assert job.run(sixth.ack_in).result()
        clock.advance(60)
        assert (taken(queue).value, taken(queue).value, taken(queue).value) == (3, 6, 7)
        again = taken(queue)
        assert (again.value, again.error) == (1, "no such address: ééé")
        clock.advance(60)
        assert queue.counts().result() == QueueCounts(3, 0, 1, 2)
        assert [(letter.value, letter.error) for letter in queue.dead().result()] == [
            (2, ("because " * 30)[:24]),
            (1, LEASE_OVER),
        ]
        assert queue.revive().result() == 2


def test_the_first_look_into_an_empty_queue_needs_no_room() -> None:
    """A full job has an empty queue as any other."""
    with Persistency(":memory:") as p, p.open_job("work", max_bytes=100) as job:
        fill(job, 100)
        assert Queue(job).take().result() is None
        assert Queue(job).counts().result() == QueueCounts(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("row", "payload"),
    [("body", None), ("state", None), ("state", b"\xff"), ("state", b"\x82\x01\x02"), ("state", b"s"), ("state", b"")],
)
def test_a_damaged_message_holds_up_no_other(
    job: Job, clock: ManualClock, caplog: pytest.LogCaptureFixture, row: str, payload: bytes | None
) -> None:
    """It is logged and out of the way; where its value is there it is a dead letter."""
    queue = Queue[int](job)
    in_line, delayed = queue.put(1).result(), queue.put(2, delay=5).result()
    queue.put_many([3, 4])
    for id_ in (in_line, delayed):
        if payload is None:
            job.delete("queue", (row, id_))
        else:
            job.put("queue", (row, id_), payload)
    with caplog.at_level(logging.ERROR, "persistency.recipes"):
        assert [message.value for message in queue.take_many(2).result()] == [3, 4]
        clock.advance(5)
        assert queue.take().result() is None
    logged = [(vars(one)["persistency_event"], vars(one)["persistency_message"]) for one in caplog.records]
    assert logged == [("message_damaged", in_line), ("message_damaged", delayed)]
    letters = queue.dead().result()
    assert [letter.value for letter in letters] == ([1, 2] if row == "state" else [])
    assert queue.revive(in_line).result() == (row == "state")
    assert queue.purge_dead().result() == (row == "state")
    assert queue.counts().result().dead == 0


def test_a_damaged_dead_letter_can_be_revived_and_purged(job: Job) -> None:
    """What is known of it is lost, its value isn't."""
    queue = Queue[int](job, backoff=0)
    ids = queue.put_many([1, 2]).result()
    for message in queue.take_many(2).result():
        message.bury("no use")
    for id_ in ids:
        job.put("queue", ("state", id_), b"\xff")
    assert [letter.value for letter in queue.dead().result()] == [1, 2]
    assert queue.cancel(ids[0]).result() is False
    assert queue.revive(limit=1).result() == 1
    assert taken(queue).value == 1
    assert queue.purge_dead().result() == 1
    assert queue.counts().result() == QueueCounts(0, 0, 1, 0)


def test_whoever_sees_that_a_lease_is_over_goes_by_the_terms_it_was_taken_on(job: Job, clock: ManualClock) -> None:
    """A producer or a monitor has terms of its own, and decides nothing over what a consumer has taken."""
    consumer, producer = Queue[int](job, attempts_max=100), Queue[int](job, attempts_max=1)
    consumer.put(1)
    for attempt in range(1, 4):
        assert taken(consumer, lease=1).attempt == attempt
        clock.advance(1)
        assert producer.counts().result() == QueueCounts(1, 0, 0, 0)
    taken(producer, lease=1)
    clock.advance(1)
    assert consumer.counts().result() == QueueCounts(0, 0, 0, 1)


# -- a message as a context ----------------------------------------------------------------------------------------


def test_a_block_acknowledges_or_has_it_tried_again(job: Job, clock: ManualClock) -> None:
    """At the end of the block it is done; an exception, which is passed on, costs an attempt."""
    queue = Queue[str](job, backoff=1)
    queue.put("flaky")
    with pytest.raises(OSError, match="down"), taken(queue):
        raise OSError("down")
    assert queue.counts().result() == QueueCounts(0, 1, 0, 0)
    clock.advance(1)
    with taken(queue) as message:
        assert (message.attempt, message.error) == (2, "OSError: down")
    assert queue.counts().result() == QueueCounts(0, 0, 0, 0)


def test_a_consumer_that_is_stopped_gives_its_message_back(job: Job) -> None:
    """S0-94: what is at work at the end goes back to where it was, and its attempt doesn't count."""
    queue = Queue[str](job)
    queue.put_many(["a", "b"])
    with pytest.raises(KeyboardInterrupt), taken(queue):
        raise KeyboardInterrupt
    again = taken(queue)
    assert (again.value, again.attempt) == ("a", 1)


def test_a_block_that_has_told_the_message_something_is_left_at_that(job: Job) -> None:
    """Who says `bury`, `retry` or `ack_in` in the block has decided."""
    queue = Queue[str](job)
    queue.put_many(["a", "b", "c"])
    with taken(queue) as message:
        message.bury("no use")
    with taken(queue) as message:
        message.retry(delay=60)
    with taken(queue) as message:
        job.run(message.ack_in)
    assert queue.counts().result() == QueueCounts(0, 1, 0, 1)


@pytest.mark.parametrize("verb", ["ack", "bury", "release", "retry", "ack_in"])
def test_a_block_that_has_told_and_then_raises_has_lost_nothing(
    job: Job, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    """What it has told stands, and nobody is told that the message was lost."""
    queue = Queue[str](job)
    queue.put("a")
    message = taken(queue)

    def work() -> None:
        with message:
            told = job.run(message.ack_in) if verb == "ack_in" else getattr(message, verb)()
            assert told.result() is True
            raise OSError("afterwards")

    with caplog.at_level(logging.WARNING, "persistency.recipes"), pytest.raises(OSError, match="afterwards"):
        work()
    assert not message.lost
    assert caplog.records == []
    assert sum(queue.counts().result()) == (0 if verb.startswith("ack") else 1)


@pytest.mark.parametrize("fails", [False, True])
def test_an_acknowledgement_that_was_undone_tells_nothing(job: Job, fails: bool) -> None:
    """The end of the block decides then, as if it hadn't been tried."""
    queue = Queue[str](job)
    queue.put("a")
    message = taken(queue)

    def book(tx: Transaction) -> None:
        assert message.ack_in(tx)
        raise OSError("undone")

    def work() -> None:
        with message:
            reply = job.run(book)
            if fails:
                reply.result()
            assert isinstance(reply.exception(), OSError)

    if fails:
        with pytest.raises(OSError, match="undone"):
            work()
    else:
        work()
    assert queue.counts().result() == (QueueCounts(0, 1, 0, 0) if fails else QueueCounts(0, 0, 0, 0))


class Mute(Exception):
    """An exception that can't be shown."""

    def __str__(self) -> str:
        raise TypeError("no text")


def test_an_exception_that_cant_be_shown_is_a_failed_attempt(job: Job) -> None:
    """The message is tried again, and the exception is passed on."""
    queue = Queue[str](job, backoff=0)
    queue.put("a")
    with pytest.raises(Mute), taken(queue):
        raise Mute
    assert taken(queue).error == "Mute"


def test_a_block_that_takes_too_long_is_logged(job: Job, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """It has happened, and will happen again: nobody is told so but the log, and `lost`."""
    queue = Queue[str](job, lease=10)
    queue.put("slow")
    with caplog.at_level(logging.WARNING, "persistency.recipes"), taken(queue) as message:
        clock.advance(10)
        taken(queue)
    assert message.lost
    (record,) = caplog.records
    assert (vars(record)["persistency_event"], vars(record)["persistency_message"]) == ("message_lost", message.id)


def test_what_goes_wrong_in_a_block_is_not_hidden_by_what_goes_wrong_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """A job that is closed meanwhile can't be told; the block's own exception is what its caller gets."""
    with Persistency(":memory:") as p:
        job = p.open_job("work")
        queue = Queue[str](job)
        queue.put_many(["a", "b"])
        first, second = queue.take_many(2).result()

        def fail() -> None:
            with first:
                job.close()
                raise OSError("mine")

        with caplog.at_level(logging.ERROR, "persistency.recipes"), pytest.raises(OSError, match="mine"):
            fail()
        assert [vars(record)["persistency_event"] for record in caplog.records] == ["message_not_told"]
        with pytest.raises(Closed), second:
            pass


def test_leases_are_kept_alive(job: Job, clock: ManualClock) -> None:
    """Work that takes many times its lease keeps its message; the thread that renews it ends after it."""
    queue = Queue[str](job, lease=0.03)
    queue.put("long")
    message = taken(queue)
    renewed = threading.Semaphore(0)
    extended, until_ms = Message._extended, message.until_ms

    def count(self: Message[Any], answer: int | None) -> bool:
        held = extended(self, answer)
        renewed.release()
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Message, "_extended", count)
        with message.keep_alive():
            for _ in range(12):
                while renewed.acquire(blocking=False):
                    pass
                assert renewed.acquire(timeout=WAIT)
                assert queue.take().result() is None
                clock.advance(0.009)
    assert message.until_ms >= until_ms + 90
    assert message.ack().result()
    assert not message.lost
    for thread in threading.enumerate():
        if thread.name == "persistency-leases":
            thread.join(WAIT)
            assert not thread.is_alive()


def test_a_lease_that_is_lost_is_kept_alive_no_more(job: Job, clock: ManualClock) -> None:
    """Somebody else has the message: the consumer can see so."""
    queue = Queue[str](job, lease=0.03)
    queue.put("paused")
    message = taken(queue)
    clock.advance(60)
    assert taken(queue, lease=60).attempt == 2
    lost = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Message, "_lose", lambda self: lost.set())
        with message.keep_alive():
            assert lost.wait(WAIT)
    assert message.lost


def test_a_message_that_was_told_is_kept_alive_no_more(job: Job) -> None:
    """An early `ack` in the block isn't taken for a lost lease."""
    queue = Queue[str](job, lease=0.03)
    queue.put("a")
    message = taken(queue)
    kept = message.keep_alive()
    renewed: Future[Reply[bool] | None] = Future()
    renew = kept._renew

    def noted() -> Reply[bool] | None:
        answer = renew()
        if message._told and not renewed.done():
            renewed.set_result(answer)
        return answer

    kept._renew = noted
    with message, kept:
        assert message.ack().result()
        assert renewed.result(WAIT) is None
    assert not message.lost


def test_a_runner_that_fails_oddly_harms_only_its_own_lease(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """The thread that renews for all goes on."""
    odd, good = queue_alive.KeptAlive("odd", 0.03, lambda: 1 // 0, print), threading.Event()
    fine = queue_alive.KeptAlive("fine", 0.06, good.set, print)  # type: ignore[arg-type]  # it answers None
    with caplog.at_level(logging.WARNING, "persistency.recipes"), odd, fine:
        assert good.wait(WAIT)
    assert {vars(one)["persistency_event"] for one in caplog.records} == {"lease_not_renewed"}


# -- waiting -------------------------------------------------------------------------------------------------------


def test_receive_gives_up_in_time(live: Job) -> None:
    """With a timeout it raises; with 0 it looks once."""
    queue = Queue[str](live)
    with pytest.raises(TimeoutError):
        queue.receive(0)
    with pytest.raises(TimeoutError):
        queue.receive(0.01)
    queue.put("a")
    assert queue.receive(0).value == "a"


def listening(queue: Queue[Any], count: int) -> None:
    """Wait until so many wait for a message."""
    while queue._bell.listeners < count:
        threading.Event().wait(0.001)


def test_who_waits_is_woken_by_who_puts(live: Job) -> None:
    """Each message wakes one of those who wait, through another queue object, too; each is given once."""
    queue = Queue[int](live)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(queue.receive(WAIT).value)) for _ in range(8)]
    for thread in threads:
        thread.start()
    listening(queue, 8)
    Queue[int](live).put_many(range(3))
    live.run(queue.put_in, 3).result()
    for n in range(4, 8):
        queue.put(n)
    for thread in threads:
        thread.join(WAIT)
    assert sorted(found) == list(range(8))
    assert queue._bell.listeners == 0


def test_who_waits_is_woken_when_something_is_due(live: Job) -> None:
    """A delay, a lease and a retry end by themselves, while several wait, one of whom gives up."""
    queue = Queue[str](live, backoff=0.05)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(queue.receive(WAIT).value)) for _ in range(3)]
    threads[0].start()
    listening(queue, 1)
    for thread in threads[1:]:
        thread.start()
    listening(queue, 3)
    with pytest.raises(TimeoutError):
        queue.receive(0.01)

    def taken_at_once(tx: Transaction) -> None:
        for value in ("lease", "retry"):
            queue.put_in(tx, value)
        queue._rows.take(tx, 50, 1)
        ((second,), _) = queue._rows.take(tx, 3_600_000, 1)
        queue._rows.retry(tx, second.id, second.state.token, None, None)

    queue.put("delayed", delay=0.05)
    live.run(taken_at_once).result()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(found) == ["delayed", "lease", "retry"]


def test_a_clock_that_jumps_is_noticed(job: Job, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches the clock doesn't rely on how long it seemed to take: a clock is set, and a machine sleeps."""
    monkeypatch.setattr(queue_module, "_STATE_LOOK_S", 0.01)
    monkeypatch.setattr(queue_module, "_DUE_LOOK_S", 0.02)
    queue = Queue[str](job)
    queue.put("later", delay=3600)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(queue.receive(WAIT).value))
    thread.start()
    listening(queue, 1)
    clock.advance(3600)
    thread.join(2 * WAIT)
    assert found == ["later"]


def test_nobody_waits_for_a_job_that_is_poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that can't go on, as its file is gone, tells everybody who waits."""
    monkeypatch.setattr(queue_module, "_STATE_LOOK_S", 0.01)
    p = Persistency(tmp_path)
    job = p.open_job("work")
    queue = Queue[int](job)
    raised: list[BaseException] = []

    def consume() -> None:
        try:
            queue.receive(WAIT)
        except PersistencyError as error:
            raised.append(error)

    threads = [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    listening(queue, 2)
    for path in tmp_path.glob("work.db*"):
        path.rename(tmp_path / f"moved-{path.name}")
    with pytest.raises(Poisoned):
        job.compare_and_set("a", ("b",), None, b"c").result()
    for thread in threads:
        thread.join(2 * WAIT)
    assert [type(error) for error in raised] == [Poisoned, Poisoned]
    with suppress(PersistencyError):
        p.close(WAIT)


def test_nobody_polls_a_job(live: Job) -> None:
    """While nothing happens those who wait ask for nothing: one look each, and one more after listening."""
    queue = Queue[int](live)
    looks = 0
    take = queue._rows.take

    def counted(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return take(*args)

    queue._rows.take = counted  # type: ignore[method-assign]  # counted on the way
    queue.put(1, delay=3600)
    threads = [threading.Thread(target=queue.receive, args=(WAIT,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    listening(queue, 4)
    threading.Event().wait(0.2)
    assert looks <= 8 + 1
    queue.put_many([2, 3, 4, 5])
    for thread in threads:
        thread.join(WAIT)
    assert looks <= 8 + 1 + 4 * 4


def test_a_loop_ends_when_the_queue_is_closed(live: Job) -> None:
    """Closing ends every loop over that object, and none over another; the messages stay."""
    queue, other = Queue[int](live), Queue[int](live)
    found: list[int] = []

    def consume() -> None:
        for message in queue:
            with message:
                found.append(message.value)

    threads = [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue.put_many(range(5)).result()
    while queue.counts().result() != QueueCounts(0, 0, 0, 0):
        pass
    listening(queue, 3)
    queue.close()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert sorted(found) == list(range(5))
    other.put(5)
    assert other.receive(WAIT).value == 5
    with pytest.raises(Closed):
        queue.receive()


def test_nobody_waits_for_a_job_that_is_closed() -> None:
    """Those who wait get `Closed`, all of them."""
    with Persistency(":memory:") as p:
        job = p.open_job("work")
        queue = Queue[int](job)
        raised: list[BaseException] = []

        def consume() -> None:
            try:
                next(iter(queue))
            except Closed as closed:
                raised.append(closed)

        threads = [threading.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        listening(queue, 3)
        job.close()
        for thread in threads:
            thread.join(WAIT)
        assert len(raised) == 3


# -- event loops ---------------------------------------------------------------------------------------------------


def test_consumers_and_producers_in_an_event_loop(in_loop: InLoop) -> None:
    """`areceive`, `async for`, `async with`: tasks share a queue with a thread, and each message is done once."""

    async def main() -> None:
        async with Persistency(":memory:") as p:
            job = await p.aopen_job("work")
            queue = Queue[int](job)
            done: Counter[int] = Counter()

            async def consume() -> None:
                async for message in queue:
                    async with message:
                        done[message.value] += 1
                    if sum(done.values()) == 60:
                        queue.close()

            async def produce() -> None:
                for n in range(40):
                    await queue.put(n, delay=0.01 if n % 4 == 0 else None)

            thread = threading.Thread(target=lambda: [queue.put(n).result() for n in range(40, 60)])
            thread.start()
            await together(produce, *[consume] * 4)
            thread.join()
            assert done == Counter(range(60))
            assert await queue.counts() == QueueCounts(0, 0, 0, 0)

    in_loop(main)


def test_a_cancelled_task_takes_no_message_along(in_loop: InLoop) -> None:
    """Who is cancelled while waiting has not had a message; the next one gets it, as its first attempt."""

    async def main() -> None:
        async with Persistency(":memory:") as p:
            queue = Queue[str](await p.aopen_job("work"))
            got: list[Message[str]] = []

            async def receive() -> None:
                got.append(await queue.areceive())

            for n in range(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(receive)
                    for _ in range(n % 4):
                        await anyio.sleep(0)
                    queue.put(f"message {n}")
                    for _ in range(n % 3):
                        await anyio.sleep(0)
                    group.cancel_scope.cancel()
                message = got.pop() if got else await queue.areceive(WAIT)
                assert (message.value, message.attempt) == (f"message {n}", 1)
                assert await message.ack()

    in_loop(main)


def test_who_gives_up_waiting_passes_the_message_on(in_loop: InLoop) -> None:
    """A timeout, too, takes no message along, and wakes somebody else for it."""

    async def main() -> None:
        async with Persistency(":memory:") as p:
            queue = Queue[int](await p.aopen_job("work"))
            found: list[int] = []

            async def impatient() -> None:
                for _ in range(30):
                    try:
                        found.append((await queue.areceive(0.001)).value)
                    except TimeoutError:
                        continue

            async def patient() -> None:
                while len(found) < 20:
                    try:
                        found.append((await queue.areceive(0.2)).value)
                    except TimeoutError:
                        continue

            async def produce() -> None:
                for n in range(20):
                    await queue.put(n)
                    await anyio.sleep(0.001)

            await together(impatient, patient, impatient, produce)
            assert sorted(found) == list(range(20))

    in_loop(main)


def test_async_contexts(in_loop: InLoop) -> None:
    """`async with message:` acknowledges, has it tried again, and gives back what was cancelled."""

    async def main() -> None:
        async with Persistency(":memory:") as p:
            queue = Queue[str](await p.aopen_job("work"), backoff=0)
            await queue.put("a")
            with pytest.raises(OSError, match="down"):
                async with await queue.areceive(WAIT):
                    raise OSError("down")
            with anyio.CancelScope() as scope:
                async with await queue.areceive(WAIT) as message:
                    assert message.attempt == 2
                    scope.cancel()
                    await anyio.sleep(WAIT)
            async with await queue.areceive(WAIT) as message:
                assert (message.attempt, message.error) == (2, "OSError: down")
            assert await queue.counts() == QueueCounts(0, 0, 0, 0)

    in_loop(main)


# -- many at once --------------------------------------------------------------------------------------------------


def test_sixteen_threads_over_one_job(tmp_path: Path) -> None:
    """Nothing is lost, nothing is done twice, though attempts fail and leases end; one consumer alone has the order."""
    with Persistency(tmp_path) as p, p.open_job("work") as job:
        queue = Queue[tuple[int, int]](job, lease=30, backoff=0.002, attempts_max=100)
        done: Counter[tuple[int, int]] = Counter()
        lock = threading.Lock()

        def consume() -> None:
            for message in queue:
                if message.attempt == 1 and message.id % 5 == 0:
                    message.retry(error="once more")
                elif message.attempt == 1 and message.id % 7 == 0:
                    message.extend(0.001)  # as if it had died
                elif message.ack().result():
                    with lock:
                        done[tuple(message.value)] += 1  # type: ignore[index]  # CBOR makes a list of it
                        if len(done) == 400:
                            queue.close()

        def produce(number: int) -> None:
            for n in range(100):
                queue.put((number, n), delay=0.003 if n % 10 == 0 else None).result()

        threads = [threading.Thread(target=consume) for _ in range(12)]
        threads += [threading.Thread(target=produce, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert done == Counter((number, n) for number in range(4) for n in range(100))
        assert queue.counts().result() == QueueCounts(0, 0, 0, 0)


def test_one_consumer_has_each_producers_order(live: Job) -> None:
    """What each of several producers puts, one consumer gets in its order."""
    queue = Queue[tuple[int, int]](live)

    def produce(number: int) -> None:
        replies: list[Reply[int]] = [queue.put((number, n)) for n in range(100)]
        assert [reply.result() for reply in replies] == sorted(reply.result() for reply in replies)

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {number: [] for number in range(4)}
    for _ in range(400):
        with queue.receive(WAIT) as message:
            number, n = message.value
            seen[number].append(n)
    for thread in threads:
        thread.join()
    assert seen == {number: list(range(100)) for number in range(4)}


def test_a_queue_on_a_baton(tmp_path: Path) -> None:
    """The same verbs; who waits looks by itself, as another process may put."""
    with Persistency(tmp_path) as p, Baton(p, "work", poll=0.02) as baton:
        queue = Queue[str](baton)
        with Persistency(tmp_path) as other, Baton(other, "work") as theirs:
            thread = threading.Thread(target=lambda: Queue[str](theirs).put("a", delay=0.05).result())
            thread.start()
            with queue.receive(WAIT) as message:
                assert message.value == "a"
            thread.join()
        with pytest.raises(TimeoutError):
            queue.receive(0.01)
        assert queue.counts().result() == QueueCounts(0, 0, 0, 0)


# -- many processes ------------------------------------------------------------------------------------------------


def harness(tmp_path: Path, seed: int, **options: Any) -> Outcome:
    """Run the soak's harness, a little of it."""
    print(f"seed {seed}")
    return run_soak(Plan(seed=seed, **options), tmp_path)


def test_sixteen_consumers_in_four_processes_that_are_killed(tmp_path: Path) -> None:
    """Nothing is lost, and nothing acknowledged is delivered again, though processes are killed at random."""
    seed = random.SystemRandom().getrandbits(32)
    outcome = harness(tmp_path, seed, processes=4, threads=4, producers=3, messages=300, kills=4)
    assert outcome.wrong == []
    assert outcome.killed >= 2  # a new process may come too late for the others


@pytest.mark.parametrize(
    ("plant", "kills", "complaint"), [("shows no token", 0, "delivered again"), ("takes for good", 3, "lost")]
)
def test_the_harness_reports_a_planted_defect(tmp_path: Path, plant: str, kills: int, complaint: str) -> None:
    """A queue with a defect is told from a sound one, by what it does wrong."""
    options = {"processes": 2, "threads": 8, "producers": 1, "messages": 100, "kills": kills}
    outcome = harness(tmp_path, 1, plant=plant, seconds=15, **options)
    assert any(complaint in wrong for wrong in outcome.wrong), outcome.wrong


def test_every_planted_defect_is_tried() -> None:
    """No defect that can be planted is left out above."""
    assert set(PLANTS) == {"shows no token", "takes for good"}
