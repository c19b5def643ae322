"""A guest whose functions are what a guest can do, well and badly; and what holds one in the middle of a call.

`answer` returns the 8 bytes it is passed as its result, so a test says what a guest's function returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from persistency.plugins import Plugin, PluginStatistics

WAIT = 30.0  # seconds a test waits for what must come

_FUNCTION = '(func (export "{name}") (param $at i32) (param $size i32) (result i64) {body})'

_FUNCTIONS = {
    "empty": "(i64.const 0)",
    "echo": "(call $place (local.get $at) (local.get $size))",
    "answer": "(i64.load (local.get $at))",
    "count": """
        (global.set $count (i32.add (global.get $count) (i32.const 1)))
        (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
        (i32.store (i32.const 4) (global.get $count))
        (call $place (i32.const 0) (i32.const 8))""",
    "says": "(drop (call $fail (local.get $at) (local.get $size))) (i64.const -1)",
    "spin": "(loop $again (br $again)) (i64.const 0)",
    "ask": "(loop $again (drop (call $last_error (i32.const 0) (i32.const 0))) (br $again)) (i64.const 0)",
    "trap": "unreachable",
    "divide": "(i64.div_s (i64.const 1) (i64.load (i32.const 0)))",
    "stray": "(i64.load (i32.const -16))",
    "deep": "(call $deep (local.get $at) (local.get $size))",
    "null": "(call_indirect (type $function) (i32.const 0) (i32.const 0) (i32.const 0))",
    "fill": """
        (loop $again (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
        unreachable""",
    "size": """
        (drop (memory.grow (i32.const 3)))
        (i32.store (i32.const 0) (memory.size))
        (call $place (i32.const 0) (i32.const 4))""",
}
NAMES = tuple(sorted(_FUNCTIONS))

_HEAD = """
  (type $function (func (param i32 i32) (result i64)))
  (import "persistency" "fail" (func $fail (type $function)))
  (import "persistency" "last_error" (func $last_error (type $function)))
"""
_BODY = """
  (global $count (mut i32) (i32.const 0))
  (table 1 funcref)
  (func $place (param $at i32) (param $size i32) (result i64)
    (i64.or
      (i64.shl (i64.extend_i32_u (local.get $at)) (i64.const 32))
      (i64.extend_i32_u (local.get $size))))
  (func $deep (type $function) (i64.add (call $deep (local.get 0) (local.get 1)) (i64.const 1)))
"""
ALLOC = """
  (func (export "alloc") (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.shl (memory.size) (i32.const 16)))
    (if (i32.eq (i32.const -1)
          (memory.grow (i32.shr_u (i32.add (local.get $size) (i32.const 65535)) (i32.const 16))))
      (then (return (i32.const 0))))
    (local.get $at))
"""


def deeds(more: str = "", *, alloc: str = ALLOC, memory: str = "1") -> bytes:
    """Return the guest with all of them, in the text format; `more` is put behind them."""
    functions = [_FUNCTION.format(name=name, body=body) for name, body in _FUNCTIONS.items()]
    memory = f'(memory (export "memory") {memory})'
    return "\n".join(["(module", _HEAD, memory, _BODY, alloc, *functions, more, ")"]).encode()


DEEDS = deeds()

# A guest that asks its store for a key, and answers with its value.
KEEPER = b"""(module
  (import "persistency" "kv_get" (func $get (param i32 i32 i32 i32) (result i64)))
  (memory (export "memory") 2)
  (func (export "alloc") (param i32) (result i32) (i32.const 65536))
  (func (export "get") (param $at i32) (param $size i32) (result i64)
    (local $found i64)
    (local.set $found (call $get (local.get $at) (local.get $size) (i32.const 0) (i32.const 1024)))
    (if (i64.lt_s (local.get $found) (i64.const 0)) (then (return (i64.const 0))))
    (local.get $found)))
"""


def version(number: int) -> bytes:
    """Return a guest whose `version` says which of them it is, and whose `held` waits for its store before."""
    return f"""(module
      (import "persistency" "kv_has" (func $has (param i32 i32) (result i64)))
      (memory (export "memory") 1)
      (data (i32.const 8) "{number:04}")
      (func (export "alloc") (param i32) (result i32) (i32.const 1024))
      (func $answer (export "version") (param i32 i32) (result i64)
        (i64.const {(8 << 32) | 4}))
      (func (export "held") (param i32 i32) (result i64)
        (drop (call $has (i32.const 8) (i32.const 1)))
        (call $answer (i32.const 0) (i32.const 0))))
    """.encode()


@contextmanager
def held(plugin: Plugin) -> Iterator[Callable[[], None]]:
    """Keep a plugin's store from answering, to the end of the block or until what is given is called.

    A call that asks it for something stays in the middle of that meanwhile.
    """
    assert plugin.store is not None
    begun, gate = threading.Event(), threading.Event()

    def hold(_tx: object) -> None:
        begun.set()
        assert gate.wait(2 * WAIT)

    # In a thread of its own: a job that has nothing else to do runs it in its caller's.
    holding = threading.Thread(target=lambda run: run(hold).result(WAIT), args=(plugin.store.job.run,))
    holding.start()
    try:
        assert begun.wait(WAIT)
        yield gate.set
    finally:
        gate.set()
        holding.join(WAIT)


def until(plugin: Plugin, so: Callable[[PluginStatistics], bool]) -> PluginStatistics:
    """Wait until a plugin's numbers are so, and return them."""
    deadline = monotonic() + WAIT
    while not so(numbers := plugin.statistics()):
        assert monotonic() < deadline, numbers
        threading.Event().wait(0.001)
    return numbers
