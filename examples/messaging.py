"""Messaging: the history of many channels in one job, as a chat or data-sync node keeps it.

    with open_channels("data") as channels:                   # without a root: in memory
        channels.update_history("general", appends=[message])     # an event: never waits for the disk
        history = channels.load("general").result().history       # a request; under asyncio: await channels.load(...)

One job, "sds", serves all channels. Its rows:

| category | key | payload, in CBOR |
|---|---|---|
| sds.meta | (channel,) | what the node knows of the channel: its Lamport clock, its Bloom filter |
| sds.log | (channel, lamport, message id) | sender and content |

Rules:
  1. What sorts a history is in its keys, so that a scan gives it by (Lamport time, message id), whatever the order in
     which messages came; and what is in the key isn't repeated in the payload.
  2. Saving and updating are events: a write that fails later must not stop a node from sending messages. It isn't lost
     either: the program's log tells it, and so does the next `job.flush()`. (A job that takes nothing any more, being
     closed for example, says so at the call.) Loading and dropping are requests: whoever asked gets their failures.
  3. A payload is a CBOR map of names to fields, so a later release may add fields that this one doesn't read.
  4. A log row that can't be read is skipped with a warning, since the others are still good; a channel whose meta
     can't be read is not known at all, and that is an error.

Doesn't know: how messages are sent, who may read them, when history is old enough to be evicted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any

from persistency import (
    Corrupt,
    Delete,
    DeletePrefix,
    Job,
    Key,
    Misuse,
    Persistency,
    Put,
    Reply,
    Row,
    Transaction,
    key,
)
from persistency.codec.values import decode, encode

JOB = "sds"
META = "sds.meta"
LOG = "sds.log"

logger = logging.getLogger("messaging")


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a channel's history. Lamport time and id are its place there and stand in its key."""

    lamport: int
    message_id: str
    sender: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Meta:
    """What a node knows of a channel. The defaults are those of a channel nobody has heard of yet."""

    lamport: int = 0
    bloom: bytes = b""


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel as it was loaded: its history by (Lamport time, message id)."""

    meta: Meta = field(default_factory=Meta)
    history: list[Message] = field(default_factory=list)


class Channels:
    """All channels of one job. It keeps nothing itself, so there may be several of it, in any thread or event loop.

    Under asyncio: `channels = Channels(await persistency.aopen_job("sds"))`, then `await channels.load(name)`.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def save_meta(self, channel: str, meta: Meta) -> None:
        """Post a channel's meta, in place of the one it has."""
        self.job.put(META, (channel,), encode(asdict(meta)))

    def update_history(self, channel: str, appends: Iterable[Message] = (), evicts: Iterable[Message] = ()) -> None:
        """Post messages to be added and others to be removed: all of it happens, or nothing.

        Without any, nothing is written. To evict a message that isn't there is fine.
        """
        puts = [Put(LOG, _place(channel, message), _payload(message)) for message in appends]
        deletes = [Delete(LOG, _place(channel, message)) for message in evicts]
        self.job.persist([*puts, *deletes])

    def load(self, channel: str) -> Reply[Channel]:
        """Ask for a channel; one that was never written is empty.

        The answer sees all that was posted before. The reply raises `Corrupt` if the meta can't be read.
        """
        # The rows are read in one transaction, inside the actor; decoded they are by whoever takes the answer.
        return self.job.run(_read, channel).map(lambda found: _decode_channel(channel, *found))

    def drop(self, channel: str) -> Reply[int]:
        """Remove a channel's meta and history: both, or the reply says why not. Other channels aren't touched."""
        return self.job.commit([DeletePrefix(LOG, (channel,)), Delete(META, (channel,))])


@contextmanager
def open_channels(root: str | PathLike[str] | None = None) -> Iterator[Channels]:
    """Open the channels of a root directory, or (`None`) of a memory that ends with the block.

    Leaving the block writes what was posted, and raises `WriteFailed` if some of it couldn't be written.
    """
    with Persistency(":memory:" if root is None else root) as persistency:
        yield Channels(persistency.open_job(JOB))


def _place(channel: str, message: Message) -> Key:
    return key(channel, message.lamport, message.message_id)


def _payload(message: Message) -> bytes:
    return encode({"sender": message.sender, "content": message.content})


def _read(tx: Transaction, channel: str) -> tuple[bytes | None, list[Row]]:
    return tx.get(META, (channel,)), tx.scan_prefix(LOG, (channel,))


def _decode_channel(channel: str, meta: bytes | None, rows: list[Row]) -> Channel:
    try:
        known = Meta() if meta is None else Meta(**_fields(meta, lamport=int, bloom=bytes))
    except Corrupt as error:
        raise Corrupt(f"the meta of channel {channel!r} can't be read: {error}") from error
    return Channel(known, _history(rows))


def _history(rows: Iterable[Row]) -> list[Message]:
    history = []
    for row in rows:
        try:
            history.append(_message(row))
        except (Corrupt, Misuse) as error:  # Misuse: the key isn't one of ours
            logger.warning("skipped a message that can't be read, %r: %s", row.key, error)
    return history


def _message(row: Row) -> Message:
    match row.key.parts:
        case (_, int(lamport), str(message_id)):
            return Message(lamport, message_id, **_fields(row.payload, sender=str, content=bytes))
        case _:
            raise Corrupt("its key isn't (channel, lamport, message id)")


def _fields(payload: bytes, **types: type) -> dict[str, Any]:
    """Return fields of a payload by their names. Raises `Corrupt` if one is missing or of another type."""
    found = decode(payload)
    if not isinstance(found, dict):
        raise Corrupt(f"a map was expected, not {type(found).__name__}")
    for name, expected in types.items():
        if not isinstance(found.get(name), expected):
            raise Corrupt(f"its field {name!r} isn't {expected.__name__}")
    return {name: found[name] for name in types}


def show(channels: Channels, channel: str) -> None:
    """Print a channel's clock and history."""
    loaded = channels.load(channel).result()
    print(f"#{channel}, Lamport time {loaded.meta.lamport}: {len(loaded.history)} messages")
    for message in loaded.history:
        print(f"  {message.lamport:>3} {message.message_id}  {message.sender}: {message.content.decode()}")


def main(root: str) -> None:
    """Write two channels under a root, close everything, and find them again."""
    hello = Message(1, "m-a", "ada", b"hello")
    late = Message(2, "m-b", "bob", b"my network was down")
    answer = Message(2, "m-c", "ada", b"there you are")
    with open_channels(root) as channels:
        channels.update_history("general", appends=[answer, hello])
        channels.update_history("general", appends=[late])  # out of order: it is sorted by its key
        channels.save_meta("general", Meta(lamport=2))
        channels.update_history("general-2", appends=[Message(1, "m-x", "cy", b"another channel")])
        show(channels, "general")

    with open_channels(root) as channels:  # all of it is in <root>/sds.db
        channels.update_history("general", appends=[Message(3, "m-d", "bob", b"bye")], evicts=[hello])
        show(channels, "general")
        channels.drop("general").result()
        show(channels, "general")
        show(channels, "general-2")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with TemporaryDirectory() as directory:
            main(directory)
