"""The README and the pages of docs, executed: every code block runs, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.forks import COMMAND_LINE, Forks
from tests.postgres import fresh_url

SERVER = "DATABASE_URL"  # what a page calls the URL of a server

README = Path(__file__).parent.parent / "README.md"
# Beside the package that is being tested, with every warning an error. A block that runs pytest names the plugin it is
# about; what happens to be installed here besides would take four fifths of the time.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(README.parent),
    "PYTHONWARNINGS": "error",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
PROGRAMS = Forks("asyncio", "persistency", options=("-X", "dev"), environment=ENVIRONMENT)
FORKS = Forks(*COMMAND_LINE, environment=ENVIRONMENT)
PAGES = [README, *sorted((README.parent / "docs").rglob("*.md"))]
# Pages whose blocks make one whole, or are in other languages, and the tests that run them.
AS_A_WHOLE = {"tutorial.md": "test_tutorial.py", "plugin-abi.md": "test_plugins_guests.py"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def where(page: Path, text: str) -> str:
    """The name of a block's test: its page and line."""
    name = str(page.relative_to(README.parent).with_suffix("")).removeprefix("docs/").replace("/", "-")
    return f"{name}-line-{text.count(chr(10)) + 1}"


BLOCKS = [
    (match[1], match[2], where(page, page.read_text()[: match.start()]))
    for page in PAGES
    if page.name not in AS_A_WHOLE
    for match in FENCED.finditer(page.read_text())
]


def blocks(language: str) -> list[object]:
    """The blocks of a language, named by their page and line."""
    return [pytest.param(text, id=place) for name, text, place in BLOCKS if name == language]


def server_of(block: str) -> dict[str, str]:
    """The environment of a block that wants a server: the URL of one, with a schema that nobody else has."""
    return {SERVER: fresh_url()} if SERVER in block else {}


def test_every_block_is_of_a_kind_that_is_executed() -> None:
    """There is no code block that the tests here don't know how to run."""
    assert {name for name, _, _ in BLOCKS} <= {"python", "sh", "sql"}
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(FENCED.findall(page.read_text())), f"{page} has a fence of another form"
    for page, test in AS_A_WHOLE.items():
        assert page in (Path(__file__).parent / test).read_text()
    for page in sorted((README.parent / "docs").rglob("*.rst")):
        assert not re.search(r"::$|^\s*\.\. code", page.read_text(), re.MULTILINE), f"{page}: blocks are in pages"


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    """A Python program runs from an empty directory, and again where it has run, without a warning."""
    environment = ENVIRONMENT | server_of(block)
    for finished in PROGRAMS.run_program(block, cwd=tmp_path, environment=environment, times=2):
        assert finished.returncode == 0, finished.stderr
        assert "Warning" not in finished.stderr
        assert "Traceback" not in finished.stderr


def of_one_line(statement: str) -> str:
    """A statement with its white space made even."""
    return " ".join(statement.split())


@pytest.mark.parametrize("block", blocks("sql"))
def test_sql_blocks_hold_for_a_job_s_file(block: str, tmp_path: Path) -> None:
    """A definition shown is the one a new file has, word for word; any other statement answers something there."""
    from persistency import Persistency

    with Persistency(tmp_path) as p:
        job = p.open_job("alpha", feed_changes_max=10)
        job.put("message", ("lobby", 1), b"hello")
        job.put("message", ("lobby", 2), b"soon gone", ttl=3600)
    with closing(sqlite3.connect(f"file:{job.path}?mode=ro", uri=True)) as file:
        real = {of_one_line(sql) for (sql,) in file.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL")}
        for statement in filter(None, map(of_one_line, block.split(";"))):
            if statement.startswith("CREATE"):
                assert statement in real
            else:
                assert file.execute(statement).fetchall() != []


# What makes the file that the shell blocks read: a line of a page, so that nobody is told to use what isn't there.
MAKES_PACKAGES = re.findall(r"^printf .* > packages\.jsonl\.gz$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("block", blocks("sh"))
def test_shell_blocks_run(block: str, tmp_path: Path) -> None:
    """A `persistency` command runs as shown, on the file a page makes; the two that set everything up are run by CI."""
    (makes_packages,) = MAKES_PACKAGES
    lines = block.splitlines()
    server = server_of(block)
    if makes_packages not in lines:
        lines.insert(0, makes_packages)  # a reader has done so further up
    for line in lines:
        words = [server.get(SERVER, "") if word == f"${SERVER}" else word for word in shlex.split(line)]
        if words[0] in {"persistency", "printf"}:
            if words[0] == "persistency":
                finished = FORKS.run_module(*words, cwd=tmp_path, environment=ENVIRONMENT | server)
            else:
                command = ["bash", "-euo", "pipefail", "-c", line]
                finished = subprocess.run(
                    command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
                )
            assert finished.returncode == 0, finished.stderr
            assert "Traceback" not in finished.stderr
        else:
            assert line in {
                "python3 -m venv v && v/bin/pip install '.[cli]' && v/bin/persistency demo",
                "python3 -m venv v && v/bin/pip install '.[test]' && v/bin/python -m pytest",
            }


@pytest.mark.parametrize("page", [README, README.parent / "docs" / "cli.md"], ids=lambda page: page.stem)
def test_the_file_of_the_shell_blocks_is_made_before_it_is_used(page: Path) -> None:
    """Each page that reads `packages.jsonl.gz` says first how to have it, in the words that are run here."""
    lines = [line for name, text in FENCED.findall(page.read_text()) if name == "sh" for line in text.splitlines()]
    users = [line for line in lines if "packages.jsonl.gz" in line]
    assert len(users) > 1
    assert users[:1] == MAKES_PACKAGES


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
