"""Starlette and FastAPI: sessions kept in a job, in the place of Starlette's own cookies (the extra `starlette`).

    app.add_middleware(SessionMiddleware, sessions=SessionStore(job))  # and `request.session` is a dict, as before

Rules:
  1. A browser is given an id that nobody can guess, and nothing else; the job is given its hash, and not the id.
  2. Under event loops nothing here blocks: what the job is asked for is awaited, by asyncio or trio.

Doesn't know: who logs in, and how.
"""

from __future__ import annotations

try:
    import starlette.requests  # noqa: F401  # to tell which extra is missing, before anything needs it
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "starlette":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.starlette needs the extra 'starlette': pip install 'persistency[starlette]'",
        name=_missing.name,
    ) from None

from persistency.integrations.starlette.middleware import SessionMiddleware, handle_of, owner_of, regenerate, save
from persistency.integrations.starlette.sessions import SessionInfo, SessionStore
from persistency.integrations.starlette.visit import Session

__all__ = ["Session", "SessionInfo", "SessionMiddleware", "SessionStore", "handle_of", "owner_of", "regenerate", "save"]
