"""The tutorial, done from its first line to its last: its files are written, its commands run, its outputs compared.

A page's block is told by its language and first line:

| block | what is done with it |
|---|---|
| `python`, first line `# chat.py` | added to that file, by the page's rule, `RULE`; then the file is imported |
| `python`, another file's name | written to that file |
| `sh`, a server | started, once the one before was ended by Ctrl-C; ready when it answers |
| `sh`, `curl -N` | run on beside the others, until a server is started |
| `sh`, all else | run by bash; what a line defines is known to later blocks |
| `text` | what the last `sh` block must have said; of a stream, what it says |

The line that installs is run as it stands when `PERSISTENCY_INSTALL` is set, which takes the network and a minute.
Otherwise `v/bin` runs this interpreter, which must have all that the line names.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

TOP = Path(__file__).parent.parent
PAGE = TOP / "docs" / "tutorial.md"
EXAMPLE = TOP / "examples" / "chat.py"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
RULE = """imports go to the top and new constants (`NAME = ...`) right below them; a function or constant that is there
already is replaced where it stands; all else is added at the end"""
PORT = "8000"  # in the page; here it is a free one
WAIT = 60.0


class Definitions:
    """A module's statements, by what they define, in the order in which they stand: what `RULE` makes of blocks."""

    def __init__(self) -> None:
        self.imports: dict[str, None] = {}
        self.others: dict[str, str] = {}
        self.begun = False

    def add(self, source: str) -> None:
        """Take in a block by `RULE`; the first one makes the file, and is taken as it stands."""
        constants: dict[str, str] = {}
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= dict.fromkeys(_imports(node))
                continue
            name = _defined(node)
            new = self.begun and isinstance(node, ast.Assign) and name not in self.others
            (constants if new else self.others)[name] = ast.unparse(_without_docstring(node))
        self.others = constants | self.others
        self.begun = True

    def text(self) -> str:
        """The module."""
        return "\n\n".join([*self.imports, *self.others.values()]) + "\n"

    def same(self, other: Definitions) -> bool:
        """Whether two define the same, whatever the order of what they import."""
        return (self.imports.keys(), self.others) == (other.imports.keys(), other.others)


