"""Copies of a job's file: backed up while it is in use, put back in its place, or written anew to give space back.

A copy is made in a temporary file beside its target, `.<name>.<random>.tmp`, and takes its place by rename.

Rules:
  1. What is at a target stays as it was until the copy is whole, checked and on the medium.
  2. A file that may be in use is read through a connection of its own, in one read transaction: a copy is of one
     moment, and nobody's writes wait for it.
  3. A copy is one file, in no need of a log: it can be read where nothing can be written.
  4. No file ever lies beside the log of another one.

Doesn't know: who owns a job, groups, threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import apsw

from persistency.errors import Corrupt, DiskFull, Misuse, StorageError, Unavailable
from persistency.logfields import about
from persistency.storage import files, looking, meta, schema, strangers
from persistency.storage.openings import undisturbed
from persistency.storage.quota import USED_MS
from persistency.storage.table import LATEST_MS

log: logging.Logger = logging.getLogger("persistency.storage")

STEP_PAGES = 256
NAME_BYTES_MAX = 200  # of a target's name within that of the temporary file

Steps: TypeAlias = Generator[tuple[int, int | None], None, None]

# Stricter than what names a job: where names ignore case these may.
_JOBS_FILE = re.compile(r"\.(db(-wal|-shm|-journal)?|lock)$", re.IGNORECASE)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNREADABLE = (apsw.SQLITE_IOERR_READ, apsw.SQLITE_IOERR_SHORT_READ)
_INCREMENTAL = 2  # what `PRAGMA auto_vacuum` answers


# -- backup ------------------------------------------------------------------------------------------------------


def back_up(
    source: Path, target: Path, *, vfs: str | None = None, lies_still: Callable[[], None] | None = None
) -> Steps:
    """Copy a job's file, as it is at the first step, to `target`; yield the bytes done, and of how many.

    The copy is put in the place of what is at `target` at the very end, once it is checked and on the medium; whatever
    goes wrong before, or closing the generator, leaves nothing behind. With `lies_still` the file is read as it lies
    there, and that is called at last, to raise if it was touched meanwhile.

    Raises what `check_target` does, `Corrupt` if the file isn't sound, and `DiskFull`, `Unavailable` or another
    `StorageError` for what the system refuses.
    """
    target, was = check_target(source, target), files.identity(source)
    with _translating(f"can't back up to {str(target)!r}"), _beside(target) as copy:
        with _reading(source, vfs, immutable=lies_still is not None) as connection:
            schema.recognise(connection, source)
            try:
                yield from _copied(connection, copy, vfs)
            except apsw.IOError as error:
                if files.identity(source) == was:
                    raise
                raise Unavailable(f"{str(source)!r} was removed or replaced while it was backed up") from error
        _seal(copy, {"clean": 1}, vfs)
        if lies_still is not None:
            lies_still()
        with undisturbed(target):
            _refuse_in_use(target)
            _publish(copy, target)


def check_target(source: Path, target: Path) -> Path:
    """Return the path a backup of `source` to `target` goes to, with the links above it resolved.

    Raises `Misuse` for a path that can't be one, or that is kept for a job's files; `Unavailable` for what is no
    regular file, or is a database somebody uses.
    """
    try:
        place = Path(os.path.realpath(target.parent))
        target = place / target.name
        str(target).encode()  # SQLite takes no other names
        if place == Path(os.path.realpath(source.parent)) and _JOBS_FILE.search(target.name):
            raise Misuse(f"{str(target)!r} is kept for a job's files: back up to another directory, or another name")
        if not _is_regular(target):
            files.check_regular(target)  # it says what is there
        _refuse_in_use(target)
    except OSError as error:
        _refused(error, f"can't back up to {str(target)!r}")
    except ValueError as error:
        if isinstance(error, Misuse):
            raise
        raise Misuse(f"can't back up to {str(target)!r}: {error}: pass the path of a file") from error
    return target


def _refuse_in_use(target: Path) -> None:
    """Refuse a target with a log beside it: its database is in use, and the copy would be read with that log."""
    for beside in files.sidecars(target):
        if os.path.lexists(beside):
            raise Unavailable(
                f"{str(target)!r} can't be replaced: {beside.name!r} beside it says it is, or was, a database in use",
                hint="Back up to another path; or see that nobody uses that file, and clear its log away.",
            )


# -- restore -----------------------------------------------------------------------------------------------------


def restore(source: Path, target: Path, job_id: str, *, vfs: str | None = None) -> None:
    """Put a copy of `source` in the place of job `job_id`'s file `target`, which its caller owns and nobody has open.

    `source` may be a backup or a job's file, this job's or another's, in use or not. If it fails the job is as it was;
    but for a failure of the very last sync of the directory, after which it is the new one already.

    Raises `Misuse` for a path that can't be one, `SchemaTooNew`, `Corrupt` if `source` isn't sound or not a job's or if
    what is at `target` isn't this job's, `Unavailable` if that is being read by somebody, and that, `DiskFull` or
    another `StorageError` for what the system refuses.
    """
    with _translating(f"can't restore {str(source)!r}"):
        source = _real_source(source, target)
        for file in (target, *files.sidecars(target)):
            files.check_regular(file)
        clear_attempts(target)
        with _beside(target) as copy:
            try:
                found = _take(source, copy, vfs)
                _seal(copy, {"job_id": job_id, "clean": 1} if found == schema.FORMAT else {}, vfs)
            except Corrupt as error:
                error.hint = "Take another backup; the job is as it was."
                raise
            with undisturbed(target):
                _clear_way(target, job_id, vfs)
                _publish(copy, target)


def clear_attempts(target: Path) -> None:
    """Delete the temporary files that killed attempts to restore a job's file have left. The caller owns the job."""
    left = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp(-wal|-shm|-journal)?")
    for name in os.listdir(target.parent):
        if left.fullmatch(name):
            target.with_name(name).unlink(missing_ok=True)


