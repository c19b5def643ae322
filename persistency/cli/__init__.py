"""The command line: `persistency`, also `python -m persistency`. `docs/cli.md` has every command.

Rules:
  1. It stands above everything: it uses the public names of the package and the codec of values, nothing else.
  2. typer and rich are an extra. Nothing outside this folder imports them, and without them one line says what to
     install.
  3. What a command needs is imported when it runs: most of a short command's time is the start of the interpreter.

Doesn't know: what the commands do; `app` lists them.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

_STDERR = 2


def main() -> int:
    """Run the command that `sys.argv` names. Returns the exit code, or raises `SystemExit` with it."""
    _have_streams()
    try:
        if find_spec("rich") is None:  # which is imported only where something is drawn
            raise ModuleNotFoundError(name="rich")
        from persistency.cli.app import app
    except ModuleNotFoundError as error:
        # A module of our own that is missing is a defect, and has to be seen as one.
        if error.name is None or error.name.partition(".")[0] == "persistency":
            raise
        print("persistency: the command line needs the extra 'cli': pip install 'persistency[cli]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("persistency: interrupted", file=sys.stderr)
        return 130
    from persistency import install_signal_handlers
    from persistency.cli.ending import tell_what_is_logged

    tell_what_is_logged()
    install_signal_handlers()  # so that `kill` ends a command in order, as Ctrl-C does
    try:
        app(prog_name="persistency")
    except KeyboardInterrupt:  # before the command has begun
        print("persistency: interrupted", file=sys.stderr)
        return 130
    return 0


def _have_streams() -> None:
    """Have stdin, stdout and stderr lead to nowhere where they were closed, lest another file get their numbers."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(handle)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115  # for good
            setattr(sys, name, stream)
