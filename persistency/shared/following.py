"""Following: which clients follow what, who followed at the moment of a change, and who is told of it. All in memory.

A change is noted down while it is made, inside the actor, together with those who follow at that moment. It is told
when it is committed: a change that is known to be committed brings those before it along.

Rules:
  1. Changes of one source are told in the order of their seqs, each once, and never before they are committed.
  2. What is noted down again (its transaction had to be begun again, or was undone) takes the place of what was noted
     for that seq and those behind it.
  3. Listeners are called in a thread of their own, so that a slow one holds nobody up. It lives while there is
     something to tell, and a moment longer.
  4. Everything here is bounded: old moments are forgotten, and so are the oldest changes a slow listener hasn't seen.

Doesn't know: jobs, rows, how a client is reached.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from threading import Condition, RLock, Thread
from typing import Any, Literal, NamedTuple, TypeAlias

from persistency.codec.values import decode
from persistency.errors import Misuse
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.shared")

MOMENTS_MAX = 1_000
"""How many different sets of followers are remembered of one source."""
MOMENT_CLIENTS_MAX = 1_000_000
"""How many clients all of them may have together."""
UNTOLD_MAX = 10_000
"""How many committed changes wait for the listeners; slow ones miss the oldest beyond."""
UNTOLD_BYTES_MAX = 32 * 1024 * 1024
"""How many bytes the data of those changes may have together, encoded."""

_LINGER_SECONDS = 1.0  # how long the thread that tells waits for more before it ends


class SharedChange(NamedTuple):
    """One change of a collection or a pool.

    `kind` is `"set"` (`data` is the record), `"delete"` (`data` is `None`), `"merge"` (`data` is the patch, `key` is
    `None`), or `"closed"`: the collection or pool has expired and was purged; that is told to listeners only, and has
    seq 0. `client` is who made the change, if that was said. `subscribers` followed at its moment, in the order in
    which they came; empty for changes of earlier processes, and for those long past.
    """

    seq: int
    kind: Literal["set", "delete", "merge", "closed"]
    key: str | None
    data: Any
    client: str | None
    subscribers: tuple[str, ...]

    @property
    def patch(self) -> Any:
        """What was merged into a pool: `data` by another name."""
        return self.data


Listener: TypeAlias = Callable[[Any, SharedChange], object]


class Note(NamedTuple):
    """What a change will be, but for its seq; `body` is its data encoded, `told` whether anybody listens."""

    kind: Literal["set", "delete", "merge", "closed"]
    key: str | None
    client: str | None
    body: bytes | None
    told: bool


class Untold(NamedTuple):
    """A change that is to be told."""

    source: Any
    seq: int
    note: Note
    subscribers: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return len(self.note.body or b"")

    def change(self) -> SharedChange:
        """Return the change, with data of its own."""
        kind, key, client, body, _ = self.note
        return SharedChange(self.seq, kind, key, None if body is None else decode(body), client, self.subscribers)


class Following:
    """All followers of one store, and those who listen to its changes."""

    def __init__(self) -> None:
        self.lock: RLock = RLock()  # signal handlers subscribe too
        self.by_client: dict[str, dict[Followers, None]] = {}
        self.closed: bool = False
        self._listeners: dict[object, Listener] = {}
        self._untold: deque[tuple[Untold, tuple[object, ...]]] = deque()  # and the tokens of those to be told
        self._untold_bytes = 0
        self._teller: Thread | None = None
        self._bell = Condition(self.lock)

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def listen(self, fn: Listener) -> Callable[[], None]:
        """Have `fn(source, change)` called for every change from now on; return what ends that."""
        if not callable(fn):
            raise Misuse(f"fn must be callable, not {type(fn).__name__}: pass a function of the source and the change")
        token = object()
        with self.lock:
            self._listeners[token] = fn

        def stop() -> None:
            with self.lock:
                self._listeners.pop(token, None)

        return stop

    def unsubscribe_all(self, client: str) -> None:
        """Have a client follow nothing any more."""
        with self.lock:
            for followers in list(self.by_client.get(as_client(client), ())):
                followers.unsubscribe(client)

    def close(self) -> None:
        """Forget everybody, listeners too."""
        with self.lock:
            self.closed = True
            for client in list(self.by_client):
                self.unsubscribe_all(client)
            self._listeners.clear()
            self._untold.clear()
            self._untold_bytes = 0

    def tell(self, untold: Untold) -> None:
        """Note a change down that is committed, for those who listen now; `wake` sees that they are told."""
        with self.lock:
            if not self._listeners:
                return
            self._untold.append((untold, tuple(self._listeners)))
            self._untold_bytes += untold.nbytes
            while len(self._untold) > UNTOLD_MAX or (self._untold_bytes > UNTOLD_BYTES_MAX and len(self._untold) > 1):
                self._untold_bytes -= self._untold.popleft()[0].nbytes
            self._bell.notify()

    def wake(self) -> None:
        """See that there is a thread to tell what is to be told. The lock isn't held."""
        with self.lock:
            if self._teller is not None or not self._untold:
                return
            teller = self._teller = Thread(target=self._speak, name="persistency:shared:on_change", daemon=True)
        try:
            teller.start()
        except RuntimeError:  # the interpreter is shutting down and starts no threads any more
            self._speak(linger=0.0)
        except BaseException:  # an interrupt
            if teller.ident is None:
                self._teller = None
            raise

    def _speak(self, linger: float = _LINGER_SECONDS) -> None:
        while True:
            with self.lock:
                if not self._bell.wait_for(lambda: self._untold, linger):
                    self._teller = None  # in one step with the look: who comes now starts another
                    return
                untold, tokens = self._untold.popleft()
                self._untold_bytes -= untold.nbytes
                listeners = [self._listeners[token] for token in tokens if token in self._listeners]
            for fn in listeners:
                _call(fn, untold)


