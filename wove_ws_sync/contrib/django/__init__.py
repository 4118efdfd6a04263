"""A Django app: the setting ``WOVE_WS``, shared executors, checks, commands, tasks, a fixture for tests.

Owns: the names for views and tasks, listed in ``__all__``. Never: connects before the first use.
Add ``"wove_ws_sync.contrib.django"`` to ``INSTALLED_APPS``.
"""

from __future__ import annotations

try:
    import django  # noqa: F401
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "wove_ws_sync.contrib.django needs the package 'django', which is not installed: "
        'pip install "wove_ws_sync[django]"',
        name=exc.name,
    ) from exc

from .commit import submit_on_commit
from .conf import DEFAULT_ALIAS
from .executors import executor, executors
from .immediate import ImmediateExecutor

__all__ = ["DEFAULT_ALIAS", "ImmediateExecutor", "executor", "executors", "submit_on_commit"]
