"""Migration: the items of diskcache, sqlitedict and LMDB become rows of a job, for `persistency import --from` too.

    report = bring(job, Diskcache("cache"), unpickle="plain")

Rules:
  1. The origin is read and never written, also while its own service writes to it.
  2. Nothing is unpickled unless it is asked for, and `"plain"` runs nothing that a pickle says.
  3. What can't come along is counted, by reason, with examples. Nothing is left out silently.
  4. Neither diskcache nor sqlitedict has to be installed. `Lmdb` needs the extra `lmdb`, and is imported for it.

Doesn't know: the terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistency.integrations.migration.bringing import bring
from persistency.integrations.migration.diskcache import Diskcache
from persistency.integrations.migration.items import Item, Later, Lost, Origin, Part, Pickled, Reason
from persistency.integrations.migration.plain import read_plain
from persistency.integrations.migration.reading import Refused
from persistency.integrations.migration.report import Example, Left, Report
from persistency.integrations.migration.sqlitedict import Sqlitedict

if TYPE_CHECKING:
    from persistency.integrations.migration.lmdb import Lmdb

__all__ = [
    "Diskcache",
    "Example",
    "Item",
    "Later",
    "Left",
    "Lmdb",
    "Lost",
    "Origin",
    "Part",
    "Pickled",
    "Reason",
    "Refused",
    "Report",
    "Sqlitedict",
    "bring",
    "read_plain",
]

if not TYPE_CHECKING:  # a type checker would take every misspelled name for this one

    def __getattr__(name):
        if name != "Lmdb":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from persistency.integrations.migration.lmdb import Lmdb

        return Lmdb
