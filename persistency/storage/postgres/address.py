"""The address of a root on a server: a URL as libpq knows it, with a few parameters of our own in its query.

    persistency_schema          the schema that holds the tables ("persistency")
    persistency_lease           for how many seconds an owner may be silent before others take its jobs over (15)
    persistency_connections     the most connections one process has open to the root (32)

Rules:
  1. Ours are taken out before libpq sees the URL; of a name that begins like ours and isn't one we know nothing.
  2. A password is in no message, and in nothing that is shown.
  3. What bounds the waiting for a server that is gone has a default, unless the URL says otherwise.
  4. Where the hosts are is known before libpq connects, so that each is an attempt of its own: what a service file and
     the environment say counts as if the URL said it, where that says nothing.

Doesn't know: connections, tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from psycopg import pq

from persistency.errors import Misuse

SCHEMES = ("postgresql", "postgres")

_OURS = "persistency_"
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}", re.ASCII)
# Seconds, and milliseconds: after so long without a sign of life a connection is given up.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "application_name": "persistency",
    "client_encoding": "UTF8",
}
# What libpq is asked for, as it finds it in service files and the environment; all else it finds there when it
# connects. How what is stored is encoded is nobody's choice but the URL's.
_ELSEWHERE = ("host", "hostaddr", "port", "target_session_attrs", "load_balance_hosts", *_DEFAULTS)
_NOWHERE = b"persistency"  # no value of sslmode: libpq gives up before it looks for a server


@dataclass(frozen=True)
class Address:
    """Where a root is. `shown` is the URL without its password, `hosts` one set of libpq's settings per host."""

    url: str
    shown: str
    hosts: tuple[dict[str, str], ...]
    schema: str
    lease_ms: int
    connections_max: int
    connect_seconds: float
    shuffled: bool

    def __repr__(self) -> str:
        return f"<Address {self.shown}>"


def parsed(url: str) -> Address:
    """Return what a URL says. Raises `Misuse`, which doesn't repeat the password."""
    bare, query = url.partition("?")[::2]
    ours: dict[str, str] = {}
    theirs: list[str] = []
    for part in query.split("&") if query else []:
        name, value = part.partition("=")[::2]
        if name.startswith(_OURS):
            ours[name.removeprefix(_OURS)] = unquote(value)
        else:
            theirs.append(part)
    shown = _masked(bare) + ("?" + "&".join(map(_masked_part, query.split("&"))) if query else "")
    lease = _number(ours, "lease", 15.0, 1.0, 3600.0)
    connections = int(_number(ours, "connections", 32, 3, 10_000))
    schema = ours.pop("schema", "persistency")
    if not _SCHEMA.fullmatch(schema) or schema.startswith("pg_"):
        raise Misuse(f"root: persistency_schema must be a plain name in lower case, not {schema!r:.80}: pass one")
    if ours:
        unknown = _OURS + min(ours)
        raise Misuse(f"root has a parameter {unknown!r:.80}: pass {_OURS}schema, _lease or _connections")
    settings = _settings(bare + ("?" + "&".join(theirs) if theirs else ""))
    hosts = _split(settings)
    if len(hosts) > 1:
        for host in hosts:
            host.setdefault("target_session_attrs", "read-write")
    return Address(
        url,
        shown,
        hosts,
        schema,
        int(lease * 1000),
        connections,
        _connect_seconds(settings),
        settings.get("load_balance_hosts") == "random",
    )


def _settings(url: str) -> dict[str, str]:
    try:
        found = pq.Conninfo.parse(url.encode())
    except Exception as error:
        raise Misuse(f"root can't be read as a URL: {_without_secrets(str(error), url)}") from None
    given = {option.keyword.decode(): option.val.decode() for option in found if option.val}
    return _DEFAULTS | _from_elsewhere(url, found) | given


def _from_elsewhere(url: str, given: list[pq.ConninfoOption]) -> dict[str, str]:
    """Return what libpq takes from a service file, or else from the environment, for what the URL leaves open.

    Only libpq knows where its files are: it is asked by a connection that it gives up before it looks for any server.
    """
    quoted = [b"%b='%b'" % (option.keyword, escaped(option.val)) for option in given if option.val]
    connection = pq.PGconn.connect_start(b" ".join([*quoted, b"sslmode='%b'" % _NOWHERE]))
    try:
        known = {option.keyword: option for option in connection.info}
        if b"sslmode" not in known or known[b"sslmode"].val != _NOWHERE:
            trouble = connection.error_message.decode(errors="replace")
            raise Misuse(f"root: its service can't be used: {_without_secrets(trouble, url)}")
        said: dict[str, str] = {}
        for name in _ELSEWHERE:
            option = known.get(name.encode())  # one that this libpq has
            if option is not None and option.val and option.val != option.compiled:  # else nobody may have said it
                said[name] = option.val.decode()
    finally:
        connection.finish()
    said.pop("client_encoding", None)
    return said


def escaped(value: bytes) -> bytes:
    """Return a value as it stands between quotes in libpq's settings."""
    return value.replace(b"\\", b"\\\\").replace(b"'", b"\\'")


def _split(settings: dict[str, str]) -> tuple[dict[str, str], ...]:
    """Return the settings for each host by itself: libpq bounds no attempt in time when it is asked not to block."""
    names = settings.get("host", "").split(",")
    addresses = settings.get("hostaddr", "").split(",") if settings.get("hostaddr") else []
    ports = settings.get("port", "").split(",")
    count = max(len(names), len(addresses))
    rest = {name: value for name, value in settings.items() if name not in ("host", "hostaddr", "port")}
    if len(ports) not in (1, count) or (addresses and len(names) not in (1, count)):
        raise Misuse("root must name as many ports as hosts, or one for all of them")
    hosts = []
    for at in range(count):
        host = dict(rest)
        name = names[at] if len(names) == count else names[0]
        port = ports[at] if len(ports) == count else ports[0]
        host |= {"host": name} if name else {}
        host |= {"hostaddr": addresses[at]} if addresses and addresses[at] else {}
        host |= {"port": port} if port else {}
        hosts.append(host)
    return tuple(hosts)


def _connect_seconds(settings: dict[str, str]) -> float:
    try:
        seconds = float(settings["connect_timeout"])
    except ValueError:
        raise Misuse("root: connect_timeout must be a number of seconds") from None
    return seconds if seconds > 0 else 3600.0


def _number(ours: dict[str, str], name: str, default: float, least: float, most: float) -> float:
    given = ours.pop(name, None)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not least <= value <= most or (name == "connections" and value != int(value)):
        raise Misuse(f"root: {_OURS}{name} must be a number from {least:g} to {most:g}, not {given!r:.80}: pass one")
    return value


def _masked(bare: str) -> str:
    scheme, _, rest = bare.partition("://")
    place, slash, path = rest.partition("/")
    user, at, hosts = place.rpartition("@")
    if ":" in user:
        user = user.partition(":")[0] + ":***"
    return f"{scheme}://{user}{at}{hosts}{slash}{path}"


def _masked_part(part: str) -> str:
    name = part.partition("=")[0]
    return f"{name}=***" if unquote(name).lower() in ("password", "sslpassword") else part


def _without_secrets(text: str, url: str) -> str:
    secrets = [part.partition("=")[2] for part in url.partition("?")[2].split("&") if "password" in part.lower()]
    user = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    for secret in [user.partition(":")[2], *secrets]:
        for form in {secret, unquote(secret)} - {""}:
            text = text.replace(form, "***")
    return text.strip()
