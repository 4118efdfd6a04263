"""Throw what atheris finds at one target of ``fuzz_targets``, guided by which lines it reaches.

Owns: the instrumentation. Never: part of a test run; see README.md beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["wove_ws_sync", "websocket", "fuzz_targets", "json"]):
    import fuzz_targets

target = fuzz_targets.TARGETS[sys.argv.pop(1)]
atheris.Setup(sys.argv, target)
atheris.Fuzz()
