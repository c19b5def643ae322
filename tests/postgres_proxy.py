"""A proxy between a client and a PostgreSQL server, which ill-treats what goes through it on purpose.

A *cut* waits for a statement by its name, and then breaks the connection: before the server has seen it, after the
server has answered it, or so that the server sees it much later, when its sender has long come back.

Rules:
  1. Everything is relayed byte by byte unless a cut says otherwise.
  2. Nothing here waits without a deadline, and `close` ends it all.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Literal, Self

from persistency.storage.postgres.address import parsed
from tests.postgres import until, with_parameters

SECONDS = 30.0
_PIECE = 65536
_READY = b"Z\0\0\0\5"  # and one byte more: the server has answered all that it was asked

When = Literal["before", "after", "late"]


class Cut:
    """One break of a connection, at the next statement of a name; `done` once it has happened."""

    def __init__(self, statement: str, when: When) -> None:
        self.name = statement.encode() + b"\0"
        self.when = when
        self.done = threading.Event()
        self.release = threading.Event()  # "late": deliver what was held back
        self.delivered = threading.Event()


class _Pair:
    """One connection: what comes from the client, and what goes to the server. `deaf`: no answer is passed on."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.deaf = False
        self.answered = threading.Event()

    def end(self) -> None:
        _end(self.client)
        _end(self.server)


class Proxy:
    """Relays to the server of `url`; `self.url` leads through it. `away`: new connections are refused.

    `splits`: what ends an answer is passed on only when the rest of it was read.
    """

    def __init__(self, url: str) -> None:
        host = parsed(url).hosts[0]
        self._target = host.get("host", "localhost"), int(host.get("port", "5432"))
        self._home = Path(tempfile.mkdtemp(prefix="pgx-", dir="/tmp"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._home / ".s.PGSQL.5432"))
        self._listener.listen(64)
        self.url = with_parameters(url, host=str(self._home), port=5432)
        self.away = False
        self.splits = False
        self.connections = 0
        self._cuts: list[Cut] = []
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self.away = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_all()
        for cut in self._cuts:
            cut.release.set()
        for thread in list(self._threads):
            thread.join(SECONDS)
        shutil.rmtree(self._home, ignore_errors=True)

    def cut(self, statement: str, when: When) -> Cut:
        """Break the connection over which the next statement of that name is sent."""
        cut = Cut(statement, when)
        with self._lock:
            self._cuts.append(cut)
        return cut

    def break_all(self) -> None:
        """Break every connection there is."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.end()

    # -- threads -------------------------------------------------------------------------------------------------

    def _spawn(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.away:
                client.close()
                continue
            host, port = self._target
            if host.startswith("/"):
                server = socket.socket(socket.AF_UNIX)
                server.connect(f"{host}/.s.PGSQL.{port}")
            else:
                server = socket.create_connection((host, port))
            self.connections += 1
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.add(pair)
            self._spawn(self._up, pair)
            self._spawn(self._down, pair)

    def _down(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while piece := pair.server.recv(_PIECE):
                if not pair.deaf:
                    self._pass_on(piece, pair.client)
                elif piece[-6:-1] == _READY:
                    pair.answered.set()
        pair.answered.set()
        if not pair.deaf:
            pair.end()

    def _pass_on(self, piece: bytes, client: socket.socket) -> None:
        end = len(piece) - 6 if self.splits and piece[-6:-1] == _READY else 0
        if end:
            client.sendall(piece[:end])
            until(lambda: not _unread(client), "the answer is read", pause=0.001)
        client.sendall(piece[end:])

    def _up(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while piece := pair.client.recv(_PIECE):
                cut = self._wanted(piece)
                if cut is not None:
                    self._do(cut, piece, pair)
                    break
                pair.server.sendall(piece)
        with self._lock:
            self._pairs.discard(pair)
        pair.end()

    def _wanted(self, piece: bytes) -> Cut | None:
        with self._lock:
            return next((cut for cut in self._cuts if not cut.done.is_set() and cut.name in piece), None)

    def _do(self, cut: Cut, piece: bytes, pair: _Pair) -> None:
        pair.deaf = cut.when != "before"
        if cut.when == "after":
            pair.server.sendall(piece)
            pair.answered.wait(SECONDS)
        cut.done.set()
        if cut.when == "late":
            _end(pair.client)
            cut.release.wait(SECONDS)
            pair.server.sendall(piece)
            pair.answered.wait(SECONDS)
            cut.delivered.set()


def _unread(sender: socket.socket) -> bool:
    """Say whether something that was sent hasn't been read yet."""
    return bool(int.from_bytes(fcntl.ioctl(sender, termios.TIOCOUTQ, b"    "), sys.byteorder))


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
