"""What breaks a run ends all of its processes, with one line that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from efficient_densenet.train import checkpoint
from efficient_densenet.train.data import Images, Key
from efficient_densenet.train.engine import Engine
from train_runs import Processes, arguments_of, load, packages, run  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "packages")


def two(arguments: str, tmp_path: Path, change=None) -> Processes:
    folders = [tmp_path / "0", tmp_path / "1"]
    return Processes(
        [arguments_of(arguments, folder) for folder in folders], tmp_path / "log", change
    )


def lines(processes: Processes) -> list[str]:
    return [line for line in processes.output.splitlines() if ": error: " in line]


def in_second_step(act) -> None:
    """In process 1."""
    really_step = Engine.step

    def step(self: Engine, epoch: int, done: int, *more: object) -> torch.Tensor:
        if self.process.rank == 1 and done:
            act()
        return really_step(self, epoch, done, *more)

    Engine.step = step


def hang() -> None:
    """While process 1 reads images for the second step."""
    read, seen = Images.__getitem__, []

    def read_or_hang(self: Images, key: object) -> tuple:
        seen.extend([key] if isinstance(key, Key) else [])
        if len(seen) > 16 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return read(self, key)

    Images.__getitem__ = read_or_hang


def fail() -> None:
    def act() -> None:
        raise ValueError("a bug\nof two lines")

    in_second_step(act)


def run_out_of_memory() -> None:
    def act() -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    in_second_step(act)


def die() -> None:
    in_second_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def lose_a_reader() -> None:
    """A process of process 1 that reads images is killed."""

    def act() -> None:
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    in_second_step(act)


def full_disk() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_hang_on_one_process(tmp_path: Path) -> None:
    processes = two("--timeout 4 --epochs 2", tmp_path, hang)
    assert processes.wait(40) == [1, 1]
    (line,) = lines(processes)
    assert line.endswith(
        "process 1: no progress for 4 s while reading images of epoch 1 after 32 of its images"
    )
    assert "time.sleep(1000)" in processes.output  # where it hangs


def test_an_exception_on_one_process(tmp_path: Path) -> None:
    processes = two("--epochs 2", tmp_path, fail)
    assert processes.wait() == [1, 1]
    assert lines(processes) == [
        "efficient-densenet-train: error: process 1: ValueError: a bug of two lines"
    ]
    assert processes.output.count("Traceback") == 1


@pytest.mark.parametrize(
    ("options", "change", "statuses", "words"),
    [
        ("", run_out_of_memory, [1, 1], "process 1: out of memory (--recompute features, "),
        ("", die, [1, -signal.SIGKILL], "another process is gone or does not answer: "),
        (" --workers 1", lose_a_reader, [1, 1], "process 1: DataLoader worker (pid"),
    ],
    ids=["out of memory", "killed", "killed reader of images"],
)
def test_one_process_fails_without_a_bug(
    options: str, change: Callable, statuses: list[int], words: str, tmp_path: Path
) -> None:
    processes = two(f"--epochs 2{options}", tmp_path, change)
    assert processes.wait() == statuses
    (line,) = lines(processes)
    assert words in line
    assert "Traceback" not in processes.output


def test_a_full_disk_with_two_processes(tmp_path: Path) -> None:
    processes = two("--epochs 2 --growth-rate 12", tmp_path, full_disk)
    assert processes.wait() == [2, 2]
    words = f"{tmp_path / '0' / 'last.pt'}: cannot be written: File too large"
    assert lines(processes) == [f"efficient-densenet-train: error: {words}"]
    assert "Traceback" not in processes.output


def test_a_process_that_never_comes(tmp_path: Path) -> None:
    arguments = [arguments_of("--timeout 1", tmp_path)]
    processes = Processes(arguments, tmp_path / "log", short_grace, expected=2)
    assert processes.wait() == [2]
    (line,) = lines(processes)
    assert "not all processes came: expected 2 processes within 1 s" in line


def short_grace() -> None:
    from efficient_densenet.train import distributed

    distributed.GRACE = 1.0


# As the user starts them, on one machine.
LAUNCHED = (
    "import sys, signal, os, torch\n"
    "torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0\n"
    "from efficient_densenet.train import command\n"
    "sys.exit(command.main(sys.argv[1:]))\n"
)


def launch(arguments: str, save: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"RES_OPTIONS": "timeout:1 attempts:1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHED, *arguments_of(arguments, save)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_launched(
    begin: str, end: Callable[[subprocess.Popen], None], save: Path
) -> tuple[int, str]:
    """Two processes, ended when a line begins so; the exit status, and what they said behind it."""
    process = launch("--processes 2 --epochs 1000", save)
    try:
        while not process.stdout.readline().startswith(begin):
            assert process.poll() is None
        end(process)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in out
    return process.returncode, out


def test_launched_processes_stop_on_sigterm_and_go_on(tmp_path: Path) -> None:
    def stop(process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGTERM)

    status, out = end_launched("epoch 2/1000", stop, tmp_path)
    assert status == 143, out
    assert "interrupted; to go on: python -m efficient_densenet.train " in out
    done = load(tmp_path / "last.pt")["epoch"]
    assert run(f"--resume --epochs {done + 1}", tmp_path) == 0


def test_a_launched_process_that_is_killed(tmp_path: Path) -> None:
    def kill_a_child(process: subprocess.Popen) -> None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    status, out = end_launched("epoch 1/1000: train", kill_a_child, tmp_path)
    assert status == 1, out
    assert "was ended by SIGKILL" in out


# --------------------------------------------------------------------------------- one process


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert run("", tmp_path / "file" / "run") == 2
    err = capsys.readouterr().err
    assert f"--save {tmp_path / 'file' / 'run'}: cannot write there: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["train.log", "confusion.png", "tensorboard"])
def test_a_report_that_cannot_be_written(name: str, tmp_path: Path, capsys) -> None:
    report = {"train.log": "log", "confusion.png": "confusion"}.get(name, name)
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    assert run(f"--reports {report}", tmp_path) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert name in err and "cannot" in err


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys) -> None:
    assert run("--lr 1e30 --epochs 3", tmp_path) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "the training loss of epoch 1 is " in err and "--lr 1e+30 may be too high" in err


def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch) -> None:
    """There is the old one or the new one, and never a name without a file."""
    folder = tmp_path / "run"
    folder.mkdir()
    kept = checkpoint.LastCheckpoints(folder, 2, None)
    kept.save({"step": 1})
    kept.save({"step": 2})
    for name in ("link", "replace"):

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, name, stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.LastCheckpoints(folder, 2, 2).save({"step": 3})
        monkeypatch.undo()
        assert checkpoint.load(folder / "last.pt") == {"step": 2}
    kept.save({"step": 3})
    assert checkpoint.load(folder / "last.pt") == {"step": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "step-00000002.pt"]


@pytest.mark.parametrize(
    ("part", "value"),
    [("images", -1), ("images", "3"), ("totals", []), ("totals", [torch.ones(2)]), ("step", None),
     ("average", [1]), ("scaler", None), ("processes", None), ("seconds", float("nan"))],
    ids=str,
)  # fmt: skip
def test_a_strange_checkpoint(part: str, value: object, tmp_path: Path, capsys) -> None:
    assert run("", tmp_path) == 0
    last = load(tmp_path / "last.pt")
    last[part] = value
    torch.save(last, tmp_path / "last.pt")
    capsys.readouterr()
    assert run("--resume", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    words = f"{tmp_path / 'last.pt'}: efficient-densenet-train wrote no such checkpoint: its {part}"
    assert words in err


def test_no_checkpoint_on_the_first_machine(tmp_path: Path) -> None:
    """The second one has one of its own: starting anew would lose it."""
    assert run("", tmp_path / "1") == 0
    for resume in ("--resume", "--resume auto"):
        processes = two(resume, tmp_path)
        assert processes.wait() == [2, 2]
        first, second = lines(processes)
        assert first == second  # each machine says it
        assert (
            f"{tmp_path / '0' / 'last.pt'}: there is no checkpoint to go on from; process" in first
        )
        assert "has one: that machine has to be the first" in first
        (tmp_path / "log.0").unlink()
        (tmp_path / "log.1").unlink()
