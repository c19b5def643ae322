"""Django: a cache backend (the extra `django`), in one file that outlives the processes that use it.

    CACHES = {
        "default": {
            "BACKEND": "persistency.integrations.django.PersistencyCache",
            "LOCATION": "/var/lib/app",
            "TIMEOUT": 300,
            "OPTIONS": {"MAX_ENTRIES": 10_000},
        }
    }

Rules:
  1. Nothing is opened before a cache is used, and what is open belongs to the process, not to a request or thread.
  2. A value is CBOR if that gives it back with its very type, and else a pickle that is signed with `SECRET_KEY`.
  3. Nothing that a file says is unpickled before its signature was checked.

Doesn't know: views, middleware, sessions: they use a cache as any other.
"""

try:
    import django as _django
except ModuleNotFoundError as _missing:
    if _missing.name != "django":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.django needs the extra 'django': pip install 'persistency[django]'",
        name=_missing.name,
    ) from None

from persistency.integrations.django.cache import PersistencyCache
from persistency.integrations.django.places import release

del _django

__all__ = ["PersistencyCache", "release"]
