"""Covers of ranges, beside a set of every key there is."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from persistency.storage.postgres.cover import Cover

KEYS = [bytes([at]) for at in range(12)]
bounds = st.sampled_from(KEYS)
ranges = st.tuples(bounds, st.one_of(st.none(), bounds))


def inside(span: tuple[bytes, bytes | None]) -> set[bytes]:
    """Return the keys of a range."""
    return {key for key in KEYS if span[0] <= key and (span[1] is None or key < span[1])}


@example(some=[(KEYS[0], KEYS[2]), (KEYS[2], KEYS[4])], asked=(KEYS[1], KEYS[3]))
@example(some=[(KEYS[2], KEYS[4]), (KEYS[0], KEYS[2])], asked=(KEYS[1], KEYS[3]))
@given(some=st.lists(ranges, max_size=8), asked=ranges)
def test_a_cover_is_what_its_ranges_have(
    some: list[tuple[bytes, bytes | None]], asked: tuple[bytes, bytes | None]
) -> None:
    """Its keys are those of its ranges, its gaps in a range are the others, in order, and its parts never touch."""
    cover, keys = Cover((), ()), set[bytes]()
    for span in some:
        before = [cover.has(key) for key in KEYS]
        more = cover.with_(*span)
        assert [cover.has(key) for key in KEYS] == before
        cover, keys = more, keys | inside(span)
    assert {key for key in KEYS if cover.has(key)} == keys
    gaps = cover.gaps(*asked)
    assert set().union(*map(inside, gaps)) == inside(asked) - keys
    assert gaps == sorted(gaps, key=lambda gap: gap[0])
    parts = list(zip(cover._starts, cover._stops, strict=True))
    for (_, stop), (start, _) in pairwise(parts):
        assert stop is not None
        assert stop < start
