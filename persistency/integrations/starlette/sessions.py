"""The session store: sessions as rows of a job, by the hash of their id, and by who they belong to.

A session is the row `("session", hash)`: a CBOR map of its values, its owner and when it began. One that has an owner
has a row `("owner", owner, hash)` too, which is empty and ends with it.

Rules:
  1. The id of a session is never stored: who reads the file, or a backup, can't use what is in it.
  2. A save is one transaction. It writes what a request has changed, key by key, into what is there by then: of two
     requests that change different keys neither loses anything, and of one key the last one stays.
  3. What was removed meanwhile stays removed: a save brings no session back that was revoked, or has ended. A login as
     somebody else that finds its session gone begins another one, with what it has put in itself, and no more.
  4. The end of a session is that of its rows, which the engine reclaims.

Doesn't know: cookies, requests, event loops.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from hashlib import sha256
from typing import Any, Final, NamedTuple

from persistency import CBOR, Corrupt, Entry, Job, Key, KeyRange, Misuse, Reply, Transaction, key
from persistency.logfields import about
from persistency.recipes.runner import Runner, as_runner

log: logging.Logger = logging.getLogger("persistency.sessions")

_SESSIONS: Final = KeyRange.prefix(key("session"))
_OWNERS: Final = KeyRange.prefix(key("owner"))
_OWNER_BYTES_MAX = 1024
_SECONDS_MAX = 10_000_000_000  # what a job takes
_TTL_PARTS = 10  # being used is noted down after this part of the `ttl` at the latest, or a session wouldn't roll


class SessionInfo(NamedTuple):
    """A session as those see it who look after sessions: no id, and no values.

    `handle` names it (`revoke_one`), and is of no use in a cookie. Times are Unix milliseconds.
    """

    handle: str
    owner: str | None
    created_ms: int
    expires_ms: int


class Terms(NamedTuple):
    """How long sessions last, in milliseconds, and the category they are in."""

    name: str
    ttl_ms: int
    rolling: bool
    touch_ms: int
    lifetime_ms: int | None

    def end_ms(self, now_ms: int, created_ms: int) -> int:
        """Return until when a session lives that is used now."""
        end_ms = now_ms + self.ttl_ms
        return end_ms if self.lifetime_ms is None else min(end_ms, created_ms + self.lifetime_ms)

    def is_due(self, now_ms: int, created_ms: int, expires_ms: int) -> bool:
        """Say whether a session that is used now, and not changed, should be given more time."""
        return self.rolling and self.end_ms(now_ms, created_ms) - expires_ms >= self.touch_ms


class Record(NamedTuple):
    """A session's row."""

    values: dict[str, Any]
    owner: str | None
    created_ms: int

    def encoded(self) -> bytes:
        """Return its payload."""
        return CBOR.encode(self._asdict())


class Loaded(NamedTuple):
    """A session that was found, and whether it should be given more time."""

    record: Record
    due: bool


class Change(NamedTuple):
    """What a request has made of a session. `old` is the hash it came with, `new` that of an id still unused."""

    old: bytes | None
    was: str | None  # whose it was, as the request knows it
    new: bytes
    put: Mapping[str, Any]  # the values that it has changed
    gone: frozenset[str]  # and the names that it has removed
    cleared: bool
    renewed: bool
    owner: str | None  # a new one


class Saved(NamedTuple):
    """What became of it: the hash it has now (`None`: there is no session), and in how many seconds it ends.

    `left_s` is 0 if that hasn't changed. `lost`: it had ended meanwhile, and what was asked for was for nothing.
    """

    digest: bytes | None
    left_s: int = 0
    owner: str | None = None
    lost: bool = False


