"""Docstrings as they are written here, for Sphinx: plain text with `code` in single backticks, and lists of options.

Rules:
  1. A name in backticks becomes a link if it is public and isn't an argument of what is described; else it is code.
  2. Paragraphs of `name: what it is` become a list of definitions; indented ones become code.
  3. A signature has what its reader passes or gets: no marks for what wasn't given, no arguments of the engine's own.
  4. A table of a module's docstring is shown by `docstring-table`, so that it stands in one place.
  5. Python's own names lead to its documentation without its inventory, so that a build needs no network.

Doesn't know: what the pages say.
"""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import persistency
from persistency.options import JobOptions

PUBLIC = {name: getattr(persistency, name) for name in persistency.__all__}
# Nobody but the engine makes these: how it does is none of a reader's business.
MADE_BY_THE_ENGINE = frozenset(
    ["Job", "Reader", "Reply", "Transaction", "CategoryMapping", "Collection", "MergePool", "Pages", "Decoded", "Grant"]
    + ["DeadLetter", "KeptAlive", "Message", "Plugin"]
)
_OPTION = re.compile(r"(?:[a-z_]+|[A-Z_]{2,})(?:, (?:[a-z_]+|[A-Z_]{2,}))*: ")
_NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?")
_NOT_GIVEN = re.compile(r"(\w+): ([^=]*?) = <default>")
_ALIAS = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
_FULL_NAME = re.compile(r"(?<![\w.~'])(?=persistency\.)")
_UNPACKED = re.compile(r"~?(?:typing\.)?Unpack\[(?:[\w.]*\.)?(\w+)\]")
# Names that a signature gives without their module.
_BARE = {"Path": "pathlib.Path", "timedelta": "datetime.timedelta"}
_TYPE_VARIABLE = re.compile(r"(?:.*\.)?[A-Z]s?")
_PYTHON = "https://docs.python.org/3/library/"
_FUNCTIONS = ("bool", "bytearray", "bytes", "dict", "float", "frozenset", "int", "list", "memoryview", "object", "set")
_FUNCTIONS += ("str", "tuple", "type")


# -- plain text to reStructuredText ----------------------------------------------------------------------------------


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """The paragraphs of a text, without the empty lines between them."""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def inline(text: str, linked: Any) -> str:
    """A text with its code marked as reStructuredText wants it, and everything else taken as it stands."""
    pieces = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    marked = []
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            marked.append(re.sub(r"([\\*_|])", r"\\\1", piece))
            continue
        code = " ".join(piece.strip("`").split())
        target = linked(code)
        # An empty escape on both sides: what is marked may touch letters then.
        if target is None:
            marked.append(rf"\ ``{code}``\ ")
        else:
            escaped = code.replace("\\", r"\\")
            marked.append(rf"\ :py:obj:`{escaped} <{target}>`\ ")
    return "".join(marked)


class Linked:
    """What code in one docstring leads to: `name` is the full name of what the docstring is about."""

    def __init__(self, name: str, obj: Any) -> None:
        self._name = name
        parts = name.split(".")
        self._owner = parts[1] if parts[0] == "persistency" and len(parts) > 1 and parts[1] in PUBLIC else None
        self._arguments = _arguments(obj)

    def __call__(self, code: str) -> str | None:
        """Return the full name that a piece of code means, or `None` if it is code alone."""
        found = _NAME.fullmatch(code)
        if found is None:
            return None
        name, called = found.groups()
        if name in self._arguments and not called:
            return None
        first, _, rest = name.partition(".")
        if rest:
            target = name if first in PUBLIC and _has(PUBLIC[first], rest) else None
        elif self._owner is not None and inspect.isclass(PUBLIC[self._owner]) and _has(PUBLIC[self._owner], name):
            target = f"{self._owner}.{name}"
        else:
            target = name if name in PUBLIC and (called or name != "key") else None
        target = None if target is None else f"persistency.{target}"
        return None if target == self._name else target


def _has(cls: Any, name: str) -> bool:
    """Whether a class has a public method or property of its own making."""
    if name.startswith("_") or not inspect.isclass(cls):
        return False
    for base in cls.__mro__:
        if name in vars(base):
            ours = base.__module__.startswith("persistency")
            return ours and isinstance(vars(base)[name], property | classmethod | staticmethod | type(_has))
    return False


