"""PostgreSQL for tests: one server for all of a session, and servers of their own for tests that ill-treat them.

`postgres_url()` names the server of the session: the one in `PERSISTENCY_TEST_POSTGRES`, else a private one, started
once from the machine's binaries and shared by all workers of pytest. `fresh_url()` names a schema in it that nobody
else has. Where there is none a test is skipped, with the reason; with `PERSISTENCY_POSTGRES_NEEDED=1` it fails. A
`Server` is a server of one's own: to be stopped, killed, copied to a standby, promoted.

Rules:
  1. A private server listens on a socket in a directory of its own, never on a port. Its binaries refuse to be run
     by root, so there they are run by the first of the users `postgres` and `nobody` that exists.
  2. None outlives those who use it, however they end: a guard, a process of its own, holds one end of a pipe, and
     ends the server when the last holder of the other end is gone.
  3. Nothing here waits without a deadline.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn, Self
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

NAMED = "PERSISTENCY_TEST_POSTGRES"
NEEDED = "PERSISTENCY_POSTGRES_NEEDED"

PORT = 5432  # only in the socket's name
START_SECONDS = 60
_PLACE_BYTES_MAX = 40  # a socket's path has room for 107, and what is below a place takes up to 40
_USERS = ("postgres", "nobody")
_FAST = {"fsync": "off", "full_page_writes": "off"}
_SETTINGS = {
    "listen_addresses": "''",
    "port": str(PORT),
    "max_connections": "300",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "log_min_messages": "warning",
    "wal_retrieve_retry_interval": "200ms",  # of a standby whose source was away
    "log_timezone": "UTC",
    "timezone": "Asia/Kathmandu",  # whoever mixes up times of day and moments shall notice
}


class NoPostgres(Exception):
    """There is no server to be had, and why."""


# -- binaries, users, places -------------------------------------------------------------------------------------


def binaries() -> Path:
    """Return the directory of the server's programs. Raises `NoPostgres` if the machine has none."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    installed = [place for place in Path("/usr/lib/postgresql").glob("*/bin") if place.parent.name.isdigit()]
    places += sorted(installed, key=lambda place: int(place.parent.name), reverse=True)
    for place in places:
        if all(os.access(place / name, os.X_OK) for name in ("initdb", "pg_ctl", "postgres")):
            return place
    raise NoPostgres("no PostgreSQL binaries on PATH or in /usr/lib/postgresql, and no server in " + NAMED)


def _unprivileged() -> dict[str, Any]:
    """Return what makes `subprocess` run a program as somebody other than root."""
    if os.geteuid() != 0:
        return {}
    for name in _USERS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise NoPostgres(f"PostgreSQL refuses to be run by root, and there is no user {' or '.join(_USERS)}")


def _place() -> Path:
    """Return a directory for temporary ones, that an unprivileged user gets into, with a path short enough."""
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        place = Path(name).resolve()
        try:
            open_to_all = all(step.stat().st_mode & stat.S_IXOTH for step in (place, *place.parents))
        except OSError:
            continue
        if len(os.fsencode(place)) <= _PLACE_BYTES_MAX and (open_to_all or os.geteuid() != 0):
            return place
    raise NoPostgres("no directory for temporary files with a short path that an unprivileged user gets into")


# -- a server ----------------------------------------------------------------------------------------------------


