"""Care: what is done with a job as a whole, in steps beside its work: checking it, giving space back.

Rules:
  1. A step asks the job for a little, as any client does, and waits; nothing is held between two of them.
  2. Steps are to be run in a thread that may wait.

Doesn't know: threads, files, SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from persistency.actor.errand import Steps, undivided_each
from persistency.actor.reply import Reply
from persistency.codec.keys import Key
from persistency.errors import Misuse, StorageError
from persistency.storage.port import Barrier, Extent, GiveBack

GIVE_BACK_PAGES = 1_000  # in one slice: 4 MB
_KEYS_PAGE = 1_000


def begun(reply: Reply[Steps[Any]]) -> Steps[Any]:
    """Take the steps that a job has answered with, once it has."""
    return (yield from undivided_each(reply.result()))


def checked(
    stored: Reply[Steps[list[str]]], categories: Callable[[], Reply[list[str]]], keys: Callable[[str], Iterable[Key]]
) -> Steps[list[str]]:
    """Look for what is wrong with what is stored, and then for keys that don't decode; return what was found."""
    problems: list[str] = yield from begun(stored)
    seen = 0
    try:
        names = categories().result()
    except StorageError as error:
        return [*problems, f"the categories can't be read: {error}"]
    for category in names:
        strange, first = 0, None
        try:
            for at, key in enumerate(keys(category), seen + 1):
                if not _decodes(key):
                    strange, first = strange + 1, first or key
                if at % _KEYS_PAGE == 0:
                    yield at, None
                seen = at
        except StorageError as error:
            problems.append(f"category {category!r}: its keys can't be read: {error}")
        if strange:
            shown = bytes(first or b"")[:100]
            problems.append(f"category {category!r}: {strange} keys are no encoded tuples, the first: {shown!r}")
    return problems


def _decodes(key: Key) -> bool:
    try:
        key.parts  # noqa: B018  # asked for what it raises
    except Misuse:
        return False
    return True


def compacted(ask: Callable[[Any], Reply[Any]]) -> Steps[int]:
    """Give unused pages back, a slice at a time, and shorten the file; return how many bytes it has lost."""
    before = ask(Extent()).result()
    while left := ask(GiveBack(GIVE_BACK_PAGES)).result():
        yield before - ask(Extent()).result(), None
    ask(Barrier(fold=True, rebuild=left is None)).result()
    after = ask(Extent()).result()
    return max(0, int(before - after))
