"""What a URL says: our own parameters, libpq's, hosts one by one, and no password anywhere."""

from __future__ import annotations

import pickle
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from persistency import Persistency
from persistency.errors import Misuse, Unavailable
from persistency.storage.postgres.address import parsed

SECRET = "hunter2%21"


def test_our_parameters_are_taken_out() -> None:
    """What begins with `persistency_` is ours, has defaults and bounds, and isn't given to libpq."""
    address = parsed("postgresql://u@h:5433/db?application_name=a&persistency_lease=2.5&persistency_connections=7")
    assert (address.lease_ms, address.connections_max, address.schema) == (2500, 7, "persistency")
    assert address.hosts[0]["application_name"] == "a"
    assert address.hosts[0]["host"] == "h"
    assert address.hosts[0]["port"] == "5433"
    assert not any("persistency_" in name for name in address.hosts[0])
    plain = parsed("postgres:///db")
    assert (plain.lease_ms, plain.connections_max, plain.schema) == (15_000, 32, "persistency")
    assert parsed("postgresql:///db?persistency_schema=my_tables").schema == "my_tables"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("persistency_leese=3", "persistency_leese"),
        ("persistency_lease=0", "persistency_lease must be a number from 1 to 3600"),
        ("persistency_lease=abc", "persistency_lease"),
        ("persistency_lease=nan", "persistency_lease"),
        ("persistency_connections=2", "persistency_connections"),
        ("persistency_connections=3.5", "persistency_connections"),
        ("persistency_schema=Drop%20Table", "persistency_schema"),
        ("persistency_schema=pg_mine", "persistency_schema"),
        ("persistency_schema=x;y", "persistency_schema"),
        ("no_such_option=1", "no_such_option"),
        ("connect_timeout=soon", "connect_timeout"),
        ("host=a,b&port=1,2,3", "ports"),
    ],
)
def test_what_is_wrong_is_said_at_once(query: str, said: str) -> None:
    """A parameter that isn't known, or out of bounds, is `Misuse`, when the Persistency is made."""
    with pytest.raises(Misuse, match=said) as misuse:
        Persistency(f"postgresql://u:{SECRET}@h/db?{query}")
    assert "hunter" not in str(misuse.value)


def test_other_engines_arent_there() -> None:
    """A scheme that isn't PostgreSQL's names no engine."""
    with pytest.raises(Misuse, match="mysql"):
        Persistency("mysql://h/db")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SECRET}@127.0.0.1:1/db?connect_timeout=2",
        f"postgresql://u@127.0.0.1:1/db?connect_timeout=2&password={SECRET}",
        f"postgresql://u@127.0.0.1:1/db?connect_timeout=2&p%61ssword={SECRET}",
    ],
)
def test_a_password_is_shown_nowhere(url: str) -> None:
    """Not in `root`, not in a repr, not in what is raised when the server can't be reached."""
    with Persistency(url) as persistency:
        with pytest.raises(Unavailable, match="refused") as raised:
            persistency.open_job("j")
        for text in (persistency.root, repr(persistency), str(raised.value), repr(parsed(url))):
            assert "hunter" not in text
        assert "***" in persistency.root
        assert pickle.loads(pickle.dumps(raised.value)).hint


@pytest.mark.parametrize("url", ["postgresql://u:hunter2%zz@h/db", "postgresql://u@h/db?password=hunter2%zz"])
def test_a_password_that_cant_be_read_is_not_repeated(url: str) -> None:
    """What libpq has to say about it names it; what is raised says the same without it."""
    with pytest.raises(Misuse, match=r"percent-encoded.*\*\*\*") as misuse:
        parsed(url)
    assert "hunter" not in str(misuse.value)
    assert misuse.value.__cause__ is None


def test_two_objects_on_one_url_share_their_jobs() -> None:
    """As with directories: the same URL is the same root, in this process."""
    url = "postgresql://u@127.0.0.1:1/db"
    with Persistency(url) as one, Persistency(url) as other:
        assert one._site is other._site
        with Persistency(url + "?persistency_lease=3") as third:
            assert third._site is not one._site


def test_hosts_are_tried_one_by_one() -> None:
    """Several hosts are asked for the one that takes writes, unless the URL says otherwise; each has its port."""
    address = parsed("postgresql://u@a:1,b:2/db")
    assert [(host["host"], host["port"], host["target_session_attrs"]) for host in address.hosts] == [
        ("a", "1", "read-write"),
        ("b", "2", "read-write"),
    ]
    assert "target_session_attrs" not in parsed("postgresql://a/db").hosts[0]
    assert parsed("postgresql://a,b/db?target_session_attrs=any").hosts[1]["target_session_attrs"] == "any"
    assert [host["host"] for host in parsed("postgresql:///db?host=/one,/two&port=5432").hosts] == ["/one", "/two"]


