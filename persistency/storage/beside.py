"""What is kept beside the rows of a file: the quota and the change log its job was opened with.

Rules:
  1. A job without them pays nothing; one that had them, and writes without, makes the notes of them wrong, and says so.

Doesn't know: transactions, groups.
"""

from __future__ import annotations

import apsw

from persistency.storage.changes import DROPPED, Changes, has_changes, keep_changes
from persistency.storage.port import StoreOptions
from persistency.storage.quota import USED, USED_MS, Quota, count_used
from persistency.storage.table import Table


def keep_beside(
    connection: apsw.Connection, table: Table, options: StoreOptions, stored: dict[str, int]
) -> tuple[str, ...]:
    """Give a table the quota and the change log its job is opened with.

    Returns the names of the notes that the first write without them makes wrong.
    """
    outdated = []
    if options.max_bytes is not None:
        used_ms = stored.get(USED_MS, table.now_ms)
        used = stored[USED] if {USED, USED_MS} <= stored.keys() else count_used(table.execute, used_ms)
        table.quota = Quota(table.execute, options.max_bytes, used, used_ms)
    elif USED in stored:
        outdated.append(USED)
    if options.feed_changes_max:
        dropped = keep_changes(connection, stored.get(DROPPED), table.version)
        table.changes = Changes(connection, table.execute, options.feed_changes_max, dropped)
    elif has_changes(connection):
        table.reaping_counts = True
        outdated += [DROPPED] if DROPPED in stored else []
    return tuple(outdated)
