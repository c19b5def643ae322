"""A guest that does as it is told: it is passed a list of host functions, with any arguments, and calls them.

It exports one function for each it imports, and `steps`, which calls several in one call. What it answers with is the
part of its memory that it is told to show: so a test sees what a host function returned, and what it has written. Each
call finds the memory filled with `FILLING`, so that a byte nobody should have touched is known.

    guest = load(host, "plugin", KVGrant())
    assert guest.ask("kv_set", b"key", b"value").result == 0
    assert guest.ask("kv_get", b"key", Room(10)) == Answer(5, b"value" + FILLED[:5])
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from persistency.plugins import KVGrant, Limits, Manifest, Plugin, PluginHost, WasiGrant

WAIT = 30.0  # seconds a test waits for what must come

PAGE_BYTES = 65_536
DATA = 1_024  # where the guest's `alloc` says that data goes
ABSENT = 0xFFFF_FFFF
FILLING = 0xA5
FILLED = bytes((FILLING,)) * PAGE_BYTES

_HEAD = struct.Struct("<I I I 4x")  # how many steps; where what is shown begins, and its length
_ARGUMENTS_MAX = 9
_STEP = struct.Struct(f"<q {_ARGUMENTS_MAX}q q")  # which function, its arguments, what it returned


def payload_at(steps: int) -> int:
    """Return where in the memory the bytes are that come behind so many steps."""
    return DATA + _HEAD.size + steps * _STEP.size


PAYLOAD = payload_at(1)


class Import(NamedTuple):
    """A function that a guest imports, with the types that its author takes it to have."""

    module: str
    name: str
    parameters: str
    result: str = "i64"


# Written down once more, and not made of what the package says: a guest is built long before it meets its host.
LAST_ERROR = Import("persistency", "last_error", "i32 i32")
FAIL = Import("persistency", "fail", "i32 i32")
READING = (
    Import("persistency", "kv_get", "i32 i32 i32 i32"),
    Import("persistency", "kv_get_many", "i32 i32 i32 i32"),
    Import("persistency", "kv_has", "i32 i32"),
    Import("persistency", "kv_list", "i32 i32 i32 i32 i32 i32"),
    Import("persistency", "kv_storage_used", ""),
)
WRITING = (
    Import("persistency", "kv_set", "i32 i32 i32 i32"),
    Import("persistency", "kv_set_with_ttl", "i32 i32 i32 i32 i64"),
    Import("persistency", "kv_delete", "i32 i32"),
    Import("persistency", "kv_delete_by_prefix", "i32 i32"),
    Import("persistency", "kv_compare_and_set", "i32 i32 i32 i32 i32 i32"),
)
EVERYTHING = (LAST_ERROR, FAIL, *READING, *WRITING)


class Room(NamedTuple):
    """A room in the guest's memory, and its length in bytes: an argument that becomes two."""

    size: int


Argument: TypeAlias = bytes | Room | int | None  # bytes become two numbers, None is no value at all, a number is itself


class Answer(NamedTuple):
    """What a host function returned, and what was in its room afterwards."""

    result: int
    room: bytes = b""

    @property
    def written(self) -> bytes:
        """The beginning of the room that the result says was written."""
        assert 0 <= self.result <= len(self.room), self.result
        assert set(self.room[self.result :]) <= {FILLING}, "more was written than was said"
        return self.room[: self.result]


def guest_of(imports: Sequence[Import] = EVERYTHING, pages: int = 2) -> str:
    """Return the text of the guest that imports these, with a memory of so many pages."""
    lines = ["(module", "(type $step (func (param i32) (result i64)))"]
    for at, (module, name, parameters, result) in enumerate(imports):
        kind = f"(param {parameters}) (result {result})"  # of which there may be none
        lines.append(f'(import "{module}" "{name}" (func $f{at} {kind}))')
    lines.append(f'(memory (export "memory") {pages})')
    lines.append(f"(table funcref (elem {' '.join(f'$s{at}' for at in range(len(imports)))}))")
    for at, (_, name, parameters, result) in enumerate(imports):
        loads = [f"(i64.load offset={8 + 8 * place} (local.get 0))" for place in range(len(parameters.split()))]
        given = [
            load if kind == "i64" else f"(i32.wrap_i64 {load})"
            for load, kind in zip(loads, parameters.split(), strict=True)
        ]
        call = f"(call $f{at} {' '.join(given)})"
        widened = {"i64": call, "i32": f"(i64.extend_i32_u {call})", "": f"{call} (i64.const 0)"}[result]
        lines.append(f"(func $s{at} (type $step) {widened})")
        lines.append(
            f'(func (export "{name}") (param i32 i32) (result i64)'
            f" (i64.store offset=16 (local.get 0) (i64.const {at})) (call $steps (local.get 0) (local.get 1)))"
        )
    return "\n".join([*lines, _REST % _NUMBERS])


_NUMBERS = {"filling": FILLING, "data": DATA, "step": _STEP.size, "result": _STEP.size - 8}
_REST = """
(func (export "alloc") (param $size i32) (result i32)
  (local $bytes i32)
  (local.set $bytes (i32.mul (memory.size) (i32.const 65536)))
  (memory.fill (i32.const 0) (i32.const %(filling)d) (local.get $bytes))
  (select (i32.const %(data)d) (i32.const 0)
    (i32.le_u (local.get $size) (i32.sub (local.get $bytes) (i32.const %(data)d)))))

(func $steps (export "steps") (param $at i32) (param $size i32) (result i64)
  (local $left i32) (local $shown i64)
  (local.set $left (i32.load (local.get $at)))
  (local.set $shown (i64.or
    (i64.shl (i64.load32_u offset=4 (local.get $at)) (i64.const 32)) (i64.load32_u offset=8 (local.get $at))))
  (local.set $at (i32.add (local.get $at) (i32.const 16)))
  (block $done
    (loop $next
      (br_if $done (i32.eqz (local.get $left)))
      (i64.store offset=%(result)d (local.get $at)
        (call_indirect (type $step) (local.get $at) (i32.wrap_i64 (i64.load (local.get $at)))))
      (local.set $at (i32.add (local.get $at) (i32.const %(step)d)))
      (local.set $left (i32.sub (local.get $left) (i32.const 1)))
      (br $next)))
  (local.get $shown)))
"""


