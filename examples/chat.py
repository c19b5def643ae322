"""Chat: the history of many tenants' channels behind HTTP, on one job per tenant. docs/tutorial.md builds it.

    CHAT_ROOT=data PORT=8000 python examples/chat.py        # http://127.0.0.1:8000/docs shows every call

The job "directory" knows the tenants; each of them has a job of its own, "tenant-<name>":

| category | key | payload |
|---|---|---|
| last | (channel,) | the number of the channel's last message, a CBOR integer |
| message | (channel, number) | author, text and time of a message, a CBOR map |
| read | (channel, user) | the number of the last message the user has read, a CBOR integer |
| online | (user,) | nothing: the row is there, or it has ended |

Rules:
  1. What is answered 201 is committed; no end of the process can take it. The number of a message and the message are
     written in one transaction, so numbers have no gaps and are given once.
  2. What is answered 202 was posted: the next request sees it, a crash may take it. A read mark and a sign of life are
     worth no more.
  3. Reading never makes a file: a tenant is there once it was put into the directory.
  4. A live stream gives what is committed, from the moment it was opened or from behind its Last-Event-ID.

Doesn't know: who may do what. Put it behind something that does, or add a dependency that asks.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from socket import socket
from typing import Annotated

import uvicorn
from fastapi import Body, Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import AwareDatetime, BaseModel, Field

from persistency import (
    Category,
    ChangeFeed,
    FeedTruncated,
    Job,
    Key,
    KeyRange,
    Persistency,
    PersistencyError,
    QuotaExceeded,
    Transaction,
    WriteFailed,
    key,
    typed,
)

LIMITS = {"feed_changes_max": 10_000, "max_bytes": 100_000_000}  # of each tenant
ONLINE_SECONDS = 30

Tenant = Annotated[str, Path(pattern="^[a-z0-9-]{1,32}$")]
Name = Annotated[str, Path(min_length=1, max_length=64)]
Number = Annotated[int, Query(ge=1, le=2**53)]


class Draft(BaseModel):
    """What a client posts."""

    author: str = Field(min_length=1, max_length=64)
    text: str = Field(max_length=4_000)


class Stored(Draft):
    """What a row holds; the channel and the number are in its key."""

    sent: AwareDatetime


class Message(Stored):
    """What a client gets."""

    number: int


STORED = typed(Stored)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the root when the server starts; when it stops, write what was posted and close everything."""
    root = os.environ.get("CHAT_ROOT", "data")
    async with Persistency(root, max_live_jobs=64, idle_ttl=300) as persistency:
        app.state.persistency = persistency
        app.state.directory = Category(await persistency.aopen_job("directory"), "tenant")
        app.state.feeds = set()
        yield


app = FastAPI(title="Chat history", lifespan=lifespan)


async def tenant_job(tenant: Tenant, request: Request) -> Job:
    """Give the job of the tenant in the path, opened if need be."""
    if not await request.app.state.directory.exists((tenant,)):
        raise HTTPException(404, f"there is no tenant {tenant!r}")
    job: Job = await request.app.state.persistency.aopen_job(f"tenant-{tenant}", **LIMITS)
    return job


TenantJob = Annotated[Job, Depends(tenant_job)]


@app.put("/tenants/{tenant}")
async def sign_up(tenant: Tenant, request: Request, response: Response) -> dict[str, str]:
    """Make a tenant; one that is there already stays as it is."""
    since = {"since": datetime.now(UTC)}
    created = await request.app.state.directory.compare_and_set((tenant,), None, since)
    response.status_code = 201 if created else 200
    return {"tenant": tenant}


# -- history -----------------------------------------------------------------------------------------------------


def append(tx: Transaction, channel: str, payload: bytes) -> int:
    """Inside the job, in one transaction: give a message the next number of its channel."""
    number = tx.increment("last", (channel,))
    tx.put("message", (channel, number), payload)
    return number


def message_of(place: Key, stored: Stored) -> Message:
    """Put together what a row's key and its payload say."""
    _channel, number = place.parts
    return Message(number=number, **stored.model_dump())


@app.post("/tenants/{tenant}/channels/{channel}/messages", status_code=201)
async def post(job: TenantJob, channel: Name, draft: Draft) -> Message:
    """Add a message to a channel; it is committed when this is answered."""
    stored = Stored(**draft.model_dump(), sent=datetime.now(UTC))
    number = await job.run(append, channel, STORED.encode(stored))
    return Message(number=number, **stored.model_dump())


