"""The file format: what a job's SQLite file holds, how it is opened, checked and brought up to date.

Format 2 (`PRAGMA user_version`), readable by any SQLite tool:

    kv       one row per key: category, key, payload, version of its last write, expires_ms or NULL
    meta     by name: job_id (the true id), last_version, clean (1: closed in order), syncs (a counter that
             a sync barrier changes, because an unchanged page would not be written); latest_ms where rows have an end,
             used_bytes and used_ms where there is a quota, changes_dropped where there is a change log, expires_ms
             where the job itself has an end
    changes  where a job was opened to keep its changes: one row for each, by version

A new file is made with `PRAGMA auto_vacuum = incremental`; one that was made without it stays so until it is rebuilt.

Format 1 is the Nim original's: kv without version and expires_ms, no meta. It is migrated in place.

Rules:
  1. A file is looked at before anything in it is changed; one that isn't ours, or too new, stays as it was.
  2. Only the tables and the index above are ours: a file with any other table, index, trigger or view is refused.
  3. All of SQLite's defences are on, and there is no way to reach it with SQL from outside.
  4. Migrations are a declared list; those that are needed run in one transaction.

Doesn't know: groups, versions beyond the stored number, threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import apsw

from persistency.errors import Corrupt, DiskFull, Forked, SchemaTooNew, StorageError, Unavailable
from persistency.logfields import about
from persistency.storage import inherited
from persistency.storage.files import Found, look, size
from persistency.storage.port import PAYLOAD_BYTES_MAX, Durability

log: logging.Logger = logging.getLogger("persistency.storage")

FORMAT = 2
PAGE_BYTES = 4096
BUSY_MS = 5000  # so long a statement waits for a lock of another process
SYNCHRONOUS = {"process": "normal", "power": "full"}
TIME_MS_MAX = 10**15  # a job's clock says no more
_VFS = "win32" if os.name == "nt" else "unix"  # named: a loaded extension may have changed the process' default

_KV = """
CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,
                 version INTEGER NOT NULL DEFAULT 0, expires_ms INTEGER,
                 PRIMARY KEY (category, key)) WITHOUT ROWID;
"""
_KV_1_TO_2 = """
ALTER TABLE kv ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE kv ADD COLUMN expires_ms INTEGER;
"""
_REST = """
CREATE INDEX kv_expires ON kv (expires_ms) WHERE expires_ms IS NOT NULL;
CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('last_version', 0), ('clean', 1), ('syncs', 0);
"""
CHANGES = """
CREATE TABLE changes (version INTEGER PRIMARY KEY, kind TEXT NOT NULL, category BLOB NOT NULL, key BLOB NOT NULL,
                      payload BLOB, stop BLOB);
