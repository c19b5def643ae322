"""How a command ends: what its user is told, and its exit code.

Rules:
  1. What its user can mend ends in a message and a hint on stderr, and never in a traceback.
  2. The exit codes are: 0 done; 1 it couldn't be done, or what was looked for isn't there; 2 it was typed wrong; 130
     interrupted by Ctrl-C, with a word about what was done until then.
  3. Whoever reads our output may stop reading: the command ends quietly then, with 0, for it gave all that was wanted.

Doesn't know: what the commands do.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from persistency import PersistencyError

P = ParamSpec("P")

FAILED = 1
INTERRUPTED = 130


class Fault(Exception):
    """What a command can't do, in words for the person who typed it; `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def told(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that it ends by the rules above."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows few characters is no error
        try:
            command(*args, **options)
            sys.stdout.flush()  # here, so that what goes wrong with it is still ours to tell
        except BrokenPipeError:
            _drop_output()
        except KeyboardInterrupt as interrupt:
            _say(f"interrupted: {interrupt}" if interrupt.args else "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (PersistencyError, Fault) as error:
            _say(str(error), error.hint)
            raise typer.Exit(FAILED) from None
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            _say(f"{where}{error.strerror or error}")
            raise typer.Exit(FAILED) from None

    return run


def _say(message: str, hint: str = "") -> None:
    try:
        print(f"persistency: {message}", file=sys.stderr)
        for line in hint.splitlines():
            print(f"  {line}", file=sys.stderr)
    except OSError:
        pass  # nobody listens there either; the exit code still tells


def _drop_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
