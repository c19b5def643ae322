"""A job's files: modes whatever the umask, links refused, one owner at a time.

For a job id there are, side by side in the root, `<name>.db`, SQLite's own `<name>.db-wal`, `-shm` and `-journal`,
and `<name>.lock`, which carries the owner's OS lock and a record: its process id, the last version known to be on the
medium, when the job was last used, and when it ends.

Rules:
  1. The lock is a file of its own: closing any descriptor of a database file drops SQLite's POSIX locks.
  2. The lock file also says what was on the medium when it was last looked: less than that is a loss, and is told.
  3. Nothing that isn't a regular file with one name is ever opened, and nothing of a job's is opened by `open()`
     while a connection may be using it.

Doesn't know: SQL, threads, what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import weakref
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from persistency.errors import Corrupt, JobLocked, Misuse, Unavailable
from persistency.storage.names import job_id_of
from persistency.storage.openings import undisturbed

LOG = "-wal"
SIDECARS = (LOG, "-shm", "-journal")
_RECORD_BYTES_MAX = 128
_SOON_MS = 1_000  # by so much a record may be late, and only if the process is killed


# In a forked child these are the parent's, and stay so however long the child lives.
_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def real_root(root: str | os.PathLike[str]) -> Path:
    """Return the root as an absolute path without links. Raises `Misuse` if it is, or lies under, a file."""
    try:
        path = Path(os.path.realpath(root))
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if there.is_dir():
            return path
    except (OSError, ValueError) as error:
        raise Misuse(f"root {root!r} can't be used: {error}: pass the path of a directory") from error
    what = "is" if there == path else f"lies under {str(there)!r}, which is"
    raise Misuse(f"root {os.fspath(root)!r} {what} a file: pass the path of a directory, existing or not")


def make_root(path: Path) -> None:
    """Create the root directory with mode 0700, and what is missing above it; leave an existing one alone."""
    try:
        if path.is_dir():
            return
        missing = [place for place in (path, *path.parents) if not place.is_dir()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            path.chmod(0o700)  # the umask may have taken bits away
        for made in missing:
            sync_directory(made.parent)
    except OSError as error:
        raise Unavailable(f"can't create the root {str(path)!r}: {error}") from error


def sidecars(path: str | Path) -> list[Path]:
    """Return the paths SQLite may use beside the database file."""
    text = str(path)  # several times as fast as `with_name`, and there are many to be looked at
    return [Path(text + suffix) for suffix in SIDECARS]


class Found(NamedTuple):
    """What lies in a job's place, in bytes: its database (`None`: nothing), and the log and the journal beside it.

    `identity` is what tells the database from others that may get its name.
    """

    database: int | None = None
    log: int = 0
    journal: int = 0
    identity: tuple[int, int] | None = None


def check_regular(path: Path) -> bool:
    """Return whether the file exists. Raises `Unavailable` if it is anything but a regular file with one name."""
    return _regular(str(path)) is not None


# Names are text here: an opening looks at many of them, and a `Path` costs more than to look.
def _regular(path: str) -> os.stat_result | None:
    """Return what the system says of a file, or `None` if there is none. Raises what `check_regular` does."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{path!r} can't be looked at: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise Unavailable(f"{path!r} is {kind}, not a job's file", hint="Move it away; nothing was touched.")
    if found.st_nlink > 1:
        raise Unavailable(f"{path!r} has {found.st_nlink} names (hard links)", hint="Keep a copy, not a link.")
    return found


def size(path: Path) -> int | None:
    """Return the size of a regular file, or `None` if there is none: another process may just have removed it."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def look(path: str | Path) -> Found:
    """Return what lies in a job's place. Raises what `check_regular` does, `Corrupt` for a log without its database."""
    name = str(path)
    beside = [_regular(name + suffix) for suffix in SIDECARS]
    log, _index, journal = [0 if file is None else file.st_size for file in beside]
    file = _regular(name)
    database = None if file is None else file.st_size
    # SQLite would clear the log of an empty file away.
    if not database and log:
        raise Corrupt(
            f"{name!r} is {'gone' if database is None else 'empty'}, but its write-ahead log is still there",
            hint="Bring the file back, or clear the rest away with drop_job(job_id).",
        )
    return Found(database, log, journal, None if file is None else (file.st_dev, file.st_ino))


