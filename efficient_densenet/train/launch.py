"""One process for each GPU of this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .errors import FAILED
from .failure import say
from .options import Options

_STOPS = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def launch(work: Callable[[Options], None], options: Options, processes: int) -> int:
    """Start processes, wait for them, and stop them if this one is stopped.

    Returns:
        The exit status. A process that fails has said why; this adds what it could not say.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"train-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
    )  # fmt: skip
    # These would add their tracebacks to the one line.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_news)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        elastic_launch(config, work)(options)
    except ChildFailedError as error:
        return _status(error, options.program)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "(exitcode:" not in text and "closing signal" not in text


def _status(error: ChildFailedError, program: str) -> int:
    codes = {rank: failed.exitcode for rank, failed in error.failures.items()}
    for rank, code in codes.items():
        # Those that lost contact with it, or were stopped after it, have a status of their own.
        if code < 0 and -code != signal.SIGTERM:
            say(program, f"process {rank} was ended by {signal.Signals(-code).name}")
            return FAILED
    first: int = error.get_first_failure()[1].exitcode
    stops = [code for code in codes.values() if code in _STOPS]
    return stops[0] if stops and first in _STOPS else max(first, FAILED)
