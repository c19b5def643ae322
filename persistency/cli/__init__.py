"""The command line: `persistency demo`, `import`, `scan` and `get`.

Rules:
  1. It stands above everything: it uses the public names of the package and the codec of values, nothing else.
  2. typer and rich are an extra. Nothing outside this folder imports them, and without them one line says what to
     install.

Doesn't know: what the commands do; `app` lists them.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command that `sys.argv` names. Returns the exit code, or raises `SystemExit` with it."""
    try:
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
    app(prog_name="persistency")
    return 0
