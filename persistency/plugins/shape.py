"""The shape of a module: what it imports and exports, and of which types, read off its binary format.

wasmtime could tell, but its C interface ends the process when it is asked for the parameters of a function that takes
a vector (`v128`). So it isn't asked.

Rules:
  1. What is read was found valid by wasmtime. Whatever isn't understood all the same is a `ValueError`.
  2. Only what is imported and exported is looked at: a module's code and data are passed over.

Doesn't know: what may be imported, what must be exported.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# The parameters and the results of a function, by the names that WebAssembly has for their types.
Signature = tuple[tuple[str, ...], tuple[str, ...]]

FUNCTION: Final = "function"
MEMORY: Final = "memory"
_KINDS: Final = (FUNCTION, "table", MEMORY, "global", "tag")
_TYPES: Final = {0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128", 0x70: "funcref", 0x6F: "externref"}
_FUNCTION_TYPE: Final = 0x60
_TYPE_SECTION, _IMPORT_SECTION, _FUNCTION_SECTION, _MEMORY_SECTION, _EXPORT_SECTION = 1, 2, 3, 5, 7


class Import(NamedTuple):
    """Something a module imports; `signature` is that of a function."""

    module: str
    name: str
    kind: str
    signature: Signature | None


class Export(NamedTuple):
    """Something a module exports: a function's `signature`, or how many `pages` a memory has at the beginning.

    `imported`: it is one of the functions it imports.
    """

    kind: str
    signature: Signature | None
    pages: int
    imported: bool


class Shape(NamedTuple):
    """What a module imports, in its order, up to the first thing that is no function; and what it exports, by name."""

    imports: list[Import]
    exports: dict[str, Export]


def shape_of(binary: bytes) -> Shape:
    """Return the shape of a module in the binary format. Raises `ValueError`."""
    try:
        return _Reading(binary).shape()
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"the module's sections can't be read: {error}") from error


class _Reading:
    """A module as far as it has been read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 8  # behind the magic number and the version
        self._signatures: list[Signature] = []
        self._functions: list[Signature] = []
        self._pages: list[int] = []
        self._shape = Shape([], {})

    def shape(self) -> Shape:
        sections = {
            _TYPE_SECTION: self._type,
            _IMPORT_SECTION: self._import,
            _FUNCTION_SECTION: self._function,
            _MEMORY_SECTION: self._memory,
            _EXPORT_SECTION: self._export,
        }
        while self._at < len(self._data):
            section = self._byte()
            size = self._number()
            end = self._at + size
            read = sections.get(section)
            if read is not None:
                for _ in range(self._number()):
                    if not read():
                        return self._shape
            self._at = end
        return self._shape

    # -- entries of sections; each says whether to read on ------------------------------------------------------------

    def _type(self) -> bool:
        if self._byte() != _FUNCTION_TYPE:
            raise ValueError("the module has types other than those of functions")
        parameters = tuple(self._value_type() for _ in range(self._number()))
        self._signatures.append((parameters, tuple(self._value_type() for _ in range(self._number()))))
        return True

    def _import(self) -> bool:
        module, name, kind = self._name(), self._name(), _KINDS[self._byte()]
        signature = self._signatures[self._number()] if kind == FUNCTION else None
        self._shape.imports.append(Import(module, name, kind, signature))
        if signature is None:
            return False
        self._functions.append(signature)
        return True

    def _function(self) -> bool:
        self._functions.append(self._signatures[self._number()])
        return True

    def _memory(self) -> bool:
        has_max = self._byte() & 1
        self._pages.append(self._number())
        if has_max:
            self._number()
        return True

    def _export(self) -> bool:
        name, kind, index = self._name(), _KINDS[self._byte()], self._number()
        self._shape.exports[name] = Export(
            kind,
            self._functions[index] if kind == FUNCTION else None,
            self._pages[index] if kind == MEMORY else 0,
            kind == FUNCTION and index < len(self._shape.imports),
        )
        return True

    # -- parts of entries --------------------------------------------------------------------------------------------

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _number(self) -> int:
        """Read an unsigned number, seven bits to a byte."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def _name(self) -> str:
        size = self._number()
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _value_type(self) -> str:
        code = self._byte()
        if code not in _TYPES:
            raise ValueError(f"the module has a type that isn't known, {code:#x}")
        return _TYPES[code]
