"""A store that can be held, and told to fail, around the memory adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

from persistency.actor.bounds import Bounds
from persistency.actor.clock import Clock
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.worker import Worker
from persistency.messages import name_ops
from persistency.storage.memory import MemoryStore
from persistency.storage.port import StoreOptions

WAIT = 20.0  # seconds a test waits for what must come


class HeldStore(MemoryStore):
    """A memory store whose `apply` waits at a gate, and raises what it was given to raise first."""

    def __init__(self, options: StoreOptions | None = None) -> None:
        super().__init__(options or StoreOptions())
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.errors: list[BaseException] = []
        self.groups: list[list[Any]] = []
        self.threads: list[int] = []
        self.closed = 0

    def apply(self, group: list[Any], now_ms: int) -> list[Any]:
        """Note the group, say that it came in, wait at the gate, fail or run it."""
        # Without the tokens: keeping a reply here would keep it from being dropped.
        self.groups.append([None if at % 3 == 2 and group[at - 2] is None else place for at, place in enumerate(group)])
        self.threads.append(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(WAIT)
        if self.errors:
            raise self.errors.pop(0)
        return super().apply(group, now_ms)

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:
        """Count the closings."""
        self.closed += 1
        super().close(tidy=tidy, now_ms=now_ms)


class OpenMailbox(Mailbox):
    """A mailbox whose methods a test may replace."""


class Actor:
    """A mailbox and its worker over a held store."""

    def __init__(
        self,
        *,
        on_error: Callable[..., object] | None = None,
        stall_timeout: float = 20.0,
        open_store: Callable[[], Any] | None = None,
        start: bool = True,
        options: StoreOptions | None = None,
        read_ms: Callable[[], int] = int,
        waiters_max: int = 8,
        **bounds: Any,
    ) -> None:
        self.store = HeldStore(options)
        self.mailbox = OpenMailbox(Bounds(**bounds))
        self.failures = FailureLog("job", on_error, self.mailbox.never_waits)
        self.worker = Worker(
            "job",
            self.mailbox,
            self.failures,
            open_store=open_store or (lambda: self.store),
            clock=Clock(read_ms),
            name_ops=name_ops,
            stall_timeout=stall_timeout,
            waiters_max=waiters_max,
        )
        if start:
            self.worker.start()
            self.worker.opened.result(WAIT)

    def put(self, key: bytes, payload: bytes = b"x") -> None:
        """Post a plain put."""
        self.mailbox.put(b"c", key, payload, len(key) + len(payload))

    def hold(self) -> None:
        """Keep the worker inside `apply`, with one put taken: everything posted from now on waits."""
        self.store.gate.clear()
        self.put(b"held")
        assert self.store.entered.acquire(timeout=WAIT)

    def let_go(self) -> None:
        """Open the gate."""
        self.store.gate.set()

    def close(self) -> None:
        """Let everything go and wait until the worker has ended."""
        self.let_go()
        self.worker.close().exception(WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