"""
ENDS = "expires_ms"  # the job's own end
NOTE = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
# From each format the statements that lead to the next one known; an empty file is format 0.
MIGRATIONS: dict[int, tuple[int, str]] = {0: (2, _KV + _REST), 1: (2, _KV_1_TO_2 + _REST)}
# The definitions in a file that was made by these statements.
_MADE, _MADE_LATER = (
    frozenset(
        (text.split()[1].lower(), text.split()[2], text.strip()) for text in statements.split(";") if "CREATE" in text
    )
    for statements in (_KV + _REST, CHANGES)
)
_AS_MADE = (_MADE, _MADE | _MADE_LATER)

# Name, declared type, NOT NULL, place in the primary key; hidden columns count.
_COLUMNS_1 = [("category", "BLOB", 1, 1), ("key", "BLOB", 1, 2), ("payload", "BLOB", 1, 0)]
_COLUMNS_2 = [*_COLUMNS_1, ("version", "INTEGER", 1, 0), ("expires_ms", "INTEGER", 0, 0)]
_COLUMNS_META = [("name", "TEXT", 1, 1), ("value", "", 0, 0)]
_COLUMNS_CHANGES = [
    ("version", "INTEGER", 0, 1),
    ("kind", "TEXT", 1, 0),
    ("category", "BLOB", 1, 0),
    ("key", "BLOB", 1, 0),
    ("payload", "BLOB", 0, 0),
    ("stop", "BLOB", 0, 0),
]
_OBJECTS = {1: {("table", "kv")}, 2: {("table", "kv"), ("index", "kv_expires"), ("table", "meta")}}
_COLUMNS = {1: {"kv": _COLUMNS_1}, 2: {"kv": _COLUMNS_2, "meta": _COLUMNS_META}}
_OPTIONAL = {"changes": _COLUMNS_CHANGES}  # in the current format
_OF_ANALYZE = {("table", "sqlite_stat1"), ("table", "sqlite_stat4")}
# What a definition may consist of: nothing that computes, compares in another way, or forbids (CHECK, COLLATE, UNIQUE).
_WORDS = frozenset(
    ["create", "table", "index", "on", "where", "is", "not", "null", "default", "0", "primary", "without", "rowid"]
    + ["kv", "kv_expires", "meta", "category", "key", "payload", "version", "expires_ms", "name", "value"]
    + ["changes", "kind", "stop"]
    + ["blob", "integer", "text", "(", ")", ",", '"', "`", "[", "]"]
)

# One by one, and each in a transaction of its own, they made an opening take an eighth longer.
_LOOK = "PRAGMA user_version; PRAGMA encoding; SELECT type, name, sql FROM sqlite_schema"

_SWITCHES = (
    (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),
    (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0),
    (apsw.SQLITE_DBCONFIG_DQS_DML, 0),
    (apsw.SQLITE_DBCONFIG_DQS_DDL, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_CREATE, 0),
    (apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_WRITE, 0),
    # Until the file is known to be ours, closing it must not carry somebody else's log over.
    (apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1),
)
_LIMITS = (
    (apsw.SQLITE_LIMIT_ATTACHED, 0),
    (apsw.SQLITE_LIMIT_LENGTH, PAYLOAD_BYTES_MAX + 1024 * 1024),
    (apsw.SQLITE_LIMIT_SQL_LENGTH, 100_000),
    (apsw.SQLITE_LIMIT_EXPR_DEPTH, 20),
    (apsw.SQLITE_LIMIT_TRIGGER_DEPTH, 1),
)

_FULL = (apsw.FullError,)
_CORRUPT = (apsw.CorruptError, apsw.NotADBError, apsw.FormatError)
_CORRUPT_CODES = (apsw.SQLITE_IOERR_DATA, apsw.SQLITE_IOERR_CORRUPTFS)
_UNAVAILABLE = (
    apsw.BusyError,
    apsw.LockedError,
    apsw.CantOpenError,
    apsw.ReadOnlyError,
    apsw.PermissionsError,
    apsw.ProtocolError,
)


def translated(error: Exception, doing: str) -> StorageError:
    """Return our error for one of SQLite's, with it as the cause."""
    code = getattr(error, "extendedresult", 0)
    kind: type[StorageError] = StorageError
    if inherited.some() and isinstance(error, apsw.AuthError):
        raise Forked("this process was forked in the middle of a transaction", hint="Let the parent end it.") from error
    strange = isinstance(error, apsw.SQLError) and "unsupported file format" in str(error)
    if isinstance(error, _FULL):
        kind = DiskFull
    elif strange or isinstance(error, (*_CORRUPT, UnicodeDecodeError)) or code in _CORRUPT_CODES:
        kind = Corrupt
    elif isinstance(error, _UNAVAILABLE):
        kind = Unavailable
    text = str(error)
    # A backup's step leaves no message with the connection.
    mine = kind(f"{doing}: {type(error).__name__ if text == 'not an error' else text}", code)
    mine.__cause__ = error
    return mine


