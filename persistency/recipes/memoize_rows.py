"""Kept results: the rows in which results are kept and computations are claimed, and the transactions on them.

A computation begins with a claim: a row with a token of its own, which ends by itself. Its result is kept only if the
claim is still there then. So whoever forgets a result forgets those that are being computed too, and of several
computations of one result the one that began last is what is kept.

Rules:
  1. Every function here is run by a runner, in one transaction, and has no effects but through it.
  2. Time is the job's: how long a computation took, when its result ends.
  3. A kept result is one CBOR item, an array of three: the milliseconds it took, the Unix time in milliseconds when it
     ends (0: never), and what the codec made of it. The numbers have fixed places, so they are read without decoding.

Doesn't know: functions, arguments, threads, event loops.
"""

from __future__ import annotations

import math
import struct
from typing import Final, NamedTuple

from persistency import Corrupt, Key, Transaction
from persistency.recipes.memoize_keys import CLAIMS, RESULTS, claim_of

# An array of three, a 32-bit and a 64-bit number; the value's own bytes follow.
_HEAD = struct.Struct(">BBIBQ")
_ARRAY_OF_3, _UINT32, _UINT64 = 0x83, 0x1A, 0x1B
_TOOK_MS_MAX = 2**32 - 1
_START, _SECOND = bytes((_ARRAY_OF_3, _UINT32)), bytes((_UINT64,))
HEAD_BYTES: Final = _HEAD.size


class Claim(NamedTuple):
    """Where a result is kept, and whose computation it is."""

    category: str
    place: Key
    token: bytes
    lease: float  # seconds; counted from when the claim was made, or last renewed


class Begun(NamedTuple):
    """What came of beginning: `payload` is a kept result, `began_ms` says that it is for us to compute one.

    Both: the result is good, but it is time to have the next one. Neither: somebody else is computing it.
    """

    payload: bytes | None
    began_ms: int | None


def packed(encoded: bytes, took_ms: int = 0, ends_ms: int = 0) -> bytes:
    """Return the payload of a result that was encoded by its codec."""
    return _HEAD.pack(_ARRAY_OF_3, _UINT32, min(took_ms, _TOOK_MS_MAX), _UINT64, ends_ms) + encoded


def unpacked(payload: bytes) -> bytes:
    """Return the encoded result of a payload. Raises `Corrupt` if it is none."""
    if payload[:2] != _START or payload[6:7] != _SECOND or len(payload) < HEAD_BYTES:
        raise Corrupt("not a kept result", hint="Is the category used for something else?")
    return payload[HEAD_BYTES:]


def _times_of(payload: bytes) -> tuple[int, int]:
    """Return how many milliseconds a result took, and when it ends. Raises `Corrupt`."""
    unpacked(payload)
    _, _, took_ms, _, ends_ms = _HEAD.unpack_from(payload)
    return took_ms, ends_ms


def is_due(payload: bytes, now_ms: int, ahead: float) -> bool:
    """Say whether a result is to be computed anew before it ends.

    `ahead` is drawn anew for each question, from an exponential distribution: so that of many who ask one is likely to
    begin in time, and two are unlikely to (XFetch, of Vattani, Chierichetti and Lowenstein, 2015).
    """
    took_ms, ends_ms = _times_of(payload)
    return bool(ends_ms) and now_ms + took_ms * ahead >= ends_ms


def ahead_of(early: float, drawn: float) -> float:
    """Return by how many durations of its computation a result is recomputed ahead; `drawn` is from 0 up to 1."""
    return -early * math.log(max(1.0 - drawn, 1e-300))


# -- transactions ----------------------------------------------------------------------------------------------


def begin(tx: Transaction, claim: Claim, ahead: float, waits: bool, anew: bool) -> Begun:
    """Look for a result, and claim its computation if there is none, or it is due.

    `waits`: a claim of somebody else's is respected; else it is replaced. `anew`: whatever is kept doesn't count.
    """
    payload = None if anew else tx.get(claim.category, claim.place)
    if payload is not None:
        try:
            if ahead <= 0 or not is_due(payload, tx.now_ms, ahead):
                return Begun(payload, None)
        except Corrupt:
            return Begun(payload, None)  # whoever reads it says so
    if waits and tx.get(claim.category, claim_of(claim.place)) not in (None, claim.token):
        return Begun(payload, None)
    tx.put(claim.category, claim_of(claim.place), claim.token, ttl=claim.lease)
    return Begun(payload, tx.now_ms)


def look(tx: Transaction, category: str, place: Key) -> bytes | None:
    """Return what is kept, as long as it hasn't ended."""
    return tx.get(category, place)


def keep(tx: Transaction, claim: Claim, encoded: bytes, began_ms: int, ttl: float | None) -> bool:
    """Keep a result, if the claim still stands, and end that; return whether it was kept."""
    if not release(tx, claim):
        return False
    now_ms = tx.now_ms
    ends_ms = 0 if ttl is None else now_ms + max(1, round(ttl * 1000))
    tx.put(claim.category, claim.place, packed(encoded, max(1, now_ms - began_ms), ends_ms), ttl=ttl)
    return True


def release(tx: Transaction, claim: Claim) -> bool:
    """End a claim, and return whether it stood."""
    stands = tx.get(claim.category, claim_of(claim.place)) == claim.token
    if stands:
        tx.delete(claim.category, claim_of(claim.place))
    return stands


def renew(tx: Transaction, claim: Claim) -> bool:
    """Have a claim's lease begin anew, and return whether it stood."""
    stands = tx.get(claim.category, claim_of(claim.place)) == claim.token
    return stands and tx.touch(claim.category, claim_of(claim.place), claim.lease)


def forget(tx: Transaction, category: str, place: Key) -> bool:
    """Remove a result, and the claim of whoever computes it; return whether there was one."""
    tx.delete(category, claim_of(place))
    return tx.delete_acked(category, place)


def drop(tx: Transaction, category: str, place: Key, payload: bytes) -> bool:
    """Remove a result if it is still this one; return whether it was."""
    return tx.compare_and_set(category, place, payload, None)


def clear(tx: Transaction, category: str) -> int:
    """Remove all results of a function, of every version, and all claims; return how many results there were."""
    tx.delete_prefix(category, CLAIMS)
    return tx.delete_prefix_acked(category, RESULTS)
