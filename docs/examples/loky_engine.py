"""An engine for ``wove-ws-sync worker --engine loky_engine:make``: processes that loky keeps and reuses."""

from concurrent.futures import Executor

from loky import get_reusable_executor


def make() -> Executor:
    return get_reusable_executor(max_workers=2, timeout=60)
