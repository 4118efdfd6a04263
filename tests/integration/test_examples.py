"""What lies in docs/examples runs as it is, with warnings as errors."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wove_ws_sync.testing import LoopbackWorker

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


def _run(name: str, folder: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _check_script(output: str) -> None:
    lines = output.splitlines()
    assert lines[:2] == ["one: 42", "map: [0, 1, 4, 9, 16]"]
    assert sorted(lines[2:6]) == [f"as completed: {n} {n * n}" for n in range(4)]
    assert lines[6:] == ["too slow: DeliveryTimeout", "cancelled: True", "its run was count_slowly"]


def test_a_plain_script(tmp_path: Path) -> None:
    _check_script(_run("script.py", tmp_path, WOVE_WS_URL=""))


def test_the_script_with_a_worker_service_of_the_environment(tmp_path: Path) -> None:
    """Where ``WOVE_WS_URL`` is set it starts none of its own; the secret is in a variable too."""
    with LoopbackWorker(workers=4) as worker:
        assert worker.security is not None
        variables = {"WOVE_WS_URL": worker.url, "WOVE_WS_SECURITY": "env:A_SECRET"}
        _check_script(_run("script.py", tmp_path, A_SECRET=worker.security["secret"], **variables))
        assert worker.log.count(" connected.") == 1


def test_a_progress_bar(tmp_path: Path) -> None:
    total = sum(number * number for number in range(2000))
    assert _run("progress_bar.py", tmp_path) == f"{total}\n{total}\n"


def test_an_environment(tmp_path: Path) -> None:
    assert _run("environment.py", tmp_path) == "FROM A WEAVE\nFROM A FUTURE\n"


def _cells() -> list[str]:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


EXPECTED = [None, True, 27, [0, 1, 8, 27], 36, None]


def test_the_notebook_on_a_loop_that_runs() -> None:
    """Each cell as IPython runs it: compiled with ``await`` at its top level, on the loop that is running."""
    namespace: dict[str, Any] = {"__name__": "__main__"}

    async def run(source: str) -> Any:
        tree = ast.parse(source)
        last = tree.body[-1]
        if isinstance(last, ast.Expr):  # its value is the cell's
            tree.body[-1] = ast.copy_location(ast.Assign([ast.Name("_", ast.Store())], last.value), last)
            ast.fix_missing_locations(tree)
        namespace["_"] = None
        done = eval(compile(tree, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
        if inspect.isawaitable(done):
            await done
        return namespace["_"]

    async def run_all() -> list[Any]:
        return [await run(source) for source in _cells()]

    assert asyncio.run(run_all()) == EXPECTED


def test_the_notebook_in_a_kernel(tmp_path: Path) -> None:
    """The same in a real kernel, where one is installed (pip install nbclient ipykernel)."""
    pytest.importorskip("ipykernel")
    pytest.importorskip("nbclient")
    code = """if True:
        import sys, nbformat, nbclient
        book = nbformat.read(sys.argv[1], as_version=4)
        nbclient.NotebookClient(book, timeout=60).execute()
        for cell in book.cells:
            if cell.cell_type == "code":
                print([o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result"])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / "notebook.ipynb")],
        cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str([] if value is None else [repr(value)]) for value in EXPECTED]