@dataclass(frozen=True)
class Guest:
    """A plugin whose code is `guest_of(imports, pages)`."""

    plugin: Plugin
    imports: Sequence[Import] = EVERYTHING
    pages: int = 2

    def ask(self, name: str, *arguments: Argument, timeout: float | None = None) -> Answer:
        """Have one host function called, by the guest's function of that name."""
        return self._told(name, ((name, *arguments),), timeout)[0]

    def steps(self, *steps: tuple[Any, ...], timeout: float | None = None) -> list[Answer]:
        """Have several host functions called in one call of the guest."""
        return self._told("steps", steps, timeout)

    def fail(self, *steps: tuple[Any, ...]) -> None:
        """Have host functions called in one call, which then answers that it has failed."""
        self._call("steps", _Steps(self.imports, steps).data(ABSENT, ABSENT), None)

    def memory_after(
        self, *steps: tuple[Any, ...], payload: bytes = b"", function: str = "steps", timeout: float | None = None
    ) -> tuple[list[int], bytes, bytes]:
        """Have host functions called with plain numbers: what they returned, and all the memory before and after.

        The payload is behind the steps, at `payload_at(len(steps))`. Where the guest keeps a result there are zeros.
        """
        size = self.pages * PAGE_BYTES
        data = _Steps(self.imports, steps).data(0, size) + payload
        after = bytearray(self._call(function, data, timeout))
        results = []
        for number in range(1, len(steps) + 1):
            at = payload_at(number)
            results.append(_STEP.unpack_from(after, at - _STEP.size)[-1])
            after[at - 8 : at] = bytes(8)
        return results, (FILLED[:DATA] + data).ljust(size, FILLED[:1]), bytes(after)

    def _told(self, function: str, steps: Sequence[tuple[Any, ...]], timeout: float | None) -> list[Answer]:
        made = _Steps(self.imports, steps)
        shown = self._call(function, made.data(DATA, made.end - DATA), timeout)
        results = [_STEP.unpack_from(shown, _HEAD.size + at * _STEP.size)[-1] for at in range(len(steps))]
        rooms = [shown[at - DATA : at - DATA + size] for at, size in made.rooms]
        return [Answer(result, room) for result, room in zip(results, rooms, strict=True)]

    def _call(self, function: str, data: bytes, timeout: float | None) -> bytes:
        return self.plugin.call(function, data, timeout=timeout).result(WAIT)


class _Steps:
    """Steps as the guest takes them: numbers, then the bytes they point to; rooms are behind that."""

    def __init__(self, imports: Sequence[Import], steps: Sequence[tuple[Any, ...]]) -> None:
        self._names = [each.name for each in imports]
        self._payload_at = payload_at(len(steps))
        self._payload = b""
        self.end = self._payload_at + sum(len(each) for step in steps for each in step if isinstance(each, bytes))
        self.rooms: list[tuple[int, int]] = []  # of each step
        self._steps = [self._packed(*step) for step in steps]

    def data(self, shown_at: int, shown_size: int) -> bytes:
        """Return what the guest is called with, if it shall show that part of its memory."""
        return _HEAD.pack(len(self._steps), shown_at, shown_size) + b"".join(self._steps) + self._payload

    def _packed(self, name: str, *arguments: Argument) -> bytes:
        numbers: list[int] = []
        room = (DATA, 0)
        for argument in arguments:
            match argument:
                case bytes():
                    numbers += (self._payload_at + len(self._payload), len(argument))
                    self._payload += argument
                case Room(size):
                    room = (self.end, size)
                    numbers += room
                    self.end += size
                case None:
                    numbers += (0, ABSENT)
                case _:
                    numbers.append(argument)
        self.rooms.append(room)
        return _STEP.pack(self._names.index(name), *numbers, *[0] * (_ARGUMENTS_MAX - len(numbers)), 0)


def load(
    host: PluginHost,
    plugin_id: str = "plugin",
    kvstore: KVGrant | None = None,
    *,
    wasi: WasiGrant | None = None,
    imports: Sequence[Import] = EVERYTHING,
    pages: int = 2,
    limits: Limits | None = None,
) -> Guest:
    """Load the guest into a host, with these grants."""
    manifest = Manifest(plugin_id, kvstore, wasi, limits or Limits())
    plugin = host.load(manifest, guest_of(imports, pages).encode()).result(WAIT)
    return Guest(plugin, imports, pages)


def listed(data: bytes) -> list[bytes | None]:
    """Return the entries of a list, as the ABI has them."""
    entries: list[bytes | None] = []
    while data:
        size = int.from_bytes(data[:4], "little")
        if size == ABSENT:
            entries.append(None)
            data = data[4:]
        else:
            assert len(data) >= 4 + size
            entries.append(data[4 : 4 + size])
            data = data[4 + size :]
    return entries


def a_list(*entries: bytes) -> bytes:
    """Return entries as a list of the ABI."""
    return b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