class Followers:
    """Those who follow one source, and its changes that are noted down but not told yet."""

    __slots__ = ("_clients", "_following", "_moment_clients", "_moments", "_notes", "_now", "_source")

    def __init__(self, following: Following, source: Any) -> None:
        self._following = following
        self._source = source
        self._clients: dict[str, None] = {}
        self._now: tuple[str, ...] | None = ()  # the clients as they are now, until one comes or goes
        self._moments: list[tuple[int, tuple[str, ...]]] = []  # from which seq on who followed
        self._moment_clients = 0
        self._notes: deque[Untold] = deque()  # in the order of their seqs

    def subscribe(self, client: str) -> None:
        """Have a client follow; one that does already is fine."""
        with self._following.lock:
            self._clients[as_client(client)] = None
            self._following.by_client.setdefault(client, {})[self] = None
            self._now = None

    def unsubscribe(self, client: str) -> None:
        """Have a client follow no more; one that doesn't is fine."""
        with self._following.lock:
            if as_client(client) not in self._clients:
                return
            del self._clients[client]
            others = self._following.by_client[client]
            del others[self]
            if not others:
                del self._following.by_client[client]
            self._now = None

    def clients(self) -> tuple[str, ...]:
        """Return who follows, in the order in which they came."""
        with self._following.lock:
            if self._now is None:
                self._now = tuple(self._clients)
            return self._now

    def note(self, seq: int, note: Note) -> tuple[str, ...]:
        """Note a change down that is being made; return who follows at this moment."""
        with self._following.lock:
            clients = self.clients()
            moments, notes = self._moments, self._notes
            while moments and moments[-1][0] >= seq:
                self._moment_clients -= len(moments.pop()[1])
            while notes and notes[-1].seq >= seq:
                notes.pop()
            if not moments or moments[-1][1] is not clients:
                moments.append((seq, clients))
                self._moment_clients += len(clients)
                while len(moments) > 1 and (len(moments) > MOMENTS_MAX or self._moment_clients > MOMENT_CLIENTS_MAX):
                    self._moment_clients -= len(moments.pop(0)[1])
            if note.told:
                notes.append(Untold(self._source, seq, note, clients))
            return clients

    def at(self, seq: int) -> tuple[str, ...]:
        """Return who followed at the moment of a change; nobody, if that isn't known any more."""
        with self._following.lock:
            behind = bisect_right(self._moments, seq, key=itemgetter(0))
            return self._moments[behind - 1][1] if behind else ()

    def committed(self, seq: int) -> None:
        """Tell the change of this seq and those before it that weren't told yet."""
        with self._following.lock:
            while self._notes and self._notes[0].seq <= seq:
                self._following.tell(self._notes.popleft())
        self._following.wake()

    def end(self) -> None:
        """Have nobody follow any more, and tell so."""
        with self._following.lock:
            clients = self.clients()
            for client in clients:
                self.unsubscribe(client)
            self._notes.clear()
            self._following.tell(Untold(self._source, 0, Note("closed", None, None, None, True), clients))
        self._following.wake()


def as_client(value: Any) -> str:
    """Return a client's id."""
    if not isinstance(value, str):
        raise Misuse(f"client must be a str, not {type(value).__name__}: pass the id your service knows it by")
    return value


def _call(fn: Listener, untold: Untold) -> None:
    try:
        fn(untold.source, untold.change())
    except BaseException as error:
        # Whatever a listener throws, SystemExit included, the others are still to be told.
        fields = about("listener_raised", None, error, seq=untold.seq, source=repr(untold.source))
        log.exception("a listener raised on change %d of %r", untold.seq, untold.source, extra=fields)
