"""The base: Django's `BaseCache`, and to a type checker what of it is used or inherited here. Django has no types.

Rules:
  1. At run time it is Django's own class, and nothing else.

Doesn't know: what is done with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    DEFAULT_TIMEOUT: Any = ...
    """Stands for a timeout that wasn't given."""

    class BaseCache:
        """What all caches of Django have in common."""

        default_timeout: int | None
        key_prefix: str
        version: int
        _max_entries: int
        _cull_frequency: int

        def __init__(self, params: dict[str, Any]) -> None: ...
        def make_key(self, key: str, version: int | None = None) -> str:
            """Return the key as it is in the cache, with its prefix and version."""
            raise NotImplementedError

        def validate_key(self, key: str) -> None:
            """Warn of what memcached would refuse."""

        def make_and_validate_key(self, key: str, version: int | None = None) -> str:
            """Do both."""
            raise NotImplementedError

        def get_or_set(self, key: str, default: Any, timeout: Any = ..., version: int | None = None) -> Any:
            """Return the value of a key; if there is none write `default`, or what that returns, and return it."""

        async def aget_or_set(self, key: str, default: Any, timeout: Any = ..., version: int | None = None) -> Any:
            """See `get_or_set`."""

        def decr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
            """Take away from a value, and return the difference."""

        async def adecr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
            """See `decr`."""

        def decr_version(self, key: str, delta: int = 1, version: int | None = None) -> int:
            """Move a value to an earlier version, and return that."""
            raise NotImplementedError

        async def adecr_version(self, key: str, delta: int = 1, version: int | None = None) -> int:
            """See `decr_version`."""
            raise NotImplementedError

        def close(self, **kwargs: Any) -> None:
            """Do nothing, at the end of every request."""

        async def aclose(self, **kwargs: Any) -> None:
            """See `close`."""

        def __contains__(self, key: str) -> bool: ...

else:
    from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache

__all__ = ["DEFAULT_TIMEOUT", "BaseCache"]
