"""A process of consumers over one queue that several processes share: `python -m tests.soak.queue_worker ...`.

Each thread takes messages until standard input ends. Of a message whose value is even the effect is written in the
transaction that acknowledges it; for the others it is written before. Some of them take longer than their lease, twice
over, so that a consumer that has lost one meets another that has it. What it does is noted in a file of its own, a line
at a time, so that a kill loses at most what was about to be noted: `T id attempt` when it was taken, `A id attempt`
when the acknowledgement was answered with yes.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from typing import Any

from persistency import Persistency, Transaction
from persistency.recipes import Baton, Message, Queue

LEASE = 0.4
SLOW = 17  # one of so many
NAME = "work"


def queue_of(baton: Baton) -> Queue[int]:
    """The queue as producers, consumers and the judge see it."""
    return Queue(baton, NAME, lease=LEASE, attempts_max=1_000_000, backoff=0.01, backoff_max=0.05)


def effect(tx: Transaction, value: int) -> None:
    """What a message is for: it is counted how often that was done."""
    tx.increment("done", (value,))


class Stale(Exception):
    """The lease was lost: the effect is not to be written."""


def effect_and_ack(tx: Transaction, message: Message[int]) -> None:
    """The effect and the acknowledgement, both or neither."""
    effect(tx, message.value)
    if not message.ack_in(tx):
        raise Stale


def consume(baton: Baton, queue: Queue[int], notes: int, chance: random.Random) -> None:
    """Do messages until the queue is closed."""
    for message in queue:
        os.write(notes, f"T {message.id} {message.attempt}\n".encode())
        if message.value % SLOW == 0 and message.attempt <= 2:
            time.sleep(1.3 * LEASE)  # work that takes too long
        elif chance.random() < 0.05:
            message.retry(error="once more").result()
            continue
        if message.value % 2 == 0:
            try:
                baton.run(effect_and_ack, message).result()
            except Stale:
                continue
            held = True
        else:
            baton.run(effect, message.value).result()
            held = message.ack().result()
        if held:
            os.write(notes, f"A {message.id} {message.attempt}\n".encode())


# -- planted defects -----------------------------------------------------------------------------------------------


def shows_no_token() -> None:
    """Who has lost a message acknowledges it for its new owner."""
    from persistency.recipes.queue_records import Kind, State
    from persistency.recipes.queue_rows import Rows

    def held(self: Rows, tx: Transaction, id_: int, token: int) -> State | None:
        state = self._state(tx, id_)
        return state if state is not None and state.kind == Kind.TAKEN else None

    Rows._held = held  # type: ignore[method-assign]  # that is the defect


def takes_for_good() -> None:
    """A message is deleted when it is taken, as in a queue without acknowledgement."""
    from persistency.recipes.queue_records import Stored
    from persistency.recipes.queue_rows import Rows

    take, ack = Rows.take, Rows.ack

    def taken(self: Rows, tx: Transaction, lease_ms: int, limit: int) -> Any:
        found: list[Stored]
        found, due_ms = take(self, tx, lease_ms, limit)
        for stored in found:
            ack(self, tx, stored.id, stored.state.token)
        return found, due_ms

    Rows.take = taken  # type: ignore[method-assign]  # as above
    Rows.ack = lambda *_: True  # type: ignore[method-assign,assignment]


PLANTS = {"shows no token": shows_no_token, "takes for good": takes_for_good}


def main() -> None:
    """Consume until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("notes")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plant", choices=PLANTS)
    given = parser.parse_args()
    if given.plant:
        PLANTS[given.plant]()
    notes = os.open(given.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Persistency(given.root) as p, Baton(p, "shared", poll=0.05) as baton:
        queue = queue_of(baton)
        threads = [
            threading.Thread(target=consume, args=(baton, queue, notes, random.Random(given.seed + n)))
            for n in range(given.threads)
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        queue.close()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
