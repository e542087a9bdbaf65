"""Worker processes that end with the one that started them, however that ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a worker. Without it one whose parent is killed stays, and works on or waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
