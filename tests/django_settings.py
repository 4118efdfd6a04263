"""Settings of the tests of Django: the example project's, with what pytest must not be disturbed by."""

import os

from django import VERSION
from project.settings import *  # noqa: F403

LOGGING_CONFIG = None
ALLOWED_HOSTS = ["testserver"]
SECRET_KEY = "the tests' own, of no worth to anybody, fifty characters"

MODULE = "tasks" if VERSION >= (6,) else "backport"
TASKS = {"default": {"BACKEND": f"wove_ws_sync.contrib.django.{MODULE}.WoveWsBackend"}}
INSTALLED_APPS = [*INSTALLED_APPS, *([] if VERSION >= (6,) else ["django_tasks"])]  # noqa: F405
WOVE_WS["default"]["DELIVERY_TIMEOUT"] = 20.0  # noqa: F405  # the machine may be busy
DATABASES["default"]["CONN_MAX_AGE"] = int(os.environ.get("TEST_CONN_MAX_AGE", "0"))  # noqa: F405