def _imports(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Take an import apart, a name at a time."""
    if isinstance(node, ast.Import):
        return [ast.unparse(ast.Import([name])) for name in node.names]
    return [ast.unparse(ast.ImportFrom(node.module, [name], 0)) for name in node.names]


def _defined(node: ast.stmt) -> str:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case ast.If():
            return ast.unparse(node.test)
    raise AssertionError(f"the page has no rule for {ast.unparse(node)!r}")


def _without_docstring(node: ast.stmt) -> ast.stmt:
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(each):
            each.body = each.body[1:] or [ast.Pass()]
    return node


def _module(text: str) -> Definitions:
    """Read a whole module, its docstring left out."""
    found = Definitions()
    tree = ast.parse(text)
    found.add("\n".join(ast.unparse(node) for node in tree.body[1 if ast.get_docstring(tree) else 0 :]))
    return found


class Reader:
    """Somebody who follows the page, with a directory, a server and a stream."""

    def __init__(self, directory: Path, port: int) -> None:
        self.cwd = directory
        self.port = str(port)
        # Nothing that this shell has set up for Python may help.
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Another pytest that ends would clear up what is in the place of all of them, and this one warn of it.
        self.environment["PYTEST_DEBUG_TEMPROOT"] = str(directory)
        self.chat = Definitions()
        self.known: list[str] = []  # what was defined in the shell
        self.said = ""
        self.outputs = 0
        self.server: subprocess.Popen[str] | None = None
        self.stream: subprocess.Popen[str] | None = None

    def write(self, block: str) -> None:
        """Write a file, or add to the service."""
        name = block.partition("\n")[0].removeprefix("# ")
        if name == "chat.py, whole":
            assert block.partition("\n")[2] == EXAMPLE.read_text(), "the page's whole file isn't the example's"
            assert self.chat.same(_module(block)), "the steps add up to something else than the whole file"
            (self.cwd / "chat.py").write_text(block)
        elif name == "chat.py":
            self.chat.add(block)
            (self.cwd / name).write_text(self.chat.text())
            runpy.run_path(str(self.cwd / name), run_name="chat")  # no step may need what a later one brings
        else:
            assert re.fullmatch(r"\w+\.py", name), "a block begins with the name of its file"
            (self.cwd / name).write_text(block)

    def type(self, block: str) -> None:
        """Type what a shell block says."""
        block = block.replace(PORT, self.port)
        first = block.partition("\n")[0]
        if first.startswith("mkdir "):
            self.set_up(block)
        elif re.match(r"(PORT=\d+ )?v/bin/(uvicorn|python) \S*chat", first) and "|" not in first:
            self.serve(shlex.split(first))
        elif " -N " in first:
            self.stream = subprocess.Popen(shlex.split(first), cwd=self.cwd, stdout=subprocess.PIPE, text=True)
            assert self.stream.stdout is not None
            assert self.stream.stdout.readline() == ": following\n"  # what is posted from here on, it gives
            self.said = ": following\n"
        else:
            self.run(block)

    def set_up(self, block: str) -> None:
        """Make the directory and what is to be installed."""
        make, install = block.splitlines()
        assert make == "mkdir chat && cd chat"
        (self.cwd / "persistency").symlink_to(TOP)
        self.cwd = self.cwd / "chat"
        self.cwd.mkdir()
        begin = "python3 -m venv v && v/bin/pip install ../persistency "
        assert install.startswith(begin)
        if os.environ.get("PERSISTENCY_INSTALL"):
            self.run(install.replace("python3", shlex.quote(sys.executable), 1))
            return
        assert [version(name) for name in install.removeprefix(begin).split()]
        (self.cwd / "v" / "bin").mkdir(parents=True)
        for name, module in (("python", ""), ("uvicorn", "-m uvicorn ")):
            script = self.cwd / "v" / "bin" / name
            script.write_text(f'#!/bin/sh\nPYTHONPATH={TOP} exec {sys.executable} -X dev {module}"$@"\n')
            script.chmod(0o755)

    def run(self, block: str) -> None:
        """Run a block to its end, in a shell that knows what earlier ones have defined."""
        finished = subprocess.run(
            ["bash", "-eu", "-c", "\n".join([*self.known, block])],
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout
        self.known += [line for line in block.splitlines() if re.match(r"\w+(\(\)|=)", line)]
        if self.stream is None:
            self.said = finished.stdout

    def serve(self, words: list[str]) -> None:
        """Start a server, in the place of the one there is."""
        self.stop()
        environment = dict(self.environment)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        self.server = subprocess.Popen(words, cwd=self.cwd, env=environment, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + WAIT
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/openapi.json")
            except httpx.TransportError:
                assert self.server.poll() is None, self.server.stderr and self.server.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.05)  # nobody tells when it answers
            else:
                return

    def compare(self, expected: str) -> None:
        """Look that what was said is what the page shows."""
        self.outputs += 1
        if self.stream is not None and self.stream.stdout is not None:
            while self.said.count("\n") < expected.count("\n"):
                line = self.stream.stdout.readline()
                assert line, f"the stream has ended: {self.said}"
                self.said += line
        assert _timeless(self.said) == _timeless(expected)

    def stop(self) -> None:
        """Press Ctrl-C in both terminals, as far as something runs there; a server says nothing it shouldn't."""
        if self.stream is not None:
            self.stream.send_signal(signal.SIGINT)
            self.stream.communicate(timeout=WAIT)
            self.stream = None
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            _, log = self.server.communicate(timeout=WAIT)
            assert self.server.returncode in {0, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL}, log
            assert "Exception" not in log, log
            assert "Warning" not in log, log
            self.server = None


def _timeless(text: str) -> str:
    """Leave out what differs from run to run: times, process ids, versions (presence that ends takes some)."""
    text = re.sub(r"20[2-9]\d-\d\d-\d\dT(?!00:00:00Z)[\d:.]+Z", "<time>", text)
    text = re.sub(r"(?m)^id: \d+$", "id: <version>", text)
    text = re.sub(r"by process \d+ \(its lock: '\S+/data/", "by process <pid> (its lock: '<data>/", text)
    return re.sub(r"in \d+\.\d+s", "in <seconds>", text)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Give a reader in an empty directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader = Reader(tmp_path, port)
    yield reader
    for process in (reader.stream, reader.server):
        if process is not None:
            process.kill()
            process.communicate()


@pytest.mark.timeout(900 if os.environ.get("PERSISTENCY_INSTALL") else 120)
def test_the_tutorial_leads_to_the_working_service(reader: Reader) -> None:
    """From an empty directory every step does what the page shows, and all of them together give the example."""
    do = {"python": reader.write, "sh": reader.type, "text": reader.compare}
    for language, block in BLOCKS:
        do[language](block)
    reader.stop()
    assert reader.outputs == sum(language == "text" for language, _ in BLOCKS) > 12
    assert (reader.cwd / "chat.py").read_text().partition("\n")[2] == EXAMPLE.read_text()


def test_each_output_belongs_to_a_command() -> None:
    """A text block stands behind a shell block, and shows something."""
    assert BLOCKS[0][0] == "sh"
    for (before, _), (language, block) in pairwise(BLOCKS):
        assert language != "text" or (before == "sh" and block.strip())


def test_blocks_are_put_together_by_the_rule_of_the_page(reader: Reader) -> None:
    """The page states the rule that is followed here, and each step's file is imported."""
    assert " ".join(RULE.split()) in " ".join(PAGE.read_text().split())
    reader.write("# chat.py\nimport os\n\nLIMIT = 1\n\ndef f() -> int:\n    return LIMIT\n\nMADE = f()\n")
    reader.write(
        "# chat.py\nimport re\n\nLIMIT = 2\nLATER = 3\nNumber = int\n\n"
        "def g() -> int:\n    return 4\n\ndef f(n: Number = LATER) -> int:\n    return n\n"
    )
    assert (reader.cwd / "chat.py").read_text().split("\n\n") == [
        "import os",
        "import re",
        "LATER = 3",
        "Number = int",
        "LIMIT = 2",
        "def f(n: Number=LATER) -> int:\n    return n",
        "MADE = f()",
        "def g() -> int:\n    return 4\n",
    ]
    with pytest.raises(NameError, match="'Missing'"):
        reader.write("# chat.py\ndef f(n: Missing) -> int:\n    return n\n")


def test_a_step_that_says_something_else_is_noticed(reader: Reader) -> None:
    """The yardstick itself: another output, another whole file and a command that fails are refused."""
    reader.run("echo hello")
    reader.compare("hello\n")
    with pytest.raises(AssertionError):
        reader.compare("goodbye\n")
    with pytest.raises(AssertionError):
        reader.run("exit 3")
    reader.chat.add("def f():\n    return 1\n")
    assert reader.chat.same(_module('"""Text."""\n\ndef f():\n    """Say one."""\n    return 1\n'))
    assert not reader.chat.same(_module("def f():\n    return 2\n"))
    with pytest.raises(AssertionError, match="whole file"):
        reader.write("# chat.py, whole\nimport os\n")
