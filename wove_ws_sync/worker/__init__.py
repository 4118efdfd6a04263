"""The worker service, for hosts on this package and on Wove's own websocket executor.

Owns: everything that runs beside the tasks. Never: imports the host's side above its
frames and payloads. Needs ``pip install "wove_ws_sync[worker]"``.
"""

from __future__ import annotations

from .service import WorkerService

__all__ = ["WorkerService"]
