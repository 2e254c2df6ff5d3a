"""Processes that price designs: how they are started, how they end with this one, and what can be sent to them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any


@contextmanager
def out_of_reach() -> Iterator[None]:
    """Processes are started within whole: Ctrl-C, which reaches all of the group, is heard here, afterwards, and not by them.

    They inherit the mask, until ``begin`` makes them deaf. It is not enough for this process, of which other threads may hear the signal.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its own start would undo the mask
    heard: list[int] = []
    ours = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if ours is not None:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours is not None:
            signal.signal(signal.SIGINT, ours)
        if heard:
            signal.raise_signal(signal.SIGINT)


def begin() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # what a score starts is not to inherit the mask
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check_sendable(what: str, sent: object, function: Any) -> None:
    """ValueError unless ``sent``, with the user's ``function`` in it, can be sent to other processes."""
    try:
        ForkingPickler.dumps(sent)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{what} cannot be sent to worker processes ({reason}); define it at the top of a module, or take workers=1"
        ) from None
    main = sys.modules["__main__"]
    if getattr(function, "__module__", None) == "__main__" and not getattr(main, "__file__", None):
        raise ValueError("worker processes cannot import what was typed into this session; put the score into a file, or take workers=1")
