"""The soak's state machines: long random runs of `tests.test_machine`, in which a job must do what a dict would."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from time import monotonic

from tests.postgres import why_not
from tests.soak.part import Part, Tell
from tests.test_machine import VARIANTS, drive

STEPS = 50


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run the state machine in every variant."""
    runs, begun = max(1, 2 * given.cycles), monotonic()
    for variant in VARIANTS:
        if monotonic() - begun >= given.seconds:
            return
        name = f"machine, {variant}"
        if variant.place == "server" and (why := why_not()):
            yield Part(name, {"other": "not run"}, [f"{name}: not run: {why}"])
            continue
        tell(f"{name}: {runs} runs of {STEPS} steps")
        part, since = Part(name), monotonic()
        try:
            drive(variant, runs=runs, steps=STEPS, database=None)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            part.wrong.append(f"{name}: {error!r}\n{notes}")
        part.cells = {"cycles": f"{runs:,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part