def _real_source(source: Path, target: Path) -> Path:
    try:
        real = Path(os.path.realpath(source.parent)) / source.name
        str(real).encode()  # SQLite takes no other names
        there = _is_regular(real) or files.check_regular(real)  # the latter says what is there
    except ValueError as error:
        raise Misuse(f"can't restore {str(source)!r}: {error}: pass the path of a file") from error
    if not there:
        raise Unavailable(f"there is no file {str(real)!r}", hint="Check the path of the backup.")
    if os.path.lexists(target) and os.path.samefile(real, target):
        raise Misuse(f"{str(real)!r} is the job's own file: pass the path of a backup")
    return real


def _take(source: Path, copy: Path, vfs: str | None) -> int:
    """Copy a file that is a job's; return its format."""
    # With no log beside it nobody has it open, and it is read as it lies there: no log is made, and none is needed.
    alone = not _has_company(source)
    before = _stamp(source)
    with _reading(source, vfs, immutable=alone) as connection:
        found = schema.recognise(connection, source)
        if not found:
            raise Corrupt(f"{str(source)!r} isn't a job's file: it is empty", hint="Take another backup.")
        if found == schema.FORMAT:
            stored, _ = meta.read_meta(connection)
            if max(stored.get(name, 0) for name in (LATEST_MS, USED_MS)) > schema.TIME_MS_MAX:
                raise Corrupt(f"the time in {str(source)!r} is beyond any clock's", hint="Take another backup.")
        for _ in _copied(connection, copy, vfs):
            pass
    if alone and (_has_company(source) or _stamp(source) != before):
        raise Unavailable(f"{str(source)!r} was written to while it was read", hint="Try again.")
    return found


def _has_company(path: Path) -> bool:
    return any(os.path.lexists(beside) for beside in files.sidecars(path))


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _clear_way(target: Path, job_id: str, vfs: str | None) -> None:
    """Make the job's file the whole of the job, and clear away what lies beside it."""
    if files.size(target):
        _fold(target, job_id, vfs)
    for beside in files.sidecars(target):
        with contextlib.suppress(FileNotFoundError):
            files.unlink(beside)
    # A power cut must not bring them back beside another file.
    files.sync_directory(target.parent)


def _fold(path: Path, job_id: str, vfs: str | None) -> None:
    """Carry a job's log over into its file, if it isn't damaged. Raises `Unavailable` if somebody has it open."""
    try:
        strangers.check_ours(path, job_id, vfs)
        connection = schema.open_file(path, vfs, write=True)
        try:
            connection.pragma("user_version")  # it hasn't looked for a log before
            schema.own_log(connection)
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        finally:
            schema.close(connection)
    except (apsw.Error, Corrupt) as error:
        cause = error.__cause__ if isinstance(error, Corrupt) else error
        if cause is None or not _is_damage(cause):
            raise
        fields = about("damaged_file_replaced", job_id, cause, path=path)
        log.warning("a damaged file is replaced, %s: %s", path, cause, extra=fields)
        return
    if os.path.lexists(files.sidecars(path)[0]):  # the last connection would have taken it away
        raise Unavailable(
            f"{str(path)!r} is being read: its log can't be cleared away",
            hint="Close what has it open, a reader in another process or a backup, and try again.",
        )


def _is_damage(error: BaseException) -> bool:
    if getattr(error, "extendedresult", 0) in _UNREADABLE:
        return True
    return isinstance(error, Exception) and isinstance(schema.translated(error, ""), Corrupt)


