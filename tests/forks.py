"""Programs of Python, each in a process of its own that is a fork of one which has imported what they need.

To start an interpreter and to import takes most of the time of a short program. What is the same for all of them is
done once: a process imports it, then each program begins in a fork, and ends as an interpreter ends. It has its own
arguments, directory, environment and exit code; its input is empty. The options of the interpreter, and the variables
that only its start looks at (`PYTHONPATH`, `PYTHONWARNINGS`), are those of the first process.

A test of how a process starts, of imports, or of signals from outside has `subprocess` for it.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

# One request a line, and one answer: the exit codes.
SERVER = """
import ast, json, os, runpy, sys, types
from importlib import import_module, invalidate_caches

for _name in json.loads(sys.argv[1]):
    import_module(_name)

def _wanted(program):
    for node in ast.parse(program).body:  # those at its top: the others may not be come to
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module

def _ready(asked):
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    if "program" in asked:
        for name in _wanted(asked["program"]):
            try:
                import_module(name)
            except Exception:
                pass  # the program will say so itself

def _own(at):
    for number, name in enumerate((os.devnull, f"out-{at}", f"err-{at}")):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        opened = os.open(os.path.join(asked["directory"], name), flags | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)

def _exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def _requests():
    begun = b""
    while more := os.read(0, 1 << 20):
        *lines, begun = (begun + more).split(b"\\n")
        yield from map(json.loads, lines)
    os._exit(0)

def _begin(asked):  # to return is to be the program
    _own(0)  # what is said while it is made ready is the first one's
    _ready(asked)
    codes = []
    for at in range(asked["times"]):
        pid = os.fork()
        if not pid:
            os.close(_answers)
            _own(at)
            invalidate_caches()  # of a directory, which may have got modules since
            return
        codes.append(_exit_code(pid))
    os.write(_answers, json.dumps(codes).encode() + b"\\n")
    os._exit(0)

_answers = os.dup(1)
for asked in _requests():
    _pid = os.fork()
    if not _pid:
        _begin(asked)
        break
    if _exit_code(_pid) != 0:
        os._exit(70)
sys.argv = asked["arguments"]
if "program" in asked:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    exec(compile(asked["program"], "<string>", "exec", dont_inherit=True), main.__dict__)
else:
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
"""


# What the commands of the command line import when they are called, beside what it begins with.
COMMAND_LINE = ("persistency.cli.app", "persistency.cli.records", "persistency.cli.intake", "pydantic.type_adapter")


class Forks:
    """A process with these modules, which runs programs in forks of itself; made when it is first needed.

    `options` are the interpreter's, `environment` is that of its start and, unless it says otherwise, of each program.
    """

    def __init__(self, *modules: str, options: Sequence[str] = (), environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, *options, "-c", SERVER, json.dumps(modules)]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def run_program(
        self, program: str, *, cwd: Path, environment: Mapping[str, str], times: int = 1, timeout: float = 100
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run what `python -c` would, so many times, one after the other; what it imports first is imported once."""
        asked = {"program": program, "arguments": ["-c"], "times": times}
        return self._run(asked, cwd, environment, timeout)

    def run_module(
        self,
        module: str,
        *arguments: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 100,
    ) -> subprocess.CompletedProcess[str]:
        """Run what `python -m` would."""
        asked = {"module": module, "arguments": ["-m", *arguments], "times": 1}
        return self._run(asked, cwd or Path.cwd(), environment or self._environment, timeout)[0]

    def _run(
        self, asked: dict[str, object], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> list[subprocess.CompletedProcess[str]]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
            atexit.register(self._stop)
        with tempfile.TemporaryDirectory() as directory:
            asked |= {"cwd": str(cwd), "environment": dict(environment), "directory": directory}
            codes = self._ask(self._process, json.dumps(asked).encode() + b"\n", timeout)
            return [
                subprocess.CompletedProcess(
                    asked["arguments"],
                    code,
                    *(Path(directory, f"{name}-{at}").read_text("utf-8") for name in ("out", "err")),
                )
                for at, code in enumerate(codes)
            ]

    def _ask(self, process: subprocess.Popen[bytes], line: bytes, timeout: float) -> list[int]:
        assert process.stdin is not None
        assert process.stdout is not None
        with ExitStack() as unless_answered:
            unless_answered.callback(self._stop)
            process.stdin.write(line)
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], timeout)
            assert ready, f"it has not ended after {timeout} s"
            answer = process.stdout.readline()
            assert answer, "the process that runs programs is gone"
            unless_answered.pop_all()
        codes: list[int] = json.loads(answer)
        return codes

    def _stop(self) -> None:
        if self._process is not None:
            with self._process as process:
                os.killpg(process.pid, signal.SIGKILL)
            self._process = None
