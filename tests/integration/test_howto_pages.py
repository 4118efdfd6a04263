"""The Python on how-to pages that stand for themselves runs as pasted, one page from top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Each page, and what its program prints at the least.
PAGES = {
    "observe": '"name": "send sum"',
    "run-joblib": "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]",
    "migrate-from-wove": "42\n36\n",
}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs_as_pasted(page: str, tmp_path: Path) -> None:
    """All its blocks of Python together are a program that ends well, with warnings as errors."""
    text = (ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    script = tmp_path / "pasted.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert PAGES[page] in done.stdout
