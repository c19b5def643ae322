"""A server that fails: the script of `tests.crash.faulty`, over connections that break and answers that are refusals.

A fault falls on one of the round trips that the engine makes, whatever it is about. The connection breaks before the
server has seen anything, or after it has done everything; or the server refuses, as one that is full, or that wants
all of it again. Once, or from then on for good: then no connection can be made either.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from persistency import Persistency
from persistency.errors import StorageError
from persistency.storage.postgres.faults import Lost, Refused
from persistency.storage.postgres.session import Session
from tests.crash.faulty import HANG_SECONDS, Call, Fired, Judge, Play, Variant, _Over, script
from tests.postgres import fresh_url, sql

OPERATIONS = ("any", "commit", "read")
_READS = ("get", "heads", "whole", "pairs", "keys", "entries", "sizes", "count", "categories", "changes", "all_bytes")


@dataclass(frozen=True)
class ServerFault:
    """What fails: a round trip of a kind; `state` is the SQLSTATE that the server refuses with, "" for a break.

    `manner`: nothing of it was done ("before"), or "all".
    """

    operation: str
    state: str = ""
    sticky: bool = False
    manner: str = "before"

    code = 0
    lies = False

    def __str__(self) -> str:
        how = f"refused with {self.state}" if self.state else f"broken, {self.manner}"
        return f"{self.operation} {how}, {'for good' if self.sticky else 'once'}"


NO_FAULT = ServerFault("")
FAULTS = (
    *(ServerFault(operation, manner=manner) for operation in OPERATIONS for manner in ("before", "all")),
    *(ServerFault("any", manner=manner, sticky=True) for manner in ("before", "all")),
    *(ServerFault("commit", state=state) for state in ("40001", "40P01", "53100", "57P01", "25006")),
    ServerFault("commit", state="53100", sticky=True),
    ServerFault("read", state="40001"),
)
VARIANTS = (Variant(), Variant("power"), Variant(kept=True))


class Wire:
    """What the engine's round trips go over; it has what a play asks a disk for."""

    def __init__(self) -> None:
        self.phase = ""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.failed: list[Fired] = []
        self.synced: Counter[str] = Counter()
        self._given: ServerFault = NO_FAULT
        self._at = 0
        self._met = 0
        self._broken = False  # for good
        self._lock = threading.Lock()
        self._inside = threading.local()

    def prepare(self, given: ServerFault, at: int) -> None:
        """Forget what was, and let the `at`-th round trip of a kind fail."""
        self._given, self._at, self._met, self._broken, self.phase = given, at, 0, False, ""
        self.calls.clear()
        self.failed.clear()

    def disarm(self) -> None:
        """Let nothing fail any more."""
        self._given, self._broken = NO_FAULT, False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the round trips of all sessions go over this wire."""
        run, pipe, init = Session.run, Session.pipe, Session.__init__

        def running(session: Session, statement: Any, params: Any) -> Any:
            return self._trip(session, [(statement, params)], lambda: run(session, statement, params))

        def piping(session: Session, steps: Sequence[Any]) -> Any:
            return self._trip(session, steps, lambda: pipe(session, steps))

        def connecting(session: Session, *given: Any, **more: Any) -> None:
            if self._broken and not self._given.state:
                raise Lost("the server is away, as the test wants it")
            init(session, *given, **more)

        with (
            mock.patch.object(Session, "run", running),
            mock.patch.object(Session, "pipe", piping),
            mock.patch.object(Session, "__init__", connecting),
        ):
            yield

    def _trip(self, session: Session, steps: Sequence[Any], go: Callable[[], Any]) -> Any:
        """Make a round trip, or fail; a trip inside another is a part of it, and setting up a session is none."""
        if getattr(self._inside, "it", False) or self.phase in ("", "over"):
            return go()
        self._inside.it = True
        try:
            if not self._fails({_kind(step[0].name) for step in steps}):
                return go()
            given = self._given
            if given.state and given.state[:3] != "57P":
                raise Refused(given.state.encode(), "as the test wants it")
            if given.manner == "all":
                go()
            session.broken = True
            raise Lost(f"the connection broke, as the test wants it {given.state}")
        finally:
            self._inside.it = False

    def _fails(self, kinds: set[str]) -> bool:
        given = self._given
        with self._lock:
            for kind in {"any", *kinds}:
                self.calls[kind, "wire"] += 1
            if not given.operation or given.operation not in {"any", *kinds}:
                return self._broken and not given.state
            self._met += 1
            fails = self._broken or self._met == self._at
            if fails:
                self._broken |= given.sticky
                self.failed.append(Fired(self.phase, given.operation, "wire"))
            return fails


def _kind(name: bytes) -> str:
    verb = name.decode().rpartition(".")[2]
    if verb == "commit" or verb.startswith("put"):
        return "commit"
    return "read" if verb.removesuffix("_back").removesuffix("_to") in _READS else "other"


class ServerPlay(Play):
    """One run of the script over a wire."""

    disk: Any

    def __init__(self, root: str, place: Path, wire: Wire, variant: Variant, given: Any, limit: float) -> None:
        super().__init__(place, wire, variant, given, limit)  # type: ignore[arg-type]  # it has what is asked for
        self.root = root
        self.place = root  # type: ignore[assignment]  # where it is opened again

    def run(self) -> None:
        """Play the script to its end, or until the job is poisoned."""
        self.persistency = Persistency(self.root, clock=self.wall)
        with self.watch:
            try:
                self._open()
                for section in script(self.variant):
                    self._section += 1
                    self._play(section)
            except _Over:
                pass
            finally:
                self._finish()

    def _alone(self, asked: Call) -> None:
        # Whether a commit is on the medium is the server's to say; see `tests.soak.postgres_restarts`.
        entry = self._post(asked)
        if entry.reply is None:
            return
        if asked.verb == "iterate":
            try:
                entry.answer = list(entry.reply)
            except Exception as error:
                self._failed(entry, error)
            return
        self._wait(entry)

    def look_from_outside(self, version: int) -> None:
        """Ask the server for the row of a closed job."""
        schema = self.root.partition("persistency_schema=")[2].partition("&")[0]
        found = sql(self.root, f"SELECT owner, last_version FROM {schema}.jobs WHERE job = 'job'")
        if found != [(None, version)]:
            self.find("file", f"after a close in order, with last version {version}, the job's row says {found}")


class ServerJudge(Judge):
    """Holds a play against the model; what a fault may do to a job is another matter than with a disk."""

    def _look_at_consequences(self) -> None:
        play, given = self.play, self.play.fault
        causes = [*play.watch.causes, *(error.__cause__ for error in play.poisoned)]
        for cause in causes:
            if not isinstance(cause, StorageError) or not play.disk.failed:
                play.find("poison", f"the job was poisoned by {cause!r}")
        if causes and not given.sticky:
            play.find("poison", f"a fault that passed has poisoned the job: {causes[0]!r}")
        for entry in self.alone:
            if not isinstance(entry.error, StorageError) or not play.disk.failed:
                play.find("error", f"{entry.asked} failed with {entry.error!r}")
        if len(self.alone) > 1 and not given.sticky:
            play.find("error", f"one fault has failed {len(self.alone)} requests")
        if any(failures for failures in play.told) and not play.watch.failed:
            play.find("told", "failures weren't told to the log")


def play_one(
    place: Path, wire: Wire, variant: Variant, given: ServerFault, at: int, *, limit: float = HANG_SECONDS
) -> ServerPlay:
    """Play the script with the `at`-th round trip failing, and judge it."""
    wire.prepare(given, at)
    play = ServerPlay(fresh_url(), place, wire, variant, given, limit)
    with wire.attached():
        play.run()
    wire.phase = ""
    if given.sticky:  # who couldn't give the job back while the server was away has a lease on it still
        schema = play.root.partition("persistency_schema=")[2].partition("&")[0]
        if sql(play.root, "SELECT to_regclass(%s)", f"{schema}.jobs") != [(None,)]:
            sql(play.root, f"UPDATE {schema}.jobs SET lease_ends = now() - interval '1 hour'")
    ServerJudge(play).judge()
    return play
