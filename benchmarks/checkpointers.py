"""The LangGraph saver beside LangGraph's own for SQLite: `python -m benchmarks.checkpointers [--steps N] [--repeat N]`.

One run measures all of them, in turn. Each plays the same conversations: of every step the checkpoint is put, then what
its task has written, and then the thread's latest checkpoint is read, as a graph does. A way is what they have in
common: the verbs in turn in one thread, awaited in turn by one task, by 32 tasks at once, by 32 threads at once.

`serializer` is LangGraph's own work alone, which all of them have done: what a step takes without any storage.

Rules:
  1. Every saver keeps a commit from being lost if the process is killed, none of them from a power cut: SQLite's WAL,
     `synchronous=NORMAL`.
  2. What was put is read back at the end, from another saver object on the same file, and compared.
  3. There are no targets: it is shown how it is.

Doesn't know: how a saver stores anything.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal

import aiosqlite
import typer
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from rich.console import Console
from rich.table import Table

from benchmarks.harness import settled_garbage
from benchmarks.machine import facts
from benchmarks.verify import Mismatch
from persistency import Persistency
from persistency.integrations.langgraph import PersistencySaver

app = typer.Typer(add_completion=False)
out = Console()

OURS, THEIRS = "PersistencySaver", "SqliteSaver"
AT_ONCE = 32
MESSAGES_MAX = 20
Saver = BaseCheckpointSaver[str]
Way = Literal["in turn", "in turn, awaited", "32 tasks", "32 threads"]


@dataclass(frozen=True, slots=True)
class Step:
    """What is done in one step of a conversation; `write` is what its task has written."""

    config: Any
    checkpoint: Checkpoint
    metadata: Any
    new_versions: dict[str, str]
    write: Any


@dataclass(frozen=True, slots=True)
class State:
    """What the conversations are about: their messages, and beside these documents that never change."""

    name: str
    messages: Callable[[int], AnyMessage | dict[str, str]]
    documents: list[str] = field(default_factory=list)


def _message(at: int) -> AnyMessage:
    text = "a question of some length " * 8
    return HumanMessage(f"{at} {text}", id=f"q{at}") if at % 2 == 0 else AIMessage(f"{at} {text * 2}", id=f"a{at}")


STATES = (
    State("dicts", lambda at: {"role": "user" if at % 2 == 0 else "assistant", "content": f"message {at}" * 5}),
    State("messages", _message),
    State("documents", _message, [f"document {at} " * 400 for at in range(40)]),
)


def conversation(thread: str, steps: int, state: State) -> Iterator[Step]:
    """Give the steps of a conversation, each with one more message, at most the last 20."""
    versions: dict[str, str] = {}
    messages: list[Any] = []
    parent: str | None = None
    for at in range(steps):
        messages = [*messages, state.messages(at)][-MESSAGES_MAX:]
        values: dict[str, Any] = {"messages": messages, "documents": state.documents, "branch:to:agent": None}
        changed = values.keys() if at == 0 else ("messages", "branch:to:agent")
        new = dict.fromkeys(changed, f"{at + 1:032}.{at:016}")
        versions = versions | new
        config: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": ""}
        if parent is not None:
            config["checkpoint_id"] = parent
        checkpoint: Checkpoint = {
            "v": 4,
            "id": str(uuid6(clock_seq=at)),
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": values,
            "channel_versions": dict(versions),
            "versions_seen": {"agent": {"branch:to:agent": versions["branch:to:agent"]}, "__input__": {}},
            "updated_channels": ["messages"],
        }
        metadata = {"source": "loop", "step": at, "parents": {}}
        yield Step({"configurable": config}, checkpoint, metadata, new, messages[-1])
        parent = checkpoint["id"]


def _play(saver: Saver, steps: Sequence[Step]) -> None:
    for step in steps:
        stored = saver.put(step.config, step.checkpoint, step.metadata, dict(step.new_versions))
        saver.put_writes(stored, [("messages", [step.write])], "8a1503f9-b875-5b6a-7464-1ac53fb2e4dd")
        _check(saver.get_tuple(_thread(step)), step)


async def _aplay(saver: Saver, steps: Sequence[Step]) -> None:
    for step in steps:
        stored = await saver.aput(step.config, step.checkpoint, step.metadata, dict(step.new_versions))
        await saver.aput_writes(stored, [("messages", [step.write])], "8a1503f9-b875-5b6a-7464-1ac53fb2e4dd")
        _check(await saver.aget_tuple(_thread(step)), step)


def _thread(step: Step) -> Any:
    return {"configurable": {"thread_id": step.config["configurable"]["thread_id"], "checkpoint_ns": ""}}


def _check(found: Any, step: Step) -> None:
    if found is None or found.checkpoint["id"] != step.checkpoint["id"] or len(found.pending_writes) != 1:
        raise Mismatch(f"{found!r:.200} is not what was put")


@contextmanager
def _ours(directory: Path) -> Iterator[Saver]:
    with Persistency(directory) as p:
        yield PersistencySaver(p.open_job("graphs"))


@contextmanager
def _theirs(directory: Path) -> Iterator[Saver]:
    directory.mkdir(exist_ok=True)
    # As its documentation opens it, to be used from several threads; it turns the WAL on by itself.
    with closing(sqlite3.connect(directory / "graphs.db", check_same_thread=False)) as connection:
        connection.execute("PRAGMA synchronous=NORMAL")
        yield SqliteSaver(connection)


def _run(name: str, way: Way, conversations: Sequence[Sequence[Step]], directory: Path) -> float:
    """Play conversations in a way; return the seconds it took."""
    if way in ("in turn, awaited", "32 tasks"):
        return asyncio.run(_run_awaited(name, conversations, directory))
    with (_ours if name == OURS else _theirs)(directory) as saver:
        saver.get_tuple(_thread(conversations[0][0]))  # opened, its tables made
        wrong: list[BaseException] = []

        def work(steps: Sequence[Step]) -> None:
            try:
                _play(saver, steps)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(steps,)) for steps in conversations]
        with settled_garbage():
            begun = perf_counter()
            if len(threads) == 1:
                work(conversations[0])
            else:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            took = perf_counter() - begun
        if wrong:
            raise wrong[0]
    return took


async def _run_awaited(name: str, conversations: Sequence[Sequence[Step]], directory: Path) -> float:
    async def play(saver: Saver) -> float:
        await saver.aget_tuple(_thread(conversations[0][0]))
        with settled_garbage():
            begun = perf_counter()
            await asyncio.gather(*(_aplay(saver, steps) for steps in conversations))
            return perf_counter() - begun

    if name == OURS:
        with _ours(directory) as saver:
            return await play(saver)
    directory.mkdir(exist_ok=True)
    async with aiosqlite.connect(directory / "graphs.db") as connection:
        await connection.execute("PRAGMA synchronous=NORMAL")
        return await play(AsyncSqliteSaver(connection))


def _verify(name: str, conversations: Sequence[Sequence[Step]], directory: Path) -> None:
    """Read everything back from the file, and compare."""
    with (_ours if name == OURS else _theirs)(directory) as saver:
        for steps in conversations:
            found = list(saver.list(_thread(steps[0])))
            if [one.checkpoint for one in reversed(found)] != [step.checkpoint for step in steps]:
                raise Mismatch(f"{name}: the checkpoints read back aren't those that were put")
            written = [[(channel, value) for _, channel, value in one.pending_writes or ()] for one in reversed(found)]
            if written != [[("messages", [step.write])] for step in steps]:
                raise Mismatch(f"{name}: the writes read back aren't those that were put")


def _serializer(steps: Sequence[Step]) -> float:
    """Do what LangGraph's serializer has to do for a conversation, and nothing else; return the seconds it took."""
    serde = JsonPlusSerializer()
    with settled_garbage():
        begun = perf_counter()
        for step in steps:
            whole = serde.dumps_typed(step.checkpoint), serde.dumps_typed([step.write])
            for typed in whole:
                serde.loads_typed(typed)
        return perf_counter() - begun


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def measured(states: Sequence[State], steps: int, repeat: int, parent: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by state and way, the microseconds a step took with each saver, and the ratios of each repetition."""
    ways: dict[Way, int] = {"in turn": 1, "in turn, awaited": 1, "32 tasks": AT_ONCE, "32 threads": AT_ONCE}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for state in states:
        for way, count in ways.items():
            each = max(2, steps // count)
            found: dict[str, list[float]] = {OURS: [], THEIRS: [], "serializer": []}
            size: dict[str, int] = {}
            for _ in range(repeat):
                played = [list(conversation(f"thread-{at}", each, state)) for at in range(count)]
                for name in (OURS, THEIRS):
                    directory = Path(tempfile.mkdtemp(prefix="checkpointers-", dir=parent))
                    try:
                        found[name].append(_run(name, way, played, directory / "root") * 1e6 / (each * count))
                        size[name] = _size(directory)
                        _verify(name, played, directory / "root")
                    finally:
                        shutil.rmtree(directory)
                found["serializer"].append(_serializer(played[0]) * 1e6 / each)
            results.setdefault(state.name, {})[way] = {
                "us": found,
                "ratio": [their / our for our, their in zip(found[OURS], found[THEIRS], strict=True)],
                "bytes": size,
            }
    return results


def _table(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(title="microseconds per step: put, put_writes, get_tuple of the latest")
    for column in ("state", "way", OURS, f"(Async){THEIRS}", "theirs / ours", "serializer alone", "MB ours / theirs"):
        table.add_column(column, justify="left" if column in ("state", "way") else "right")
    for state, ways in results.items():
        for way, one in ways.items():
            us = {name: median(times) for name, times in one["us"].items()}
            sizes = f"{one['bytes'][OURS] / 1e6:.1f} / {one['bytes'][THEIRS] / 1e6:.1f}"
            ratio = f"{median(one['ratio']):.2f} ({min(one['ratio']):.2f} to {max(one['ratio']):.2f})"
            table.add_row(state, way, f"{us[OURS]:.0f}", f"{us[THEIRS]:.0f}", ratio, f"{us['serializer']:.0f}", sizes)
    return table


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=64, help="Steps of each measurement, over all conversations.")] = 2_000,
    repeat: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    state: Annotated[list[str] | None, typer.Option(help=f"Only this: {', '.join(s.name for s in STATES)}.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Where the files go; the default is for temporary ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure the LangGraph saver beside LangGraph's own for SQLite."""
    unknown = set(state or ()) - {one.name for one in STATES}
    if unknown:
        raise typer.BadParameter(f"no state {', '.join(unknown)}; there are {', '.join(one.name for one in STATES)}")
    parent = Path(tempfile.gettempdir()) if directory is None else directory
    machine = facts(parent)
    try:
        results = measured([one for one in STATES if not state or one.name in state], steps, repeat, parent)
    except Mismatch as mismatch:
        out.print(f"a wrong result, so nothing counts: {mismatch}", markup=False, highlight=False)
        raise typer.Exit(1) from mismatch
    out.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    out.print(_table(results))
    if json_file is not None:
        report = {"machine": machine, "steps": steps, "repeat": repeat, "results": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.checkpointers")
