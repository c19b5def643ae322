"""The middleware: sessions for Starlette and FastAPI, `request.session`, with an id in a cookie.

Rules:
  1. Pure ASGI: nothing but the first message of a response is touched, and no body is held up.
  2. A session is read before the request is handled, and saved before its response begins: who has the response can
     rely on it. What is changed later, in a stream, a background task or a websocket, is saved when that is over,
     however it ends.
  3. A request whose failure reaches the middleware before its response begins has changed nothing. One that an
     exception handler answers has a response, and is saved as any other.
  4. What is saved is the session that was made here. An application that is mounted may have a session middleware of
     its own, which puts another one into the same scope.
  5. The cookie is set if the browser has to be told something: another id, more time, or that the session is over.

Doesn't know: how sessions are stored, what is in them.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persistency import Misuse
from persistency.integrations.starlette.sessions import SessionStore, digest_of
from persistency.integrations.starlette.visit import Visit

_VISIT: Final = "persistency.session"  # where a scope has its visit
_STARTS: Final = frozenset(("http.response.start", "websocket.accept", "websocket.http.response.start"))
_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # a token of RFC 6265
_ATTRIBUTE: Final = re.compile(r"[\x20-\x3a\x3c-\x7e]+")  # no control characters, no semicolon
_OVER: Final = "expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; "


class SessionMiddleware:
    """Sessions in a job: `app.add_middleware(SessionMiddleware, sessions=SessionStore(job))`.

    The options are those of Starlette's own, and so is `request.session`: a dict. `https_only` adds `Secure`: set it
    wherever the service is reached by HTTPS. With `persistent=False` the browser forgets the cookie when it is closed;
    the session in the job ends by itself all the same. Raises `Misuse` for wrong arguments.
    """

    def __init__(
        self,
        app: ASGIApp,
        sessions: SessionStore,
        *,
        session_cookie: str = "session",
        path: str = "/",
        same_site: Literal["lax", "strict", "none"] = "lax",
        https_only: bool = False,
        domain: str | None = None,
        partitioned: bool = False,
        persistent: bool = True,
    ) -> None:
        if not isinstance(sessions, SessionStore):
            raise Misuse(f"sessions must be a SessionStore, not {type(sessions).__name__}: pass SessionStore(job)")
        if not isinstance(session_cookie, str) or not _NAME.fullmatch(session_cookie):
            raise Misuse(f"session_cookie is no name of a cookie: {session_cookie!r:.80}")
        for argument, text in (("path", path), ("domain", domain)):
            if text is not None and not (isinstance(text, str) and _ATTRIBUTE.fullmatch(text)):
                raise Misuse(f"{argument} is nothing a cookie can have: {text!r:.80}")
        if same_site not in ("lax", "strict", "none"):
            raise Misuse(f"same_site must be one of 'lax', 'strict', 'none', not {same_site!r:.80}")
        if (same_site == "none" or partitioned) and not https_only:
            raise Misuse("browsers refuse such a cookie without Secure: pass https_only=True")
        if session_cookie.startswith("__Secure-") and not https_only:
            raise Misuse("browsers refuse a __Secure- cookie without Secure: pass https_only=True")
        if session_cookie.startswith("__Host-") and (not https_only or domain is not None or path != "/"):
            raise Misuse("browsers refuse a __Host- cookie but with https_only=True, path='/' and no domain")
        self.app: ASGIApp = app
        self.sessions: SessionStore = sessions
        self.session_cookie: str = session_cookie
        self._path = path
        self._persistent = persistent
        self._flags: str = "httponly; samesite=" + same_site
        self._flags += "; secure" if https_only else ""
        self._flags += f"; domain={domain}" if domain is not None else ""
        self._flags += "; partitioned" if partitioned else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or one websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        visit = Visit(self.sessions)
        await visit.open(HTTPConnection(scope).cookies.get(self.session_cookie))
        outer = {name: scope[name] for name in ("session", _VISIT) if name in scope}
        scope["session"] = visit.session
        scope[_VISIT] = visit

        async def send_with_cookie(message: Message) -> None:
            if message["type"] in _STARTS and not visit.begun:
                await visit.save()
                visit.begun = True
                self._tell(visit, message)
            await send(message)

        try:
            await self.app(scope, receive, send_with_cookie)
        except GeneratorExit:  # nobody drives this any more, and nothing can be awaited
            raise
        except BaseException:  # a client that went away, a background task, a cancellation
            if visit.begun:
                await visit.end_failed()
            raise
        else:
            await visit.end()
        finally:
            scope.update(outer)

    def _tell(self, visit: Visit, message: Message) -> None:
        """Put into the first message of a response what the browser, and caches on the way, have to know."""
        headers = MutableHeaders(raw=list(message.get("headers") or []))
        if visit.left_s is not None:
            session_id, age = visit.session_id, f"Max-Age={visit.left_s}; " if self._persistent else ""
            value = (
                f"null; path={self._path}; {_OVER}" if session_id is None else f"{session_id}; path={self._path}; {age}"
            )
            headers.append("set-cookie", f"{self.session_cookie}={value}{self._flags}")
        if visit.left_s is not None or visit.session.accessed:
            headers.add_vary_header("Cookie")
        message["headers"] = headers.raw


def regenerate(connection: HTTPConnection, owner: str | None = None) -> None:
    """Give the session of a request another id, at every login: an id that was known before is worth nothing then.

    With an `owner` (text: the user's id) it belongs to that user from now on, so that `SessionStore.of(owner)` and
    `revoke(owner)` find it, and its lifetime begins anew; there is one then even if nothing was put in. Its values
    stay. What other requests that are under way with the old id change is dropped. Of a session that has ended
    meanwhile nothing comes back: another owner gets one with what this request has put in, the same owner none.
    Raises `Misuse` when the response has begun, or without a `SessionMiddleware`.
    """
    visit = _visit_of(connection)
    if visit.begun:
        raise Misuse("the response has begun, and the browser can't be told of another id: call it earlier")
    visit.session.renew(owner)


async def save(connection: HTTPConnection) -> bool:
    """Write what has changed now, and not only at the end: in a websocket, or before a slow answer.

    Returns whether there is a session afterwards: `False` also if it was revoked or has ended meanwhile. What is
    written stays if the request fails afterwards; but the browser isn't told then of an id that is new.
    """
    visit = _visit_of(connection)
    await visit.save(ask=True)
    return visit.session_id is not None


def handle_of(connection: HTTPConnection) -> str | None:
    """Return the handle of the session of a request, as in `SessionInfo`; `None` if it has none, or none yet."""
    visit = _visit_of(connection)
    return None if visit.session_id is None else digest_of(visit.session_id).hex()


def owner_of(connection: HTTPConnection) -> str | None:
    """Return whose session a request has, as `regenerate` was told at the login; `None` if it is nobody's."""
    return _visit_of(connection).owner


def _visit_of(connection: HTTPConnection) -> Visit:
    visit = connection.scope.get(_VISIT)
    if not isinstance(visit, Visit):
        raise Misuse(
            "the request has no session of this package",
            hint="Add the middleware: app.add_middleware(SessionMiddleware, sessions=SessionStore(job)).",
        )
    if connection.scope["session"] is not visit.session:
        raise Misuse(
            "the request's session was put there by somebody else: another session middleware, or the application",
            hint="Change the session, and don't replace it: clear() and update().",
        )
    return visit
