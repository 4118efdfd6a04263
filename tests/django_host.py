"""The example project, set up in this process, on a database of its own; import it before any model.

Tests of Django import ``PROJECT`` from here; worker services that they start know the project as well.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import django
import pytest
from django.core.management import call_command
from django.db import connections

PROJECT = Path(__file__).parents[1] / "docs" / "examples" / "django_project"
SECRET = "a secret of the tests, long enough"

_folder = tempfile.mkdtemp(prefix="wove-ws-django-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
ENVIRON = {
    "DJANGO_SETTINGS_MODULE": "django_settings",
    "DJANGO_DATABASE": str(Path(_folder) / "db.sqlite3"),
}


@contextlib.contextmanager
def environ() -> Iterator[None]:
    """Have the variables of the project, for processes that tests start; others must not see them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        yield


sys.path.insert(0, str(PROJECT))
with environ(), pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TZ", "UTC")  # Django sets it for good
    django.setup()
    call_command("migrate", verbosity=0)
    connections.close_all()