def connect(
    path: str | Path,
    durability: Durability,
    vfs: str | None = None,
    begins: Callable[[], None] = lambda: None,
    there: Found | None = None,
) -> apsw.Connection:
    """Open a job's database file and bring it to the current format; `begins` may refuse to begin an empty one.

    `there`: what lies in its place, if that was looked at already.

    Raises `Corrupt` for a file that isn't ours, `SchemaTooNew` for one from a newer release (both untouched), and
    the other storage errors for what the system refuses.
    """
    there = look(path) if there is None else there
    try:
        if there.journal:
            _look_first(Path(path), vfs)
        connection = open_file(path, vfs, write=True)
    except (apsw.Error, UnicodeDecodeError) as error:
        raise translated(error, f"can't open {str(path)!r}") from error
    try:
        if not there.log:
            own_log(connection)  # it will be our own, and must not be left behind
        found = recognise(connection, path, begin=True)
        if connection.readonly("main") and os.access(path, os.W_OK):
            raise Corrupt(f"{str(path)!r} says that nobody may write it", hint="Restore it from a backup.")
        connection.wal_autocheckpoint(0)  # it runs inside COMMIT and can make a committed write look failed
        settings = "COMMIT; PRAGMA journal_mode = wal; PRAGMA temp_store = memory"
        if found == 0:
            connection.execute("COMMIT")
            begins()
            connection.pragma("auto_vacuum", "incremental")  # so that space can be given back in slices
            settings = settings.removeprefix("COMMIT; ")
        # `synchronous` last: the journal that a new file has until then needs every one of its syncs.
        modes = connection.execute(f"{settings}; PRAGMA synchronous = {SYNCHRONOUS[durability]}").fetchall()
        if modes != [("wal",)]:
            raise Unavailable(f"{str(path)!r} can't use a write-ahead log (journal mode {modes!r})")
        if found != FORMAT:
            migrate(connection, found)
    except (apsw.Error, UnicodeDecodeError) as error:
        close(connection)
        raise translated(error, f"can't open {str(path)!r}") from error
    except BaseException:
        close(connection)
        raise
    return connection


def open_file(
    path: str | Path, vfs: str | None = None, *, write: bool = False, immutable: bool = False
) -> apsw.Connection:
    """Open an existing file with all the defences on; nothing in it has been looked at yet.

    Without `write` to read it only; `immutable`: as it lies there, without locks, and without the log beside it.
    """
    inherited.check(name := str(path))
    flags = apsw.SQLITE_OPEN_NOFOLLOW | (apsw.SQLITE_OPEN_READWRITE if write else apsw.SQLITE_OPEN_READONLY)
    if immutable:
        quoted = str(Path(path).absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        name, flags = f"file://{quoted}?immutable=1", flags | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(name, flags=flags, vfs=vfs or _VFS, statementcachesize=64)
    inherited.note(connection, str(path))
    try:
        _defend(connection)
    except BaseException:
        close(connection)
        raise
    return connection


def _look_first(path: Path, vfs: str | None) -> None:
    """Look at a file as it lies there: the journal beside it would be applied to it by any other look."""
    try:
        with contextlib.closing(open_file(path, vfs, immutable=True)) as connection:
            recognise(connection, path)
    except (apsw.NotADBError, apsw.CorruptError):
        # A power cut may have torn the first page while it was written: what counts is what the journal makes of it.
        import shutil  # only here: hardly anybody gets here
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / path.name
            for file in (path, path.with_name(path.name + "-journal")):
                shutil.copyfile(file, copy.with_name(file.name))
            with contextlib.closing(open_file(copy, write=True)) as connection:
                recognise(connection, path)


def cut_off(connection: apsw.Connection) -> None:
    """Carry over a log that was left behind, if nobody else reads there; to be called before anything is written.

    What a power cut has torn ends before the tear. But the same statements, written there once more, would take the
    place of what was torn, and what was lost behind it be there again. Raises `StorageError`.
    """
    connection.set_busy_timeout(0)
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except (apsw.BusyError, apsw.FullError) as error:  # the store tries again, and tells
        log.debug("a log that was left behind: %s", error, extra=about("left_log_not_cut", None, error))
    except apsw.Error as error:
        raise translated(error, "a log that was left behind can't be carried over") from error
    finally:
        connection.set_busy_timeout(BUSY_MS)


def own_log(connection: apsw.Connection) -> None:
    """From now on closing the connection carries the log over and clears it away: it is known to be ours."""
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)


