"""The victim: a process that posts numbered rows until it is killed. `persistency demo` starts it.

    python -m persistency.cli.victim ROOT JOB TOTAL COUNTER

Rules:
  1. It posts rows 0, 1, 2, ... up to TOTAL, and after each put writes how many there were into a page of memory that
     it shares with its parent (COUNTER is the file's descriptor): that number outlives any kill.
  2. On stdout it says `flushed N` once a flush has answered that N rows are committed, and, every so many rows,
     `posted N`. A line is one small write, which a pipe takes whole.
  3. It ends by itself only after TOTAL rows, or when nobody reads what it says.

Doesn't know: when it is killed.
"""

from __future__ import annotations

import mmap
import os
import sys

from persistency import Persistency, Row, key
from persistency.codec.values import encode

CATEGORY = "records"
FLUSH_EVERY = 40_000
TELL_EVERY = 1_000
COUNTER_BYTES = 8


def row_of(number: int) -> Row:
    """Return the row of a number, as it is posted and as it must be found."""
    return Row(key("row", number), encode(f"row {number:09d} of the process that was killed in the middle of its work"))


def main(root: str, job_id: str, total: int, counter: int) -> None:
    """Post `total` rows into a job, flushing now and then."""
    with (
        mmap.mmap(counter, COUNTER_BYTES) as page,
        memoryview(page).cast("Q") as posted,  # a store into it is one machine word: never half a number
        Persistency(root) as persistency,
        persistency.open_job(job_id) as job,
    ):
        for number in range(total):
            job.put(CATEGORY, *row_of(number))
            posted[0] = done = number + 1
            if not done % FLUSH_EVERY:
                job.flush().result()
                _say(f"flushed {done}")
            elif not done % TELL_EVERY:
                _say(f"posted {done}")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
