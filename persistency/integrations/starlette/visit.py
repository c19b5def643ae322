"""A visit: one request, or one websocket, and the session it came with.

Rules:
  1. A session belongs to an id that was given out by this store. One that a browser made up gets an empty session, and
     never becomes anybody's id.
  2. What has changed is found by comparing what is there with what was read, so that a list in the session can be
     appended to as well. What hasn't changed isn't written, and of what nobody looks at nothing is even compared.
  3. As long as the response hasn't begun a session can be begun, given another id, or ended. Afterwards its values can
     be changed, but there is no way to tell the browser of another id.
  4. One save at a time: of two tasks that save, the second one writes what the first one hasn't.

Doesn't know: cookies and headers, how sessions are stored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import wraps
from secrets import token_urlsafe
from typing import Any, Final, NamedTuple

from persistency import CBOR, Misuse, Reply
from persistency.integrations.starlette.sessions import Change, SessionStore, as_owner, digest_of
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.sessions")

_ID_BYTES: Final = 32
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}")  # what `token_urlsafe` makes of so many


class Turn(NamedTuple):
    """What is to become of a session besides its values."""

    cleared: bool = False
    renewed: bool = False
    owner: str | None = None


class Session(dict[str, Any]):
    """What `request.session` is: a dict with text for keys and what CBOR can hold for values.

    A tuple comes back as a list. `clear()` ends it: whatever is put in afterwards is another session, with another id.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.accessed: bool = False
        self.stored: dict[str, bytes] = {}  # what the job has of it, as far as this request knows; once it is accessed
        self._turn = Turn()

    def mark_accessed(self) -> None:
        """Note that the response depends on the session; called by `request.session`, and by all verbs of a dict."""
        if not self.accessed:
            self.stored = self.encoded()
            self.accessed = True

    def clear(self) -> None:
        """End the session: its values, its id and its owner are gone."""
        self.mark_accessed()
        self._turn = Turn(cleared=True)
        super().clear()

    def renew(self, owner: str | None = None) -> None:
        """Have it go on under another id; see `regenerate`."""
        self.mark_accessed()
        self._turn = Turn(self._turn.cleared, renewed=True, owner=as_owner(owner) or self._turn.owner)

    @property
    def turn(self) -> Turn:
        """What is to become of it besides its values."""
        return self._turn

    def take_turn(self) -> Turn:
        """Return what is to become of it besides its values, and take that as done."""
        taken, self._turn = self._turn, Turn()
        return taken

    def give_back(self, turn: Turn) -> None:
        """Take back that it was done, unless there is something newer to be done."""
        if not self._turn.cleared:
            newer = self._turn if self._turn.renewed else turn
            self._turn = Turn(turn.cleared, newer.renewed, newer.owner)

    def encoded(self) -> dict[str, bytes]:
        """Return the values as they would be stored, each by itself. Raises `Misuse` for what can't be."""
        return {name: _encoded(name, value) for name, value in super().items()}


def _noting(verb: str) -> Callable[..., Any]:
    """Return a verb of `dict` that notes that the session is looked at, before anything in it can be changed."""
    plain = getattr(dict, verb)

    @wraps(plain)
    def noting(self: Session, *args: Any, **options: Any) -> Any:
        self.mark_accessed()
        return plain(self, *args, **options)

    return noting


