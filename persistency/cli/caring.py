"""The commands that keep house: `backup`, `restore`, `check`, `compact`, `drop`, `purge`.

Rules:
  1. What deletes or replaces a job, or a file that is no former backup, asks first, on a terminal, and wants `--yes`
     elsewhere.
  2. `backup` and `check` look beside whoever has the job open. The others need it for themselves; of one that is open
     elsewhere they say in which process.

Doesn't know: how anything is done.
"""

from __future__ import annotations

from pathlib import Path
from time import time
from typing import Annotated

import typer

from persistency import Corrupt, JobLocked, Misuse, Persistency, PersistencyError, StoredJob
from persistency.cli.arguments import AsJson, JobId, Root, Yes
from persistency.cli.asking import ask
from persistency.cli.completing import job_ids
from persistency.cli.ending import Fault, hearing, say, told
from persistency.cli.opening import NothingStored, check_there, find, having, looking_into, owned
from persistency.cli.replacing import agree
from persistency.cli.show import as_size, show_json, show_line, working
from persistency.cli.working import carried_out

_SIZE_HELP = "Until the root takes no more than this: 500000000, 500MB or 2GiB."


@told
def backup(
    root: Root,
    job: JobId,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The file to be made. A former backup is replaced.", show_default=False),
    ],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Copy a job, as it is at one moment, to a file: checked, and there whole or not at all.

    The job may be in use: its owner isn't kept waiting. What the owner hasn't committed yet isn't in the copy.

    A former backup of that name is replaced without a question. Any other file is asked about first.

    Example: persistency backup data packages packages.backup
    """
    if str(file) == "-":
        raise typer.BadParameter("a backup is a file; `export` can write to stdout", param_hint="'FILE'")
    with Persistency(root) as persistency:
        find(persistency, root, job)
    agree(file, None, yes=yes)
    with looking_into(root, job) as opened, working(f"{job} to {file.name}", "bytes") as advance:
        carried_out(lambda step: opened.backup(file, step), advance, f"{file} is as it was before")
    size = file.stat().st_size
    if as_json:
        show_json({"job": job, "file": str(file), "bytes": size})
    else:
        show_line((f"job {job!r} is copied to {file}, {as_size(size)}",))


@told
def restore(
    root: Root,
    job: JobId,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` has made.", show_default=False)],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a job of a backup, under the same id or another one; whatever goes wrong, the job stays as it was.

    A job that is there is replaced, which is asked about first.

    Example: persistency restore data packages packages.backup --yes
    """
    with Persistency(root) as persistency:
        there = [stored for stored in persistency.stored_jobs() if stored.job_id == job]
        if there:
            ask(f"Replace job {job!r} in {root}, {as_size(there[0].bytes)}, by {file}?", yes=yes)
        with working(f"{file.name} to {job}", "bytes"):
            try:
                persistency.restore(job, file)
            except JobLocked as error:
                raise owned(error) from error
            except Corrupt as error:
                if error.hint == Corrupt.hint:
                    error.hint = "Pass what `backup` has made; the job is as it was."
                raise
    if as_json:
        show_json({"job": job, "file": str(file), "replaced": bool(there)})
    else:
        show_line((f"job {job!r} is {'replaced by' if there else 'made of'} {file}",))


