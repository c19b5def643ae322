"""How a command ends: what its user is told, and its exit code.

Rules:
  1. What its user can mend ends in a message and a hint on stderr, and never in a traceback.
  2. The exit codes are: 0 done; 1 it couldn't be done, or what was looked for isn't there; 2 it was typed wrong; 3 the
     job belongs to another process, so that trying again later can help; 130 interrupted by Ctrl-C, with a word about
     what was done until then. `kill` ends a command in order too, with such a word, and 143, as a shell counts it.
  3. What the package logs is told as it comes; what is but the way to an error, only where there is none in the end.
  4. Whoever reads our output may stop reading: the command ends quietly then, with 0, for it gave all that was wanted.

Doesn't know: what the commands do.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeAlias

import typer

from persistency import JobLocked, Misuse, PersistencyError, Poisoned

P = ParamSpec("P")
Stop: TypeAlias = KeyboardInterrupt | SystemExit
"""What Ctrl-C and `kill` raise."""

FAILED = 1
TYPED_WRONG = 2
LOCKED = 3
INTERRUPTED = 130

# What the package logs on its way to an error, which says the same.
_LEADS_TO_AN_ERROR = {"job_stalls", "job_goes_on", "job_poisoned", "left_log_stays", "file_not_tidied", "drop_failed",
                      "file_not_made_smaller"}  # fmt: skip
_OUT_OF_ROOM = {
    errno.ENOSPC: "Free some space, and try again.",
    errno.EDQUOT: "Free some of what your quota allows, and try again.",
    errno.EFBIG: "A limit on the size of files is reached (ulimit -f), or the file system's own.",
}


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
            _teller.tell_rest()
        except BrokenPipeError:
            _drop_output()
        except (KeyboardInterrupt, SystemExit) as stop:
            say(": ".join(["interrupted", *getattr(stop, "__notes__", [])]))
            _drop_output_of_nobody()
            raise typer.Exit(INTERRUPTED if isinstance(stop, KeyboardInterrupt) else _number(stop)) from None
        except (PersistencyError, Fault) as error:
            say(str(error), hint_of(error))
            _drop_output_of_nobody()
            raise typer.Exit(_code_of(error)) from None
        except OSError as error:
            say(f"{_where(error)}{error.strerror or error}", _OUT_OF_ROOM.get(error.errno or 0, ""))
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


def stopped(by: Stop, words: str) -> Stop:
    """Return what ends a command that Ctrl-C or `kill` has stopped, with a word about what was done until then."""
    stop: Stop = KeyboardInterrupt() if isinstance(by, KeyboardInterrupt) else SystemExit(by.code)
    stop.add_note(words)
    return stop


class _Teller(logging.Handler):
    """Says what the package logs, in a line each; a traceback is nothing for who has typed a command."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._held: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Say a record, or keep it until it is known whether there is an error that says the same."""
        if _event_of(record) in _LEADS_TO_AN_ERROR:
            self._held.append(record.getMessage())
        else:
            say(record.getMessage())

    def tell_rest(self) -> None:
        """Say what was kept: there is no error."""
        for message in dict.fromkeys(self._held):
            say(message)
        self._held.clear()


_teller = _Teller()


def tell_what_is_logged() -> None:
    """Have what the package logs told as everything else is."""
    logger = logging.getLogger("persistency")
    logger.addHandler(_teller)
    logger.propagate = False


class _Heard(logging.Handler):
    """Keeps what is logged of one event."""

    def __init__(self, event: str) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}
        self._event = event

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's message, once."""
        if _event_of(record) == self._event:
            self.messages[record.getMessage()] = None


@contextmanager
def hearing(event: str) -> Iterator[dict[str, None]]:
    """Give the messages that are logged of an event meanwhile: what the package passes over may be an error here."""
    heard = _Heard(event)
    logger = logging.getLogger("persistency")
    logger.addHandler(heard)
    try:
        yield heard.messages
    finally:
        logger.removeHandler(heard)


def _event_of(record: logging.LogRecord) -> object:
    return getattr(record, "persistency_event", None)


def hint_of(error: PersistencyError | Fault) -> str:
    """Return what to do about an error, in words for a person; nothing if its hint is for a program alone."""
    if isinstance(error, Fault):
        return error.hint
    own, *added = error.hint.splitlines()  # what was added to it here is for persons
    if isinstance(error, Poisoned):
        own = "Mend that (is there room on the disk?), and try again."
    elif own in (Misuse.hint, PersistencyError.hint):
        own = ""
    return "\n".join(filter(None, [own, *added]))


def _code_of(error: PersistencyError | Fault) -> int:
    if isinstance(error, Fault):
        return error.code
    if isinstance(error, Misuse):
        return TYPED_WRONG
    return LOCKED if isinstance(error, JobLocked) else FAILED


def _number(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else FAILED


def _where(error: OSError) -> str:
    if isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: "
    return "stdout: " if error.errno in _OUT_OF_ROOM else ""  # every other file that is written has its name


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
