"""`python -m persistency`: the command line, where the script `persistency` isn't on the path."""

from __future__ import annotations

import sys

from persistency.cli import main

sys.exit(main())
