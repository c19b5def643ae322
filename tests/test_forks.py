"""What runs the programs of other tests in forks: a program there does what it does in an interpreter of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import Forks

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "error"}
FORKS = Forks("asyncio", "persistency", options=("-X", "dev"), environment=ENVIRONMENT)
PROGRAMS = {
    "nothing": "",
    "streams": "import sys; print('ä', sys.argv, __name__); print(sys.stdin.read() == '', file=sys.stderr)",
    "exit": "import atexit, sys; atexit.register(print, 'last'); sys.exit(3)",
    "exit with a message": "import sys; sys.exit('wrong')",
    "exception": "from persistency import Persistency\nPersistency(None, 1)",
    "no such module": "import asyncio, nowhere",
    "syntax": "from __future__ import nothing",
    "warning": "import warnings; warnings.warn('told')",
    "unraisable": "open('file', 'w')",
    "kill": "import os; os.kill(os.getpid(), 9)",
    "environment": "import os; print(os.environ['GIVEN'], os.getcwd(), len(os.environ)); os.environ['GIVEN'] = ''",
    "module of its own": "from pathlib import Path\nPath('mine.py').write_text('x = 1')\nimport mine\nprint(mine.x)",
    "thread": "import threading; threading.Thread(target=print, args=['from a thread']).start()",
    "processes": "import multiprocessing\nif __name__ == '__main__':\n"
    "    with multiprocessing.get_context('fork').Pool(1) as pool: print(pool.map(abs, [-1]))",
    "dataclass": "import dataclasses, sys\n@dataclasses.dataclass\nclass C:\n    x: 'int' = 1\n"
    "print(C(), sys.modules['__main__'].C is C)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_it_does_by_itself(name: str, tmp_path: Path) -> None:
    """It ends with the same code, and prints the same; what it fails with is its last line."""
    environment = ENVIRONMENT | {"GIVEN": "value"}
    alone = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAMS[name]],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    forked = FORKS.run_program(PROGRAMS[name], cwd=tmp_path, environment=environment, times=2)
    assert len(forked) == 2
    for one in forked:
        assert (one.returncode, one.stdout) == (alone.returncode, alone.stdout)
        assert one.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_a_module_does_too(tmp_path: Path) -> None:
    """`-m`, with its arguments."""
    command = ["persistency", "ls", str(tmp_path / "none"), "--json"]
    alone = subprocess.run(
        [sys.executable, "-m", *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    one = FORKS.run_module(*command)
    assert (one.returncode, one.stdout, one.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert one.returncode != 0


def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """With the time over it is gone, and the next one has another process to be forked from."""
    program = "import fcntl, signal\nfile = open('lock', 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nsignal.pause()"
    with pytest.raises(AssertionError, match="has not ended after 1 s"):
        FORKS.run_program(program, cwd=tmp_path, environment=ENVIRONMENT, timeout=1)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # comes when nobody has it any more
    (after,) = FORKS.run_program("print(1)", cwd=tmp_path, environment=ENVIRONMENT)
    assert (after.returncode, after.stdout) == (0, "1\n")
