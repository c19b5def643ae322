"""Sessions for Starlette and FastAPI: what Starlette's own middleware promises, and what a server's have to besides."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from datetime import timedelta
from hashlib import sha256
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Annotated, Any, cast

import anyio
import httpx2
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as CookieSessions
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketDisconnect

from persistency import CBOR, Corrupt, Job, Misuse, Persistency, key
from persistency.integrations.starlette import (
    Session,
    SessionMiddleware,
    SessionStore,
    handle_of,
    owner_of,
    regenerate,
    save,
)
from persistency.integrations.starlette import sessions as store_module
from persistency.recipes import Baton
from persistency.testing import ManualClock
from tests.loops import InLoop, bounded

DAYS = 24 * 60 * 60
ID = re.compile(r"[A-Za-z0-9_-]{43}")


class Desk:
    """A job with sessions, under a clock that only the test moves."""

    def __init__(self, p: Persistency, clock: ManualClock) -> None:
        self.persistency, self.clock = p, clock
        self.job: Job = p.open_job("web", feed_changes_max=10_000)
        self.sessions = SessionStore(self.job)

    def written(self) -> int:
        """How many operations the job has seen."""
        return self.job.version().result()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Give a job with sessions."""
    clock = ManualClock()
    with Persistency(tmp_path, clock=clock) as p:
        yield Desk(p, clock)


async def view(request: Request) -> JSONResponse:
    """Answer with what is in the session."""
    return JSONResponse({"session": request.session})


async def update(request: Request) -> JSONResponse:
    """Put what was sent into the session."""
    request.session.update(await request.json())
    return JSONResponse({"session": request.session})


async def append(request: Request) -> JSONResponse:
    """Change what is inside of a value of the session, and not the session."""
    request.session["list"].append(len(request.session["list"]))
    return JSONResponse({"session": request.session})


async def remove(request: Request) -> JSONResponse:
    """Take one key out."""
    return JSONResponse({"was": request.session.pop(request.path_params["name"], None)})


async def clear(request: Request) -> JSONResponse:
    """Log out."""
    request.session.clear()
    return JSONResponse({"session": request.session})


async def login(request: Request) -> JSONResponse:
    """Log in."""
    request.session["user"] = request.path_params["user"]
    regenerate(request, owner=request.path_params["user"])
    return JSONResponse({"session": request.session})


async def rotate(request: Request) -> JSONResponse:
    """Give the session another id."""
    regenerate(request)
    return JSONResponse({})


async def me(request: Request) -> JSONResponse:
    """Answer with the handle."""
    return JSONResponse({"handle": handle_of(request)})


async def silent(_request: Request) -> Response:
    """Have nothing to do with sessions."""
    return PlainTextResponse("fine")


async def fail(request: Request) -> Response:
    """Change the session, and fail."""
    request.session["failed"] = True
    raise RuntimeError("as it should")


ROUTES = [
    Route("/", view),
    Route("/update", update, methods=["POST"]),
    Route("/append", append, methods=["POST"]),
    Route("/remove/{name}", remove, methods=["POST"]),
    Route("/clear", clear, methods=["POST"]),
    Route("/login/{user}", login, methods=["POST"]),
    Route("/rotate", rotate, methods=["POST"]),
    Route("/me", me),
    Route("/silent", silent),
    Route("/fail", fail, methods=["POST"]),
]


def app(sessions: SessionStore, *routes: Any, **options: Any) -> Starlette:
    """An application with sessions."""
    return Starlette(
        routes=[*routes, *ROUTES], middleware=[Middleware(SessionMiddleware, sessions=sessions, **options)]
    )


def client(of: ASGIApp | SessionStore, url: str = "http://testserver", **options: Any) -> TestClient:
    """A browser."""
    return TestClient(app(of) if isinstance(of, SessionStore) else of, base_url=url, **options)


def cookie_of(response: Any) -> Any:
    """The session's cookie that a response sets, with its attributes; `None`: it sets none."""
    jar: SimpleCookie = SimpleCookie()
    for line in response.headers.get_list("set-cookie"):
        jar.load(line)
    return jar.get("session")


def seen(browser: TestClient) -> Any:
    """What a browser's session has."""
    return browser.get("/").json()["session"]


# -- what Starlette's own middleware does ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_session_is_a_dict_that_stays(desk: Desk, backend: Any) -> None:
    """It is empty at first, keeps what is put in from request to request, and is over when it is cleared."""
    with client(desk.sessions, backend=backend) as browser:
        assert seen(browser) == {}
        assert browser.post("/update", json={"some": "data"}).json() == {"session": {"some": "data"}}
        assert seen(browser) == {"some": "data"}
        assert browser.post("/update", json={"more": [1, {"a": None}]}).status_code == 200
        assert seen(browser) == {"some": "data", "more": [1, {"a": None}]}
        cleared = browser.post("/clear")
        assert cleared.json() == {"session": {}}
        assert cookie_of(cleared).value == "null"
        assert cookie_of(cleared)["expires"].startswith("Thu, 01 Jan 1970")
        assert "session" not in browser.cookies
        assert seen(browser) == {}
        assert desk.sessions.count().result() == 0


def test_a_cookie_is_set_only_if_there_is_something_to_tell(desk: Desk) -> None:
    """Reading sets none, nor does clearing what is empty; the first change does."""
    browser = client(desk.sessions)
    assert cookie_of(browser.get("/")) is None
    assert cookie_of(browser.post("/clear")) is None
    set_ = cookie_of(browser.post("/update", json={"a": 1}))
    assert ID.fullmatch(set_.value)
    assert (set_["path"], set_["samesite"], set_["max-age"]) == ("/", "lax", str(14 * DAYS))
    assert set_["httponly"]
    assert not set_["secure"]
    assert not set_["domain"]
    assert cookie_of(browser.get("/")) is None


def test_responses_vary_by_the_cookie_if_they_depend_on_it(desk: Desk) -> None:
    """Caches are told where the session was looked at, and nowhere else."""
    browser = client(desk.sessions)
    assert "vary" not in browser.get("/silent").headers
    assert browser.get("/").headers["vary"] == "Cookie"
    assert browser.post("/update", json={"a": 1}).headers["vary"] == "Cookie"
    assert "vary" not in browser.get("/silent").headers


def test_a_session_ends(desk: Desk) -> None:
    """After its time it is empty, whatever the browser sends."""
    browser = client(SessionStore(desk.job, ttl=timedelta(seconds=10)))
    session_id = cookie_of(browser.post("/update", json={"a": 1})).value
    desk.clock.advance(9.999)
    assert seen_by(session_id, desk) == {"a": 1}
    desk.clock.advance(0.001)
    assert seen_by(session_id, desk) == {}


def seen_by(session_id: str, desk: Desk, **options: Any) -> Any:
    """What a request with this id sees; nothing is written."""
    sessions = SessionStore(desk.job, ttl=10, rolling=False, **options)
    return client(sessions).get("/", headers={"cookie": f"session={session_id}"}).json()["session"]


