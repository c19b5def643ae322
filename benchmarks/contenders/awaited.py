"""What contenders under asyncio share.

Rules:
  1. The loop is the runner's; whoever isn't in it runs what is awaited there.

Doesn't know: which contender uses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.protocol import AwaitedPut, Pair


def put_in_turn(runner: asyncio.Runner, put: AwaitedPut, rows: Sequence[Pair]) -> None:
    """Await a put of each row in turn."""

    async def put_all() -> None:
        for key, payload in rows:
            await put(key, payload)

    runner.run(put_all())