def _arguments(obj: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return frozenset()


def process_docstring(_app: Sphinx, _what: str, name: str, obj: Any, _options: Any, lines: list[str]) -> None:
    """Turn a docstring into reStructuredText, in place."""
    linked = Linked(name, obj)
    text = []
    for paragraph in paragraphs(lines):
        if all(line.startswith("    ") for line in paragraph):
            text += [".. code-block:: python", "", *paragraph, ""]
        elif all(_OPTION.match(line) or line.startswith("  ") for line in paragraph):
            text += [*_definitions(paragraph, linked), ""]
        else:
            text += [*inline("\n".join(paragraph), linked).split("\n"), ""]
    lines[:] = text


def _definitions(paragraph: list[str], linked: Any) -> Iterator[str]:
    whole = re.sub(r"\n  +", " ", "\n".join(paragraph))
    for line in whole.split("\n"):
        names, _, text = line.partition(": ")
        yield from (", ".join(f"``{name}``" for name in names.split(", ")), f"   {inline(text, linked)}", "")


# -- signatures and links --------------------------------------------------------------------------------------------


def process_signature(
    _app: Sphinx, what: str, name: str, obj: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out of a signature what only the engine has a use for; show the defaults that stand behind `DEFAULT`."""
    if what == "class" and (name.rpartition(".")[2] in MADE_BY_THE_ENGINE or getattr(obj, "_is_protocol", False)):
        return "", returns
    if signature is not None:
        signature = re.sub(r" \| ~?(persistency\.options\.)?Default\b", "", signature)
        signature = _NOT_GIVEN.sub(_with_default, signature)
        signature = signature.replace("<function <lambda>>", "...")
        signature = _UNPACKED.sub(r"*\1", signature)
        signature = _FULL_NAME.sub("~", _ALIAS.sub(r"~\1", signature))
    return signature, returns


def _with_default(given: re.Match[str]) -> str:
    return f"{given[1]}: {given[2]} = {getattr(JobOptions(), given[1], None)!r}"


def resolve(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Lead a type's name to its entry, or into Python's own documentation."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if _TYPE_VARIABLE.fullmatch(target):
        return content  # it stands for any type, and leads nowhere
    target = app.config.autodoc_type_aliases.get(target, target)  # an overload is shown as it is written
    if target != node["reftarget"]:
        return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)
    address = _in_python(target)
    if address is None:
        return None
    return nodes.reference("", "", content, internal=False, refuri=_PYTHON + address, reftitle=f"Python: {target}")


def _in_python(name: str) -> str | None:
    """The address of one of Python's own names within its library reference."""
    if name == "None":
        return "constants.html#None"
    built_in = getattr(builtins, name, None)
    if inspect.isclass(built_in):
        if issubclass(built_in, BaseException):
            return f"exceptions.html#{name}"
        page = "functions" if name in _FUNCTIONS else None
        return None if page is None else f"{page}.html#{name}"
    name = _BARE.get(name, re.sub(r"\._\w+\.", ".", name))
    module = name.rpartition(".")[0]
    if module in {"collections.abc", "concurrent.futures", "contextlib", "datetime", "os", "pathlib", "typing"}:
        return f"{module}.html#{name}"
    return None


# -- tables ----------------------------------------------------------------------------------------------------------


class DocstringTable(SphinxDirective):
    """The table of a module's docstring: `.. docstring-table:: persistency.codec.keys`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table; its first row is the head."""
        module = import_module(self.arguments[0])
        rows = [line for line in inspect.cleandoc(module.__doc__ or "").split("\n") if line.startswith("|")]
        if not rows:
            raise self.error(f"the docstring of {self.arguments[0]} has no table")
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
        for row in rows:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            if set("".join(cells)) <= set("-: "):
                continue
            for at, cell in enumerate(cells):
                shown = inline(cell.replace(r"\|", "|"), Linked("", None)).strip()
                lines.append(f"   {'* -' if at == 0 else '  -'} {shown}")
        holder = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("missing-reference", resolve)
    app.add_directive("docstring-table", DocstringTable)
    # What is meant by a default, not what it is made of.
    shown = persistency.KeyRange.__repr__
    persistency.KeyRange.__repr__ = lambda self: "KeyRange()" if self == type(self)() else shown(self)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
