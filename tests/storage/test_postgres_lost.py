"""Commits that a PostgreSQL server lost: whoever has followed them is told, however far the next owner has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from persistency import ChangeFeed, Persistency, Reader
from persistency.errors import Unavailable
from persistency.ops import Change
from persistency.storage.postgres import bell as bell_module
from persistency.storage.postgres import root as root_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.schema import GENERATION_BITS
from tests.postgres import fresh_url, sql, with_parameters

WAIT = 60
FEED = 100


class Place:
    """A root, the job in it that is followed, and a reader of another root."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.schema = parsed(url).schema
        self.root = Persistency(url)
        self.others = Persistency(with_parameters(url, application_name="other"))
        self.own(3)
        self.reader: Reader = self.others.open_reader("j")

    def own(self, commits: int, *, feed: int = FEED) -> None:
        """Own the job for so many commits."""
        with closing(self.root.open_job("j", feed_changes_max=feed)) as job:
            for _ in range(commits):
                job.put("c", ("k",), b"v")
                job.flush().result(WAIT)

    def sql(self, statement: str) -> list[tuple[int, ...]]:
        """Run a statement, in which `s` is the schema."""
        return sql(self.url, statement.replace("s.", f"{self.schema}."))

    def lose(self, version: int) -> None:
        """Have the server lose all behind a version, as a crash does where a commit isn't waited for."""
        self.sql(f"DELETE FROM s.changes WHERE version > {version}")
        self.sql(f"UPDATE s.jobs SET last_version = {version}")

    def lose_the_last_take(self) -> None:
        """Have the server lose that the job was taken, as with a replica that hadn't yet received it."""
        self.sql("DELETE FROM s.takes WHERE generation = (SELECT generation FROM s.jobs)")
        self.sql("UPDATE s.jobs SET generation = generation - 1")

    def waiting(self, after: int) -> Callable[[], list[Change]]:
        """Return what gives the changes behind a version, for which somebody waits already."""
        reply = self.reader.changes(after, 10, wait=True)
        assert self.reader.version().result(WAIT) == after
        return lambda: reply.result(WAIT)


@pytest.fixture
def place() -> Iterator[Place]:
    """A place with three commits."""
    place = Place(fresh_url(persistency_lease=5))
    yield place
    place.others.close()
    place.root.close()


