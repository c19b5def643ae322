"""Holders of one lock that are killed: they contend for it, and tell a witness file outside of the store what they do.

    python -m tests.crash.holders ROOT --form processes|threads --seed N [--lease MS] [--kills N] [--overstays N]
        [--plant NAME]

A line is appended (`O_APPEND`, one write) inside a transaction that has checked the grant, so that the file has the
lines in the order in which the job has run the transactions: a holder that was paused can't tell what is no longer so.

    enter TOKEN BEGAN ENDS ASKED   the lock was got: its lease at this moment, and since when it was asked for
    work TOKEN BEGAN ENDS 0        something that the lock guards was done
    leave TOKEN BEGAN ENDS NOW     the last thing that it guards
  and outside of any:
    held TOKEN AT                  at that moment, or later, `grant.lost` was false
    lost TOKEN                     what was to be done next was refused
    wrong TEXT                     a promise was seen broken

All times are milliseconds by one clock that never steps, which is the job's as well.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from time import sleep
from typing import Any

from persistency import Persistency, Transaction
from persistency.recipes import Baton, Grant, Lock, LockLost, Runner, lock, lock_grant, lock_rows
from persistency.recipes.lock_keeper import clock
from tests.crash.running import replace_method

NAME = "the one"
JOB = "locks"
WITNESS, STOP = "witness", "stop"
_EPOCH_S = 1_700_000_000
THREADS = {"processes": 2, "threads": 8}
# How often, of a thousand rounds, a holder kills its process somewhere within, or stays for longer than its lease: one
# that it lets run out, or one that is renewed.
KILLS, OVERSTAYS, LONG = 12, 4, 4
STEPS = 6


def steady() -> float:
    """Return a time in Unix seconds that never steps, the same for all processes."""
    return _EPOCH_S + clock()


class Contender:
    """One thread that gets the lock again and again."""

    def __init__(
        self, root: Path, runner: Runner, rng: random.Random, lease_ms: int, kills: int, overstays: int
    ) -> None:
        self.kills, self.overstays = kills, overstays
        self.stop = root / STOP
        self.runner = runner
        self.rng = rng
        self.lease_s = lease_ms / 1000
        self.file = os.open(root / WITNESS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.renewed = Lock(runner, NAME, lease=self.lease_s)
        self.plain = Lock(runner, NAME, lease=self.lease_s, renew=False)

    def tell(self, *words: object) -> None:
        """Append a line."""
        os.write(self.file, (" ".join(map(str, words)) + "\n").encode())

    def run(self) -> None:
        """Contend until there is a file that says to stop."""
        try:
            while not self.stop.exists():
                self.round()
        except BaseException as error:
            self.tell("wrong", f"a contender ended: {error!r}".replace("\n", " "))
            raise

    def round(self) -> None:
        """Get the lock once, and do something that it guards."""
        luck = self.rng.randrange(1000)
        overstays = luck < self.overstays
        stays_s = (1.4 if luck < self.overstays + LONG else self.rng.choice((0, 0, 0, 0.003))) * self.lease_s
        dies_at = self.rng.randrange(STEPS) if self.rng.randrange(1000) < self.kills else STEPS
        asked = int(steady() * 1000)
        grant = (self.plain if overstays else self.renewed).acquire()
        try:
            self.use(grant, asked, stays_s, dies_at)
        except LockLost:
            self.tell("lost", grant.token)
            if not grant.lost:
                self.tell("wrong", f"{grant.token} was refused, and its holder not told")
        kept = grant.release().result()
        if kept and grant.lost:
            self.tell("wrong", f"{grant.token} was released and lost")

    def use(self, grant: Grant, asked: int, stays_s: float, dies_at: int) -> None:
        """Be inside, and die there at one of some moments."""
        self.die_if(dies_at == 0)
        self.runner.run(self.fenced, grant, "enter", asked, dies_at == 1).result()
        self.sample(grant)
        self.die_if(dies_at == 2)
        sleep(stays_s)  # what a holder does takes time; it waits for nothing
        self.sample(grant)
        self.die_if(dies_at == 3)
        self.runner.run(self.fenced, grant, "work", 0, dies_at == 4).result()
        self.runner.run(self.fenced, grant, "leave", 0, False).result()
        self.die_if(dies_at == 5)

    def sample(self, grant: Grant) -> None:
        """Tell until when, at least, the holder believed to have the lock."""
        at = steady()
        if not grant.lost:
            self.tell("held", grant.token, f"{at * 1000:.3f}")

    def fenced(self, tx: Transaction, grant: Grant, what: str, asked: int, dies: bool) -> None:
        """Do what the lock guards, and tell it: nobody else can get the lock meanwhile."""
        grant.check_in(tx)
        entry = tx.entry("locks", (NAME,))
        assert entry is not None
        assert entry.expires_ms is not None
        last = tx.get("guarded", ("token",))
        if last is not None and int(last) > grant.token:
            self.tell("wrong", f"{grant.token} writes after {int(last)}")
        tx.put("guarded", ("token",), str(grant.token).encode())
        began = entry.expires_ms - round(self.lease_s * 1000)
        self.tell(what, grant.token, began, entry.expires_ms, tx.now_ms if what == "leave" else asked)
        self.die_if(dies)

    def die_if(self, dies: bool) -> None:
        """Be killed here."""
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)


# -- planted defects -----------------------------------------------------------------------------------------------


def _take_what_is_held(tx: Transaction, row: lock_rows.LockRow) -> lock_rows.Taken:
    """Take the lock without looking whether it is held."""
    tx.delete(row.category, row.key)
    return lock_rows.take(tx, row)


def _take_early(tx: Transaction, row: lock_rows.LockRow) -> lock_rows.Taken:
    """Take a lock whose lease will soon be over."""
    entry = tx.entry(row.category, row.key)
    if entry is not None and entry.expires_ms is not None and entry.expires_ms - tx.now_ms < row.lease_ms // 2:
        tx.delete(row.category, row.key)
    taken = lock_rows.take(tx, row)
    return taken._replace(wait_s=min(taken.wait_s, row.lease_ms / 5000))


def _same_token_of(tx: Transaction, row: lock_rows.LockRow) -> int | None:
    """Give everybody the same token."""
    return 7 if tx.exists(row.category, row.key) else None


def _free_anybodys(tx: Transaction, row: lock_rows.LockRow, _token: int) -> bool:
    """Give the lock back, whoever has it."""
    return tx.delete_acked(row.category, row.key)


def _take_counting_late(tx: Transaction, row: lock_rows.LockRow) -> lock_rows.Taken:
    """Have the holder believe that its lease is longer than it is."""
    taken = lock_rows.take(tx, row)
    return taken._replace(until=taken.until + row.lease_ms / 1000)


def plant(name: str) -> None:
    """Spoil the lock of this process."""
    if name == "checks nothing":
        replace_method(Grant, "check_in", lambda _self, _tx: None)
    elif name == "frees anybody's":
        vars(lock_grant)["free"] = _free_anybodys
    elif name == "gives a token again":
        vars(lock_rows)["token_of"] = _same_token_of
    else:
        vars(lock)["take"] = _TAKES[name]


_TAKES: dict[str, Any] = {
    "takes what is held": _take_what_is_held,
    "takes before the lease is over": _take_early,
    "counts the lease too long": _take_counting_late,
}

# Each with a word of the finding that reports it.
PLANTS = {
    "takes what is held": "while",
    "takes before the lease is over": "while",
    "gives a token again": "token",
    "frees anybody's": "while",
    "counts the lease too long": "believed",
    "checks nothing": "after",
}


def main() -> None:
    """Contend for the lock, in several threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--form", choices=sorted(THREADS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lease", type=int, default=500)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--overstays", type=int, default=OVERSTAYS)
    parser.add_argument("--plant", choices=sorted(PLANTS))
    given = parser.parse_args()
    if given.plant is not None:
        plant(given.plant)
    with ExitStack() as stack:
        store = stack.enter_context(Persistency(given.root, clock=steady))
        runner: Runner
        if given.form == "processes":
            runner = stack.enter_context(Baton(store, JOB, poll=0.02))
        else:
            runner = stack.enter_context(store.open_job(JOB))
        contenders = [
            Contender(
                given.root, runner, random.Random(f"{given.seed}/{at}"), given.lease, given.kills, given.overstays
            )
            for at in range(THREADS[given.form])
        ]
        threads = [threading.Thread(target=contender.run) for contender in contenders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
