"""Log fields: what a log record says besides its text, for machines.

Every record of this package carries the same few attributes, so that a formatter for JSON finds what a person reads in
the message: `log.warning("job %r goes on", job_id, extra=about("job_goes_on", job_id))`.

Rules:
  1. Every name begins with `persistency_`, so that none is an attribute that `logging` or another library has.
  2. `persistency_event` is one fixed word per call, and documented in docs/watching.md; `persistency_job` is the id of
     the job, or `None` where the place knows none. Both are always there.
  3. Values are plain: text, numbers, lists and dicts of them. No key and no payload is among them.

Doesn't know: what is logged, when, and by whom.
"""

from __future__ import annotations

from typing import Any


def about(event: str, job_id: str | None = None, error: BaseException | None = None, **more: Any) -> dict[str, Any]:
    """Return a record's fields, to be given to `logging` as `extra`.

    `persistency_error` is the name of the error's class, `persistency_code` SQLite's extended result code, if it has
    one; each of `more` gets the prefix, and a path or another object becomes text.
    """
    fields: dict[str, Any] = {"persistency_event": event, "persistency_job": job_id}
    if error is not None:
        fields["persistency_error"] = type(error).__name__
        if code := getattr(error, "code", 0):
            fields["persistency_code"] = code
    for name, value in more.items():
        plain = value is None or isinstance(value, str | int | float | list | dict)
        fields[f"persistency_{name}"] = value if plain else str(value)
    return fields