def test_a_secure_cookie_isnt_sent_in_the_clear(desk: Desk) -> None:
    """With `https_only` the browser sends it by HTTPS alone."""
    application = app(desk.sessions, https_only=True)
    secure, plain = client(application, "https://testserver"), client(application)
    assert cookie_of(secure.post("/update", json={"a": 1}))["secure"]
    assert seen(secure) == {"a": 1}
    plain.post("/update", json={"a": 1})
    assert seen(plain) == {}


def test_a_cookie_has_the_path_domain_and_name_it_is_given(desk: Desk) -> None:
    """An application that is mounted has its sessions to itself; all attributes are as said."""
    inner = app(desk.sessions, path="/second", session_cookie="session2", domain=".example.com", same_site="strict")
    browser = client(Starlette(routes=[Mount("/second", app=inner)]), "http://www.example.com")
    header = browser.post("/second/update", json={"a": 1}).headers["set-cookie"]
    assert re.fullmatch(
        r"session2=[\w-]{43}; path=/second; Max-Age=1209600; httponly; samesite=strict; domain=\.example\.com", header
    )
    assert browser.get("/second/").json() == {"session": {"a": 1}}
    over = browser.post("/second/clear").headers["set-cookie"]
    assert over.startswith("session2=null; path=/second; expires=")
    assert "domain=.example.com" in over


def test_a_cookie_may_end_with_the_browser(desk: Desk) -> None:
    """With `persistent=False` it has no age; the session in the job has its end all the same."""
    browser = client(app(desk.sessions, persistent=False))
    set_ = cookie_of(browser.post("/update", json={"a": 1}))
    assert set_["max-age"] == set_["expires"] == ""
    assert seen(browser) == {"a": 1}
    desk.clock.advance(14 * DAYS)
    assert seen(browser) == {}


def test_a_partitioned_cookie_says_so(desk: Desk) -> None:
    """For pages within another site's."""
    browser = client(app(desk.sessions, https_only=True, same_site="none", partitioned=True), "https://testserver")
    header = browser.post("/update", json={"a": 1}).headers["set-cookie"]
    assert header.endswith("httponly; samesite=none; secure; partitioned")


def test_other_kinds_of_scope_pass(desk: Desk) -> None:
    """The lifespan of an application isn't touched, and an application without the middleware says what it lacks."""
    begun = []

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        begun.append((scope["type"], "session" in scope))
        for kind in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{kind}"
            await send({"type": f"lifespan.{kind}.complete"})

    with client(SessionMiddleware(lifespan, desk.sessions)):
        assert begun == [("lifespan", False)]
    bare = Starlette(routes=[Route("/me", me), Route("/rotate", rotate)])
    for path in ("/me", "/rotate"):
        with pytest.raises(Misuse, match="SessionMiddleware"):
            client(bare).get(path)


# -- ids -------------------------------------------------------------------------------------------------------------

BAD_COOKIES = [
    "",
    "null",
    "a" * 42,
    "a" * 44,
    "a" * 100_000,
    "A" * 42 + "=",
    "A" * 42 + "%",
    "../" * 14 + "a",
    "\udcff" * 43,
    sha256(b"").hexdigest(),
    "'; DROP TABLE kv; --",
]


@pytest.mark.parametrize("bad", BAD_COOKIES, ids=range(len(BAD_COOKIES)))
def test_what_is_no_id_is_a_fresh_session(desk: Desk, bad: str) -> None:
    """Garbage, whatever its size, is no error, and asks nothing of the job; what is put in gets an id of its own."""
    header = {"cookie": b"session=" + bad.encode("utf-8", "surrogateescape")}
    browser = client(desk.sessions)
    before = desk.written()
    assert browser.get("/", headers=cast(Any, header)).json() == {"session": {}}
    assert desk.written() == before
    set_ = cookie_of(browser.post("/update", json={"a": 1}, headers=cast(Any, header)))
    assert ID.fullmatch(set_.value)
    assert set_.value != bad


def test_an_id_that_a_browser_made_up_never_becomes_one(desk: Desk) -> None:
    """Against fixation: of the right form, but not given out here, it is nobody's, also after something was put in."""
    made_up = "x" * 43
    browser = client(desk.sessions)
    given = cookie_of(browser.post("/update", json={"a": 1}, headers={"cookie": f"session={made_up}"})).value
    assert given != made_up
    assert seen_by(made_up, desk) == {}
    assert seen_by(given, desk) == {"a": 1}


def test_the_file_holds_no_id_that_could_be_used(desk: Desk) -> None:
    """Whoever has the file, or a backup, finds hashes; neither these nor handles are ids."""
    browser = client(desk.sessions)
    session_id = cookie_of(browser.post("/login/ann")).value
    handle = browser.get("/me").json()["handle"]
    assert handle == sha256(session_id.encode()).hexdigest()
    desk.job.flush(sync=True).result()
    assert desk.job.path is not None
    for path in desk.job.path.parent.iterdir():
        assert session_id.encode() not in path.read_bytes()
    for other in (handle, bytes.fromhex(handle).hex()[:43]):
        assert seen_by(other, desk) == {}


def test_ids_are_long_and_differ(desk: Desk) -> None:
    """256 bits, each of its own."""
    ids = {cookie_of(client(desk.sessions).post("/update", json={"a": 1})).value for _ in range(20)}
    assert len(ids) == 20
    assert all(ID.fullmatch(each) for each in ids)


def test_at_login_the_id_changes(desk: Desk) -> None:
    """An id that was known before the login is worth nothing afterwards; the values came along."""
    browser = client(desk.sessions)
    before = cookie_of(browser.post("/update", json={"cart": [1]})).value
    after = cookie_of(browser.post("/login/ann")).value
    assert after != before
    assert seen(browser) == {"cart": [1], "user": "ann"}
    assert seen_by(before, desk) == {}
    assert desk.sessions.count().result() == 1
    again = cookie_of(browser.post("/rotate")).value
    assert again not in (before, after)
    assert seen(browser) == {"cart": [1], "user": "ann"}
    assert desk.sessions.count("ann").result() == 1


def test_a_login_alone_begins_a_session(desk: Desk) -> None:
    """One with an owner is there even if nothing was put in; it ends as any other when it becomes empty later."""

    async def enter(request: Request) -> Response:
        assert owner_of(request) is None
        regenerate(request, owner="ann")
        return JSONResponse({"owner": owner_of(request)})

    async def who(request: Request) -> Response:
        return JSONResponse({"owner": owner_of(request)})

    browser = client(app(desk.sessions, Route("/enter", enter), Route("/who", who)))
    set_ = cookie_of(browser.get("/enter"))
    assert ID.fullmatch(set_.value)
    assert desk.sessions.count("ann").result() == 1
    assert browser.get("/who").json() == {"owner": "ann"}
    browser.post("/update", json={"a": 1})
    assert cookie_of(browser.post("/remove/a")).value == "null"
    assert desk.job.count("sessions").result() == 0
    assert cookie_of(browser.post("/rotate")) is None
    assert browser.get("/who").json() == {"owner": None}


def test_after_a_logout_nothing_is_left_of_the_session(desk: Desk) -> None:
    """`clear()` ends it; what is put in afterwards, in the same request too, is another session without an owner."""

    async def leave(request: Request) -> Response:
        request.session.clear()
        request.session["flash"] = "goodbye"
        return Response()

    browser = client(app(desk.sessions, Route("/leave", leave)))
    before = cookie_of(browser.post("/login/ann")).value
    after = cookie_of(browser.get("/leave")).value
    assert after not in (before, "null")
    assert seen(browser) == {"flash": "goodbye"}
    assert seen_by(before, desk) == {}
    assert desk.sessions.count("ann").result() == 0
    assert desk.sessions.count().result() == 1