@told
def check(
    root: Root,
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="JOB", help="The jobs; without: all.", autocompletion=job_ids)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for damage in jobs: in the file, in its rows and notes, in keys. They may be in use.

    Exit code 1 if there is any.

    Example: persistency check data
    """
    problems = 0
    for job in jobs or _there(root):
        if (found := _checked(root, job, named=bool(jobs))) is None:
            continue
        problems += len(found)
        if as_json:
            show_json({"job": job, "problems": found})
        else:
            for text in found or ["sound"]:
                show_line((job, text))
    if problems:
        hint = "docs/care.md says what it can be, and what to do; what is damaged is restored from a backup."
        raise Fault(f"{problems:,} {'problem' if problems == 1 else 'problems'} found", hint)


def _checked(root: str, job: str, *, named: bool) -> list[str] | None:
    """Return what is wrong with a job; `None` if it was found there, and is gone by now."""
    try:
        with looking_into(root, job) as opened, working(f"checking {job}", "rows") as advance:
            return carried_out(opened.check, advance, f"job {job!r} isn't checked to the end")
    except (PersistencyError, NothingStored) as error:
        return [str(error)]  # it can't even be opened, or read to the end: that is what is wrong with it
    except Fault:
        if named:
            raise
        return None


@told
def compact(root: Root, job: JobId, as_json: AsJson = False) -> None:
    """Give the room of deleted rows back to the file system.

    Example: persistency compact data packages
    """
    with (
        hearing("file_not_made_smaller") as heard,
        having(root, job) as opened,
        working(f"compacting {job}", "bytes") as advance,
    ):
        given = carried_out(opened.compact, advance, "what was given back until then is")
    if heard:
        raise Fault(next(iter(heard)), f"{as_size(given)} were given back. Is there room on the disk?")
    if as_json:
        show_json({"job": job, "bytes": given})
    else:
        show_line((f"job {job!r} is {as_size(given)} smaller" if given else f"job {job!r} has no room to give back",))


@told
def drop(
    root: Root,
    jobs: Annotated[
        list[str], typer.Argument(metavar="JOB", help="The jobs.", show_default=False, autocompletion=job_ids)
    ],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete jobs, with all their files.

    Example: persistency drop data packages --yes
    """
    with Persistency(root) as persistency:
        stored = {one.job_id: one for one in persistency.stored_jobs()}
        for job in jobs:
            if job not in stored:
                find(persistency, root, job)  # says what there is
        doomed = [stored[job] for job in dict.fromkeys(jobs)]
        ask(f"Delete {_summed(doomed)} in {root}?", yes=yes)
        for one in doomed:
            try:
                persistency.drop_job(one.job_id)
            except JobLocked as error:
                raise owned(error) from error
            _show_gone(one, as_json=as_json)


@told
def purge(
    root: Root,
    size: Annotated[str | None, typer.Argument(metavar="SIZE", help=_SIZE_HELP)] = None,
    expired: Annotated[bool, typer.Option("--expired", help="The temporary jobs whose time is over.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete jobs to make room: those that were used the longest ago, or those whose time is over.

    What is open, here or elsewhere, stays. It shows what is gone.

    Examples: persistency purge data 2GiB --yes; persistency purge data --expired --yes
    """
    if (size is None) == (not expired):
        raise typer.BadParameter("pass a size, or --expired", param_hint="'SIZE'")
    limit = None if size is None else _limit(size)
    with Persistency(root) as persistency, hearing("drop_failed") as refused:
        check_there(root)
        stored = {one.job_id: one for one in persistency.stored_jobs()}
        gone: list[str] = []
        if expired:
            doomed = [one for one in stored.values() if one.expires is not None and one.expires <= time()]
            if doomed:
                ask(f"Delete {_summed(doomed)} in {root}, whose time is over?", yes=yes)
                gone = persistency.purge_expired()
        elif stored and limit is not None:
            what = _summed(list(stored.values()))
            ask(f"Delete what was used the longest ago of {what} in {root}, down to {size}?", yes=yes)
            gone = persistency.purge(limit)
    for job in gone:
        _show_gone(stored[job], as_json=as_json)
    if refused:
        raise Fault("; ".join(refused), "Mend that, and try again; the others were dealt with.")
    if not gone and not as_json:
        say("nothing is to be deleted")


def _limit(size: str) -> int | str:
    limit = int(size) if size.isdecimal() else size
    if limit == 0:
        raise typer.BadParameter("0 is no limit; to delete jobs by their names there is `drop`", param_hint="'SIZE'")
    try:
        Persistency(":memory:").purge(limit)  # which says whether it is a size, and has nothing to be deleted
    except Misuse as error:
        message = f"{size!r} is no size; type 500000000, 500MB or 2GiB"
        raise typer.BadParameter(message, param_hint="'SIZE'") from error
    return limit


def _there(root: str) -> list[str]:
    with Persistency(root) as persistency:
        check_there(root)
        jobs = [
            stored.job_id for stored in persistency.stored_jobs() if stored.expires is None or stored.expires > time()
        ]
    if not jobs:
        raise Fault(f"no jobs in {root}")
    return jobs


def _summed(stored: list[StoredJob]) -> str:
    names = ", ".join(repr(one.job_id) for one in stored[:5]) + (", ..." if len(stored) > 5 else "")
    what = "job" if len(stored) == 1 else f"{len(stored):,} jobs:"
    return f"{what} {names} ({as_size(sum(one.bytes for one in stored))})"


def _show_gone(stored: StoredJob, *, as_json: bool) -> None:
    if as_json:
        show_json({"job": stored.job_id, "bytes": stored.bytes})
    else:
        show_line((f"job {stored.job_id!r} is deleted, {as_size(stored.bytes)}",))
