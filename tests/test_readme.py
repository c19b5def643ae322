"""The README and the pages of docs, executed: every code block runs, as it stands there."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
BLOCKS = [
    (match.group(1), match.group(2), f"{page.stem}-line-{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]


def blocks(language: str) -> list[object]:
    """The blocks of a language, named by their page and line."""
    return [pytest.param(text, id=where) for name, text, where in BLOCKS if name == language]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command beside the package that is being tested."""
    environment = {**os.environ, "PYTHONPATH": str(README.parent), "PYTHONWARNINGS": "error"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_every_block_is_of_a_kind_that_is_executed() -> None:
    """There is no code block that the tests here don't know how to run."""
    assert {name for name, _, _ in BLOCKS} <= {"python", "sh", "sql"}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    """A Python block runs from an empty directory, and again where it has run, without a warning."""
    for _ in range(2):
        finished = run([sys.executable, "-X", "dev", "-c", block], tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert "Warning" not in finished.stderr
        assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("block", blocks("sql"))
def test_sql_blocks_are_the_schema(block: str, tmp_path: Path) -> None:
    """The schema shown is the one a new file has, to the letter of its columns."""
    from persistency import Persistency

    with Persistency(tmp_path) as p:
        path = p.open_job("alpha").path
    shown, real = sqlite3.connect(":memory:"), sqlite3.connect(path)
    shown.execute(block)
    for asked in (
        "SELECT * FROM pragma_table_xinfo('kv')",
        "SELECT type, wr FROM pragma_table_list('kv')",
        "SELECT name, origin FROM pragma_index_list('kv') WHERE origin = 'pk'",
    ):
        assert shown.execute(asked).fetchall() == real.execute(asked).fetchall() != []
    shown.close()
    real.close()


@pytest.mark.parametrize("block", blocks("sh"))
def test_shell_blocks_run(block: str, tmp_path: Path) -> None:
    """A `persistency` command runs as shown; the two that set everything up are run by CI, as they stand."""
    with gzip.open(tmp_path / "packages.jsonl.gz", "wt") as file:
        for name in ("0ad", "chess", "tetris"):
            file.write(json.dumps({"section": "games", "package": name, "size": len(name)}) + "\n")
    for line in block.splitlines():
        words = shlex.split(line)
        if words[0] == "persistency":
            finished = run([sys.executable, "-m", *words], tmp_path)
            assert finished.returncode == 0, finished.stderr
            assert "Traceback" not in finished.stderr
        else:
            assert line in {
                "python3 -m venv v && v/bin/pip install '.[cli]' && v/bin/persistency demo",
                "python3 -m venv v && v/bin/pip install '.[test]' && v/bin/python -m pytest",
            }


def test_links_lead_somewhere() -> None:
    """What a page links to in this repository is there."""
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert links
    assert [str(page.parent / link) for page, link in links if not (page.parent / link).exists()] == []


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    """CI takes its commands from the README, so they can't drift apart."""
    ci = (README.parent / ".ci" / "run").read_text()
    assert "readme_command 'persistency demo'" in ci
    assert "readme_command 'python -m pytest'" in ci
