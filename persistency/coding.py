"""Coding: the values of one category as payloads and back, and the rows of a job with their values in them.

Rules:
  1. A value that its codec doesn't take is `Misuse`; a payload that it doesn't take is `Corrupt`, and that names the
     category and the key. So it is for any codec, whatever it raises itself.
  2. What comes back is what a job gives, with `value` in the place of `payload`.

Doesn't know: jobs, replies, which codec it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar, overload

from persistency.codec.keys import Key
from persistency.codec.objects import Codec
from persistency.errors import Corrupt, Misuse
from persistency.ops import Entry, Found, Row
from persistency.paging import Pages

T = TypeVar("T")
D = TypeVar("D")
M_co = TypeVar("M_co", covariant=True)

if TYPE_CHECKING:
    # Type checkers bring it along; Python has defaults itself from 3.13 on.
    from typing_extensions import TypeVar as TypeVarWithDefault

    K = TypeVarWithDefault("K", bound=tuple[Any, ...], default=tuple[Any, ...])
    V = TypeVarWithDefault("V", default=Any)
else:
    K = TypeVar("K", bound=tuple)
    V = TypeVar("V")


class CategoryRow(NamedTuple, Generic[T]):
    """What a scan gives: a key and its value."""

    key: Key
    value: T


class CategoryEntry(NamedTuple, Generic[T]):
    """A row with all that is kept of it: an `Entry` with its value decoded."""

    key: Key
    value: T
    version: int
    expires_ms: int | None


CategoryRows: TypeAlias = list[CategoryRow[T]]
CategoryEntries: TypeAlias = list[CategoryEntry[T]]

if TYPE_CHECKING:

    class FoundValues(dict[Key, V], Generic[K, V]):
        """A `Found` with values in it: nothing else is different, so nothing else is made."""

        def __getitem__(self, wanted: K | Key) -> V: ...

        @overload
        def get(self, wanted: K | Key, default: None = None) -> V | None: ...
        @overload
        def get(self, wanted: K | Key, default: V) -> V: ...
        @overload
        def get(self, wanted: K | Key, default: D) -> V | D: ...
        def get(self, wanted: K | Key, default: Any = None) -> Any:
            """Return the value of a `Key` or a tuple, or `default` if it is not among the rows found."""

else:
    FoundValues = Found


class TwoParameters:
    """A generic class of two parameters, the second of which may be left out: it is `Any` then."""

    __slots__ = ()

    def __class_getitem__(cls, given: Any) -> Any:
        # What the defaults of the parameters say to type checkers, for annotations that are evaluated.
        inherited: Any = super()  # `Generic`'s
        return inherited.__class_getitem__(given if isinstance(given, tuple) else (given, Any))


class Decoded(Generic[M_co]):
    """Pages whose rows are decoded as they are given. Each `for`, and each `async for`, walks from the beginning."""

    def __init__(self, pages: Pages[Any], make: Callable[[Any], M_co]) -> None:
        self._pages = pages
        self._make = make

    def __iter__(self) -> Iterator[M_co]:
        return map(self._make, self._pages)

    def __aiter__(self) -> AsyncIterator[M_co]:
        return _DecodedWalk(aiter(self._pages), self._make)


class _DecodedWalk(Generic[M_co]):
    """One `async for` over rows that are decoded. No generator: one that is left in the middle holds nothing."""

    def __init__(self, rows: AsyncIterator[Any], make: Callable[[Any], M_co]) -> None:
        self._rows = rows
        self._make = make

    def __aiter__(self) -> AsyncIterator[M_co]:
        return self

    async def __anext__(self) -> M_co:
        return self._make(await anext(self._rows))


class Coding(Generic[T]):
    """The values of the category `name`, in the encoding of `codec`."""

    __slots__ = ("codec", "name")

    def __init__(self, name: str, codec: Codec[T]) -> None:
        self.name: str = name
        self.codec: Codec[T] = codec

    def encode(self, value: T) -> bytes:
        """Return a value's payload. Raises `Misuse` if it can't be encoded."""
        try:
            return self.codec.encode(value)
        except (Misuse, MemoryError, RecursionError):
            raise
        except Exception as error:  # a codec of the user's own
            raise Misuse(f"category {self.name!r}: the value can't be encoded: {error!r:.200}") from error

    def decode(self, key: Key, payload: bytes) -> T:
        """Return a payload's value. Raises `Corrupt` if it can't be decoded."""
        try:
            return self.codec.decode(payload)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # as above
            why = error if isinstance(error, Corrupt) else f"{error!r:.200}"
            own = isinstance(error, Corrupt) and error.hint != Corrupt.hint  # what to do about a value, not a file
            hint = error.hint if isinstance(error, Corrupt) and own else "Was it written with another codec?"
            raise Corrupt(f"category {self.name!r}, {key!r}: the value can't be decoded: {why}", hint=hint) from error

    def parts(self, key: Key) -> tuple[Any, ...]:
        """Return a key's tuple. Raises `Misuse` for a `RawKey`."""
        try:
            return key.parts
        except Misuse as error:
            hint = "Use iterate(): it gives keys as they are."
            raise Misuse(f"category {self.name!r} has a key that isn't a tuple, {key!r:.80}", hint=hint) from error

    def row(self, row: Row) -> CategoryRow[T]:
        """Return a row with its value."""
        return CategoryRow(row.key, self.decode(*row))

    def rows(self, rows: Iterable[Row]) -> CategoryRows[T]:
        """Return rows with their values."""
        return [CategoryRow(key, self.decode(key, payload)) for key, payload in rows]

    def entry(self, entry: Entry | None) -> CategoryEntry[T] | None:
        """Return an entry with its value; of none, none."""
        return None if entry is None else self._entry(entry)

    def entries(self, entries: Iterable[Entry]) -> CategoryEntries[T]:
        """Return entries with their values."""
        return [self._entry(entry) for entry in entries]

    def _entry(self, entry: Entry) -> CategoryEntry[T]:
        return CategoryEntry(entry.key, self.decode(entry.key, entry.payload), entry.version, entry.expires_ms)

    def found(self, found: Found) -> FoundValues[Any, T]:
        """Return the values of the payloads found."""
        return FoundValues((key, self.decode(key, payload)) for key, payload in found.items())

    def pair(self, row: Row) -> tuple[Any, T]:
        """Return a row as the tuple of its key, and its value."""
        return self.parts(row.key), self.decode(*row)
