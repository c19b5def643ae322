"""Completion: what a shell may offer for a job's id and a category's name.

Rules:
  1. Whoever presses Tab wants no message: what can't be known is not offered.
  2. It only looks, as a reader does, and so it offers the names in a job that somebody has open.

Doesn't know: shells, what the commands do.
"""

from __future__ import annotations

import typer

from persistency import Persistency, PersistencyError


def job_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of the root's jobs that begin so."""
    root = ctx.params.get("root")
    if not isinstance(root, str):
        return []
    try:
        with Persistency(root) as persistency:
            return [stored.job_id for stored in persistency.stored_jobs() if stored.job_id.startswith(incomplete)]
    except (PersistencyError, OSError):
        return []


def categories(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the job's categories that begin so."""
    root, job_id = ctx.params.get("root"), ctx.params.get("job")
    if root is None:  # an option that waits for its value keeps what was typed before from being told apart
        root, job_id, *_ = [*ctx.args, None, None]
    if not isinstance(root, str) or not isinstance(job_id, str):
        return []
    try:
        with Persistency(root) as persistency, persistency.open_reader(job_id) as reader:
            return [name for name in reader.categories().result() if name.startswith(incomplete)]
    except (PersistencyError, OSError):
        return []
