"""The soak of the LangGraph integration: graphs whose process is killed, random operations beside LangGraph's own."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from langgraph.checkpoint.memory import InMemorySaver

from persistency import Persistency
from persistency.integrations.langgraph import PersistencyGraphStore, PersistencySaver
from tests.soak.part import Part, Tell

PROJECT = Path(__file__).parent.parent.parent

# Counts, and says a number when the checkpoint was acknowledged that has it, until it is killed.
PROGRAM = """
import operator, sys
from typing import Annotated, TypedDict
from langgraph.graph import START, StateGraph
from persistency import Persistency
from persistency.integrations.langgraph import PersistencySaver

class State(TypedDict):
    counted: Annotated[list[int], operator.add]

class Saver(PersistencySaver):
    late = []
    def put(self, config, checkpoint, metadata, new_versions):
        given = config, checkpoint, metadata, new_versions
        if sys.argv[2] == "planted":  # the step before is put now, this one the next time
            self.late.append(given)
            stored = {"configurable": {**config["configurable"], "checkpoint_id": checkpoint["id"]}}
            if len(self.late) > 1:
                super().put(*self.late.pop(0))
        else:
            stored = super().put(*given)
        print(len(checkpoint["channel_values"].get("counted", ())), flush=True)
        return stored

graph = StateGraph(State).add_node("count", lambda state: {"counted": [len(state["counted"])]})
graph.add_edge(START, "count").add_conditional_edges("count", lambda _state: "count", ["count"])
with Persistency(sys.argv[1]) as p:
    built = graph.compile(checkpointer=Saver(p.open_job("graphs")))
    config = {"configurable": {"thread_id": "t"}, "recursion_limit": 1_000_000}
    counted = built.get_state(config).values.get("counted", [])
    print("resumed", len(counted), counted == list(range(len(counted))), flush=True)
    built.invoke(None if counted else {"counted": []}, config, durability="sync")
"""


def kill(place: Path, kills: int, seed: int, *, plant: bool = False) -> tuple[list[str], int]:
    """Kill a graph's process so many times; return what was wrong, and how many steps were acknowledged."""
    rng, wrong, told = random.Random(seed), [], 0
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "error"}
    for _ in range(kills):
        command = [sys.executable, "-c", PROGRAM, str(place), "planted" if plant else "sound"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline().split()
            if first[:1] != ["resumed"] or first[2] != "True":
                wrong.append(f"other: seed {seed}: it began with {first}")
            elif int(first[1]) < told:
                wrong.append(f"lost: seed {seed}: {told} steps were acknowledged, {first[1]} are there")
            for _ in range(rng.randrange(4, 30)):
                told = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:  # what it had said before it died
                told = int(line)
            if process.wait(60) != -signal.SIGKILL:
                wrong.append(f"other: seed {seed}: it ended by itself, with {process.returncode}")
    return wrong + _looked_at(place, told, seed), told


def _looked_at(place: Path, told: int, seed: int) -> list[str]:
    """Look at what is there when nobody works any more."""
    with Persistency(place) as p:
        saver = PersistencySaver(p.open_job("graphs"))
        listed = saver.list({"configurable": {"thread_id": "t", "checkpoint_ns": ""}})
        found = [one.checkpoint["channel_values"].get("counted", []) for one in listed]
    wrong = []
    if len(found[0]) < told:
        wrong.append(f"lost: seed {seed}: {told} steps were acknowledged, {len(found[0])} are there at the end")
    if any(counted != list(range(len(counted))) for counted in found) or found != sorted(found, reverse=True):
        wrong.append(f"other: seed {seed}: steps are missing in the middle, or there twice")
    return wrong


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Kill a graph `cycles // 25` times (40), and do random operations with `cycles // 2` seeds each (500)."""
    from tests.test_langgraph_oracle import STEPS, Mismatch, Run, Stores

    with tempfile.TemporaryDirectory(prefix="graphs-") as name:
        for plant in (True, False):
            part, begun = Part(f"graphs, killed{', planted defect' if plant else ''}"), monotonic()
            tell(part.name)
            kills = 3 if plant else max(3, given.cycles // 25)
            found, steps = kill(Path(name) / str(plant), kills, given.seed, plant=plant)
            seen = any(one.startswith("lost") for one in found)
            part.wrong = ([] if seen else [f"{part.name}: not reported"]) if plant else found
            part.cells = {"cycles": str(kills), "rows": f"{steps:,}", "other": "seen" if plant and seen else ""}
            part.cells["seconds"] = f"{monotonic() - begun:.1f}"
            yield part
    part, begun = Part("graphs, beside LangGraph's own"), monotonic()
    tell(part.name)
    seeds = range(given.seed, given.seed + max(1, given.cycles // 2))
    for seed in seeds:
        with Persistency(":memory:") as p:
            job = p.open_job("graphs")
            try:
                Run(PersistencySaver(job), InMemorySaver(), seed).go(STEPS)
                Stores(PersistencyGraphStore(job), seed).go(STEPS)
            except Mismatch as mismatch:
                part.wrong.append(str(mismatch))
    part.cells = {"cycles": f"{len(seeds):,}", "seconds": f"{monotonic() - begun:.1f}"}
    yield part
