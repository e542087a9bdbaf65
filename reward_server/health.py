"""The standard health service, without its deadlock when clients come and go, and with its own threads."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpc_health.v1 import health

# A call whose request is still being received holds its thread. Probes must not wait for other calls, so they have
# their own pool, and it takes many silent strangers to fill it. Threads are started on demand.
_THREADS = ThreadPoolExecutor(256, thread_name_prefix="health")


class HealthServicer(health.HealthServicer):
    """``grpc_health.v1.health.HealthServicer`` without its deadlock, which two concurrent watchers can cause.

    The original sends a new watcher's first answer while holding the service's lock; the send is completed by the gRPC
    server's only serving thread. When a watcher leaves, that thread runs a callback which waits for the same lock. Here
    another thread runs the callback.
    """

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=True, experimental_thread_pool=_THREADS)
        self._gone: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._forget, name="watchers", daemon=True).start()

    # gRPC reads ``experimental_thread_pool`` from the method.
    def Check(self, request: Any, context: Any) -> Any:
        return super().Check(request, context)

    Check.experimental_thread_pool = _THREADS  # type: ignore[attr-defined]

    def _on_close_callback(self, send_response_callback: Any, service: str) -> Callable[[], None]:
        closed = super()._on_close_callback(send_response_callback, service)
        return lambda: self._gone.put(closed)

    def _forget(self) -> None:
        while True:
            self._gone.get()()
