"""Types, as a user's checker sees them: the package is installed somewhere else, and programs are checked against it.

`tests/typing/jobs.py` and `views.py` are right, and they run; in `mistakes.py` every line marked `# wrong: ...` is.
Both checkers, at their strictest, must report exactly those lines.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import persistency
import persistency.testing
from persistency.options import JobOptions, OpenOptions

TREE = Path(__file__).parent.parent
PROGRAMS = sorted((TREE / "tests" / "typing").glob("*.py"))
RIGHT = [path for path in PROGRAMS if path.name != "mistakes.py"]
Lines = dict[str, set[int]]


def needs(checker: str) -> pytest.MarkDecorator:
    """Skip where a checker isn't installed."""
    missing = importlib.util.find_spec(checker) is None
    return pytest.mark.skipif(missing, reason=f"{checker} isn't installed here: it is in the extra `dev`")


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """Give a directory of programs beside an environment that the package is installed in."""
    venv.create(tmp_path / "v", with_pip=False, symlinks=True)
    python = tmp_path / "v" / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
    shutil.copytree(TREE / "persistency", site / "persistency", ignore=shutil.ignore_patterns("__pycache__"))
    # What the package and the programs stand on is taken from here.
    (site / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for path in PROGRAMS:
        shutil.copy(path, programs)
    return programs


def finished(user: Path, *command: str, checker: str) -> subprocess.CompletedProcess[str]:
    """Run a checker in the directory of the programs, with the user's environment in front."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}
    environment["PATH"] = f"{user.parent / 'v' / 'bin'}:{environment['PATH']}"
    line = [sys.executable, "-m", checker, *command]
    return subprocess.run(
        line, cwd=user, env=environment, capture_output=True, text=True, timeout=110, check=False
    )  # fmt: skip


def by_mypy(user: Path) -> tuple[Lines, str]:
    """Return the lines mypy reports, by program, and all it says."""
    options = ["--strict", "--config-file=", "--no-error-summary", "--python-version=3.11"]
    places = [f"--cache-dir={user.parent / 'cache'}", f"--python-executable={user.parent / 'v' / 'bin' / 'python'}"]
    told = finished(user, *options, *places, *[path.name for path in PROGRAMS], checker="mypy")
    assert told.returncode in {0, 1}, told.stderr + told.stdout
    lines: Lines = {path.name: set() for path in PROGRAMS}
    for name, line in re.findall(r"^(.+?):(\d+): error: ", told.stdout, re.MULTILINE):
        lines.setdefault(name, set()).add(int(line))
    return lines, told.stdout


def by_pyright(user: Path) -> tuple[Lines, str]:
    """Return the lines pyright reports in its mode `strict`, by program, and all it says."""
    settings = {"include": ["."], "typeCheckingMode": "strict", "pythonVersion": "3.11"}
    (user / "pyrightconfig.json").write_text(json.dumps(settings))
    told = finished(user, "--outputjson", checker="basedpyright")
    report = json.loads(told.stdout)
    assert report["summary"]["filesAnalyzed"] == len(PROGRAMS), told.stdout + told.stderr
    lines: Lines = {path.name: set() for path in PROGRAMS}
    for one in report["generalDiagnostics"]:
        lines.setdefault(Path(one["file"]).name, set()).add(one["range"]["start"]["line"] + 1)
    return lines, told.stdout


def marked(path: Path) -> set[int]:
    """Return the lines of a program that are marked as wrong."""
    return {at for at, line in enumerate(path.read_text().splitlines(), 1) if re.search(r"  # wrong: \S", line)}


@pytest.mark.parametrize(
    "check", [pytest.param(by_mypy, marks=needs("mypy")), pytest.param(by_pyright, marks=needs("basedpyright"))]
)
def test_mistakes_are_seen_and_nothing_else(user: Path, check: Callable[[Path], tuple[Lines, str]]) -> None:
    """Each marked line of the programs is reported, and no other: not in them, and not in the package."""
    lines, told = check(user)
    assert lines == {path.name: marked(path) for path in PROGRAMS}, told
    assert len(lines["mistakes.py"]) > 50


@pytest.mark.parametrize("program", RIGHT, ids=[path.stem for path in RIGHT])
def test_programs_without_a_mistake_run(program: Path, tmp_path: Path) -> None:
    """What they say of types holds for what there is: they aren't only written for a checker."""
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    command = [sys.executable, "-X", "dev", "-W", "error", str(program), str(tmp_path / "root")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert told.returncode == 0, told.stderr
    assert "Traceback" not in told.stderr


def public_names() -> set[str]:
    """Return the full names of what the package offers."""
    found = set()
    for module in (persistency, persistency.testing):
        for name in module.__all__:
            thing = getattr(module, name)
            home, own = getattr(thing, "__module__", None), getattr(thing, "__qualname__", name)
            found.add(f"{home if isinstance(home, str) else module.__name__}.{own}")
    return found


@needs("basedpyright")
def test_the_types_of_public_names_are_known(user: Path) -> None:
    """`pyright --verifytypes`: every type in the package is known, 100 %, and all public names were looked at."""
    told = finished(user, "--verifytypes", "persistency", "--ignoreexternal", "--outputjson", checker="basedpyright")
    report = json.loads(told.stdout)["typeCompleteness"]
    symbols: list[dict[str, Any]] = report["symbols"]
    assert [one for one in symbols if not one["isTypeKnown"] or one["isTypeAmbiguous"]] == []
    assert report["completenessScore"] == 1
    functions_and_classes = {name for name in public_names() if name.startswith("persistency.")}
    assert len(functions_and_classes) > 50
    assert functions_and_classes - {one["name"] for one in symbols} == set()


def test_the_options_of_a_job_are_the_same_wherever_they_are_told() -> None:
    """`aopen_job` takes what `open_job` does, to a checker as at run time."""
    told = set(inspect.signature(persistency.Persistency.open_job).parameters) - {"self", "job_id"}
    assert told == OpenOptions.__optional_keys__
    assert told == set(JobOptions._fields) - {"ttl_ms"} | {"ttl"}


def test_parameters_may_be_left_out_at_run_time_too() -> None:
    """As their defaults tell checkers: for an annotation that is evaluated, by a framework for example."""
    alias = persistency.Category[tuple[str, int]]
    assert alias.__args__ == (tuple[str, int], Any)
    assert persistency.Category[tuple[str, int], int].__args__ == (tuple[str, int], int)
    assert persistency.CategoryMapping[str].__args__ == (str,)
