"""The bell: tells those who follow jobs that others own when something was committed there.

A commit of a job that keeps its changes rings on the server, with the job's version; whoever follows listens. Where
the server knows no such bell the versions are asked for, over and over. What was committed is in the tables: a ring
says no more than that it is worth looking.

Rules:
  1. A ring that is missed is made up for: whenever listening begins, and now and then, the versions are asked for.
  2. One connection and one thread for all who follow; both are gone soon after the last has left.

Doesn't know: what a change is, readers, threads that wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from time import monotonic

from persistency.logfields import about
from persistency.storage.postgres import packing
from persistency.storage.postgres.address import Address
from persistency.storage.postgres.faults import Lost, Refused
from persistency.storage.postgres.reads import value, whole
from persistency.storage.postgres.schema import Statements
from persistency.storage.postgres.session import Session, Statement

log: logging.Logger = logging.getLogger("persistency.storage")

POLL_SECONDS = 0.5  # between two questions where there is no bell, and two looks whether anybody still follows
LOOK_SECONDS = 10.0  # between two questions where there is one

Tell = Callable[[int | None], None]


class Bell:
    """The bell of one root. What is told is a job's last version, as soon as it is known, or that it is gone."""

    def __init__(self, address: Address, statements: Statements) -> None:
        self._address = address
        self._statements = statements
        self._lock = threading.RLock()  # a signal handler may open a reader too
        self._followers: dict[object, tuple[str, Tell]] = {}
        self._thread: threading.Thread | None = None
        self._session: Session | None = None
        self._told = ""

    def follow(self, job: str, tell: Tell) -> object:
        """Have `tell` called, in a thread of the bell's, whenever a job may have another version; return a token."""
        token = object()
        with self._lock:
            self._followers[token] = job, tell
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="persistency:bell", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends
                    self._thread = None
        return token

    def leave(self, token: object) -> None:
        """Tell somebody no more."""
        with self._lock:
            self._followers.pop(token, None)

    def _run(self) -> None:
        hears, ask_at = False, 0.0
        while True:
            with self._lock:
                if not self._followers:
                    self._thread = None
                    break
            try:
                session = self._session
                if session is None:
                    session = self._session = Session(self._address)
                    hears, ask_at = self._listen(session), 0.0
                if not hears or monotonic() >= ask_at:
                    self._ask(session)
                    ask_at = monotonic() + LOOK_SECONDS
                for told in session.told(POLL_SECONDS):
                    version, _, job = told.partition(" ")
                    self._ring({job: int(version)})
                self._told = ""
            except (Lost, Refused) as error:
                if str(error) != self._told:
                    self._told = str(error)
                    fields = about("bell_not_heard", None, error)
                    log.warning("followers can't be told of commits, it is tried again: %s", error, extra=fields)
                self._disconnect()
                threading.Event().wait(POLL_SECONDS)
        self._disconnect()

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def forsake(self) -> None:
        """In a forked child: the thread isn't there, its session is the parent's."""
        session, self._session = self._session, None
        if session is not None:
            session.forsake()

    def _listen(self, session: Session) -> bool:
        """Listen, and return whether the server can be listened to."""
        try:
            session.run(Statement(b"", f"LISTEN {self._statements.channel}".encode()), ())
        except Refused as refused:
            log.info(
                "commits are asked for, the server has no bell: %s", refused, extra=about("no_bell", None, refused)
            )
            return False
        return True

    def _ask(self, session: Session) -> None:
        with self._lock:
            jobs = sorted({job for job, _ in self._followers.values()})
        if jobs:
            result = session.run(self._statements["versions"], (packing.texts(jobs),))
            found = {value(result, at, 0).decode(): whole(result, at, 1) for at in range(result.ntuples)}
            self._ring({job: found.get(job) for job in jobs})

    def _ring(self, versions: Mapping[str, int | None]) -> None:
        with self._lock:
            followers = list(self._followers.values())
        for job, tell in followers:
            if job in versions:
                tell(versions[job])