def close(connection: apsw.Connection) -> None:
    """Close a connection; what goes wrong is only told to the log, because whatever was committed is safe."""
    try:
        connection.close()
    except apsw.Error as error:
        log.warning("closing a job's file: %s", error, extra=about("file_not_closed", None, error))


def _defend(connection: apsw.Connection) -> None:
    for switch, value in _SWITCHES:
        connection.config(switch, value)
    for limit, value in _LIMITS:
        connection.limit(limit, value)
    connection.set_busy_timeout(BUSY_MS)
    connection.execute("PRAGMA cell_size_check = 1; PRAGMA mmap_size = 0").fetchall()


def recognise(connection: apsw.Connection, path: str | Path, *, begin: bool = False) -> int:
    """Return the file's format (0: an empty file), reading only; with `begin`, in a transaction that is left open.

    Raises `Corrupt` for a file that isn't ours, `SchemaTooNew` for one from a newer release.
    """
    rows = connection.execute("BEGIN;" + _LOOK if begin else _LOOK)
    try:  # one by one, for in a newer file the next ones may make no sense
        found = int(next(rows)[0])
        if found > FORMAT:
            raise SchemaTooNew(f"{str(path)!r} has format {found}; this release knows up to {FORMAT}")
        if (encoding := next(rows)[0]) != "UTF-8":
            raise Corrupt(f"{str(path)!r} isn't a job's file: its text is {encoding}")
        definitions = [definition for definition in rows if definition[:2] not in _OF_ANALYZE]
    finally:
        rows.close(True)
    if found == FORMAT and set(definitions) in _AS_MADE:
        return found
    optional = {("table", name) for name in _OPTIONAL if found == FORMAT}
    objects = {(kind, name) for kind, name, _ in definitions} - optional
    if found == 0 and not definitions and size(Path(path)) != 1:  # SQLite takes a file of one byte for an empty one
        return 0
    strange = sorted(f"{kind} {name}" for kind, name in objects - _OBJECTS.get(found, set()))
    if found <= 0 or strange or objects != _OBJECTS[found] or not _as_defined(connection, found, definitions):
        raise Corrupt(
            f"{str(path)!r} isn't a job's file: format {found}, "
            + (f"has {', '.join(strange)}" if strange else "other columns"),
            hint="It was left untouched. Move it away, or choose another job id or root.",
        )
    return found


def _as_defined(connection: apsw.Connection, found: int, definitions: list[tuple[Any, ...]]) -> bool:
    """Return whether the tables of a file have a format's columns, and nothing else is in any definition."""
    words = [re.findall(r"\w+|\S", str(sql).lower()) for _, _, sql in definitions]
    tables = _COLUMNS[found] | {name: _OPTIONAL[name] for _, name, _ in definitions if name in _OPTIONAL}
    columns = {
        table: connection.execute(
            'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?) ORDER BY cid', (table,)
        ).fetchall()
        for table in tables
    }
    return columns == tables and _WORDS.issuperset(chain(*words))


def migrate(connection: apsw.Connection, found: int) -> None:
    """Bring a file of an older format to the current one, in one transaction."""
    cut_off(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        while found != FORMAT:
            found, statements = MIGRATIONS[found]
            connection.execute(statements)
        connection.pragma("user_version", FORMAT)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    # The tables must not hang on a log file alone: without it there would be nothing to read.
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
