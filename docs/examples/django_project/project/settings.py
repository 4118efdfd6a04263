"""Settings of the example project; what differs from place to place comes from the environment."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "for a try on this machine only")
DEBUG = os.environ.get("DJANGO_DEBUG", "") == "1"
ALLOWED_HOSTS = os.environ.get("DJANGO_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")

INSTALLED_APPS = ["wove_ws_sync.contrib.django", "jobs"]
MIDDLEWARE: list[str] = ["django.middleware.security.SecurityMiddleware"]
ROOT_URLCONF = "project.urls"
WSGI_APPLICATION = "project.wsgi.application"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DJANGO_DATABASE", str(BASE_DIR / "db.sqlite3")),
        # A file, as a worker service of the tests cannot share a database in memory.
        "TEST": {"NAME": os.environ.get("DJANGO_TEST_DATABASE", str(BASE_DIR / "test.sqlite3"))},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"

# Each key may also be set by a variable: WOVE_WS_DEFAULT_URL, WOVE_WS_DEFAULT_CA_FILE, ...
WOVE_WS = {
    "default": {
        "URL": "ws://127.0.0.1:8765/wove",
        "SECURITY": "env:WOVE_WORKER_SECRET",
        # So long a view may wait, and does while the worker service is down.
        "DELIVERY_TIMEOUT": 5.0,
        "ENVIRONMENT": "workers",
    }
}