@pytest.fixture(params=["bell", "polling"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the bell alone tells, or nothing but the versions that are asked for."""
    if request.param == "bell":
        monkeypatch.setattr(bell_module, "LOOK_SECONDS", 10_000.0)
    else:
        monkeypatch.setattr(bell_module, "POLL_SECONDS", 0.02)
        monkeypatch.setattr(bell_module.Bell, "_listen", lambda _bell, _session: False)


def test_who_waits_learns_that_commits_were_lost(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that goes back rings too: the loss is told while nobody has written since."""
    monkeypatch.setattr(bell_module, "LOOK_SECONDS", 0.1)
    waiting = place.waiting(3)
    place.lose(1)
    with pytest.raises(Unavailable, match="lost its last commits"):
        waiting()


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("owners", [(3,), (0, 3), (1, 0, 3), (0, 2, 1), (5,)])
def test_an_owner_that_overtakes_hides_no_loss(place: Place, owners: tuple[int, ...]) -> None:
    """Changes that took the place of lost ones are missed by nobody in silence, whoever owned the job meanwhile."""
    assert next(ChangeFeed(place.reader, after=2)).version == 3
    place.lose(1)
    for commits in owners:
        place.own(commits)
    for feed in (ChangeFeed(place.reader, after=3), ChangeFeed(place.reader, after=0)):
        with pytest.raises(Unavailable, match="lost its last commits"):
            next(feed)
    with place.others.open_reader("j") as another:
        assert [change.version for change in another.changes(0, 10).result(WAIT)] == list(range(1, 2 + sum(owners)))


@pytest.mark.usefixtures("told")
def test_who_waits_while_an_owner_overtakes_is_told(place: Place) -> None:
    """The same for somebody who waits, and had no chance to look in between."""
    waiting = place.waiting(3)
    with place.root.open_job("j", feed_changes_max=FEED):
        pass
    # In one step, so that no look comes between: what was lost, the next taking, and commits behind it.
    place.sql(
        "WITH job AS (UPDATE s.jobs SET last_version = 7, generation = generation + 1 RETURNING generation),"
        " change AS (INSERT INTO s.changes (job, version, kind, category, key, payload)"
        " SELECT 'j', n, 0, 'c', 'k', 'v' FROM generate_series(4, 6) AS g(n))"
        " INSERT INTO s.takes (job, generation, version, mark) SELECT 'j', generation, 1, 5 FROM job"
    )
    place.own(1)
    with pytest.raises(Unavailable, match="lost its last commits"):
        waiting()


def test_a_generation_that_was_counted_again_hides_no_loss(place: Place) -> None:
    """Where the taking itself was lost, and the next one has its number, it isn't taken for it."""
    place.own(1)
    assert place.reader.version().result(WAIT) == 4
    (taken,) = place.sql("SELECT generation FROM s.jobs")
    place.lose(3)
    place.lose_the_last_take()
    place.own(1)
    assert place.sql("SELECT generation FROM s.jobs") == [taken]
    for _ in range(2):
        with pytest.raises(Unavailable, match="lost its last commits"):
            place.reader.changes(4, 10).result(WAIT)


def test_a_generation_that_went_back_is_a_loss(place: Place) -> None:
    """Nor does the one before it come back."""
    place.own(0)
    assert place.reader.version().result(WAIT) == 3
    place.lose_the_last_take()
    with pytest.raises(Unavailable, match="lost its last commits"):
        place.reader.changes(3, 10).result(WAIT)


@pytest.mark.usefixtures("told")
def test_owners_that_come_and_go_are_no_loss(place: Place) -> None:
    """A job that changes hands is followed on, whether its owners write or not, and keep changes or not."""
    feed, version = ChangeFeed(place.reader, after=3), 3
    for commits in (1, 0, 2, 0, 0, 1):
        place.own(commits)
        place.own(0, feed=0)
        for _ in range(commits):
            version += 1
            assert next(feed).version == version
    waiting = place.waiting(version)
    place.own(0)
    place.own(1)
    assert [change.version for change in waiting()] == [version + 1]


def test_who_was_away_for_too_many_owners_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes of takings are bounded in number: who has slept through all of them reads rows, and follows no more."""
    monkeypatch.setattr(root_module, "TAKES_MAX", 3)
    assert place.reader.version().result(WAIT) == 3
    for _ in range(2):
        place.own(0)
    assert place.reader.changes(3, 10).result(WAIT) == []
    for _ in range(6):
        place.own(0)
    assert place.sql("SELECT count(*) FROM s.takes") == [(3,)]
    assert place.reader.get("c", ("k",)).result(WAIT) == b"v"
    for _ in range(2):
        with pytest.raises(Unavailable, match="changed hands too often"):
            place.reader.changes(3, 10).result(WAIT)
    with place.others.open_reader("j") as another:
        assert [change.version for change in another.changes(2, 10).result(WAIT)] == [3]


def test_notes_go_with_their_job(place: Place) -> None:
    """Of a job that is dropped no note is left, and of one that keeps no changes there is none."""
    assert place.sql("SELECT job, version FROM s.takes") == [("j", 0)]
    place.root.open_job("k").close()
    place.root.drop_job("j")
    assert place.sql("SELECT count(*) FROM s.takes") == [(0,)]


def test_notes_go_with_what_has_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that begins anew behind its end is noted once: its past is no concern of who follows it now."""
    place.own(0)
    place.sql("UPDATE s.jobs SET ends_ms = 1")
    monkeypatch.setattr(root_module, "_new_generation", lambda: 1 << GENERATION_BITS)  # drawn below the last one
    place.own(2)
    assert place.sql("SELECT t.version FROM s.takes t JOIN s.jobs j USING (job, generation)") == [(0,)]
    assert place.sql("SELECT count(*) FROM s.takes") == [(1,)]


def test_owners_before_changes_were_kept_are_no_loss(place: Place) -> None:
    """Of what was done before a job kept its changes nobody has seen any: a reader of then follows what comes."""
    for _ in range(3):
        place.own(1, feed=0)
    assert place.sql("SELECT feed_dropped FROM s.jobs") == [(None,)]
    with place.others.open_reader("j") as reader:
        place.own(1, feed=0)
        place.own(1)
        place.own(1)
        assert [change.version for change in reader.changes(7, 10).result(WAIT)] == [8, 9]


FIRST: dict[str, Callable[[Persistency], object]] = {
    "an owner": lambda root: root.open_job("j", feed_changes_max=FEED).close(),
    "a reader": lambda root: root.open_reader("j").close(),
    "a list": lambda root: [job.job_id for job in root.stored_jobs()] == ["j"] or pytest.fail("it isn't there"),
    "a drop": lambda root: root.drop_job("k"),
}


@pytest.mark.parametrize("first", FIRST)
def test_tables_of_the_first_format_are_made_whole(place: Place, first: str) -> None:
    """Whoever comes first to tables without notes makes them whole; what is there is read, and followed on."""
    place.sql("DROP TABLE s.takes")
    place.sql("UPDATE s.meta SET value = 1")
    with Persistency(with_parameters(place.url, application_name="later")) as root:
        FIRST[first](root)
        assert place.sql("SELECT value FROM s.meta") == [(2,)]
        with root.open_reader("j") as reader:
            assert reader.version().result(WAIT) == 3
            place.own(1)
            assert [change.version for change in reader.changes(3, 10).result(WAIT)] == [4]
