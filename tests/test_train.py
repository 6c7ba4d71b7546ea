"""The training command: its options, data sets, recipes and reports, on tiny data."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

import efficient_densenet
from efficient_densenet.train import command, recipes
from efficient_densenet.train.batches import StepSize, TrainingBatches, seed_of
from efficient_densenet.train.data import DATASETS, load_data
from efficient_densenet.train.model import create_model
from efficient_densenet.train.options import parse_options
from efficient_densenet.train.recipes import RECIPES, Schedule
from train_runs import TINY, arguments_of, load, packages, read_results, run  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "packages", "one_process")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs, the command starts processes of its own."""
    devices = min(torch.cuda.device_count(), 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def refusal(arguments: str, save: Path, capsys: pytest.CaptureFixture) -> str:
    """The line on stderr that goes with exit status 2."""
    capsys.readouterr()
    assert run(arguments, save) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"efficient-densenet-train: error: [^\n]+\n", err), err
    return err.partition("error: ")[2]


# ---------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_everything(tmp_path: Path, capsys) -> None:
    pytest.importorskip("tensorboard")
    reports = "csv,curves,confusion,tensorboard,log,table"
    assert run(f"--epochs 3 --reports {reports} --keep 2 --save-every 3", tmp_path) == 0
    out, err = capsys.readouterr()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"best.pt", "last.pt", "results.csv", "curves.png", "confusion.png"}
    # Fifteen steps: saved at 3, 5, 6, 9, 10, 12 and 15.
    assert {name for name in names if name.startswith("step-")} == {"step-00000012.pt"}
    for name in ("curves.png", "confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    rows = read_results(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_top5_error"]) <= float(rows[-1]["test_error"])
    assert re.search(r"^validation +1300 +\d+\.\d{4} +[\d.]+% +[\d.]+%$", out, re.M)
    assert re.search(r"^test +360 ", out, re.M)
    assert "step" not in err and "loss" in err  # plain lines, for this is no terminal
    log = (tmp_path / "train.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)
    assert any("epoch 3/3: train loss" in line for line in log)


def test_without_arguments_it_trains_on_digits() -> None:
    options = parse_options([])
    assert (options.dataset, options.save, options.recipe) == ("digits", "runs/digits", "digits")
    assert (options.model, options.depth, options.growth_rate) == ("densenet_bc", 16, 12)
    assert options.seed is None and options.efficient


def test_a_bar_on_a_terminal(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run("", tmp_path) == 0
    err = capsys.readouterr().err
    assert "epoch 1/1:" in err and "\r" in err and "%|" in err


# ---------------------------------------------------------------------------------- each option

RUNS = [
    "--no-efficient",
    "--recompute features",
    "--model densenet_bc_100_12 --epochs 1 --batch-size 128",
    "--recipe modern --epochs 6 --lr 0.05",
    "--recipe imagenet --epochs 2 --batch-size 20 --scale-lr linear",
    "--scale-lr sqrt --momentum 0 --weight-decay 0.001 --no-norm-decay",
    "--accumulate 2 --clip 1",
    "--schedule cosine --warmup-epochs 1 --epochs 2 --label-smoothing 0.1 --drop-rate 0.1",
    "--ema 0.9 --mixup 0.2 --randaugment",
    "--cutmix 1 --schedule step --warmup-epochs 0",
    "--amp bf16 --channels-last",
    "--amp fp16 --clip 1",
    "--compile aot_eager",
    "--sync-bn --processes 1 --timeout 60",
    "--workers 1",
    "--image-size 8 --overwrite",
]


@pytest.mark.parametrize("arguments", RUNS)
def test_each_option(arguments: str, tmp_path: Path, capsys) -> None:
    tiny = TINY.split()[4 if "--model" in arguments else 0 :]  # others have a shape of their own
    status = command.main([*tiny, *arguments.split(), "--save", str(tmp_path)])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "test accuracy" in out
    assert all(float(row["train_loss"]) < 20 for row in read_results(tmp_path))


@pytest.mark.parametrize(
    ("library", "model"),
    [("efficient_densenet", "densenet121"), ("torchvision", "densenet121")]
    + [("timm", "densenetblur121d"), ("monai", "DenseNet121")],
)
def test_models_of_libraries(library: str, model: str, tmp_path: Path, capsys) -> None:
    if library in ("timm", "monai"):
        pytest.importorskip(library)
    write_folder(tmp_path / "data")
    arguments = f"--dataset imagefolder --data {tmp_path / 'data'} --image-size 32 --valid-size 20"
    arguments += f" --library {library} --model {model} --epochs 1 --reports csv"
    save = ["--save", str(tmp_path / "run")]
    status = command.main([*arguments.split(), *save, "--batch-size-per-device", "2"])
    assert status == 0, capsys.readouterr().err
    assert command.main(["--model", model, "--library", library, *save, "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert f"--model {model}: cannot take images of 8 x 8: " in err.splitlines()[-1]


def test_help_names_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "over all devices" in text and "one device holds at once" in text
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.M)) >= {
        "--dataset", "--recipe", "--lr", "--amp", "--compile", "--sync-bn", "--resume",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--lr fast", "--lr: expected a number >= 0, got 'fast'"),
        ("--lr nan", "--lr: expected a number >= 0, got 'nan'"),
        ("--momentum 1", "--momentum: expected a number >= 0 and < 1, got '1'"),
        ("--epochs 0", "--epochs: expected an integer >= 1, got '0'"),
        ("--recipe best", "--recipe: invalid choice: 'best'"),
        ("--dataset cifar100", "--dataset cifar100 needs --data DIR"),
        ("--data .", "--data .: no cifar-10-batches-py/ there"),
        ("--dataset digits --data .", "--dataset digits reads no --data"),
        ("--model densenet7", "--depth goes with --model densenet_bc, not densenet7"),
        ("--library timm", "--library timm needs --model NAME"),
        ("--depth 12", "--depth 12: depth - 4 must be divisible by 6"),
        ("--warmup-epochs 1", "--warmup-epochs 1: there are 1 epochs"),
        ("--recompute features --no-efficient", "--recompute features needs --efficient"),
        ("--batch-size 4 --batch-size-per-device 4", "not allowed with argument"),
        ("--accumulate 64", "--batch-size 32: not enough for 1 processes in 64 parts each"),
        ("--reports csv,poem", "--reports: expected some of csv, curves, "),
        ("--compile gcc", "--compile gcc: expected one of "),
        ("--valid-size 1437", "--valid-size 1437: there are 1437 training images"),
        ("--pretrained", "--pretrained: nobody offers weights of densenet_bc"),
        ("--pretrained none.pt", "--pretrained: weights: expected a file, got 'none.pt'"),
        ("--evaluate", "best.pt"),
        ("--evaluate --resume", "--evaluate trains nothing"),
        ("--resume", "last.pt: there is no checkpoint to go on from"),
        ("--colour", "unrecognized arguments: --colour"),
        ("--epo 3", "unrecognized arguments: --epo 3"),
    ],
)
def test_refused_options(arguments: str, words: str, tmp_path: Path, capsys) -> None:
    assert words in refusal(arguments, tmp_path, capsys)


@pytest.mark.parametrize(
    ("library", "model"), [("efficient_densenet", "densenet7"), ("torchvision", "densenet7"),
                           ("timm", "resnet18"), ("monai", "DenseNet7")],
)  # fmt: skip
def test_a_model_that_does_not_exist(library: str, model: str, tmp_path: Path, capsys) -> None:
    if library in ("timm", "monai"):
        pytest.importorskip(library)
    arguments = ["--library", library, "--model", model, "--save", str(tmp_path)]
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and model in err


@pytest.mark.parametrize("package", ["torchvision", "tqdm", "matplotlib", "sklearn", "tensorboard"])
def test_a_missing_package(
    package: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = "scikit-learn" if package == "sklearn" else package
    words = f"the package {name} is missing: pip install 'efficient_densenet[train]'"
    reports = "--reports curves,confusion" + (",tensorboard" if package == "tensorboard" else "")
    assert words in refusal(reports, tmp_path, capsys)


# ------------------------------------------------------------------------- pretrained, evaluate


def test_evaluate_repeats_the_test(tmp_path: Path, capsys) -> None:
    assert run("--reports csv,confusion --ema 0.5", tmp_path) == 0
    out = capsys.readouterr().out
    accuracy = re.search(r"test accuracy ([\d.]+%)", out)[1]
    for file in ("", str(tmp_path / "best.pt")):
        assert run(f"--ema 0.5 --evaluate {file} --reports confusion", tmp_path) == 0
        assert re.search(rf"^test +360 +[\d.]+ +{accuracy} ", capsys.readouterr().out, re.M)
    (tmp_path / "other.pt").write_bytes(b"no checkpoint")
    error = refusal(f"--evaluate {tmp_path / 'other.pt'}", tmp_path, capsys)
    assert error.startswith(f"--evaluate {tmp_path / 'other.pt'}: weights: expected a file of ")


def test_pretrained_weights_of_other_classes(tmp_path: Path) -> None:
    options = parse_options(TINY.split())
    model = efficient_densenet.DenseNet(4, [1, 1, 1], num_init_features=8, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    options.pretrained = str(tmp_path / "weights.pt")
    ours = create_model(options, 10, pretrained=True)
    assert ours.classifier.out_features == 10
    assert torch.equal(ours.features.conv0.weight, model.features.conv0.weight)
    assert run(f"--pretrained {options.pretrained}", tmp_path / "run") == 0


def test_pretrained_weights_of_a_library(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.densenet121(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    arguments = ["--library", "torchvision", "--model", "densenet121"]
    options = parse_options([*arguments, "--pretrained", str(tmp_path / "weights.pt")])
    ours = create_model(options, 10, pretrained=True)
    assert ours.classifier.out_features == 10
    assert torch.equal(ours.features.conv0.weight, model.features.conv0.weight)
    options.pretrained = str(tmp_path / "none.pt")
    with pytest.raises(Exception, match="--pretrained: weights: expected a file"):
        create_model(options, 10, pretrained=True)


# -------------------------------------------------------------------------------------- recipes


def test_the_paper_s_recipes() -> None:
    paper = RECIPES["cifar"]
    assert (paper.n_epochs, paper.batch_size, paper.lr, paper.weight_decay) == (300, 64, 0.1, 1e-4)
    assert recipes.milestones(300) == [150, 225]
    assert recipes.milestones(90, RECIPES["imagenet"].milestones) == [30, 60]
    for name, kind in DATASETS.items():
        data = ["--data", "somewhere"] if kind.needs_folder else []
        options = parse_options(["--dataset", name, *data])
        assert options.n_epochs == RECIPES[kind.recipe].n_epochs


def test_learning_rates() -> None:
    step = Schedule("step", 4, 10)
    assert [round(step(i), 9) for i in (0, 19, 20, 29, 30, 39)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = Schedule("cosine", 5, 10, warmup_epochs=1)
    assert cosine(0) == pytest.approx(0.01) and cosine(10) == 1
    assert cosine(30) == pytest.approx(0.5) and cosine(50) == pytest.approx(0)
    assert all(cosine(i) < cosine(i + 1) for i in range(10))
    assert all(cosine(i) > cosine(i + 1) for i in range(10, 50))


def test_every_image_once_whatever_the_processes() -> None:
    """Over all processes, a step is of the same images with the same augmentation."""

    def steps(processes: int, parts: int) -> list[set]:
        size, found = StepSize(processes, parts, 12 // processes // parts), []
        for rank in range(processes):
            batches = TrainingBatches(31, size, rank, seed=3)
            batches.start(2, 0)
            keys = iter(batches)
            for i, sizes in enumerate(batches.steps()):
                own = [key for _ in sizes for key in next(keys)]
                assert len(own) == sum(sizes)
                found += [set()] if i == len(found) else []
                found[i] |= set(own)
        return found

    alone = steps(1, 1)
    assert [len(step) for step in alone] == [12, 12, 7]
    assert {key.image for step in alone for key in step} == set(range(31))
    assert steps(1, 3) == alone
    for processes, parts in ((2, 1), (3, 2)):
        together = steps(processes, parts)
        assert together[:2] == alone[:2] and together[2] < alone[2]
        assert len(together[2]) == 7 - 31 % processes
    assert len({seed_of(1, epoch, image) for epoch in range(50) for image in range(50)}) == 2500


def test_a_resumed_epoch_has_the_images_that_are_left() -> None:
    batches = TrainingBatches(31, StepSize(1, 1, 5), 0, seed=3)
    batches.start(1, 0)
    whole = list(batches)
    batches.start(1, 15)
    assert list(batches) == whole[3:]
    assert list(batches.steps()) == [[5], [5], [5], [1]]


# ------------------------------------------------------------------------------------ data sets


def write_folder(root: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")


def test_a_folder_of_images(tmp_path: Path, capsys) -> None:
    write_folder(tmp_path / "data")
    source = f"--dataset imagefolder --data {tmp_path / 'data'} --image-size 32"
    options = parse_options(source.split())
    data = load_data(options)
    assert (options.valid_size, list(data.classes)) == (1, ["cat", "dog"])
    assert [len(part) for part in (data.train, data.valid, data.test)] == [23, 1, 8]
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 32, 32)
    run_tiny = f"{source} --valid-size 4 --batch-size 8 --workers 2 --save-every 1"
    assert run(run_tiny, tmp_path / "run") == 0
    assert "test +8 " not in capsys.readouterr().out
    for name, words in (("val/dog", "class dog is in one of"), ("val", "no val/ there")):
        (tmp_path / "data" / name).rename(tmp_path / "away")
        assert words in refusal(run_tiny, tmp_path / "run", capsys)
        (tmp_path / "away").rename(tmp_path / "data" / name)


def test_cifar100(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = torch.randint(256, (100, 3072), dtype=torch.uint8).numpy()
    names = [f"c{i}" for i in range(100)]
    contents = {"meta": {"fine_label_names": names}}
    contents |= {
        part: {"data": pixels, "fine_labels": list(range(100))} for part in ("train", "test")
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    assert "was modified" in refusal(f"--dataset cifar100 --data {tmp_path}", tmp_path, capsys)
    cifar = datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5["meta"]})
    data = load_data(
        parse_options(["--dataset", "cifar100", "--data", str(tmp_path), "--valid-size", "40"])
    )
    assert len(data.classes) == 100 and len(data.train) == 60
    arguments = f"--dataset cifar100 --data {tmp_path} --valid-size 40 --reports confusion"
    assert run(arguments, tmp_path / "run") == 0
    assert (tmp_path / "run" / "confusion.png").exists()


@pytest.mark.parametrize("dataset", ["svhn", "svhn-extra"])
def test_svhn(dataset: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    scipy_io = pytest.importorskip("scipy.io")
    assert "the folder is empty" in refusal(
        f"--dataset {dataset} --data {tmp_path}", tmp_path, capsys
    )
    files = {}
    for part, count in (("train", 50), ("test", 20), ("extra", 10)):
        name = f"{part}_32x32.mat"
        pixels = torch.randint(256, (32, 32, 3, count), dtype=torch.uint8).numpy()
        labels = torch.arange(count)[:, None] % 10 + 1
        scipy_io.savemat(tmp_path / name, {"X": pixels, "y": labels.numpy()})
        files[part] = ["", name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", files)
    arguments = f"--dataset {dataset} --data {tmp_path} --valid-size 20"
    data = load_data(parse_options(arguments.split()))
    assert len(data.train) == (40 if dataset == "svhn-extra" else 30)
    image, label = data.train[0]
    assert image.shape == (3, 32, 32) and 0 <= label < 10
    # The paper augments no digits.
    assert torch.equal(image, data.train[0][0])
    assert run(arguments, tmp_path / "run") == 0


def test_an_image_is_augmented_as_its_key_has_it(tmp_path: Path) -> None:
    write_folder(tmp_path)
    from efficient_densenet.train.data import Key

    arguments = f"--dataset imagefolder --data {tmp_path} --image-size 16 --randaugment"
    data = load_data(parse_options(arguments.split()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = data.train[Key(3, 7)][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(data.train[Key(3, 7)][0], first)
    assert not torch.equal(data.train[Key(3, 8)][0], first)
