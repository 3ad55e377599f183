"""A process that is told to end does so as after Ctrl-C: by an exception, so that every `with` and `finally` cleans up.

For entry points of processes only: nothing here happens when the library is imported.
"""

import signal
import threading
import time

REQUESTS = ("SIGTERM", "SIGHUP")
"""SIGHUP does not exist on Windows."""
SAME_REQUEST_SECONDS = 1.0
"""Who ends a process and then its whole group, as `timeout` does, means it once: cleaning up is not interrupted."""


def end_in_order() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit(128 + number) in the main thread, which has to be the caller's.

    What is ignored (nohup) or handled already stays so; in any other thread nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    told: list[float] = []

    def leave(number: int, frame: object) -> None:
        again = bool(told) and time.monotonic() - told[-1] < SAME_REQUEST_SECONDS
        told.append(time.monotonic())
        if not again:
            raise SystemExit(128 + number)

    for number in (getattr(signal, name) for name in REQUESTS if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)
