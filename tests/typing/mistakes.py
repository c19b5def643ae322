"""What a type checker must tell a user: every line that ends in a comment `wrong: ...`, and no other one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from persistency import (
    RAW,
    Category,
    CategoryMapping,
    Check,
    Job,
    Key,
    KeyRange,
    KVStore,
    Persistency,
    Put,
    Reply,
    Row,
    Transaction,
    typed,
)


@dataclass
class User:
    """A dataclass."""

    name: str


def arguments(p: Persistency, job: Job) -> None:
    """Arguments of the wrong type, or unknown."""
    job.put("users", "ada", b"1")  # wrong: a key is a tuple
    job.put("users", ("ada",), "1")  # wrong: a payload is bytes
    job.put("users", ("ada",), b"1", ttl="60")  # wrong: a ttl is seconds or a timedelta
    job.put("users", ("ada",), b"1", 60)  # wrong: a ttl is given by its name
    job.put(b"users", ("ada",), b"1")  # wrong: a category is text
    job.delete_range("users", ("ada",))  # wrong: a range is a KeyRange
    job.persist(b"1")  # wrong: not an operation
    job.commit([Put("users", ("ada",), b"1"), Check])  # wrong: a class is no operation
    job.scan("users", limit="3")  # wrong: a limit is a number
    job.iterate("users", keys=True)  # wrong: there is no such option
    p.open_job("alpha", durability="disk")  # wrong: there is no such level
    p.open_job("alpha", max_byte=1)  # wrong: there is no such option
    p.open_job("alpha", on_error=print_failure)  # wrong: it is called with the id and the failures
    Persistency("data", clock=60)  # wrong: a clock is a function


def print_failure(failure: str) -> None:
    """Take something else than what it is given."""


def answers(job: Job) -> None:
    """Answers taken for what they aren't."""
    length: int = len(job.get("users", ("ada",)))  # wrong: a reply is not its answer
    payload: bytes = job.get("users", ("ada",)).result()  # wrong: there may be no row
    name: str = job.put("users", ("ada",), b"1")  # wrong: an event answers nothing
    text: Reply[str] = job.get("users", ("ada",)).map(len_of)  # wrong: it gives a number
    rows: list[Row] = job.scan("users")  # wrong: a reply is not its answer
    for row in job.iterate("users"):
        key: str = row.key  # wrong: a Key
        print(key)
    for each in job.iterate("users", keys_only=True):
        print(each.payload)  # wrong: only keys
    print(length, payload, name, text, rows)


def len_of(payload: bytes | None) -> int:
    """Give a number."""
    return len(payload or b"")


async def awaited(p: Persistency, job: Job) -> None:
    """The same in an event loop."""
    await p.aopen_job("alpha", durability="disk")  # wrong: there is no such level
    await p.aopen_job("alpha", max_byte=1)  # wrong: there is no such option
    payload: bytes = await job.get("users", ("ada",))  # wrong: there may be no row
    await job.iterate("users")  # wrong: it is walked over with `async for`
    await job.put("users", ("ada",), b"1")  # wrong: an event has nothing to await
    print(payload)


def ship(tx: Transaction, number: int, note: str = "") -> bytes:
    """Run in the data."""
    return tx.get("orders", (number,)) or note.encode()


def functions(job: Job) -> None:
    """What is sent to the data with the wrong arguments."""
    job.run(ship)  # wrong: it wants a number
    job.run(ship, "42")  # wrong: a number
    job.run(ship, 42, 43)  # wrong: a note is text
    job.run(ship, 42, "", 1)  # wrong: one too many
    job.run(ship(None, 42))  # wrong: called instead of handed over
    job.run(len_of)  # wrong: it takes no transaction
    number: int = job.run(ship, 42).result()  # wrong: it gives bytes
    print(number)


def unsaid(job: Job) -> None:
    """A category whose keys are any tuples."""
    users = Category(job, "users", typed(User))
    users.put("ada", User("ada"))  # wrong: a key is a tuple
    users.put(("ada",), "ada")  # wrong: a value is a User
    users.put(("ada",), {"name": "ada"})  # wrong: a value is a User
    print(users.get(("ada",)).result().name)  # wrong: there may be no row
    users.compare_and_set(("ada",), "ada", None)  # wrong: a value is a User
    users.list("ada")  # wrong: a prefix is a tuple
    Category(job, "users", User)  # wrong: a class is no codec
    Category(job, "users", typed(User("ada")))  # wrong: typed takes a class
    Category("job", "users")  # wrong: not a job
    raw = Category(job, "raw", RAW)
    raw.put(("ada",), "text")  # wrong: bytes


def said(job: Job) -> None:
    """A category whose keys are of a type."""
    users: Category[tuple[str, int], User] = Category(job, "users", typed(User))
    users.put(("ada",), User("ada"))  # wrong: a part is missing
    users.put((7, "ada"), User("ada"))  # wrong: the wrong way round
    users.get(("ada", "7"))  # wrong: a number
    users.get_many([("ada",)])  # wrong: a part is missing
    users.get_many([("ada", 7)]).result()["ada",]  # wrong: a part is missing
    users.delete(("ada", 7, 8))  # wrong: a part too many
    users.touch(("ada",), None)  # wrong: a part is missing
    for place, user in users.list():
        number: int = place[0]  # wrong: text
        name: str = user  # wrong: a User
        print(number, name)
    names: Category[tuple[str, int], str] = Category(job, "users", typed(User))  # wrong: the codec gives Users
    other: Category[tuple[int], User] = users  # wrong: other keys
    bare: Category[str, User] = Category(job, "users", typed(User))  # wrong: keys are tuples
    print(names, other, bare)


def mappings(job: Job) -> None:
    """A mapping whose keys and values are of a type."""
    counts: CategoryMapping[str, int] = Category(job, "counts").mapping()
    counts["ada"] = "1"  # wrong: a number
    counts[7] = 1  # wrong: text
    del counts["ada", 7]  # wrong: text
    number: str = counts["ada"]  # wrong: a number
    maybe: int = counts.get("ada")  # wrong: there may be none
    counts.pop(7)  # wrong: text
    print(number, maybe)


def texts(job: Job) -> None:
    """Text keys."""
    store = KVStore(job)
    store.set(("ada",), b"1")  # wrong: a key is text
    store.set("ada", "1")  # wrong: a value is bytes
    found: dict[Key, bytes] = store.get_many(["ada"]).result()  # wrong: by text
    store.list(KeyRange())  # wrong: a prefix is text
    print(found)


def replies(reply: Reply[Any], job: Job) -> None:
    """Names that aren't there."""
    reply.wait()  # wrong: it is result()
    job.set("users", ("ada",), b"1")  # wrong: it is put()
    job.id = 7  # wrong: text
