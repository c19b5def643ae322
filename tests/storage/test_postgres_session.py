"""A session by itself: what makes it one that nobody uses again, and what it takes a commit to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.faults import Lost, Refused
from persistency.storage.postgres.session import BEGIN, COMMIT, Session, Statement
from tests.postgres import fresh_url

ONE = Statement(b"one", b"SELECT 1::bigint")
SYNCS = Statement(b"is_synced", b"SHOW synchronous_commit")


@pytest.fixture
def session() -> Iterator[Session]:
    """A session that has run what the tests run, so that it needn't be prepared."""
    session = Session(parsed(fresh_url()))
    session.run(ONE, ())
    yield session
    session.close()


@pytest.mark.parametrize("how", ["run", "pipe"])
def test_what_was_interrupted_is_broken(session: Session, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A Ctrl-C between what is sent and its answer leaves a session that isn't lent again, and sends nothing more."""
    acts: dict[str, Callable[[], object]] = {
        "run": lambda: session.run(ONE, ()),
        "pipe": lambda: session.pipe([(BEGIN, ()), (ONE, ()), (COMMIT, ())]),
    }

    def interrupted(_self: Session) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            acts[how]()
    assert session.broken
    assert not session.idle
    session.roll_back()  # nothing: what it would be answered is what was asked before


@pytest.mark.parametrize("how", ["run", "pipe"])
@pytest.mark.parametrize(("state", "lost"), [("57P01", True), ("57P05", True), ("57014", False), ("40001", False)])
def test_a_server_that_goes_down_says_nothing_of_what_was_done(
    session: Session, state: str, lost: bool, how: str
) -> None:
    """It may have committed before; any other error means that nothing was done, and the session goes on."""
    text = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"
    statement = Statement(b"raises", text.encode())
    with pytest.raises(Lost if lost else Refused, match="no"):
        session.run(statement, ()) if how == "run" else session.pipe([(BEGIN, ()), (statement, ()), (COMMIT, ())])
    assert session.broken == lost
    if not lost:
        session.roll_back()
        assert session.run(ONE, ()).ntuples == 1
        assert session.idle


def test_what_a_commit_waits_for_is_set_again_where_that_failed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that was refused isn't taken for done, the one before it neither; one that is as it was isn't sent."""
    assert session.run(SYNCS, ()).get_value(0, 0) == b"on"
    run, names = Session.run, []

    def refuse(self: Session, statement: Statement, params: Any) -> Any:
        names.append(statement.name)
        if len(names) == 1:
            raise Refused(b"57014", "no")
        return run(self, statement, params)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", refuse)
        with pytest.raises(Refused):
            session.set_syncs(False)
        for syncs in (False, False, True, True):
            session.set_syncs(syncs)
    assert names == [b"syncs_not", b"syncs_not", b"syncs"]
    assert session.run(SYNCS, ()).get_value(0, 0) == b"on"