# -- what both do ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give an empty temporary file beside the target, which is gone afterwards, whatever happens."""
    short = target.name if len(os.fsencode(target.name)) <= NAME_BYTES_MAX else target.name[: NAME_BYTES_MAX // 4]
    path = target.with_name(f".{short}.{os.urandom(8).hex()}.tmp")
    owner = os.getpid()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
        yield path
    finally:
        if os.getpid() == owner:  # in a forked child it is the parent's
            for file in (path, *files.sidecars(path)):
                with contextlib.suppress(OSError):
                    file.unlink()


@contextlib.contextmanager
def _reading(path: Path, vfs: str | None, *, immutable: bool = False) -> Iterator[apsw.Connection]:
    """Give a connection to read a file with, in one read transaction."""
    connection = looking.begin(path, vfs, immutable=immutable)
    with _ending(connection, lambda: schema.close(connection)):
        yield connection


def _copied(source: apsw.Connection, copy: Path, vfs: str | None) -> Steps:
    """Copy every page, some at a time."""
    page_bytes = int(source.pragma("page_size"))
    connection = schema.open_file(copy, vfs, write=True)
    with _ending(connection, lambda: schema.close(connection)):
        _hold_in_memory(connection)
        backup = connection.backup("main", source, "main")
        with _ending(backup, lambda: backup.close(True)):
            while not backup.done:
                backup.step(STEP_PAGES)
                yield (backup.page_count - backup.remaining) * page_bytes, backup.page_count * page_bytes


@contextlib.contextmanager
def _ending(what: Any, end: Callable[[], None]) -> Iterator[None]:
    """End something afterwards; but not in a forked child, where that would write to its parent's file."""
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            end()
        else:
            import ctypes  # only here: hardly anybody gets here

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))  # being torn down would end it too


def _hold_in_memory(connection: apsw.Connection) -> None:
    """Let a connection write a file that is thrown away if that fails, and synced when all is done."""
    connection.pragma("journal_mode", "memory")
    connection.pragma("synchronous", "off")


def _seal(copy: Path, notes: dict[str, Any], vfs: str | None) -> None:
    """Make a copy a file in no need of a log, with these notes in it; check it and bring it onto the medium."""
    connection = schema.open_file(copy, vfs, write=True)
    try:
        mode = connection.pragma("journal_mode", "delete")  # that it has a log is written in it
        if mode != "delete":
            raise StorageError(f"{str(copy)!r} stays in journal mode {mode!r}")
        _hold_in_memory(connection)
        connection.execute("BEGIN IMMEDIATE")
        for note in notes.items():
            connection.execute(schema.NOTE, note)
        if "job_id" in notes:  # put back by hand, a job doesn't end by itself
            connection.execute("DELETE FROM meta WHERE name = ?", (schema.ENDS,))
        connection.execute("COMMIT")
    finally:
        schema.close(connection)
    with _reading(copy, vfs) as connection:
        found = [text for (text,) in connection.execute("PRAGMA integrity_check(3)")]
    if found != ["ok"]:
        raise Corrupt(
            f"the file isn't sound: {'; '.join(found)}",
            hint="The copy was thrown away and nothing was replaced. check() says more; take an older backup.",
        )
    handle = os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(copy: Path, target: Path) -> None:
    os.replace(copy, target)
    files.sync_directory(target.parent)


def _is_regular(path: Path) -> bool:
    """Say whether there is a regular file; one of several names is one, too."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _translating(doing: str) -> Iterator[None]:
    try:
        yield
    except (apsw.Error, UnicodeDecodeError) as error:
        raise schema.translated(error, doing) from error
    except OSError as error:
        _refused(error, doing)


def _refused(error: OSError, doing: str) -> NoReturn:
    kind = DiskFull if error.errno in _NO_ROOM else Unavailable
    raise kind(f"{doing}: {error}") from error


# -- giving space back -------------------------------------------------------------------------------------------


def give_back(connection: apsw.Connection, pages: int) -> int | None:
    """Take at most `pages` unused pages out of the file; return how many are left. To be called in a transaction.

    `None` for a file that can't do it in parts: one that an earlier release made, or the Nim original. See `rebuild`.
    The file itself gets shorter when its log is carried over.
    """
    if connection.pragma("auto_vacuum") != _INCREMENTAL:
        return None
    if pages > 0:  # else it would be all of them
        # Each row is a page: it has to be run to its end.
        connection.execute(f"PRAGMA incremental_vacuum({pages:d})").fetchall()
    return int(connection.pragma("freelist_count"))


def rebuild(connection: apsw.Connection) -> None:
    """Write a file anew without unused pages; from then on it can give them back in parts.

    To be called outside any transaction. It is one transaction itself, all or nothing, and takes room for the content
    once in a temporary file and once in the log.
    """
    connection.limit(apsw.SQLITE_LIMIT_ATTACHED, 1)  # SQLite attaches the temporary file to the connection
    try:
        connection.pragma("temp_store", "file")  # not in memory, which a big file would fill
        connection.pragma("auto_vacuum", "incremental")
        connection.execute("VACUUM")
    finally:
        connection.pragma("temp_store", "memory")
        connection.limit(apsw.SQLITE_LIMIT_ATTACHED, 0)