for _verb in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__", "__ne__", "__or__"),
    *("__repr__", "__reversed__", "__ror__", "__setitem__", "copy", "get", "items", "keys", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(Session, _verb, _noting(_verb))


class Visit:
    """One request and its session."""

    def __init__(self, sessions: SessionStore) -> None:
        self._sessions = sessions
        self.session: Session = Session()
        self.begun: bool = False  # whether the response has
        self.left_s: int | None = None  # for the browser, if it has to be told: 0: there is no session any more
        self._id: str | None = None  # the one that is stored, or was until it was lost
        self._lost = False
        self._owner: str | None = None
        self._due = False
        self._under_way: Future[None] | None = None  # a save
        self._told = False  # that something is dropped

    @property
    def session_id(self) -> str | None:
        """The id that the browser has, or will have; `None`: there is no session, as far as this request knows."""
        return None if self._lost else self._id

    @property
    def owner(self) -> str | None:
        """Whose session it is, or will be once it is saved."""
        turn = self.session.turn
        return turn.owner or (None if turn.cleared or self._lost else self._owner)

    async def open(self, cookie: str | None) -> None:
        """Look for the session of a cookie."""
        if cookie is None or _ID.fullmatch(cookie) is None:
            return
        loaded = await self._sessions.load(digest_of(cookie))
        if loaded is not None:
            self._id, self._owner, self._due = cookie, loaded.record.owner, loaded.due
            self.session = Session(loaded.record.values)

    async def save(self, *, ask: bool = False) -> None:
        """Write what has changed, or give the session more time; then `left_s` says what the browser has to know.

        With `ask` the job is asked whether the session is still there even if there is nothing to be done.
        """
        while (under_way := self._under_way) is not None:
            await Reply.of(under_way)
        done = self._under_way = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting for it doesn't cancel it
        try:
            await self._save(ask)
        finally:
            self._under_way = None
            done.set_result(None)

    async def _save(self, ask: bool) -> None:
        session = self.session
        if not session.accessed:
            await self._touch(ask)
            return
        now = session.encoded()
        turn = session.take_turn()
        try:
            await self._write(now, turn, ask)
        except BaseException:
            session.give_back(turn)
            raise

    async def _write(self, now: dict[str, bytes], turn: Turn, ask: bool) -> None:
        had, before = self._id, self.session.stored
        put = {name: data for name, data in now.items() if turn.cleared or before.get(name) != data}
        gone = frozenset(before.keys() - now.keys())
        if had is None and not (now or turn.owner):
            return
        if not (put or gone or turn.cleared or turn.renewed):
            await self._touch(ask)
            return
        if self.begun and (put or turn.owner) and (had is None or turn.cleared):
            self._drop("a session was begun when the response had begun already; it isn't kept")
            if had is None:
                return
            put, now, turn = {}, {}, Turn(cleared=True)
        old, fresh = None if had is None else digest_of(had), token_urlsafe(_ID_BYTES)
        # Copies: they are written by another thread, and the request may go on to change its own.
        values = {name: _decoded(data) for name, data in put.items()}
        saved = await self._sessions.save(Change(old, self._owner, digest_of(fresh), values, gone, *turn))
        if saved.lost:
            self._lose()
            self._drop("a session has ended while a request was changing it; what it changed is dropped")
            return
        self.session.stored, self._due, self._lost, self._owner = now, False, False, saved.owner
        if saved.digest is None:
            self._id, self.left_s = None, None if had is None else 0
        else:
            self._id, self.left_s = had if saved.digest == old else fresh, saved.left_s

    async def _touch(self, ask: bool) -> None:
        if self._id is None or not (ask or self._due):
            return
        saved = await self._sessions.touch(digest_of(self._id))
        self._due = False
        if saved.lost:
            self._lose()
        else:
            self.left_s = saved.left_s or self.left_s

    def _lose(self) -> None:
        # Whose id was given another meanwhile has that one by now: nothing is said to the browser.
        self._lost, self.left_s = True, None

    async def end(self) -> None:
        """Write what has changed since the response began."""
        self.begun = True
        await self.save()

    async def end_failed(self) -> None:
        """Do the same after a failure, which is what is to be raised then, and not that this fails too."""
        try:
            await self.end()
        except Exception as error:
            self._drop("what a request that failed had changed in its session couldn't be saved", error)

    def _drop(self, text: str, error: Exception | None = None) -> None:
        if error is None and self._told:  # a websocket may save a thousand times
            return
        self._told = True
        log.warning("%s", text, exc_info=error, extra=about("session_change_dropped", self._sessions.runner.id, error))


def _encoded(name: str, value: Any) -> bytes:
    """Return a value and its name in as many containers as a session's row has around them, for these count."""
    if not isinstance(name, str):
        raise Misuse(f"a session's keys must be text, not {type(name).__name__}: pass str(...) of it")
    try:
        return CBOR.encode([{name: value}])
    except Misuse as error:
        raise Misuse(f"the value of {name!r:.80} can't be kept in a session: {error}") from error


def _decoded(data: bytes) -> Any:
    (value,) = CBOR.decode(data)[0].values()
    return value
