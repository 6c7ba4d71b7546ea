"""From arguments to an exit status: 0, 1 failed, 2 refused, or 128 + the signal that stopped it."""

from __future__ import annotations

import gc
import os
import platform
import random
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException

from . import checkpoint, failure
from .batches import step_size
from .checks import Checker, changed_options
from .data import Data, load_data
from .distributed import (
    Process,
    agree,
    end_at_once,
    gather,
    join,
    leads_machine,
    leave,
    rank_from_environment,
    share,
)
from .errors import REFUSED, SharedError, Stopped, UsageError, one_line
from .evaluation import Evaluation
from .failure import Watchdog
from .launch import launch
from .loop import Run
from .model import create_model
from .options import AUTO, BEST, LAST, PROGRAM, Options, parse_options
from .packages import require_packages
from .report import final_table
from .weights_file import load_file

Checkpoints = tuple[dict[str, Any], dict[str, Any] | None] | None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse_options, sys.argv[1:] if arguments is None else arguments, PROGRAM)


def run(parse: Callable[[list[str]], Options], arguments: list[str], program: str) -> int:
    """Do what options say that ``parse`` reads from the arguments."""
    try:
        options = parse(arguments)
        before = _last_written(options)
        try:
            processes = options.processes or max(1, torch.cuda.device_count())
            if processes == 1 or dist.is_torchelastic_launched():
                return work(options)
            step_size(options, processes)
            status = launch(work_and_end, options, processes)
            if status > 128:
                _say_how_to_resume(options, arguments, before)
            return status
        except (KeyboardInterrupt, SignalException, Stopped) as stop:
            number = getattr(stop, "signal_number", getattr(stop, "sigval", signal.SIGINT))
            if rank_from_environment() == 0:
                _say_how_to_resume(options, arguments, before)
            if dist.is_initialized():
                end_at_once(128 + number)
            return int(128 + number)
    except UsageError as error:
        if leads_machine():
            failure.say(program, str(error))
        return REFUSED


def work_and_end(options: Options) -> None:
    """The work of a process that :func:`.launch.launch` starts."""
    try:
        status = work(options)
    except UsageError as error:
        if leads_machine():
            failure.say(options.program, str(error))
        status = REFUSED
    except (KeyboardInterrupt, Stopped) as stop:
        status = 128 + getattr(stop, "signal_number", signal.SIGINT)
    if status:
        end_at_once(status)


