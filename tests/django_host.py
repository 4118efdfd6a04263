"""The example project, set up in this process, on a database of its own; import it before any model.

Tests of Django import ``PROJECT`` from here; worker services that they start know the project as well.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import django
from django.core.management import call_command

PROJECT = Path(__file__).parents[1] / "docs" / "examples" / "django_project"
SECRET = "a secret of the tests, long enough"

_folder = tempfile.mkdtemp(prefix="wove-ws-django-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["DJANGO_SETTINGS_MODULE"] = "django_settings"
os.environ["DJANGO_DATABASE"] = str(Path(_folder) / "db.sqlite3")
sys.path.insert(0, str(PROJECT))
django.setup()
call_command("migrate", verbosity=0)