# -- what is written, and when ---------------------------------------------------------------------------------------


def test_nothing_is_written_for_who_only_reads(desk: Desk) -> None:
    """Not for a request without a session, nor with one, nor for putting in what is there already."""
    browser = client(desk.sessions)
    browser.get("/")
    browser.get("/silent")
    assert desk.written() == 0
    browser.post("/update", json={"a": [1, 2]})
    before = desk.written()
    browser.get("/")
    browser.get("/silent")
    browser.post("/update", json={"a": [1, 2]})
    browser.post("/clear", headers={"cookie": "session=null"})
    assert desk.written() == before


def test_a_change_inside_of_a_value_is_seen(desk: Desk) -> None:
    """A list in the session that was appended to is written, without anybody saying that it has changed."""
    browser = client(desk.sessions)
    browser.post("/update", json={"list": [0]})
    browser.post("/append")
    browser.post("/append")
    assert seen(browser) == {"list": [0, 1, 2]}


def test_of_a_session_that_nobody_looks_at_nothing_is_encoded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has nothing to do with its session isn't charged for how much is in it; any look at it counts."""
    browser = client(desk.sessions)
    browser.post("/update", json={"list": [0]})
    encoded: list[Session] = []
    real = Session.encoded

    def counted(session: Session) -> dict[str, bytes]:
        encoded.append(session)
        return real(session)

    monkeypatch.setattr(Session, "encoded", counted)
    browser.get("/silent")
    assert encoded == []
    browser.get("/")
    assert encoded != []
    session = Session({"list": [0]})
    assert not session.accessed
    cast(Any, dict(session))["list"].append(1)  # without a word to it
    assert session.accessed
    assert session.stored != real(session)


@pytest.mark.parametrize(
    "look",
    [
        lambda session: session["a"],
        lambda session: session.get("a"),
        lambda session: [*session],
        lambda session: [*session.values()],
        lambda session: {**session},
        lambda session: session | {},
        lambda session: session.update(b=2),
        lambda session: session.pop("a"),
        lambda session: session.__delitem__("a"),
        lambda session: session.__ior__({"b": 2}),
        lambda session: session.clear(),
        lambda session: session.copy(),
        lambda session: session == {},
        lambda session: bool(session),
        lambda session: "a" in session,
        json.dumps,
    ],
)
def test_every_look_at_a_session_is_noted_before_it_can_be_changed(look: Callable[[Session], Any]) -> None:
    """Also by those who take it out of the scope, where `request.session` doesn't see it."""
    session = Session({"a": 1})
    look(session)
    assert session.accessed
    assert session.stored == Session({"a": 1}).encoded()


def test_a_session_that_becomes_empty_is_removed(desk: Desk) -> None:
    """With its last key the row goes and the cookie."""
    browser = client(desk.sessions)
    browser.post("/update", json={"a": 1, "b": 2})
    assert cookie_of(browser.post("/remove/a")).value != "null"
    assert cookie_of(browser.post("/remove/missing")) is None
    assert cookie_of(browser.post("/remove/b")).value == "null"
    assert desk.sessions.count().result() == 0
    assert desk.job.count("sessions").result() == 0


def test_being_used_gives_a_session_more_time_now_and_then(desk: Desk) -> None:
    """When it rolls each use counts, but it is noted down once a minute at the most, and the browser told of it."""
    browser = client(desk.sessions)
    browser.post("/login/ann")
    before = desk.written()
    desk.clock.advance(59.9)
    assert cookie_of(browser.get("/silent")) is None
    assert desk.written() == before
    desk.clock.advance(0.1)
    assert cookie_of(browser.get("/silent"))["max-age"] == str(14 * DAYS)
    assert desk.written() > before
    for _ in range(5):
        desk.clock.advance(13 * DAYS)
        assert seen(browser) == {"user": "ann"}
    assert desk.sessions.count("ann").result() == 1
    desk.clock.advance(14 * DAYS)
    assert seen(browser) == {}
    assert desk.sessions.count("ann").result() == 0


def test_a_short_session_rolls_as_well(desk: Desk) -> None:
    """One that lasts no longer than `touch_every` is given more time after a tenth of its own."""
    browser = client(SessionStore(desk.job, ttl=60))
    browser.post("/update", json={"a": 1})
    desk.clock.advance(5.9)
    assert cookie_of(browser.get("/silent")) is None
    for _ in range(8):
        desk.clock.advance(50)
        assert cookie_of(browser.get("/"))["max-age"] == "60"
    assert seen(browser) == {"a": 1}


def test_without_rolling_a_session_ends_when_it_was_to_end(desk: Desk) -> None:
    """Neither using it nor changing it gives it more time."""
    browser = client(SessionStore(desk.job, ttl=100, rolling=False))
    browser.post("/update", json={"a": 1})
    desk.clock.advance(70)
    assert cookie_of(browser.get("/")) is None
    assert cookie_of(browser.post("/update", json={"b": 2}))["max-age"] == "30"
    desk.clock.advance(29)
    assert seen(browser) == {"a": 1, "b": 2}
    desk.clock.advance(1)
    assert seen(browser) == {}


def test_a_lifetime_ends_a_session_however_much_it_is_used(desk: Desk) -> None:
    """It counts from the beginning, and anew from each login, of the same user too; rotating the id gives no more."""
    browser = client(SessionStore(desk.job, ttl=50, lifetime=100, touch_every=0))
    browser.post("/update", json={"a": 1})
    for _ in range(3):
        desk.clock.advance(30)
        assert seen(browser) == {"a": 1}
    assert cookie_of(browser.post("/rotate"))["max-age"] == "10"
    assert cookie_of(browser.post("/login/ann"))["max-age"] == "50"
    desk.clock.advance(40)
    assert cookie_of(browser.post("/login/ann"))["max-age"] == "50"
    for _ in range(3):
        desk.clock.advance(30)
        assert seen(browser) == {"a": 1, "user": "ann"}
    desk.clock.advance(10)
    assert seen(browser) == {}


def test_a_request_that_fails_has_changed_nothing(desk: Desk) -> None:
    """What it had put into the session by then isn't there."""
    browser = client(desk.sessions, raise_server_exceptions=False)
    browser.post("/update", json={"a": 1})
    assert browser.post("/fail").status_code == 500
    assert seen(browser) == {"a": 1}


