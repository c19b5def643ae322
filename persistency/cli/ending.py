"""How a command ends: what its user is told, and its exit code.

Rules:
  1. What its user can mend ends in a message and a hint on stderr, and never in a traceback.
  2. The exit codes are: 0 done; 1 it couldn't be done, or what was looked for isn't there; 2 it was typed wrong; 3 the
     job belongs to another process, so that trying again later can help; 130 interrupted by Ctrl-C, with a word about
     what was done until then. `kill` ends a command in order too, with 143, as a shell counts it.
  3. Whoever reads our output may stop reading: the command ends quietly then, with 0, for it gave all that was wanted.

Doesn't know: what the commands do.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from persistency import JobLocked, PersistencyError, Poisoned

P = ParamSpec("P")

FAILED = 1
LOCKED = 3
INTERRUPTED = 130


class Fault(Exception):
    """What a command can't do, in words for the person who typed it; `hint` says what to do next."""

    code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Locked(Fault):
    """A fault that another process is the reason of, because it has a job open."""

    code = LOCKED


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
            say(f"interrupted: {interrupt}" if interrupt.args else "interrupted")
            _drop_output_of_nobody()
            raise typer.Exit(INTERRUPTED) from None
        except (PersistencyError, Fault) as error:
            say(str(error), _hint_of(error))
            _drop_output_of_nobody()
            raise typer.Exit(_code_of(error)) from None
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
            say(f"{where}{error.strerror or error}")
            _drop_output_of_nobody()
            raise typer.Exit(FAILED) from None

    return run


def say(message: str, hint: str = "") -> None:
    """Say something on stderr, beside what the command gives on stdout."""
    try:
        print(f"persistency: {message}", file=sys.stderr)
        for line in hint.splitlines():
            print(f"  {line}", file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        pass  # nobody listens there either; the exit code still tells


class _Teller(logging.Handler):
    """Says what the package logs, in a line each; a traceback is nothing for who has typed a command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a record."""
        say(record.getMessage())


def tell_what_is_logged() -> None:
    """Have what the package logs told as everything else is."""
    logger = logging.getLogger("persistency")
    logger.addHandler(_Teller(logging.WARNING))
    logger.propagate = False


def _hint_of(error: PersistencyError | Fault) -> str:
    if not isinstance(error, Poisoned):
        return error.hint
    # Its own hint is for a program that has the job open; the rest is what was added to it here.
    return "\n".join(["Mend that (is there room on the disk?), and try again.", *error.hint.splitlines()[1:]])


def _code_of(error: PersistencyError | Fault) -> int:
    if isinstance(error, Fault):
        return error.code
    return LOCKED if isinstance(error, JobLocked) else FAILED


def _drop_output_of_nobody() -> None:
    """Give out what is still buffered, or, if it can't be, let it go: there is one thing to be told already."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
