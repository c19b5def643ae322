"""Connecting: from an address to a connection, with a bound on the time for each host.

Rules:
  1. Names are looked up here, before libpq is asked: there nobody else would run meanwhile.
  2. Hosts are tried in turn, and each of their addresses; the first that suits is taken.

Doesn't know: what a connection is for.
"""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Iterator
from time import monotonic
from typing import NamedTuple

from psycopg import pq

from persistency.storage.postgres.address import Address, escaped
from persistency.storage.postgres.faults import Lost


class Connected(NamedTuple):
    """A connection, and libpq's settings for the one host, and its one address, that it is to."""

    connection: pq.abc.PGconn
    settings: dict[str, str]


def connected(address: Address) -> Connected:
    """Return a new connection to any of the hosts. Raises `Lost`, which says what became of every one."""
    hosts = list(address.hosts)
    if address.shuffled:
        random.shuffle(hosts)
    troubles: list[str] = []
    for host in hosts:
        for settings in _looked_up(host, troubles):
            try:
                return Connected(connected_to(settings, address.connect_seconds), settings)
            except Lost as error:
                troubles.append(str(error))
    raise Lost("; ".join(dict.fromkeys(troubles)))


def connected_to(settings: dict[str, str], seconds: float) -> pq.abc.PGconn:
    """Return a new connection to the one host of those settings. Raises `Lost`, after so many seconds at the latest."""
    connection = _begun(settings)
    try:
        _finish(connection, monotonic() + seconds)
    except BaseException:
        connection.finish()
        raise
    return connection


def said(connection: pq.abc.PGconn) -> str:
    """Return what a connection says about its end."""
    text = connection.error_message
    return " ".join(text.decode(errors="replace").split()) or "the connection is closed"


def _looked_up(host: dict[str, str], troubles: list[str]) -> Iterator[dict[str, str]]:
    name = host.get("host", "")
    if not name or "hostaddr" in host or name.startswith(("/", "@")):
        yield host
        return
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a label of a name that is too long, or empty, is no name
        troubles.append(f"can't look up host {name!r}: {error}")
        return
    for numeric in dict.fromkeys(str(entry[4][0]) for entry in found):
        yield host | {"hostaddr": numeric}


def _begun(settings: dict[str, str]) -> pq.abc.PGconn:
    quoted = (b"%b='%b'" % (name.encode(), escaped(value.encode())) for name, value in settings.items())
    return pq.PGconn.connect_start(b" ".join(quoted))


def _finish(connection: pq.abc.PGconn, deadline: float) -> None:
    if connection.status == pq.ConnStatus.BAD:
        raise Lost(said(connection))
    asked = pq.PollingStatus.WRITING
    while True:
        # Looked up each time: libpq may have another socket by now.
        poll = select.poll()
        poll.register(connection.socket, select.POLLIN if asked == pq.PollingStatus.READING else select.POLLOUT)
        if not poll.poll(max(0.0, 1000 * (deadline - monotonic()))):
            raise Lost("the server didn't answer in time")
        asked = pq.PollingStatus(connection.connect_poll())
        if asked == pq.PollingStatus.OK:
            return
        if asked == pq.PollingStatus.FAILED:
            raise Lost(said(connection))