def test_a_server_that_never_answers_is_given_up() -> None:
    """Something that takes the connection and says nothing is left after `connect_timeout`, the next host is tried."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        port = silent.getsockname()[1]
        url = f"postgresql://u@127.0.0.1:{port},127.0.0.1:1/db?connect_timeout=1"
        with Persistency(url) as persistency, pytest.raises(Unavailable) as raised:
            persistency.open_job("j")
        assert "didn't answer in time" in str(raised.value)
        assert "refused" in str(raised.value)


def test_a_host_that_isnt_known() -> None:
    """A name that can't be looked up is said, and others run meanwhile."""
    with Persistency("postgresql://u@no-such-host.invalid/db") as persistency:
        done = threading.Event()
        threading.Thread(target=done.set).start()
        with pytest.raises(Unavailable, match=r"no-such-host\.invalid"):
            persistency.open_job("j")
        assert done.wait(10)


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
def test_a_host_whose_name_is_none(host: str) -> None:
    """A name that can't even be asked for is a host that isn't found; the next one is tried."""
    with (
        Persistency(f"postgresql://u@{host},127.0.0.1:1/db?connect_timeout=2") as persistency,
        pytest.raises(Unavailable, match=f"{host}.*refused"),
    ):
        persistency.open_job("j")


SERVICES = """
# what is where
[far]
host=one.example.invalid,two.example.invalid
port=1,2
user=somebody
password=hunter2
connect_timeout=3

[near]
host=127.0.0.1
port=1
target_session_attrs=read-only

[broken]
nonsense=1
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A service file."""
    path = tmp_path / "services.conf"
    path.write_text(SERVICES)
    for name in ("PGSERVICE", "PGHOST", "PGPORT", "PGHOSTADDR", "PGCONNECT_TIMEOUT", "PGTARGETSESSIONATTRS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    return path


def _places(url: str) -> list[tuple[str | None, str | None, str | None]]:
    return [(host.get("host"), host.get("port"), host.get("target_session_attrs")) for host in parsed(url).hosts]


@pytest.mark.usefixtures("services")
def test_the_hosts_of_a_service() -> None:
    """They are tried one by one, like those of a URL; what the URL says comes first, our defaults last."""
    far = [("one.example.invalid", "1", "read-write"), ("two.example.invalid", "2", "read-write")]
    assert _places("postgresql:///?service=far") == far
    assert parsed("postgresql:///?service=far").connect_seconds == 3
    assert _places("postgresql:///?service=far&target_session_attrs=any")[1][2] == "any"
    assert _places("postgresql://a:7,b:8/?service=near") == [("a", "7", "read-only"), ("b", "8", "read-only")]
    near = parsed("postgresql:///?service=near&connect_timeout=4")
    assert (near.connect_seconds, near.hosts[0]["tcp_user_timeout"]) == (4, "20000")
    assert not any("password" in host for host in parsed("postgresql:///?service=far").hosts)


@pytest.mark.usefixtures("services")
def test_a_service_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PGSERVICE` names it as the URL does, and the URL's comes first; so it is with the hosts themselves."""
    monkeypatch.setenv("PGSERVICE", "far")
    assert [host for host, _, _ in _places("postgresql:///db")] == ["one.example.invalid", "two.example.invalid"]
    assert [host for host, _, _ in _places("postgresql:///db?service=near")] == ["127.0.0.1"]
    monkeypatch.delenv("PGSERVICE")
    monkeypatch.setenv("PGHOST", "a,b")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    assert [host for host, _, _ in _places("postgresql:///db")] == ["a", "b"]
    assert parsed("postgresql:///db").hosts[0]["client_encoding"] == "UTF8"


def test_where_service_files_are(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libpq looks for them: where the system keeps its settings, too."""
    monkeypatch.delenv("PGSERVICEFILE")
    monkeypatch.setenv("PGSYSCONFDIR", str(services.parent))
    services.rename(services.parent / "pg_service.conf")
    assert len(_places("postgresql:///?service=far")) == 2


@pytest.mark.usefixtures("services")
def test_the_hosts_of_a_service_are_looked_up_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by libpq, during which nobody else would run."""
    asked: list[Any] = []

    def look_up(name: str, *_args: Any, **_options: Any) -> Any:
        asked.append(name)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with Persistency("postgresql:///?service=far") as persistency, pytest.raises(Unavailable, match="no such host"):
        persistency.open_job("j")
    assert asked == ["one.example.invalid", "two.example.invalid"]


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize(("service", "said"), [("farther", "farther"), ("broken", "syntax error")])
def test_a_service_that_isnt_known(service: str, said: str) -> None:
    """It is said at once, of `root`, and no password with it."""
    with pytest.raises(Misuse, match=f"^root.*{said}") as misuse:
        Persistency(f"postgresql://u:{SECRET}@/db?service={service}")
    assert "hunter" not in str(misuse.value)
