"""A failure of one process becomes the end of all, with its reason.

A process that fails tells the others through the store by which they met. Each has a watchdog that
looks there every second, and ends a process that makes no progress. Whoever is killed can tell
nothing: the others notice a broken connection.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .distributed import Process, end_at_once, leads_machine
from .errors import FAILED, REFUSED, RunFailed, SharedError, UsageError, one_line

_FAILURE, _STUCK = "efficient_densenet.train/failure", "efficient_densenet.train/stuck"
_PATIENCE = timedelta(seconds=2)  # for a reason that is on its way
LINGER = 2.0  # seconds: process 0 may hold the store, where the others are to find the reason


def describe(error: BaseException) -> str | None:
    """The one line of a failure that is nobody's bug; None for one that needs its traceback."""
    text = one_line(error)
    if isinstance(error, (UsageError, RunFailed)):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        advice = (
            "--recompute features, --amp bf16, --accumulate or a smaller --batch-size take less"
        )
        return f"out of memory ({advice}): {text}"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return text
    if is_broken_connection(error):
        text = re.sub(r"^\[\S+\] ", "", text).partition(". This is typically")[0]
        return f"another process is gone or does not answer: {text}"
    return text if isinstance(error, OSError) else None


def is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("Connection closed by peer", "onnection reset by peer", "Timed out waiting", "gloo/")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def say(program: str, reason: str) -> None:
    print(f"{program}: error: {reason}", file=sys.stderr, flush=True)


def end_all(error: Exception, program: str, process: Process) -> int:
    """Say why, once on each machine, and tell the other processes.

    Returns:
        The exit status, of a process that is alone; one of several ends here.
    """
    status = REFUSED if isinstance(error, UsageError) else FAILED
    if isinstance(error, SharedError) and process.store is not None:  # the others know
        if leads_machine():
            say(program, str(error))
        end_at_once(status)
    if is_broken_connection(error) and (told := _told(process, _PATIENCE)) is not None:
        _end_as_told(told, program)
    reason = describe(error)
    if reason is None:
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {one_line(error)}"
    if process.rank:
        reason = f"process {process.rank}: {reason}"
    if process.store is not None:
        _tell(process, status, reason)
    say(program, reason)
    if process.store is not None:
        time.sleep(LINGER)
        end_at_once(status)
    return status


def _tell(process: Process, status: int, reason: str) -> None:
    assert process.store is not None
    told = {"host": platform.node(), "status": status, "reason": reason}
    with suppress(RuntimeError):  # its host is gone, and nobody is left to be told
        process.store.set(_FAILURE, json.dumps(told))


def _told(process: Process, patience: timedelta) -> dict[str, Any] | None:
    """What another process told, or tells in that time; None for nothing."""
    store = process.store
    if store is None:
        return None
    try:
        if patience:
            store.wait([_FAILURE], patience)
        return json.loads(store.get(_FAILURE)) if store.check([_FAILURE]) else None
    except RuntimeError:  # nobody told anything, or the store is gone
        return None


def _end_as_told(told: dict[str, Any], program: str) -> NoReturn:
    if told["host"] != platform.node() and leads_machine():
        say(program, told["reason"])
    end_at_once(told["status"])


class Watchdog:
    """Ends a process that makes no progress, with where it hangs, or when another one failed.

    Args:
        timeout: seconds without a :meth:`beat`.
    """

    CLAIM = 2.0  # seconds in which the processes that are stuck find out who is behind
    SILENCE = 10.0  # after which the ones that are not speak as well

    def __init__(self, process: Process, program: str, timeout: float) -> None:
        self.process, self.program, self.timeout = process, program, timeout
        self._doing, self._count, self._last = "starting", 0, time.monotonic()
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, doing: str) -> None:
        """There is progress: from now on the process does this."""
        self._doing, self._last = doing, time.monotonic()
        self._count += 1

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 4)):
            told = _told(self.process, timedelta(0))
            if told is not None:
                _end_as_told(told, self.program)
            if time.monotonic() - self._last > self.timeout and self._is_behind():
                self._end()

    def _is_behind(self) -> bool:
        """Whether no other process that is stuck has come less far: that one waits for nobody."""
        store, count = self.process.store, self._count
        if store is None:
            return True
        try:
            store.set(f"{_STUCK}/{self.process.rank}", str(count))
            time.sleep(self.CLAIM)
            keys = [f"{_STUCK}/{rank}" for rank in range(self.process.world_size)]
            stuck = [int(store.get(key)) for key in keys if store.check([key])]
        except RuntimeError:
            return True
        waited = time.monotonic() - self._last - self.timeout
        return count == self._count and (min(stuck) >= count or waited > self.SILENCE)

    def _end(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        who = f"process {self.process.rank}: " if self.process.world_size > 1 else ""
        reason = f"{who}no progress for {self.timeout:g} s while {self._doing}"
        if self.process.store is not None:
            _tell(self.process, FAILED, reason)
        print(f"{who}hangs here:\n{stack}", end="", file=sys.stderr)
        say(self.program, reason)
        time.sleep(LINGER)
        end_at_once(FAILED)
