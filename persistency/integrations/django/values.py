"""Values: what a cache is given, as payloads and back: CBOR, or a pickle that is signed.

A payload is one CBOR item; or, for what CBOR wouldn't give back with its very type, the byte FF, with which no CBOR
item begins, the byte 01, 32 bytes of signature, and a pickle.

Rules:
  1. A pickle is loaded only if its signature was checked, and never before.
  2. The signature is an HMAC-SHA256 with a key derived from Django's `SECRET_KEY`. The id of the job and the cache key,
     which has the version in it, are signed along: a payload is of no use under another key.
  3. Keys of `SECRET_KEY_FALLBACKS` are accepted and never used to sign.
  4. What can't be read is `Refused`, for whatever reason, and is returned as such; nothing else is raised.
  5. An int is always a CBOR integer, which the engine can count up.
  6. What a class does to be pickled is work, and so is a large value: an event loop does neither itself.

Doesn't know: jobs, transactions, time.
"""

from __future__ import annotations

import pickle
from hmac import compare_digest
from math import inf
from typing import Any, Final

from django.conf import settings
from django.utils.crypto import salted_hmac

from persistency import CBOR, Misuse
from persistency.errors import Corrupt
from persistency.integrations.django.exact import is_exact, is_small
from persistency.integrations.django.steps import SMALL, Steps, by_size

_SIGNED: Final = b"\xff\x01"
_MAC_BYTES: Final = 32
_BODY: Final = len(_SIGNED) + _MAC_BYTES
_SALT: Final = "persistency.integrations.django.values"


class Refused(Exception):
    """A payload isn't what this cache wrote under that key. The message says why."""


class Values:
    """The values of one job. With `pickles=False` there are none but those that CBOR holds."""

    def __init__(self, job_id: str, *, pickles: bool) -> None:
        self._job_id = job_id.encode()
        self._pickles = pickles

    # -- as steps: a large value, or one that is pickled, is work --------------------------------------------------

    def encode(self, pairs: list[tuple[str, Any]]) -> Steps[list[bytes]]:
        """Return the payloads of keys' values. Raises what `pickle` raises, or `Misuse` if pickles are refused."""
        small = is_small([value for _, value in pairs], SMALL)
        return (yield from by_size(0 if small else inf, self._encode, pairs))

    def decode(self, pairs: list[tuple[str, bytes]]) -> Steps[list[Any]]:
        """Return the values of keys' payloads; of a payload that is none, a `Refused`."""
        pickled = any(_is_sealed(payload) for _, payload in pairs)
        return (yield from by_size(inf if pickled else _size(pairs), self._decode, pairs))

    def check(self, key: str, payload: bytes) -> Steps[Refused | None]:
        """Return why a pickle was refused: it wasn't signed for this key, or there are to be none."""
        return (yield from by_size(len(payload) if _is_sealed(payload) else 0, self.refusal, key, payload))

    def move(self, key: str, payload: bytes, target: str) -> Steps[bytes | Refused]:
        """Return a payload as it is under another key, or why it was refused."""
        return (yield from by_size(len(payload), self._moved, key, payload, target))

    # -- at once -------------------------------------------------------------------------------------------------

    def refusal(self, key: str, payload: bytes) -> Refused | None:
        """Do what `check` does, in this thread."""
        if not _is_sealed(payload):
            return None
        if not self._pickles:
            return Refused('it is a pickle, and this cache has "PICKLE": False')
        mac, body = payload[len(_SIGNED) : _BODY], memoryview(payload)[_BODY:]
        secrets = (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)
        known = [compare_digest(mac, self._mac(key, body, secret)) for secret in secrets]
        if payload[: len(_SIGNED)] != _SIGNED or not any(known):
            return Refused("its signature isn't one of this key and SECRET_KEY")
        return None

    def _encode(self, pairs: list[tuple[str, Any]]) -> list[bytes]:
        return [self._payload(key, value) for key, value in pairs]

    def _payload(self, key: str, value: Any) -> bytes:
        if is_exact(value):
            try:
                return CBOR.encode(value)
            except Misuse:  # nested too deep, a lone surrogate, an int of over 1,024 bytes
                pass
        if not self._pickles:
            raise Misuse(
                f'a value of type {type(value).__name__} would have to be pickled, and this cache has "PICKLE": False',
                hint="Cache None, bool, int, float, str, bytes, list, dict, set, aware UTC datetimes, Decimal, UUID; "
                "a tuple as a list, a template's SafeString as a str.",
            )
        return self._sealed(key, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))

    def _decode(self, pairs: list[tuple[str, bytes]]) -> list[Any]:
        return [self._value(key, payload) for key, payload in pairs]

    def _value(self, key: str, payload: bytes) -> Any:
        if not _is_sealed(payload):
            try:
                return CBOR.decode(payload)
            except Corrupt as error:
                return _because(f"it isn't a value: {error}", error)
        refused = self.refusal(key, payload)
        if refused is not None:
            return refused
        try:
            # Whoever has the secret key signed it for this cache key: it is as much ours as the code that asks.
            return pickle.loads(memoryview(payload)[_BODY:])  # noqa: S301  # that is what the signature is for
        except MemoryError:
            raise
        except Exception as error:  # a class that has moved since, or is another one now, raises anything
            return _because(f"its pickle can't be loaded: {type(error).__name__}: {error}", error)

    def _moved(self, key: str, payload: bytes, target: str) -> bytes | Refused:
        refused = self.refusal(key, payload)
        if refused is not None:
            return refused
        return self._sealed(target, payload[_BODY:]) if _is_sealed(payload) else payload

    def _sealed(self, key: str, body: bytes) -> bytes:
        return b"".join((_SIGNED, self._mac(key, body, settings.SECRET_KEY), body))

    def _mac(self, key: str, body: bytes | memoryview, secret: str | bytes) -> bytes:
        name = key.encode("utf-8", "surrogatepass")
        # With their lengths, so that no two pairs of names are the same bytes.
        names = b"%d:%b%d:%b" % (len(self._job_id), self._job_id, len(name), name)
        mac = salted_hmac(_SALT, names, secret=secret, algorithm="sha256")
        mac.update(body)
        return bytes(mac.digest())


def _is_sealed(payload: bytes) -> bool:
    """Whether a payload is to be a signed pickle; its signature says whether it is one."""
    return payload[:1] == _SIGNED[:1]


def _size(pairs: list[tuple[str, bytes]]) -> int:
    return sum(len(payload) for _, payload in pairs)


def _because(why: str, error: Exception) -> Refused:
    refused = Refused(why)
    refused.__cause__ = error
    return refused