def test_a_failure_that_a_handler_answers_is_a_response(desk: Desk) -> None:
    """An `HTTPException`, or one that the application has a handler for, is answered, and the session is saved."""

    class Refused(Exception):
        """One that has a handler."""

    async def forbid(request: Request) -> Response:
        request.session["forbidden"] = True
        raise HTTPException(403)

    async def refuse(request: Request) -> Response:
        request.session["refused"] = True
        raise Refused

    async def answer(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("refused", 409)

    application = Starlette(
        routes=[*ROUTES, Route("/forbid", forbid), Route("/refuse", refuse)],
        middleware=[Middleware(SessionMiddleware, sessions=desk.sessions)],
        exception_handlers={Refused: answer, Exception: answer},
    )
    browser = client(application, raise_server_exceptions=False)
    assert [browser.get(path).status_code for path in ("/forbid", "/refuse")] == [403, 409]
    assert browser.post("/fail").status_code == 409  # which is answered outside of all middleware
    assert seen(browser) == {"forbidden": True, "refused": True}


def nested(depth: int) -> list[Any]:
    """Lists in lists, so many."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("value", [object(), float, {"a": 1j}, nested(63), nested(65)])
def test_a_value_that_cant_be_kept_fails_the_request(desk: Desk, value: Any) -> None:
    """It is told by the name of its key, before the response has begun; so is a key that isn't text."""

    async def bad(request: Request) -> Response:
        request.session["thing"] = value
        return Response()

    async def number(request: Request) -> Response:
        cast(Any, request.session)[5] = "five"
        return Response()

    async def surrogate(request: Request) -> Response:
        request.session["\ud800"] = 1
        return Response()

    browser = client(app(desk.sessions, *(Route(f"/{one.__name__}", one) for one in (bad, number, surrogate))))
    browser.post("/update", json={"a": 1})
    with pytest.raises(Misuse, match="'thing'"):
        browser.get("/bad")
    with pytest.raises(Misuse, match="keys must be text"):
        browser.get("/number")
    with pytest.raises(Misuse, match=r"value of .*ud800"):
        browser.get("/surrogate")
    assert seen(browser) == {"a": 1}


def test_values_are_what_cbor_holds(desk: Desk) -> None:
    """More than JSON: bytes come back, and what is nested 62 deep; the row is plain CBOR, and no pickle."""
    browser = client(desk.sessions)

    async def put(request: Request) -> Response:
        request.session["key"] = b"\x00\xff"
        request.session["deep"] = nested(62)
        return Response()

    async def get(request: Request) -> Response:
        return Response(request.session["key"])

    browser = client(app(desk.sessions, Route("/put", put), Route("/get", get)))
    browser.get("/put")
    assert browser.get("/get").content == b"\x00\xff"
    (row,) = desk.job.scan("sessions").result()
    assert CBOR.decode(row.payload)["values"] == {"key": b"\x00\xff", "deep": nested(62)}


@pytest.mark.parametrize(
    "payload", [b"\xff", CBOR.encode([1]), CBOR.encode({"values": 5, "owner": None, "created_ms": 0})]
)
def test_a_row_that_is_no_session_is_corrupt(desk: Desk, payload: bytes) -> None:
    """A damaged row is told as such, and other sessions go on."""
    browser, other = client(desk.sessions), client(desk.sessions)
    session_id = cookie_of(browser.post("/update", json={"a": 1})).value
    other.post("/update", json={"b": 2})
    desk.job.put("sessions", key("session", sha256(session_id.encode()).digest()), payload)
    with pytest.raises(Corrupt):
        browser.get("/")
    assert seen(other) == {"b": 2}


def test_a_damaged_row_is_in_nobodys_way(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Its owner's other sessions are listed and revoked, and it goes itself: nothing of it stays behind."""

    def damage() -> list[str]:
        for _ in range(3):
            client(desk.sessions).post("/login/ann")
        handles = [info.handle for info in desk.sessions.of("ann").result()]
        desk.job.put("sessions", key("session", bytes.fromhex(handles[0])), b"\xff")
        return handles

    caplog.set_level(logging.WARNING, "persistency.sessions")
    handles = damage()
    assert {info.handle for info in desk.sessions.of("ann").result()} == set(handles[1:])
    assert [getattr(record, "persistency_event", None) for record in caplog.records] == ["session_damaged"]
    assert desk.sessions.revoke_one(handles[0]).result() is True
    assert desk.sessions.revoke_one(handles[0]).result() is False
    assert desk.sessions.count("ann").result() == 2
    damage()
    assert desk.sessions.revoke("ann").result() == 5
    assert desk.job.count("sessions").result() == 0


# -- after the response has begun ------------------------------------------------------------------------------------


@pytest.fixture
def dropped(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """Give how often a change was dropped, as the log says."""
    caplog.set_level(logging.WARNING, "persistency.sessions")
    return lambda: sum(
        getattr(record, "persistency_event", None) == "session_change_dropped" for record in caplog.records
    )


def test_what_changes_after_the_response_has_begun_is_saved(desk: Desk, dropped: Callable[[], int]) -> None:
    """In a stream and in a background task, of a session that the browser knows; one can't be begun or renewed then."""

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            request.session["streamed"] = True
            with pytest.raises(Misuse, match="has begun"):
                regenerate(request)
            yield b"two"

        return StreamingResponse(parts())

    async def later(request: Request) -> Response:
        async def task() -> None:
            request.session["later"] = True

        return PlainTextResponse("fine", background=BackgroundTask(task))

    async def late_logout(request: Request) -> Response:
        async def task() -> None:
            request.session.clear()

        return PlainTextResponse("fine", background=BackgroundTask(task))

    application = app(desk.sessions, Route("/stream", stream), Route("/later", later), Route("/leave", late_logout))
    browser = client(application)
    browser.get("/later")
    assert (desk.sessions.count().result(), dropped()) == (0, 1)
    browser.post("/update", json={"a": 1})
    assert browser.get("/stream").text == "onetwo"
    browser.get("/later")
    assert seen(browser) == {"a": 1, "streamed": True, "later": True}
    browser.get("/leave")
    assert (desk.sessions.count().result(), dropped()) == (0, 1)


def test_a_websocket_reads_and_changes_its_session(desk: Desk, dropped: Callable[[], int]) -> None:
    """Before it is accepted it can begin one, afterwards change it; `save` writes at once, its end at the end."""

    async def talk(websocket: WebSocket) -> None:
        if websocket.query_params.get("begin"):
            websocket.session["begun"] = True
        await websocket.accept(headers=[(b"x-own", b"1")])
        async for text in websocket.iter_text():
            websocket.session[text] = True
            kept = await save(websocket) if text == "now" else None
            await websocket.send_json({"session": websocket.session, "kept": kept})

    browser = client(app(desk.sessions, WebSocketRoute("/ws", talk)))
    with browser.websocket_connect("/ws") as socket:
        socket.send_text("now")
        assert socket.receive_json() == {"session": {"now": True}, "kept": False}
        assert desk.sessions.count().result() == 0
    assert dropped() >= 1
    with browser.websocket_connect("/ws?begin=1") as socket:
        headers = dict(cast(Any, socket).extra_headers)
        assert headers[b"x-own"] == b"1"
        session_id = headers[b"set-cookie"].decode().partition(";")[0].partition("=")[2]
        assert ID.fullmatch(session_id)
        assert seen_by(session_id, desk) == {"begun": True}
        socket.send_text("later")
        assert socket.receive_json()["kept"] is None
        assert seen_by(session_id, desk) == {"begun": True}
        socket.send_text("now")
        assert socket.receive_json()["kept"] is True
        assert seen_by(session_id, desk) == {"begun": True, "later": True, "now": True}
        socket.send_text("last")
        assert socket.receive_json()["kept"] is None
    assert seen_by(session_id, desk) == {"begun": True, "later": True, "now": True, "last": True}


async def talk_and_go(application: ASGIApp, session_id: str) -> None:
    """Be a browser that says something in a websocket, and is gone."""
    said = iter([{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}])

    async def receive() -> Any:
        return next(said, {"type": "websocket.disconnect", "code": 1006})

    async def send(_message: Any) -> None:
        return None

    headers = [(b"cookie", f"session={session_id}".encode())]
    await application({"type": "websocket", "headers": headers, "path": "/ws", "query_string": b""}, receive, send)


def test_what_has_changed_is_saved_however_it_ends(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A client that goes away, a stream and a background task that raise: what was in the session is saved.

    If that fails too, the log says so, and what is raised is the first failure.
    """

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            websocket.session["said"] = await websocket.receive_text()
            await websocket.send_text("fine")

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            request.session["streamed"] = True
            raise RuntimeError("in the stream")

        return StreamingResponse(parts())

    async def later(request: Request) -> Response:
        async def task() -> None:
            request.session["later"] = object() if request.query_params.get("bad") else True
            raise RuntimeError("in the task")

        return PlainTextResponse("fine", background=BackgroundTask(task))

    routes = [WebSocketRoute("/ws", talk), Route("/stream", stream), Route("/later", later)]
    browser = client(app(desk.sessions, *routes))
    browser.post("/update", json={"a": 1})
    with pytest.raises(WebSocketDisconnect):
        anyio.run(talk_and_go, browser.app, browser.cookies["session"])
    with pytest.raises(RuntimeError, match="in the stream"):
        browser.get("/stream")
    with pytest.raises(RuntimeError, match="in the task"):
        browser.get("/later")
    everything = {"a": 1, "said": "hello", "streamed": True, "later": True}
    assert seen(browser) == everything
    assert caplog.records == []
    with pytest.raises(RuntimeError, match="in the task"):
        browser.get("/later?bad=1")
    assert seen(browser) == everything
    assert [getattr(record, "persistency_event", None) for record in caplog.records] == ["session_change_dropped"]


def test_a_request_that_is_cancelled_has_saved_what_it_changed(desk: Desk, in_loop: InLoop) -> None:
    """Once its response has begun: the job is asked before anything is waited for."""

    async def play() -> None:
        async def endless(scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            scope["session"]["changed"] = True
            reached.set()
            await anyio.sleep_forever()

        async def drop(_message: Any) -> None:
            return None

        reached = anyio.Event()
        headers = [(b"cookie", f"session={session_id}".encode())]
        scope = {"type": "http", "headers": headers, "method": "GET", "path": "/", "query_string": b""}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(SessionMiddleware(endless, desk.sessions), scope, cast(Any, drop), drop)
            await reached.wait()
            tasks.cancel_scope.cancel()

    session_id = cookie_of(client(desk.sessions).post("/update", json={"a": 1})).value
    in_loop(bounded, play)
    desk.job.flush().result()
    assert seen_by(session_id, desk) == {"a": 1, "changed": True}


def test_a_websocket_that_saves_gives_its_session_more_time(desk: Desk) -> None:
    """Whether that is due is decided at each save, and not once when it was opened."""
    sessions = SessionStore(desk.job, ttl=1000)

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        written = desk.written()
        assert await save(websocket)
        assert desk.written() == written  # it isn't due yet
        for _ in range(30):
            desk.clock.advance(100)
            assert await save(websocket)
        await websocket.send_json(await desk.sessions.count())
        await websocket.close()

    browser = client(app(sessions, WebSocketRoute("/ws", talk)))
    browser.post("/login/ann")
    with browser.websocket_connect("/ws") as socket:
        assert socket.receive_json() == 1


@pytest.mark.parametrize("changes", [False, True], ids=["reads", "changes"])
@pytest.mark.parametrize("waits", [0, 100, 14 * DAYS], ids=["at once", "later", "too late"])
def test_saving_tells_that_a_session_has_ended(desk: Desk, changes: bool, waits: float) -> None:
    """Revoked or over, changed or not, due for more time or not: `save` says `False`, and there is no handle."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json([await save(websocket), owner_of(websocket)])
        if waits < 14 * DAYS:
            await desk.sessions.revoke("ann")
        desk.clock.advance(waits)
        for _ in range(2):
            if changes:
                websocket.session["late"] = 1
            await websocket.send_json([await save(websocket), handle_of(websocket), owner_of(websocket)])
        await websocket.close()

    async def early(request: Request) -> Response:
        await desk.sessions.revoke("ann")
        return JSONResponse(await save(request))

    browser = client(app(desk.sessions, WebSocketRoute("/ws", talk), Route("/early", early)))
    browser.post("/login/ann")
    with browser.websocket_connect("/ws") as socket:
        assert socket.receive_json() == [True, "ann"]
        assert [socket.receive_json() for _ in range(2)] == [[False, None, None]] * 2
    assert desk.job.count("sessions").result() == 0
    browser.post("/login/ann")
    response = browser.get("/early")
    assert response.json() is False
    assert cookie_of(response) is None


def test_a_dropped_change_is_told_once(desk: Desk, dropped: Callable[[], int]) -> None:
    """A websocket without a session that saves a hundred times fills no log."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for n in range(100):
            websocket.session["n"] = n
            assert await save(websocket) is False
        await websocket.close()

    with client(app(desk.sessions, WebSocketRoute("/ws", talk))).websocket_connect("/ws") as socket:
        assert socket.receive()["type"] == "websocket.close"
    assert dropped() == 1


def test_a_websocket_that_is_refused_tells_the_browser_too(desk: Desk) -> None:
    """A refusal with a response of its own sets the cookie; a bare one can't, and begins no session."""

    async def refuse(websocket: WebSocket) -> None:
        websocket.session["tried"] = True
        if websocket.query_params.get("response"):
            await websocket.send_denial_response(PlainTextResponse("no", 403))
        else:
            await websocket.close()

    browser = client(app(desk.sessions, WebSocketRoute("/ws", refuse)))
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect("/ws"):
        pass
    assert desk.sessions.count().result() == 0
    with pytest.raises(WebSocketDenialResponse) as refused, browser.websocket_connect("/ws?response=1"):
        pass
    assert ID.fullmatch(cookie_of(refused.value).value)
    assert desk.sessions.count().result() == 1


def test_saving_before_the_response_is_told_with_it(desk: Desk) -> None:
    """A session that `save` has written is there while the request goes on, and its cookie comes with the response."""
    counted = []

    async def early(request: Request) -> Response:
        assert handle_of(request) is None
        assert await save(request) is False
        request.session["a"] = 1
        assert await save(request) is True
        counted.append(await desk.sessions.count())
        return JSONResponse({"handle": handle_of(request)})

    browser = client(app(desk.sessions, Route("/early", early)))
    response = browser.get("/early")
    assert counted == [1]
    assert sha256(cookie_of(response).value.encode()).hexdigest() == response.json()["handle"]
    assert seen(browser) == {"a": 1}
    assert desk.sessions.count().result() == 1


@pytest.mark.parametrize("first", ["/update", "/login/ann", None])
def test_two_tasks_of_a_request_save_one_session(desk: Desk, in_loop: InLoop, first: str | None) -> None:
    """The second one waits for the first, and finds nothing left to do: no session is begun twice, or lost."""

    async def both(request: Request) -> Response:
        request.session["b"] = 2
        regenerate(request, owner="bob")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save, request)
            tasks.start_soon(save, request)
        assert await save(request)
        return Response()

    async def play() -> Any:
        transport = httpx2.ASGITransport(app=cast(Any, app(desk.sessions, Route("/both", both))))
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as browser:
            if first is not None:
                await browser.post(first, json={"a": 1})
            await browser.get("/both")
            return (await browser.get("/")).json()["session"]

    assert in_loop(bounded, play)["b"] == 2
    assert [desk.sessions.count(owner).result() for owner in (None, "bob")] == [1, 1]


def test_a_save_that_fails_lets_the_next_one_go_on(
    desk: Desk, in_loop: InLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for it saves, what the first one couldn't as well."""
    told: list[Any] = []
    real = SessionStore.save

    def refused(_tx: Any) -> Any:
        raise RuntimeError("no room")

    def flaky(sessions: SessionStore, change: Any) -> Any:
        monkeypatch.setattr(SessionStore, "save", real)
        return sessions.runner.run(refused)

    async def play() -> None:
        async def both(request: Request) -> Response:
            request.session["a"] = 1
            regenerate(request, owner="ann")

            async def one() -> None:
                try:
                    told.append(await save(request))
                except RuntimeError as error:
                    told.append(str(error))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                tasks.start_soon(one)
            return Response()

        transport = httpx2.ASGITransport(app=cast(Any, app(desk.sessions, Route("/both", both))))
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as browser:
            await browser.get("/both")
            assert (await browser.get("/")).json()["session"] == {"a": 1}

    monkeypatch.setattr(SessionStore, "save", flaky)
    in_loop(bounded, play)
    assert sorted(told, key=str) == [True, "no room"]
    assert desk.sessions.count("ann").result() == 1


# -- at once ---------------------------------------------------------------------------------------------------------


class Gate:
    """Two requests of one session, each of which has read before either writes."""

    def __init__(self, parties: int = 2) -> None:
        self._left, self._open = parties, anyio.Event()

    async def pass_(self) -> None:
        """Wait until all have come."""
        self._left -= 1
        if not self._left:
            self._open.set()
        await self._open.wait()


async def together(desk: Desk, first: str, *handlers: Callable[[Request], Any]) -> tuple[Any, list[Any]]:
    """Have requests of one session handled at once; returns what the session has then, and the responses."""
    gate = Gate(len(handlers))

    def route(handler: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            assert request.session
            await gate.pass_()
            handler(request)
            return Response()

        return handle

    application = app(desk.sessions, *(Route(f"/at-once/{n}", route(handler)) for n, handler in enumerate(handlers)))
    transport = httpx2.ASGITransport(app=cast(Any, application))
    async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as browser:
        begun = await browser.post(first, json={"cart": ["a"], "seen": 1})
        cookie = {"cookie": f"session={cookie_of(begun).value}"}
        responses: list[Any] = [None] * len(handlers)

        async def ask(n: int) -> None:
            async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as tab:
                responses[n] = await tab.get(f"/at-once/{n}", headers=cookie)

        async with anyio.create_task_group() as tasks:
            for n in range(len(handlers)):
                tasks.start_soon(ask, n)
        return (await browser.get("/", headers=cookie)).json()["session"], responses


def put(**values: Any) -> Callable[[Request], Any]:
    """A handler that puts values into the session."""
    return lambda request: request.session.update(values)


def test_requests_at_once_lose_nothing_of_one_another(desk: Desk, in_loop: InLoop) -> None:
    """Of twenty requests that have all read the session, each has its own key kept; what was removed stays removed."""
    handlers = [put(**{f"k{n}": n}) for n in range(20)]
    session, _ = in_loop(
        bounded, together, desk, "/update", *handlers, lambda request: request.session.pop("seen"), put(cart=["a", "b"])
    )
    assert session == {"cart": ["a", "b"], **{f"k{n}": n for n in range(20)}}


def test_of_one_key_the_last_writer_wins(desk: Desk, in_loop: InLoop) -> None:
    """Whole: it is the value of one of them."""
    session, _ = in_loop(bounded, together, desk, "/update", *(put(cart=[n, n, n]) for n in range(8)))
    assert session["cart"] in [[n, n, n] for n in range(8)]


def test_removing_the_last_key_that_is_known_keeps_what_came_meanwhile(desk: Desk, in_loop: InLoop) -> None:
    """A session isn't over because one request has emptied it as it knew it."""

    def empty(request: Request) -> None:
        for name in list(request.session):
            del request.session[name]

    session, responses = in_loop(bounded, together, desk, "/update", put(new=1), empty)
    if session:  # `put` came first
        assert session == {"new": 1}
        assert cookie_of(responses[1]).value != "null"
    else:  # then its session was over before it
        assert cookie_of(responses[1]).value == "null"


def test_a_logout_isnt_undone_by_a_request_under_way(desk: Desk, in_loop: InLoop, dropped: Callable[[], int]) -> None:
    """Whatever comes first: afterwards there is no session, and the late change is dropped, and said to be."""
    handlers = [put(late=1), lambda request: request.session.clear(), put(later=2)]
    session, responses = in_loop(bounded, together, desk, "/login/ann", *handlers)
    assert session == {}
    assert desk.sessions.count().result() == 0
    assert cookie_of(responses[1]).value == "null"
    assert dropped() == sum(cookie_of(responses[n]) is None for n in (0, 2))


def test_a_login_isnt_undone_by_a_request_under_way(desk: Desk, in_loop: InLoop) -> None:
    """A request with the old id neither brings that back nor takes the new one from the browser."""

    def log_in(request: Request) -> None:
        request.session["user"] = "ann"
        regenerate(request, owner="ann")

    session, responses = in_loop(bounded, together, desk, "/update", log_in, put(late=1), put(later=2))
    assert session == {}  # of the old id
    given = cookie_of(responses[0]).value
    for response in responses[1:]:
        assert cookie_of(response) is None or cookie_of(response).value != "null"
    assert seen_by(given, desk)["user"] == "ann"
    assert desk.sessions.count().result() == 1


def test_these_tests_would_find_a_lost_update(desk: Desk, in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store that writes a session as a whole, which is the usual mistake, requests lose what others did."""
    real = store_module._save

    def careless(tx: Any, terms: Any, change: Any) -> Any:
        found = store_module._find(tx, terms, change.old)
        theirs = {} if found is None else found[0].values
        return real(tx, terms, change._replace(gone=theirs.keys() - change.put.keys()))

    def forgetful(session: Session) -> None:
        session.accessed = True  # and doesn't note what is stored: then all seems to be new

    monkeypatch.setattr(store_module, "_save", careless)
    monkeypatch.setattr(Session, "mark_accessed", forgetful)
    session, _ = in_loop(bounded, together, desk, "/update", *(put(**{f"k{n}": n}) for n in range(20)))
    assert len([name for name in session if name.startswith("k")]) == 1


def test_two_logins_at_once_both_hold(desk: Desk, in_loop: InLoop) -> None:
    """A form that was sent twice: both responses have a session that is logged in; the values came along once."""

    def log_in(request: Request) -> None:
        request.session["user"] = "ann"
        regenerate(request, owner="ann")

    _, responses = in_loop(bounded, together, desk, "/update", log_in, log_in)
    found = sorted((seen_by(cookie_of(response).value, desk) for response in responses), key=len)
    assert found == [{"user": "ann"}, {"cart": ["a"], "seen": 1, "user": "ann"}]
    assert desk.sessions.count("ann").result() == 2


def test_a_revoked_session_stays_revoked(desk: Desk, in_loop: InLoop, dropped: Callable[[], int]) -> None:
    """A request that was under way when its session was revoked doesn't bring it back, by no kind of change."""
    revoked: list[int] = []

    def late(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        def handle(request: Request) -> None:
            if not revoked:
                revoked.append(desk.sessions.revoke("ann").result())
            handler(request)

        return handle

    def rotate_for_ann(request: Request) -> None:
        regenerate(request, owner="ann")

    handlers = [late(handler) for handler in (put(late=1), regenerate, rotate_for_ann)]
    session, responses = in_loop(bounded, together, desk, "/login/ann", *handlers)
    assert session == {}
    assert revoked == [1]
    assert desk.job.count("sessions").result() == 0
    assert [cookie_of(response) for response in responses] == [None, None, None]
    assert dropped() == 3


def test_a_login_as_somebody_else_brings_nothing_back(desk: Desk, in_loop: InLoop) -> None:
    """Ann has logged out when the login as Bob is done that was under way: his session has nothing of hers."""

    async def play() -> Any:
        async def as_bob(request: Request) -> Response:
            assert request.session["user"] == "ann"
            await tab.post("/clear", headers=cookie)
            request.session["user"] = "bob"
            regenerate(request, owner="bob")
            assert owner_of(request) == "bob"
            return Response()

        application = app(desk.sessions, Route("/as-bob", as_bob))
        transport = httpx2.ASGITransport(app=cast(Any, application))
        async with (
            httpx2.AsyncClient(transport=transport, base_url="http://testserver") as browser,
            httpx2.AsyncClient(transport=transport, base_url="http://testserver") as tab,
        ):
            await browser.post("/login/ann")
            await browser.post("/update", json={"admin": True})
            cookie = {"cookie": f"session={browser.cookies['session']}"}
            await browser.get("/as-bob")
            return (await browser.get("/")).json()["session"]

    assert in_loop(bounded, play) == {"user": "bob"}
    assert [desk.sessions.count(owner).result() for owner in ("ann", "bob", None)] == [0, 1, 1]


# -- those who look after sessions -----------------------------------------------------------------------------------


def test_the_sessions_of_an_owner(desk: Desk) -> None:
    """They are listed, the oldest first, and revoked: one, all but one, all; others' stay."""
    begun_ms = round(desk.clock.now * 1000)
    browsers = [client(desk.sessions) for _ in range(4)]
    for browser in browsers[:3]:
        browser.post("/login/ann")
        desk.clock.advance(1)
    browsers[3].post("/login/ann2")
    handles = [browser.get("/me").json()["handle"] for browser in browsers]
    infos = desk.sessions.of("ann").result()
    assert [info.handle for info in infos] == handles[:3]
    assert infos[1] == (handles[1], "ann", begun_ms + 1000, begun_ms + 1000 + 14 * DAYS * 1000)
    assert [desk.sessions.count(owner).result() for owner in ("ann", "ann2", "an", None)] == [3, 1, 0, 4]
    assert desk.sessions.revoke_one(handles[0]).result() is True
    assert desk.sessions.revoke_one(handles[0]).result() is False
    assert desk.sessions.revoke("ann", keep=handles[2]).result() == 1
    assert [seen(browser) for browser in browsers] == [{}, {}, {"user": "ann"}, {"user": "ann2"}]
    assert desk.sessions.revoke("ann").result() == 1
    assert desk.sessions.revoke("ann").result() == 0
    assert desk.sessions.of("ann").result() == []
    assert seen(browsers[3]) == {"user": "ann2"}
    browsers[0].post("/update", json={"a": 1})
    assert desk.sessions.revoke_all().result() == 2
    assert desk.job.count("sessions").result() == 0


def test_another_owner_takes_a_session_over(desk: Desk) -> None:
    """A second login in the same browser leaves nothing with the first owner."""
    browser = client(desk.sessions)
    browser.post("/login/ann")
    browser.post("/login/bob")
    assert [desk.sessions.count(owner).result() for owner in ("ann", "bob")] == [0, 1]
    assert desk.sessions.count().result() == 1
    assert seen(browser) == {"user": "bob"}


def test_sessions_that_have_ended_leave_the_file(desk: Desk) -> None:
    """Nobody asks for them any more: they, and the rows of their owners, are reclaimed all the same."""
    desk.clock.attach(desk.persistency)
    for _ in range(5):
        client(desk.sessions).post("/login/ann")
    path, seen_version = desk.job.path, desk.written()
    assert path is not None

    def rows() -> int:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as file:
            return int(file.execute("SELECT count(*) FROM kv").fetchone()[0])

    assert rows() == 10
    desk.clock.advance(14 * DAYS)
    ended = 0
    while ended < 10:
        changes = desk.job.changes(seen_version, 1000, wait=True).result(30)
        seen_version = changes[-1].version
        ended += sum(change.kind == "expire" for change in changes)
    assert rows() == 0


def test_stores_of_several_names_share_a_job(desk: Desk) -> None:
    """The sessions of one are unknown to the other."""
    one, two = SessionStore(desk.job, name="one"), SessionStore(desk.job, name="two")
    session_id = cookie_of(client(one).post("/update", json={"a": 1})).value
    assert client(two).get("/", headers={"cookie": f"session={session_id}"}).json() == {"session": {}}
    assert two.revoke_all().result() == 0
    assert one.count().result() == 1


# -- FastAPI, and several processes ----------------------------------------------------------------------------------


def user(request: Request) -> str:
    """A dependency that reads."""
    return cast(str, request.session.get("user", "nobody"))


def current(connection: HTTPConnection) -> Session:
    """A dependency that gives the session."""
    return cast(Session, connection.session)


def test_it_works_with_fastapi_and_its_dependencies(desk: Desk) -> None:
    """A dependency reads the session, in an `async def` and in a `def` that runs in a thread."""
    api = FastAPI()
    api.add_middleware(SessionMiddleware, sessions=desk.sessions)

    @api.get("/who")
    def who(name: Annotated[str, Depends(user)]) -> str:
        return name

    @api.post("/enter/{name}")
    async def enter(name: str, request: Request, session: Annotated[Session, Depends(current)]) -> str:
        session["user"] = name
        regenerate(request, name)
        return name

    @api.post("/visit")
    def visit(session: Annotated[Session, Depends(current)]) -> int:
        session["visits"] = session.get("visits", 0) + 1
        return cast(int, session["visits"])

    browser = client(api)
    assert browser.get("/who").json() == "nobody"
    assert browser.post("/enter/ann").json() == "ann"
    assert browser.get("/who").json() == "ann"
    assert [browser.post("/visit").json() for _ in range(3)] == [1, 2, 3]
    assert [info.owner for info in desk.sessions.of("ann").result()] == ["ann"]


WORKER = """
import asyncio, sys
import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route
from persistency import Persistency
from persistency.integrations.starlette import SessionMiddleware, SessionStore
from persistency.recipes import Baton

root, name, cookie = sys.argv[1:]

async def put(request):
    request.session[f"{name}-{request.query_params['n']}"] = 1
    return Response()

async def main():
    async with Persistency(root) as p:
        baton = Baton(p, "web")
        sessions = SessionStore(baton)
        app = Starlette(routes=[Route("/", put)], middleware=[Middleware(SessionMiddleware, sessions=sessions)])
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as browser:
            for n in range(15):
                (await browser.get(f"/?n={n}", headers={"cookie": cookie})).raise_for_status()
        await baton.aclose()

asyncio.run(main())
"""


def test_several_processes_share_sessions_by_a_baton(tmp_path: Path) -> None:
    """Two workers change one session at once, each key by key: all of it is there afterwards."""
    with Persistency(tmp_path) as p:
        with Baton(p, "web") as baton:
            cookie = cookie_of(client(SessionStore(baton)).post("/update", json={"a": 1})).value
        workers = [
            subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, str(tmp_path), name, f"session={cookie}"])
            for name in "xy"
        ]
        assert [worker.wait(60) for worker in workers] == [0, 0]
        with Baton(p, "web") as baton:
            sessions = SessionStore(baton)
            browser = client(sessions)
            session = browser.get("/", headers={"cookie": f"session={cookie}"}).json()["session"]
            assert session == {"a": 1, **{f"{name}-{n}": 1 for name in "xy" for n in range(15)}}
            assert sessions.count().result() == 1


# -- wrong arguments -------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_told_at_the_call(desk: Desk) -> None:
    """`Misuse` for what no store can be made of, what no cookie can have, and what browsers would refuse."""
    store, middleware, sessions = cast(Any, SessionStore), cast(Any, SessionMiddleware), cast(Any, desk.sessions)
    for arguments in (
        {"runner": "job"},
        {"runner": desk.persistency},
        {"name": ""},
        {"name": "n" * 256},
        {"name": "\ud800"},
        {"ttl": 0},
        {"ttl": "1"},
        {"ttl": True},
        {"ttl": float("nan")},
        {"ttl": 10**11},
        {"touch_every": -1},
        {"lifetime": 0},
        {"rolling": 1},
    ):
        with pytest.raises(Misuse):
            store(**{"runner": desk.job, **arguments})
    for options in (
        {"sessions": desk.job},
        {"session_cookie": "a b"},
        {"session_cookie": ""},
        {"session_cookie": "a\r\nset-cookie: b"},
        {"path": "/; domain=evil"},
        {"path": "/\n"},
        {"domain": ""},
        {"same_site": "Lax"},
        {"same_site": "none"},
        {"partitioned": True},
        {"session_cookie": "__Secure-s"},
        {"session_cookie": "__Host-s", "https_only": True, "path": "/a"},
        {"session_cookie": "__Host-s", "https_only": True, "domain": "example.com"},
    ):
        with pytest.raises(Misuse):
            middleware(app(sessions), **{"sessions": sessions, **options})
    middleware(app(sessions), sessions, session_cookie="__Host-s", https_only=True)
    for call in (
        lambda: sessions.revoke(None),
        lambda: sessions.revoke(""),
        lambda: sessions.of(5),
        lambda: sessions.of("\ud800"),
        lambda: sessions.count("o" * 1025),
        lambda: sessions.revoke_one("no handle"),
        lambda: sessions.revoke_one(5),
        lambda: Session().renew(cast(Any, 5)),
    ):
        with pytest.raises(Misuse):
            call()


def test_a_session_that_was_replaced_is_told_as_such(desk: Desk) -> None:
    """An application that puts a dict of its own into the scope can't have that saved, and is told how to."""

    async def replace(request: Request) -> Response:
        request.scope["session"] = {"mine": 1}
        for call in (regenerate, handle_of, owner_of):
            with pytest.raises(Misuse, match="clear"):
                call(request)
        with pytest.raises(Misuse, match="clear"):
            await save(request)
        return Response()

    browser = client(app(desk.sessions, Route("/replace", replace)))
    browser.post("/update", json={"a": 1})
    browser.get("/replace")
    assert seen(browser) == {"a": 1}


@pytest.mark.parametrize("theirs", [True, False], ids=["Starlette's", "ours"])
def test_a_mounted_application_may_have_sessions_of_its_own(desk: Desk, theirs: bool) -> None:
    """Neither what it puts into its sessions nor that it has none changes the site's; ours is put back afterwards."""
    after: list[Any] = []
    routes = [Route("/", view), Route("/update", update, methods=["POST"])]
    inner: ASGIApp = Starlette(routes=routes)
    if theirs:
        inner = CookieSessions(inner, secret_key="key", session_cookie="admin")
    else:
        inner = SessionMiddleware(inner, SessionStore(desk.job, name="admin"), session_cookie="admin")

    def looking(application: ASGIApp) -> ASGIApp:
        async def look(scope: Any, receive: Any, send: Any) -> None:
            await application(scope, receive, send)
            if scope["type"] == "http":
                after.append(dict(scope["session"]))

        return look

    site = Starlette(
        routes=[*ROUTES, Mount("/admin", app=inner)],
        middleware=[Middleware(SessionMiddleware, sessions=desk.sessions), Middleware(looking)],
    )
    browser = client(site)
    browser.post("/login/ann")
    before = desk.written()
    assert browser.get("/admin/").json() == {"session": {}}
    assert cookie_of(browser.get("/admin/")) is None
    assert desk.written() == before
    browser.post("/admin/update", json={"token": "secret"})
    assert browser.get("/admin/").json() == {"session": {"token": "secret"}}
    assert after[-1] == ({"token": "secret"} if theirs else {"user": "ann"})
    assert seen(browser) == {"user": "ann"}
    assert [info.owner for info in desk.sessions.of("ann").result()] == ["ann"]


def test_a_failed_save_is_made_up_for_by_the_next(desk: Desk) -> None:
    """A logout that couldn't be written is still one when it is tried again."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        websocket.session.clear()
        websocket.session["bad"] = object()
        with pytest.raises(Misuse):
            await save(websocket)
        del websocket.session["bad"]
        await websocket.send_json(await save(websocket))

    browser = client(app(desk.sessions, WebSocketRoute("/ws", talk)))
    browser.post("/login/ann")
    with browser.websocket_connect("/ws") as socket:
        assert socket.receive_json() is False
    assert desk.sessions.count().result() == 0


def test_a_save_that_was_cancelled_is_made_up_for(desk: Desk) -> None:
    """A session remembers that it was to be cleared, if whoever saved it was stopped."""
    turn = Session({"a": 1})
    turn.clear()
    taken = turn.take_turn()
    assert taken.cleared
    assert not turn.take_turn().cleared
    turn.give_back(taken)
    assert turn.take_turn().cleared
    turn.renew("ann")
    taken = turn.take_turn()
    turn.renew("bob")
    turn.give_back(taken)
    assert turn.take_turn().owner == "bob"
