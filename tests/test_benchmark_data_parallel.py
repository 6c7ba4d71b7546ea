"""benchmarks/data_parallel.py, with two processes on a CPU: what it writes and what it refuses."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import data_parallel  # noqa: E402
from data_parallel import Row  # noqa: E402
from rows import Job, NotTimed  # noqa: E402

WAYS = ["single", "ddp", "ddp-settings", "ddp-graph"]
requires_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(autouse=True)
def one_thread_per_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def job():
    return Job(
        "bc40", "fp32", "ours ddp", 2, steps=1, warmup=1, device="cpu", cudnn_benchmark=False
    )


@requires_gloo
def test_rows(tmp_path, capsys):
    arguments = "--device cpu --config bc40 --precision fp32 --models ours --processes 2 --batch 2 "
    arguments += f"--steps 1 --warmup 1 --out {tmp_path}"
    assert data_parallel.main(arguments.split()) == 0
    text = (tmp_path / "data_parallel.md").read_text()
    assert capsys.readouterr().out == f"{text}\n"
    assert f"benchmarks/data_parallel.py {arguments}" in text and "over gloo" in text
    content = json.loads((tmp_path / "data_parallel.json").read_text())
    assert content.keys() == {"origin", "steps", "warmup", "rows"}
    assert {"device", "torch", "commit", "command", "backend"} <= content["origin"].keys()
    assert [row["row"] for row in content["rows"]] == WAYS
    for row in content["rows"]:
        assert row.keys() == {*Row.__dataclass_fields__, "efficiency"}
        assert (row["config"], row["precision"], row["model"]) == ("bc40", "fp32", "ours")
        assert row["batch"] == 2 and row["processes"] == (1 if row["row"] == "single" else 2)
        assert row["graph_ms"] is row["graph_ms_min"] is row["activation_bytes"] is None
    *launched, graph = content["rows"]
    for row in launched:
        assert 0 < row["step_ms_min"] <= row["step_ms"] and row["host_ms"] > 0
        assert row["note"] == "" and row["efficiency"] == launched[0]["step_ms"] / row["step_ms"]
    assert graph["step_ms"] is graph["efficiency"] is None and "GPU only" in graph["note"]


def test_efficiency():
    """Launched steps are compared with launched ones, replays with replays."""

    def row(way, model="ours", **times):
        return Row("bc40", "fp32", way, 2, model=model, **times)

    rows = [
        *(row("single", step_ms=6.0, graph_ms=2.0), row("single", "plain", step_ms=7.0)),
        *(row("ddp", step_ms=8.0), row("ddp-graph", graph_ms=2.5), row("ddp-settings", note="no")),
        *(row("ddp-graph", "plain", graph_ms=2.5), row("ddp", "checkpoint", step_ms=8.0)),
    ]
    found = [data_parallel.efficiency(row, rows) for row in rows]
    assert found == [1.0, 1.0, 0.75, 0.8, None, None, None]


# --------------------------------------------------------------------------- rows without numbers


def test_processes_have_images_of_their_own(job):
    """The same weights, and without a reduction other gradients."""
    alone = Job(**{**vars(job), "row": "ours single"})
    first, second = (data_parallel.train_step(alone, rank) for rank in range(2))
    for own, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(own, other)
    assert not torch.equal(first.images, second.images)
    for step in (first, second):
        data_parallel.check(step, step())
    momenta = [
        [state["momentum_buffer"] for state in step.optimizer.state.values()]
        for step in (first, second)
    ]
    assert not any(map(torch.equal, *momenta))


def test_what_is_not_timed(job, monkeypatch):
    step = data_parallel.train_step(Job(**{**vars(job), "row": "ours single"}), 0)
    logits = step()
    with pytest.raises(NotTimed, match="not finite"):
        data_parallel.check(step, logits / 0)
    monkeypatch.setattr(data_parallel, "of_all", lambda value: [value, value + 1])
    with pytest.raises(NotTimed, match="gradients of the processes have norms"):
        data_parallel.check(step, logits)


def fails_in_one(job, rank, processes, rendezvous, report):
    if rank == 0:
        time.sleep(600)  # as if it waited for the others
    report.send(Row.of(job, note="failed"))


def dies(job, rank, processes, rendezvous, report):
    os._exit(3)


def hangs(job, rank, processes, rendezvous, report):
    time.sleep(600)


@pytest.mark.parametrize(
    ("process", "note"),
    [(fails_in_one, "failed"), (dies, "a process ended with exit status 3")],
)
def test_one_process_ends_all(job, monkeypatch, process, note):
    monkeypatch.setattr(data_parallel, "process", process)
    row = data_parallel.in_processes(job, 2)
    assert (row.model, row.row, row.processes, row.note) == ("ours", "ddp", 2, note)


def test_time_limit(job, monkeypatch):
    monkeypatch.setattr(data_parallel, "process", hangs)
    monkeypatch.setattr(data_parallel, "TIMEOUT_S", 1)
    assert data_parallel.in_processes(job, 2).note == "given up after 1 s"


def test_too_few_gpus(capsys):
    with pytest.raises(SystemExit):
        data_parallel.parse(["--processes", "1000"])
    assert "--processes 1000: GPUs that torch sees: " in capsys.readouterr().err
