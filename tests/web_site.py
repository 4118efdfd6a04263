"""A Django project in one file, whose views run weaves on a worker service; for tests and measurements.

As a program it is ``manage.py``; ``application`` is what a WSGI server takes.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import django
import wove
from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

import wove_ws_sync
import wove_ws_sync.session

VERSION = "first"
# With it the views use the executor that Wove brings, to compare.
PLAIN = os.environ.get("PLAIN_WOVE") == "1"

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1"], DEBUG=False, ROOT_URLCONF=__name__, SECRET_KEY="for-tests", USE_TZ=True
    )
    django.setup()

_config: dict[str, Any] = {
    "url": os.environ["WORKER_URL"],
    "security": {"type": "signed", "secret": os.environ["WORKER_SECRET"]},
}
if not PLAIN:
    _config |= {"ca_file": os.environ.get("WORKER_CA"), "seal": os.environ.get("SEAL", "auto")}
(wove if PLAIN else wove_ws_sync).config(
    default_environment="far", environments={"far": {"executor": "websocket", "executor_config": _config}}
)


def weave(request: HttpRequest, number: int) -> JsonResponse:
    """Answer with what three tasks on the worker make of *number*."""
    with wove.weave() as w:

        @w.do
        def square() -> int:
            return number * number

        @w.do
        def cube() -> int:
            return number**3

        @w.do
        def total(square: int, cube: int) -> int:
            return square + cube

    return _answer(value=w.result.total)


def about(request: HttpRequest) -> JsonResponse:
    """Answer with nothing but who answers."""
    return _answer()


def _answer(**values: Any) -> JsonResponse:
    links = [link.stats() for link in wove_ws_sync.session.links()]
    return JsonResponse(
        {
            "pid": os.getpid(),
            "version": VERSION,
            "dials": [link["dials"] for link in links],
            "threads": sorted(thread.name for thread in threading.enumerate()),
            **values,
        }
    )


urlpatterns = [path("weave/<int:number>", weave), path("about", about)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
else:
    application = get_wsgi_application()
