"""Closing: `with` and `async with`, for whatever has a `close` and an `aclose`.

Rules:
  1. What went wrong in the body comes first; what goes wrong while closing is a note on it.

Doesn't know: what is closed.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NoReturn, Self

from persistency.errors import Misuse


class Closing:
    """What is closed when its block is left."""

    __slots__ = ()

    def close(self) -> None:
        """Close it. To be overridden."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close it without blocking the event loop. To be overridden."""
        raise NotImplementedError

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        hint = "Send the root and the job's id; open the job there, or read it there with open_reader(job_id)."
        raise Misuse(f"{self!r} can't be copied, pickled or sent to another process", hint=hint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and closing {self!r} raised {failed!r}")  # without masking what came first

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and closing {self!r} raised {failed!r}")