def work(options: Options) -> int:
    """The work of each process; returns its exit status.

    Raises:
        Stopped, KeyboardInterrupt: a signal asked for an end.
        UsageError: the process alone knows that something cannot be done, and met no other.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    step_size(options, world_size)
    if options.sync_bn and world_size > 1 and not torch.cuda.is_available():
        raise UsageError("--sync-bn: DistributedDataParallel takes SyncBatchNorm on GPUs only")
    process = join(options.timeout)
    try:
        with Watchdog(process, options.program, options.timeout) as watchdog:
            train_and_test(options, process, watchdog)
            watchdog.beat("waiting for the other processes to end")
            leave(process)
    except Stopped as stop:
        number = stop.signal_number
    except Exception as error:
        return failure.end_all(error, options.program, process)
    else:
        return 0
    gc.collect()
    raise Stopped(number)  # without the frames of the first, which hold on to all of the run


def train_and_test(options: Options, process: Process, watchdog: Watchdog | None = None) -> None:
    """Train and test, or with ``--evaluate`` only the latter."""
    torch.backends.cudnn.deterministic = True  # a resumed run has the same bits
    data, checkpoints = prepare_together(options, process)
    if options.seed is None:
        seed = random.randrange(2**32)
        if checkpoints is not None:
            seed = checkpoints[0]["arguments"]["seed"]
        options.seed = share(seed, process)
    run = Run(options, data, process, watchdog)
    if options.evaluate is not None:
        evaluate_file(run)
        return
    if process.leads:
        run.report.line(_banner(run))
    if checkpoints is not None:
        _restore(run, *checkpoints)
    run.train()
    run.test()


def _banner(run: Run) -> str:
    options, process, size = run.options, run.process, run.batches.size
    if options.model == "densenet_bc":
        what = f"DenseNet-BC, depth {options.depth}, growth rate {options.growth_rate}"
    else:
        what = f"{options.library}'s {options.model}"
    parts = f" in {size.parts} parts" if size.parts > 1 else ""
    return (
        f"{options.dataset}: {what}, efficient {options.efficient}, {process.world_size} x "
        f"{process.device.type}, {size.parts * size.part} images a step on each{parts}, "
        f"seed {options.seed}, saved in {options.save}"
    )


def _restore(run: Run, last: dict[str, Any], best: dict[str, Any] | None) -> None:
    run.restore(last)
    changes = changed_options(last, run.options, run.process.world_size)
    if changes and run.process.leads:
        listed = ", ".join(changes)
        run.report.line(f"not the bits of a run that was never stopped: {listed}", "stderr")
    if best is not None and run.process.leads and run.last.step is None:  # of another folder
        checkpoint.save(run.folder / BEST, best)


def evaluate_file(run: Run) -> None:
    """What ``--evaluate`` asks for."""
    options = run.options
    path = Path(options.save) / BEST if options.evaluate == BEST else Path(str(options.evaluate))
    reason = None
    if run.process.leads:
        try:
            load_file(run.engine.evaluated, path)
        except UsageError as error:
            reason = str(error)
    agree(reason, run.process)
    result: Evaluation = run.evaluate(run.loaders.test, "testing")
    if run.process.leads:
        run.report.confusion(result.confusion, list(run.data.classes))
        run.report.line(final_table({"test": result}, [f"weights of {path}"]))


# ------------------------------------------------------------------------------------------------
# What can be refused early


def prepare(options: Options, leads: bool) -> tuple[Data, Checkpoints]:
    """The data, and for process 0 the checkpoints to go on from.

    Raises:
        UsageError: something is missing, or does not fit.
    """
    require_packages(options)
    data = load_data(options)
    if not leads:
        return data, None
    if options.evaluate is not None:
        Path(options.save).mkdir(parents=True, exist_ok=True)
        return data, None
    checkpoints = _load_checkpoints(options, len(data.classes))
    checkpoint.check_writable(options)
    return data, checkpoints


def _load_checkpoints(options: Options, num_classes: int) -> Checkpoints:
    path = checkpoint.resumed_path(options)
    if path is None:
        options.resume = None
        return None
    last = checkpoint.load(path)
    checker, model = Checker(path, options.program), create_model(options, num_classes)
    checker.check_last(last, options, model)
    if not last["history"]:
        return last, None
    best_path = path.with_name(BEST)
    best = checkpoint.load(best_path)
    Checker(best_path, options.program).check_best(best, model)
    return last, best


def prepare_together(options: Options, process: Process) -> tuple[Data, Checkpoints]:
    """The data of this machine and the checkpoints of process 0, or one refusal in all processes.

    Only process 0 reads and writes ``--save``: machines need not share that folder.
    """
    data, checkpoints, reason = None, None, None
    _check_first_machine(options, process)
    try:
        data, checkpoints = prepare(options, leads=process.leads)
    except UsageError as error:
        reason = one_line(error)
    agree(reason, process)
    assert data is not None
    shared: Checkpoints = share(checkpoints, process)
    options.resume = share(options.resume, process)
    return data, shared


def _check_first_machine(options: Options, process: Process) -> None:
    """Refuse to begin anew, or in vain, where the checkpoints lie on another machine's disk."""
    path = Path(options.save) / LAST
    found = gather((os.path.lexists(path), platform.node()), process)
    if options.resume not in (LAST, AUTO) or found[0][0]:
        return
    for rank, (has_checkpoint, host) in enumerate(found):
        if has_checkpoint:
            missing = f"{share(str(path), process)}: there is no checkpoint to go on from"
            advice = f"process {rank} on {host} has one: that machine has to be the first"
            raise SharedError(f"{missing}; {advice}")


# ------------------------------------------------------------------------------------------------
# After a stop


def _last_written(options: Options) -> int:
    """When last.pt was written, in nanoseconds; 0 if there is none."""
    try:
        return (Path(options.save) / LAST).stat().st_mtime_ns
    except OSError:
        return 0


def _say_how_to_resume(options: Options, arguments: list[str], before: int) -> None:
    """``before``: what :func:`_last_written` was when this run began."""
    message = "interrupted before the first checkpoint"
    if _last_written(options) != before or (options.resume is not None and before):
        again = shlex.join([*_without_resume(arguments), "--resume"])
        message = f"interrupted; to go on: {options.invocation} {again}"
    elif before:
        message += f"; {options.save} still holds an earlier run"
    print(message, file=sys.stderr, flush=True)


def _without_resume(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--overwrite" or argument.partition("=")[0] == "--resume":
            continue
        if not argument.startswith("-") and i and arguments[i - 1] == "--resume":
            continue
        kept.append(argument)
    return kept