def clear_leftovers(path: str | Path) -> Found:
    """Look; without a database, clear away what SQLite would take for a part of a new one."""
    there = look(path)
    if there.database is not None:
        return there
    for beside in sidecars(path):
        beside.unlink(missing_ok=True)
    return Found()


def prepare(path: str | Path) -> bool:
    """Make sure the database file is there, ours alone to open, mode 0600. Returns whether it is a new one."""
    if (there := clear_leftovers(path).database) is not None:
        return there == 0
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
        sync_directory(Path(path).parent)
    except OSError as error:
        raise Unavailable(f"can't create {str(path)!r}: {error}") from error
    return True


def sync_directory(path: Path) -> None:
    """Bring a directory's entries onto the medium: without it a power cut can take a new file's name."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def identity(path: str | Path) -> tuple[int, int] | None:
    """Return what tells a file from others that may get its name, or `None` if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Record(NamedTuple):
    """What a job's lock file says: who has or had the job, and what it was when it was last written to.

    `version` is one that was on the medium; `used_ms` when the job was last used, `expires_ms` when it ends.
    """

    pid: int | None = None
    version: int = 0
    used_ms: int | None = None
    expires_ms: int | None = None


def read_record(lock: Path) -> Record:
    """Return what a lock file says, as far as it can be read."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return Record()
    try:
        return _parse(os.pread(handle, _RECORD_BYTES_MAX, 0))
    except OSError:
        return Record()
    finally:
        os.close(handle)


def _parse(data: bytes) -> Record:
    data = data.lstrip(b" \0").rstrip(b" \0\n")
    try:
        record = Record(*map(int, data.split()[:-2:2]))
    except (TypeError, ValueError):
        record = Record()
    if b"-" not in data and _written(record).rstrip() == data:  # to the letter, names and checksum too
        return record
    # What was torn, or damaged, must not be taken for a loss: only who has the job may be read from it.
    pid = data.partition(b"\n")[0]
    return Record(int(pid) if pid.isdigit() else None)


def _written(record: Record) -> bytes:
    pid, version, used_ms, expires_ms = record
    # The process id stands alone in the first line, for whoever looks with other tools.
    text = f"{pid}\nversion {version}\n"
    if used_ms is not None:
        text += f"used_ms {used_ms}\n"
    if expires_ms is not None:
        text += f"expires_ms {expires_ms}\n"
    data = text.encode()
    return (data + b"crc %d\n" % crc32(data)).ljust(_RECORD_BYTES_MAX)


class Claim:
    """The ownership of one job by this process: an exclusive OS lock on a file of its own, held until `release`.

    `record` is what the file said before.
    """

    def __init__(self, database: str | Path) -> None:
        self._name = str(database).removesuffix(".db") + ".lock"
        self.record: Record = Record()
        self._handle = -1
        _claims.add(self)
        try:
            while not self._take():
                pass
        except BaseException:  # thrown in here from outside, too: a lock that nobody knows of is never given back
            self.release()
            raise

    @property
    def path(self) -> Path:
        """The file that is locked."""
        return Path(self._name)

    def note_opening(self, version: int, used_ms: int, expires_ms: int | None) -> None:
        """As `note`; but that a job was used again, soon after it was closed, isn't worth a write by itself."""
        known = self.record
        soon = known.used_ms is not None and 0 <= used_ms - known.used_ms <= _SOON_MS
        if not soon or (known.version, known.expires_ms) != (version, expires_ms):
            self.note(version, used_ms, expires_ms)

    def note(self, version: int, used_ms: int, expires_ms: int | None) -> None:
        """Write down what was on the medium, and when. A full disk is no reason to fail: it is a note."""
        before, self.record = self.record, Record(os.getpid(), version, used_ms, expires_ms)
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, _written(self.record), 0)
            if before.expires_ms != expires_ms:  # nobody else says that it is to be swept
                os.fsync(self._handle)

    def _take(self) -> bool:
        """Lock the file; return whether it is still the one of that name when that is done."""
        try:
            self._handle = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            found = os.fstat(self._handle)
            odd = not stat.S_ISREG(found.st_mode) or found.st_nlink > 1
        except OSError as error:
            _regular(self._name)  # what it is says more than that it can't be opened
            raise Unavailable(f"can't open the lock file {self._name!r}: {error}") from error
        if odd:
            _regular(self._name)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_named(found):
                if found.st_mode & 0o7777 != 0o600:  # to set it again would write
                    os.fchmod(self._handle, 0o600)
                self.record = record = _parse(os.pread(self._handle, _RECORD_BYTES_MAX, 0))
                if record.pid != (pid := os.getpid()) or record.used_ms is None:  # else it says already what it is to
                    with contextlib.suppress(OSError):  # a full disk
                        os.pwrite(self._handle, _written(record._replace(pid=pid)), 0)
                return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise Unavailable(f"can't lock {self._name!r}: {error}") from error
            owner = read_record(self.path).pid
            name = f"process {owner}" if owner else "another process"
            job_id = job_id_of(self.path.with_suffix(".db").name)
            raise JobLocked(f"job {job_id!r} is owned by {name} (its lock: {self._name!r})", owner) from None
        # Whoever dropped the job has unlinked the file we opened: the name now means another one.
        handle, self._handle = self._handle, -1
        os.close(handle)
        return False

    def _is_named(self, found: os.stat_result) -> bool:
        try:
            return os.path.samestat(found, os.lstat(self._name))
        except FileNotFoundError:
            return False

    def check(self, version: int) -> None:
        """Hold a file's last version against one that was on the medium. Raises `Corrupt` if it is less."""
        known = self.record.version
        if version < known:
            raise Corrupt(
                f"{str(self.path.with_suffix('.db'))!r} has lost writes: it ends with version {version}, "
                f"and {known} was on the medium",
                hint="Was its log removed, or an older copy put in its place? Restore a backup; or, to go on with what "
                f"is there, delete {self.path.name!r}.",
            )

    def release(self, *, unlock: bool = True) -> None:
        """Give the job up; a second call is nothing. Without `unlock` it stays the parent process'."""
        _claims.discard(self)
        if self._handle >= 0:
            if unlock:  # another process, just forked, may have the same handle for a moment
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            handle, self._handle = self._handle, -1
            os.close(handle)

    def __del__(self) -> None:
        # Nobody else would, where an interrupt came before whoever made it had it in hand.
        with contextlib.suppress(Exception):  # there may be no `os` any more
            self.release()


def remove(path: str | Path, *, lock: bool = True) -> list[Path]:
    """Delete a job's files, without `lock` all but that; return those that were there. The caller owns the `Claim`.

    The database goes first: from then on the job is gone, whatever happens to the rest.
    """
    removed = []
    path = Path(path)
    with undisturbed(path):
        for file in (path, *sidecars(path), *([path.with_suffix(".lock")] if lock else [])):
            try:
                unlink(file)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise Unavailable(f"can't delete {str(file)!r}: {error}") from error
            removed.append(file)
    return removed


def unlink(file: Path) -> None:
    """Delete one of a job's files; a log is emptied first, if that is possible.

    A reader in another process may just have opened it: it would take the next file's index for its own, and fill it.
    """
    if file.name.endswith(LOG):
        with contextlib.suppress(OSError):
            # SQLite has no locks on a log, which closing it would drop.
            handle = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.ftruncate(handle, 0)
            finally:
                os.close(handle)
    file.unlink()


def _in_child() -> None:
    for claim in list(_claims):
        claim.release(unlock=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
