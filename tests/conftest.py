"""What every test relies on, however pytest was started."""

from __future__ import annotations

import signal

# A job in the background of a shell without job control is started with SIGINT ignored, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
