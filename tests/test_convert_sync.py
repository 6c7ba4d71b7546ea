"""Networks whose norms synchronise: two processes with halves of a batch against one with all.

torch's own SyncBatchNorm refuses tensors of the CPU, so the comparison is with batch norm on the
whole batch. The last norm is in evaluation mode, because it has no block behind it that runs it.
"""

import copy
import importlib.util
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from efficient_densenet import DenseNet, convert, explain
from reference import kept_bytes
from test_convert import images, library, monai, timm, torchvision
from test_sync_batch_norm import on_processes

synchronise = nn.SyncBatchNorm.convert_sync_batchnorm


def own():
    return DenseNet(4, (2, 3, 2), num_init_features=8, small_inputs=False, efficient=True)


def synchronise_timm(model):
    return library("timm.layers").convert_sync_batchnorm(model)


CASES = {  # the network, whose name begins with its library's, and what is done to it
    "own": (own, synchronise),
    "torchvision before": (torchvision, lambda m: convert(synchronise(m))),
    "torchvision after": (torchvision, lambda m: synchronise(convert(m))),
    "MONAI before": (monai, lambda m: convert(synchronise(m))),
    "MONAI after": (monai, lambda m: synchronise(convert(m))),
    "timm before": (timm, lambda m: convert(synchronise_timm(m))),
    "timm after": (timm, lambda m: synchronise_timm(convert(m))),
}
INSTALLED = {
    name: case
    for name, case in CASES.items()
    if name == "own" or importlib.util.find_spec(name.split()[0].lower())
}


def freeze_last_norm(model):
    norms = [m for m in model.features.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    norms[-1].eval()
    return model


def difference(found, expected):
    return max(
        (a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True)
    )


def train_on_parts(rank, world):
    """By case: the largest differences from the whole batch, and what explain says."""
    found = {}
    for name, (make, change) in INSTALLED.items():
        torch.manual_seed(0)
        plain = make().double()
        model = freeze_last_norm(change(copy.deepcopy(plain)))
        x = images("torchvision", n=2 * world)
        part = slice(2 * rank, 2 * rank + 2)
        y, expected = model(x[part]), freeze_last_norm(plain)(x)
        y.square().sum().backward()
        expected.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient)
        pairs = {
            "y": ([y], [expected[part]]),
            "gradients": (gradients, [p.grad for p in plain.parameters()]),
            "buffers": (model.buffers(), plain.buffers()),
        }
        reports = explain(model), explain(model, x[part]), explain(model.eval())
        paths = [report[0].path for report in reports]
        found[name] = {key: difference(*pair) for key, pair in pairs.items()}, paths
    return found


def test_parts_of_a_batch_on_two_processes(tmp_path):
    for found in on_processes(2, train_on_parts, tmp_path):
        assert found.keys() == INSTALLED.keys()
        for name, (errors, (alone, with_input, evaluation)) in found.items():
            assert max(errors.values()) < 1e-8, (name, errors)
            for path in (alone, with_input):
                assert path.startswith("layer by layer: ") and "synchronises" in path, name
            assert evaluation == "fused", name


def memory_and_log(rank, world):
    """Bytes kept by a block of 12 layers, synchronised and plain; and the lines of the log."""
    records = []
    logger = logging.getLogger("efficient_densenet")
    logger.addFilter(lambda record: records.append(record.getMessage()) or True)
    logger.setLevel(logging.INFO)
    densenet = library("torchvision.models.densenet")
    plain = densenet._DenseBlock(12, 8, 4, 4, 0.0).double()
    block = convert(synchronise(copy.deepcopy(plain)))
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    kept = [kept_bytes(lambda b=b: b(x), [x, *b.parameters()]) for b in (block, plain)]
    return kept, records


def test_memory_is_linear_and_convert_says_what_runs(tmp_path):
    for (ours, plain), records in on_processes(2, memory_and_log, tmp_path):
        assert ours < 0.55 * plain
        assert len(records) == 1 and "for now layer by layer" in records[0]
        assert "synchronises its statistics" in records[0]


def run_alone(rank, world):
    torch.manual_seed(0)
    model = torchvision().double()
    plain, x = copy.deepcopy(model), images("torchvision")
    model = synchronise(convert(model))
    paths = [report.path for report in explain(model)]
    freeze_last_norm(model), freeze_last_norm(plain)
    return paths, difference([model(x)], [plain(x)])


def test_one_process_runs_fused(tmp_path):
    ((paths, error),) = on_processes(1, run_alone, tmp_path)
    assert set(paths) == {"fused"} and error < 1e-10


def test_without_processes_it_is_batch_norm():
    torch.manual_seed(0)
    plain = torchvision().double()
    model, x = synchronise(convert(copy.deepcopy(plain))), images("torchvision")
    assert {report.path for report in explain(model)} == {"fused"}
    torch.testing.assert_close(model(x), plain(x))


def test_torchs_conversion_drops_the_activation_of_timm(caplog):
    """That network has no ReLU any more: its blocks are others, and are left alone."""
    torch.manual_seed(0)
    model = synchronise(timm().double()).eval()
    plain, x = copy.deepcopy(model), images("timm")
    with caplog.at_level(logging.INFO, "efficient_densenet"):
        convert(model)
    assert caplog.text.count("norm is SyncBatchNorm, without a ReLU") == 3
    assert torch.equal(model(x), plain(x))
    with pytest.raises(ValueError, match="without a ReLU"):
        convert(model, strict=True)
