"""``python -m wove_ws_sync``. Owns: nothing. Never: more than a call of the command line."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