class SessionStore:
    """The sessions of a service, for `SessionMiddleware`, and for whoever looks after them.

    `runner`: a `Job`, or a `Baton` where several worker processes share it. `name` is the category of its rows. A
    session ends `ttl` (seconds or a `timedelta`; 14 days) after it was last used if `rolling`, else after it began;
    being used is noted down every `touch_every` (at least every tenth of the `ttl`). `lifetime`: however much it is
    used, it ends so long after it began, or after its owner last logged in. Raises `Misuse` for wrong arguments.

    Its verbs give a `Reply`: `await` it, or ask for its `result()`.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        name: str = "sessions",
        ttl: float | timedelta = timedelta(days=14),
        rolling: bool = True,
        touch_every: float | timedelta = 60.0,
        lifetime: float | timedelta | None = None,
    ) -> None:
        if not 1 <= _size(name) <= 255:
            raise Misuse(f"name must be text of 1 to 255 UTF-8 bytes, not {name!r:.80}: pass the name of a category")
        if not isinstance(rolling, bool):
            raise Misuse(f"rolling must be a bool, not {type(rolling).__name__}: pass True or False")
        self._runner = as_runner(runner)
        ttl_ms = _as_ms(ttl, "ttl")
        self._terms = Terms(
            name,
            ttl_ms,
            rolling,
            min(_as_ms(touch_every, "touch_every", least=0), ttl_ms // _TTL_PARTS),
            None if lifetime is None else _as_ms(lifetime, "lifetime"),
        )

    @property
    def runner(self) -> Runner:
        """The job, or the baton."""
        return self._runner

    # -- for those who look after sessions -----------------------------------------------------------------------

    def count(self, owner: str | None = None) -> Reply[int]:
        """Ask how many sessions there are, or how many an owner has."""
        span = _SESSIONS if owner is None else _owned(owner)
        return self._runner.run(Transaction.count, self._terms.name, span)

    def of(self, owner: str) -> Reply[list[SessionInfo]]:
        """Ask for the sessions of an owner, the oldest first. One whose row is damaged is left out, and logged."""
        return self._runner.run(_of, self._terms, _owned(owner), self._runner.id)

    def revoke(self, owner: str, *, keep: str | None = None) -> Reply[int]:
        """End all sessions of an owner, but the one whose handle is `keep`, and answer how many there were.

        Requests that are under way with them go on, but what they change is dropped.
        """
        kept = None if keep is None else _as_digest(keep)
        return self._runner.run(_revoke, self._terms, owner, _owned(owner), kept)

    def revoke_one(self, handle: str) -> Reply[bool]:
        """End the session of a handle, and answer whether there was one."""
        return self._runner.run(_revoke_one, self._terms, _as_digest(handle))

    def revoke_all(self) -> Reply[int]:
        """End all sessions, and answer how many there were."""
        return self._runner.run(_drop_all, self._terms)

    # -- for the middleware --------------------------------------------------------------------------------------

    def load(self, digest: bytes) -> Reply[Loaded | None]:
        """Ask for the session whose id has this hash."""
        if isinstance(job := self._runner, Job):  # a job answers this in place, without another thread
            entry = job.entry(self._terms.name, key("session", digest))
            return entry.map(lambda found: _loaded(self._terms, found, job.now_ms))
        return self._runner.run(_load, self._terms, digest)

    def save(self, change: Change) -> Reply[Saved]:
        """Write what a request has changed."""
        return self._runner.run(_save, self._terms, change)

    def touch(self, digest: bytes) -> Reply[Saved]:
        """Ask whether a session is there, and give it more time if that is due."""
        return self._runner.run(_touch, self._terms, digest)

    def __repr__(self) -> str:
        return f"<SessionStore {self._terms.name!r} of {self._runner!r}>"


def digest_of(session_id: str) -> bytes:
    """Return what a session is stored under."""
    return sha256(session_id.encode()).digest()


def as_owner(owner: str | None) -> str | None:
    """Return an owner. Raises `Misuse`."""
    if owner is None:
        return None
    if not isinstance(owner, str):
        raise Misuse(f"owner must be a str, not {type(owner).__name__}: pass the user's id as text")
    if not 1 <= _size(owner) <= _OWNER_BYTES_MAX:
        raise Misuse(f"owner must have 1 to {_OWNER_BYTES_MAX} UTF-8 bytes: pass the user's id as text")
    return owner


def _size(text: Any) -> int:
    """Return how many UTF-8 bytes a text has, none if it is none."""
    try:
        return len(text.encode()) if isinstance(text, str) else 0
    except UnicodeEncodeError:  # a lone surrogate
        return 0


def _owned(owner: str) -> KeyRange:
    if owner is None:
        raise Misuse("owner must be a str, not None: pass the user's id as text")
    return KeyRange.prefix(key("owner", as_owner(owner)))


def _as_digest(handle: str) -> bytes:
    try:
        return bytes.fromhex(handle)
    except (TypeError, ValueError) as error:
        raise Misuse(f"{handle!r:.80} is no handle of a session: pass what SessionInfo has") from error


def _as_ms(value: float | timedelta, argument: str, *, least: int = 1) -> int:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}: pass {argument}=60.0")
    if not least / 1000 <= seconds <= _SECONDS_MAX:  # NaN too
        raise Misuse(f"{argument} must be {least / 1000:g} to {_SECONDS_MAX:,} seconds, not {value!r:.40}")
    return round(seconds * 1000)


# -- what runs inside the job ----------------------------------------------------------------------------------------


def _record(name: str, entry: Entry) -> Record:
    stored = CBOR.decode(entry.payload)
    if isinstance(stored, dict):
        values, owner, created_ms = (stored.get(field) for field in Record._fields)
        if isinstance(values, dict) and isinstance(owner, str | None) and type(created_ms) is int:
            return Record(values, owner, created_ms)
    hint = "Give the sessions a category of their own: SessionStore(job, name=...)."
    raise Corrupt(f"category {name!r} holds {entry.key!r}, which is no session", hint=hint)


def _find(tx: Transaction, terms: Terms, digest: bytes | None) -> tuple[Record, int] | None:
    """Return a session that is there, and when it ends."""
    entry = None if digest is None else tx.entry(terms.name, key("session", digest))
    return None if entry is None else (_record(terms.name, entry), entry.expires_ms or tx.now_ms)


def _loaded(terms: Terms, entry: Entry | None, now_ms: int) -> Loaded | None:
    if entry is None:
        return None
    record = _record(terms.name, entry)
    return Loaded(record, terms.is_due(now_ms, record.created_ms, entry.expires_ms or now_ms))


def _load(tx: Transaction, terms: Terms, digest: bytes) -> Loaded | None:
    return _loaded(terms, tx.entry(terms.name, key("session", digest)), tx.now_ms)


def _save(tx: Transaction, terms: Terms, change: Change) -> Saved:
    now_ms = tx.now_ms
    found = _find(tx, terms, change.old)
    if change.cleared and found is not None:
        _drop(tx, terms, change.old, found[0].owner)
        found = None
    if found is not None:
        record, end_ms = found
        values = {name: value for name, value in record.values.items() if name not in change.gone} | dict(change.put)
        if change.owner is not None:  # a login
            record = record._replace(created_ms=now_ms)
        if terms.rolling or change.renewed:
            end_ms = terms.end_ms(now_ms, record.created_ms)
    elif change.old is None or change.cleared or _is_login(change):
        record, end_ms = Record({}, None, now_ms), terms.end_ms(now_ms, now_ms)
        values = dict(change.put)
    else:
        return Saved(None, lost=True)
    owner = change.owner or record.owner
    ends = (not values and change.owner is None) or end_ms <= now_ms
    if found is not None and (ends or change.renewed):
        _drop(tx, terms, change.old, record.owner)
    if ends:
        return Saved(None)
    digest = change.new if found is None or change.renewed else change.old
    assert digest is not None, "what was found was looked for"
    _put(tx, terms, digest, record._replace(values=values, owner=owner), end_ms - now_ms)
    return Saved(digest, _seconds(end_ms - now_ms), owner)


def _is_login(change: Change) -> bool:
    """Say whether somebody logs in whose session it wasn't: who had it, and was revoked, doesn't come back by this."""
    return change.renewed and change.owner not in (None, change.was)


def _put(tx: Transaction, terms: Terms, digest: bytes, record: Record, left_ms: int) -> None:
    ttl = timedelta(milliseconds=left_ms)
    tx.put(terms.name, key("session", digest), record.encoded(), ttl=ttl)
    if record.owner is not None:
        tx.put(terms.name, key("owner", record.owner, digest), b"", ttl=ttl)


def _touch(tx: Transaction, terms: Terms, digest: bytes) -> Saved:
    found = _find(tx, terms, digest)
    if found is None:
        return Saved(None, lost=True)
    record, end_ms = found
    if not terms.is_due(tx.now_ms, record.created_ms, end_ms):
        return Saved(digest, owner=record.owner)
    left_ms = terms.end_ms(tx.now_ms, record.created_ms) - tx.now_ms
    ttl = timedelta(milliseconds=left_ms)
    tx.touch(terms.name, key("session", digest), ttl)
    if record.owner is not None:
        tx.touch(terms.name, key("owner", record.owner, digest), ttl)
    return Saved(digest, _seconds(left_ms), record.owner)


def _seconds(left_ms: int) -> int:
    return -(-left_ms // 1000)


def _drop(tx: Transaction, terms: Terms, digest: bytes | None, owner: str | None) -> bool:
    """Remove a session by its hash and owner, whatever its row holds; return whether it was there."""
    if digest is None:
        return False
    if owner is not None:
        tx.delete(terms.name, key("owner", owner, digest))
    return tx.delete_acked(terms.name, key("session", digest))


def _revoke_one(tx: Transaction, terms: Terms, digest: bytes) -> bool:
    try:
        found = _find(tx, terms, digest)
    except Corrupt:  # then those that it may belong to say whose it is
        for row in tx.keys(terms.name, _OWNERS):
            if row.parts[-1] == digest:
                tx.delete(terms.name, row)
        return _drop(tx, terms, digest, None)
    return found is not None and _drop(tx, terms, digest, found[0].owner)


def _drop_all(tx: Transaction, terms: Terms) -> int:
    tx.delete_prefix(terms.name, key("owner"))
    return tx.delete_prefix_acked(terms.name, key("session"))


def _of(tx: Transaction, terms: Terms, span: KeyRange, job_id: str) -> list[SessionInfo]:
    infos = []
    for digest in _digests(tx.keys(terms.name, span)):
        try:
            found = _find(tx, terms, digest)
        except Corrupt as error:
            log.warning(
                "session %s can't be read: %s", digest.hex(), error, extra=about("session_damaged", job_id, error)
            )
            continue
        if found is not None:
            record, end_ms = found
            infos.append(SessionInfo(digest.hex(), record.owner, record.created_ms, end_ms))
    return sorted(infos, key=lambda info: info.created_ms)


def _revoke(tx: Transaction, terms: Terms, owner: str, span: KeyRange, kept: bytes | None) -> int:
    digests = _digests(tx.keys(terms.name, span))
    return sum(_drop(tx, terms, digest, owner) for digest in digests if digest != kept)


def _digests(rows: list[Key]) -> list[bytes]:
    return [row.parts[-1] for row in rows]
