"""The watch: sees when the files of an open job are no longer what is found under their names.

Rules:
  1. Whatever is committed was looked for before, by name, unless nothing has changed in the directory since.

Doesn't know: SQL, who owns the job, what is in the files.
"""

from __future__ import annotations

import contextlib
import os
from time import time_ns

from persistency.errors import Corrupt
from persistency.storage.files import LOG, identity

_TICK_NS = 100_000_000


class Watch:
    """Sees when a job's database or log is no longer what is found under its name.

    `found` is the database's identity when it was looked at, before it was opened.
    """

    def __init__(self, name: str, found: tuple[int, int] | None) -> None:
        self._name = name
        self._folder = -1  # the directory, open once it was looked at
        self._found = {name: found, name + LOG: identity(name + LOG)}
        self._changed_ns = -1  # the directory's, when it was last looked through

    def check(self, *, thorough: bool = False) -> None:
        """Raise `Corrupt` if one of the files was removed, renamed or replaced; `thorough`: or is elsewhere by now."""
        # That changes their directory, which is open: to look at it costs a third. So does renaming the directory.
        changed_ns = self._look_at_folder()
        if changed_ns == self._changed_ns >= 0 and not thorough:
            return
        for path, found in self._found.items():
            if identity(path) != found:
                raise Corrupt(
                    f"{path!r} was removed, renamed or replaced while it was open",
                    hint="What was written since is lost; restore the job from a backup, or open what is there now.",
                )
        # Two changes within one tick of the file system's clock look like one: only an old enough one is trusted.
        self._changed_ns = changed_ns if time_ns() - changed_ns > _TICK_NS else -1

    def _look_at_folder(self) -> int:
        """Return when it was changed, or -1 if it can't be told; before the names in it are looked at."""
        try:
            if self._folder < 0:  # not with the job: one that is only read never needs it
                self._folder = os.open(os.path.dirname(self._name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            return os.fstat(self._folder).st_ctime_ns
        except OSError:  # there are no descriptors left: the names have to do
            return -1

    def close(self) -> None:
        """See nothing any more; a second call is nothing."""
        if self._folder >= 0:
            handle, self._folder = self._folder, -1
            os.close(handle)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it wasn't opened, or there is no `os` any more
            self.close()
