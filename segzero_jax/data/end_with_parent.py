"""Makes worker processes end with their parent, however it ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a worker, which would otherwise outlive a killed parent, working on or waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