@app.get("/tenants/{tenant}/channels/{channel}/messages")
async def read(
    job: TenantJob,
    channel: Name,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Number | None = None,
) -> list[Message]:
    """Give the newest messages of a channel, or the newest before a number; the newest first."""
    whole = KeyRange.prefix((channel,))
    wanted = whole if before is None else KeyRange(whole.start, key(channel, before))
    rows = await Category(job, "message", STORED).scan(wanted, reverse=True, limit=limit)
    return [message_of(row.key, row.value) for row in rows]


@app.post("/tenants/{tenant}/channels/{channel}/import", status_code=201)
async def take_in(
    job: TenantJob, channel: Name, history: Annotated[list[Stored], Body(min_length=1, max_length=10_000)]
) -> dict[str, int]:
    """Add messages from elsewhere, the oldest first; all of them are committed when this is answered."""
    messages = Category(job, "message", STORED)
    last = await job.increment("last", (channel,), len(history))
    for number, stored in enumerate(history, last - len(history) + 1):
        messages.put((channel, number), stored)  # an event: nobody waits for the disk
        await job.drain()  # but for room, where others have filled the mailbox
    await job.flush()
    return {"first": last - len(history) + 1, "last": last}


# -- who has read what, and who is there -------------------------------------------------------------------------


@app.put("/tenants/{tenant}/channels/{channel}/read/{user}", status_code=202)
async def mark_read(job: TenantJob, channel: Name, user: Name, number: Number) -> None:
    """Note down the last message that a user has read."""
    Category(job, "read").put((channel, user), number)


@app.get("/tenants/{tenant}/channels/{channel}/unread/{user}")
async def unread(job: TenantJob, channel: Name, user: Name) -> int:
    """Count the messages behind a user's read mark."""
    number = await Category(job, "read").get((channel, user), 0)
    return await job.count("message", KeyRange(key(channel, number + 1), KeyRange.prefix((channel,)).stop))


@app.put("/tenants/{tenant}/online/{user}", status_code=202)
async def sign_of_life(job: TenantJob, user: Name) -> None:
    """Count a user as present for a while; a client says so again before it is over."""
    job.put("online", (user,), b"", ttl=ONLINE_SECONDS)


@app.get("/tenants/{tenant}/online")
async def online(job: TenantJob) -> list[str]:
    """Name the users who are present."""
    return [place.parts[0] for place in await job.keys("online")]


# -- live --------------------------------------------------------------------------------------------------------


@app.get("/tenants/{tenant}/channels/{channel}/live", response_class=EventSourceResponse)
async def live(
    job: TenantJob,
    channel: Name,
    request: Request,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Send messages as they are committed; a client that was away goes on behind the last event it has seen."""
    feeds = request.app.state.feeds
    with ChangeFeed(job, "message", (channel,), after=last_event_id) as feed:
        feeds.add(feed)
        try:
            yield ServerSentEvent(comment="following")
            async for change in feed:
                if change.payload is not None:  # a put
                    message = message_of(change.key, STORED.decode(change.payload))
                    yield ServerSentEvent(data=message, event="message", id=str(change.version))
        except FeedTruncated:  # it was away for too long
            yield ServerSentEvent(data="read the newest messages, and follow anew", event="truncated", id="")
        finally:
            feeds.discard(feed)


# -- what can go wrong -------------------------------------------------------------------------------------------


@app.exception_handler(PersistencyError)
async def refuse(_request: Request, error: PersistencyError) -> JSONResponse:
    """Tell clients what they can do about; all else is a fault of this service, and stays one."""
    failures = error.failures if isinstance(error, WriteFailed) else ()
    if any(isinstance(each, QuotaExceeded) for each in (error, *(failure.error for failure in failures))):
        return JSONResponse({"detail": "the tenant has no room left"}, 507)
    if error.retryable:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})
    raise error


@app.exception_handler(TimeoutError)
async def no_slot(_request: Request, _error: TimeoutError) -> JSONResponse:
    """All jobs that may be live have been busy for `open_timeout`."""
    return JSONResponse({"detail": "too many tenants are busy"}, 503, {"Retry-After": "5"})


# -- as a program ------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """A server that ends its live streams when it is told to end; they have no end of their own."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """End the streams, then do what every server does: answer what has begun, and leave the lifespan."""
        for feed in list(app.state.feeds):
            feed.close()
        await super().shutdown(sockets)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, port=int(os.environ.get("PORT", "8000")), timeout_graceful_shutdown=5)).run()