class Server:
    """A server of one's own, in a directory of its own; `with Server() as server:` starts it, and leaves nothing.

    `durable=False` leaves out what only a power cut needs. `settings` are lines of `postgresql.conf`, with values as
    they stand there.
    """

    def __init__(self, *, durable: bool = True, session: Path | None = None, **settings: str) -> None:
        self.bin = binaries()
        self._as = _unprivileged()
        self.home = Path(tempfile.mkdtemp(prefix="pg-", dir=_place()))
        self._guard, self._hold = _guarded(self.home, session)
        if self._as:
            os.chown(self.home, self._as["user"], self._as["group"])
        self.data = self.home / "data"
        self.settings = {**_SETTINGS, **({} if durable else _FAST), **settings}

    def __enter__(self) -> Self:
        if self.pid is None:  # a standby runs already
            try:
                self.make()
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, and remove everything; only the guard does that, so that there is one way."""
        if self._hold in _holds:
            _holds.discard(self._hold)
            os.close(self._hold)
            self._guard.wait(START_SECONDS)

    # -- its life --------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make an empty cluster, with a collation that isn't the order of bytes where there is such a one."""
        options = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "--no-instructions", "-D", self.data)
        try:
            self.run("initdb", *options, "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en")
        except NoPostgres:
            shutil.rmtree(self.data, ignore_errors=True)
            self.run("initdb", *options, "--locale=C")
        self.configure(**self.settings)

    def configure(self, **settings: str) -> None:
        """Set what is named in `postgresql.conf`; a server that runs reads it again."""
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(lines + f"unix_socket_directories = '{self.home}'\n")
        if self.pid is not None:
            self.run("pg_ctl", "reload", "-D", self.data)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        log = self.home / "log"
        try:
            self.run("pg_ctl", "start", "-w", "-t", START_SECONDS, "-l", log, "-D", self.data)
        except NoPostgres as error:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise NoPostgres(f"{error}\n{tail}") from error

    def stop(self, *, immediate: bool = False) -> None:
        """Stop it: in order, or (`immediate`) as a crash would, without a last checkpoint; its clients are cut off."""
        self.run(
            "pg_ctl", "stop", "-w", "-t", START_SECONDS, "-m", "immediate" if immediate else "fast", "-D", self.data
        )

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start it."""
        self.stop(immediate=immediate)
        self.start()

    @property
    def pid(self) -> int | None:
        """The process of the server; None while there is none."""
        try:
            return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None

    # -- copies of it ----------------------------------------------------------------------------------------

    def standby(self, *, synchronous: bool = True) -> Server:
        """Return a server that runs, and replays what this one commits.

        `synchronous`: from here on a commit of this one is answered once the copy has it on its medium.
        """
        copy = Server(durable=True, session=None, **self.settings)
        try:
            source = f"host={self.home} port={PORT} user=postgres application_name=copy"
            copy.run("pg_basebackup", "-D", copy.data, "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source)
            copy.configure()
            copy.start()
            if synchronous:
                self.configure(synchronous_standby_names="'*'")
            wanted = "sync" if synchronous else "async"
            state = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = %s"
            until(lambda: self.sql(state, wanted) == [(1,)], f"the standby is {wanted}")
        except BaseException:
            copy.close()
            raise
        return copy

    def promote(self) -> None:
        """Make a standby a server that takes writes; it waits for nobody."""
        self.configure(synchronous_standby_names="''")
        self.run("pg_ctl", "promote", "-w", "-t", START_SECONDS, "-D", self.data)

    # -- its clients -----------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Its URL, with the database that every server has."""
        return url_of(self)

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own; return its rows."""
        return sql(self.url, statement, *values)

    def run(self, program: str, *arguments: object) -> str:
        """Run one of the server's programs as its user; return what it says. Raises `NoPostgres` if it fails."""
        command = [str(self.bin / program), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.home,
            env=environment,
            timeout=2 * START_SECONDS,
            check=False,
            **self._as,
        )
        if done.returncode != 0:
            raise NoPostgres(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
        said: str = done.stdout
        return said


def url_of(*servers: Server, **parameters: object) -> str:
    """Return the URL of a server, or of several of which one at a time takes writes."""
    hosts = ",".join(f"{quote(str(server.home), safe='')}:{PORT}" for server in servers)
    return with_parameters(f"postgresql://postgres@{hosts}/postgres", **parameters)


def with_parameters(url: str, **parameters: object) -> str:
    """Return a URL with more parameters in its query."""
    scheme, place, path, query, _ = urlsplit(url)
    more = urlencode({name: str(value) for name, value in parameters.items()})
    return urlunsplit((scheme, place, path, "&".join(filter(None, (query, more))), ""))


def sql(url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own; return its rows. Parameters that are ours are left out."""
    import psycopg

    scheme, place, path, query, _ = urlsplit(url)
    theirs = "&".join(part for part in query.split("&") if part and not part.startswith("persistency_"))
    with psycopg.connect(urlunsplit((scheme, place, path, theirs, "")), autocommit=True) as connection:
        cursor = connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


def until(true: Any, what: str, *, seconds: float = 30.0, pause: float = 0.02) -> None:
    """Wait until a condition of another process holds. Raises `TimeoutError`, saying what didn't come true."""
    deadline = monotonic() + seconds
    while not true():
        if monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s it still isn't so that {what}")
        sleep(pause)


# -- guards ------------------------------------------------------------------------------------------------------


_holds: set[int] = set()  # the ends that this process holds; its forked children don't


def _let_go() -> None:
    while _holds:
        with suppress(OSError):
            os.close(_holds.pop())


os.register_at_fork(after_in_child=_let_go)


def _guarded(home: Path, session: Path | None) -> tuple[subprocess.Popen[bytes], int]:
    """Start the guard of a server in that directory; return it, and what to close to end both.

    With a session it is its FIFO, which other processes can hold too.
    """
    if session is None:
        theirs, ours = os.pipe()
    else:
        os.mkfifo(session / "hold", 0o600)
        theirs = os.open(session / "hold", os.O_RDONLY | os.O_NONBLOCK)
        ours = os.open(session / "hold", os.O_WRONLY)
        os.set_blocking(theirs, True)
    _holds.add(ours)
    command = [sys.executable, "-I", os.path.abspath(__file__), str(home), *([] if session is None else [str(session)])]
    try:
        guard = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True)
    finally:
        os.close(theirs)
    return guard, ours


def _watch(home: Path, session: Path | None) -> None:
    """Wait until nobody holds the other end, then end the server in that directory; in a process of its own."""
    while True:
        while os.read(0, 4096):
            pass
        if session is None:
            _end(home)
            return
        with _locked(session):
            if not _held():
                _end(home)
                shutil.rmtree(session, ignore_errors=True)
                return


def _held() -> bool:
    """Tell whether somebody has the other end of a FIFO again."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    return not any(what & select.POLLHUP for _, what in poll.poll(0))


def _end(home: Path) -> None:
    """Stop the server as a crash would, and remove its directory."""
    data = home / "data"
    stop = [str(binaries() / "pg_ctl"), "stop", "-w", "-t", "10", "-m", "immediate", "-D", str(data)]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(stop, timeout=20, check=False, cwd="/", stderr=subprocess.DEVNULL, **_unprivileged())
    for _ in range(5):  # a process of the server that isn't gone yet may still write
        shutil.rmtree(home, ignore_errors=True)
        if not home.exists():
            return
        sleep(0.2)


# -- the session's server ----------------------------------------------------------------------------------------

_named: dict[str, str] = {}  # the URL of the session's server, or why there is none
_given: list[str] = []  # schemas that were given out on somebody else's server
_keeping: list[Server] = []  # with its guard: an object that is no more would warn of a process that is


def postgres_url() -> str:
    """Return the URL of the session's server, started if need be; skip the test if there is none."""
    if why := why_not():
        missing(why)
    return _named["url"]


def why_not() -> str:
    """Return why there is no server for this session; nothing if there is one, which is started if need be."""
    if not _named:
        try:
            _named["url"] = _session_url()
        except NoPostgres as error:
            _named["why"] = str(error)
    return _named.get("why", "")


def missing(why: str) -> NoReturn:
    """Skip a test for which there is no PostgreSQL; fail it where that is needed."""
    import pytest

    if os.environ.get(NEEDED) == "1":
        pytest.fail(f"PostgreSQL is needed here ({NEEDED}=1): {why}", pytrace=False)
    pytest.skip(why)


def fresh_url(**parameters: object) -> str:
    """Return a URL of the session's server with a schema that nobody else has, and more parameters if named."""
    schema = f"test_{secrets.token_hex(8)}"
    url = with_parameters(postgres_url(), persistency_schema=schema, **parameters)
    if os.environ.get(NAMED):
        _given.append(schema)
    return url


def drop_schemas() -> None:
    """Remove what tests of this process have left on a server that is somebody else's; at the end of a session."""
    while _given:
        sql(_named["url"], f"DROP SCHEMA IF EXISTS {_given.pop()} CASCADE")


def _session_url() -> str:
    import importlib.util

    if importlib.util.find_spec("psycopg") is None:
        raise NoPostgres("psycopg is not installed: pip install 'persistency[postgres]'")
    if named := os.environ.get(NAMED):
        return named
    binaries()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    session = _place() / f"pgs-{os.getuid()}-{run[:16]}"
    with _locked(session):
        return _joined(session) or _founded(session)


def _joined(session: Path) -> str | None:
    """Return the URL of the server that a sibling has started, and hold it; None if there is none, or no longer."""
    try:
        url = (session / "url").read_text()
        hold = os.open(session / "hold", os.O_WRONLY | os.O_NONBLOCK)  # refused if its guard is gone
    except OSError:
        return None
    _holds.add(hold)
    return url


def _founded(session: Path) -> str:
    """Start a server with a guard that ends it when no process of the session is left."""
    for name in ("url", "hold"):
        (session / name).unlink(missing_ok=True)
    server = Server(durable=False, session=session)
    _keeping.append(server)
    server.make()
    server.start()
    (session / "url").write_text(server.url)
    return server.url


@contextmanager
def _locked(session: Path) -> Iterator[None]:
    """Hold the lock of a session, in a directory that is there."""
    while True:
        session.mkdir(mode=0o700, exist_ok=True)
        try:
            file = (session / "lock").open("a")
        except FileNotFoundError:  # the guard of a former server has just removed it
            continue
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_there(session / "lock", file.fileno()):
                yield
                return


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _main(arguments: Iterable[str]) -> None:
    home, *session = map(Path, arguments)
    _watch(home, session[0] if session else None)


if __name__ == "__main__":
    _main(sys.argv[1:])
