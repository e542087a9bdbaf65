"""The standard health service, mended in what clients that come and go do to it, with threads of its own."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpc_health.v1 import health

# Calls whose request is still on its way hold the threads that they will be answered in. Probes must not wait for them,
# and those of strangers who send nothing should be many. Threads are started when they are needed.
_THREADS = ThreadPoolExecutor(256, thread_name_prefix="health")


class HealthServicer(health.HealthServicer):
    """``grpc_health.v1.health.HealthServicer``, which ends every server for good once two watchers meet in it.

    A new watcher's first answer is sent under the service's lock, and its sending is finished by the one thread that
    serves a gRPC server. That thread also calls back when a watcher is gone, and there waits for the same lock. Here
    another thread waits for it.
    """

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=_THREADS)
        self._gone: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._forget, name="watchers", daemon=True).start()

    # gRPC looks at this of a method.
    def Check(self, request: Any, context: Any) -> Any:
        return super().Check(request, context)

    Check.experimental_thread_pool = _THREADS  # type: ignore[attr-defined]

    def _on_close_callback(self, send_response_callback: Any, service: str) -> Callable[[], None]:
        closed = super()._on_close_callback(send_response_callback, service)
        return lambda: self._gone.put(closed)

    def _forget(self) -> None:
        while True:
            self._gone.get()()
