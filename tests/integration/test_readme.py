"""The Python in README and tutorial runs as pasted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/tutorial.md")


def _blocks() -> list[tuple[str, str]]:
    """Return where each block of Python stands, as "page:line", and its text."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append((f"{page}:{text.count(chr(10), 0, match.start()) + 2}", match[1]))
    return found


BLOCKS = _blocks()


def test_there_are_blocks_to_run() -> None:
    """Both pages show code; a change of their markup must not leave nothing to test."""
    assert {place.partition(":")[0] for place, _ in BLOCKS} == set(PAGES)


@pytest.mark.parametrize("code", [pytest.param(code, id=place) for place, code in BLOCKS])
def test_block_runs_as_pasted(code: str, tmp_path: Path) -> None:
    """The block, saved as a file of its own, runs to its end with warnings as errors and prints something."""
    script = tmp_path / "pasted.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""
