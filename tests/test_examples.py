"""The examples: equal to plain modules, in linear memory, and their command lines work."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_densenet import SharedStorage
from reference import kept_bytes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import fc_densenet  # noqa: E402
from fc_densenet import MODELS, DenseBlock, FCDenseNet, TransitionDown  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_block(block: DenseBlock, features: list[Tensor]) -> list[Tensor]:
    x = torch.cat(features, 1)
    new = []
    for norm, conv in zip(block.norms, block.convs, strict=True):
        new.append(conv(F.relu(norm(x))))
        x = torch.cat([x, new[-1]], 1)
    return new


def plain_transition(module: TransitionDown, features: list[Tensor]) -> list[Tensor]:
    return [F.max_pool2d(module.conv(F.relu(module.norm(torch.cat(features, 1)))), 2)]


def step(module: nn.Module, forward, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Results, gradients of their weighted sum, and buffers."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    outputs = forward(inputs)
    sum((y * torch.linspace(-1, 2, y.numel()).to(y).view_as(y)).sum() for y in outputs).backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        # A bias before a batch norm has no gradient but rounding.
        error = (found[name].double() - expected[name].double()).norm().item()
        assert error <= 1e-10 * max(1, expected[name].double().norm().item()), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make, plain",
    [
        (lambda storage: DenseBlock(4, 11, 3, drop_rate=0, storage=storage), plain_block),
        (lambda storage: TransitionDown(11, drop_rate=0, storage=storage), plain_transition),
    ],
    ids=["block", "transition"],
)
def test_fc_densenet_pieces_equal_plain_compositions(make, plain, training, device):
    efficient = make(SharedStorage()).to(device, torch.float64).train(training)
    for norm in efficient.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    composed = copy.deepcopy(efficient)
    inputs = [torch.randn(2, c, 9, 6, dtype=torch.float64, device=device) for c in (5, 6)]

    def forward(features):
        result = efficient(features)
        return result if isinstance(result, list) else [result]

    expected = step(composed, lambda features: plain(composed, features), inputs)
    assert_equal(step(efficient, forward, inputs), expected)


def test_fc_densenet_equals_its_plain_self(device):
    """Whole networks, with dropout, on sizes that the way up has to cut."""
    networks = []
    for efficient in (True, False):
        torch.manual_seed(0)
        network = FCDenseNet(4, [2, 3, 2, 2, 1], 5, num_init_features=6, efficient=efficient)
        networks.append(network.to(device, torch.float64))
    x = torch.randn(2, 3, 14, 11, dtype=torch.float64, device=device)
    results = []
    for network in networks:
        torch.manual_seed(1)
        results.append(step(network, lambda inputs, network=network: [network(*inputs)], [x]))
    assert results[0]["output 0"].shape == (2, 5, 14, 11)
    assert_equal(*results)


def test_memory_of_a_block_is_linear_in_its_layers():
    def kept(num_layers: int, storage: SharedStorage | None) -> int:
        block = DenseBlock(num_layers, 8, 4, drop_rate=0, storage=storage)
        x = torch.randn(2, 8, 32, 32, requires_grad=True)
        return kept_bytes(lambda: block([x])[-1], [*block.parameters(), *block.buffers()])

    def growth(storage: SharedStorage | None) -> list[float]:
        """Bytes of one layer more, with few layers and with many."""
        few, more, many = (kept(num_layers, storage) for num_layers in (2, 4, 16))
        return [(more - few) / 2, (many - more) / 12]

    new_features = 4 * (2 * 4 * 32 * 32)
    for each in growth(SharedStorage()):
        assert new_features <= each <= 1.1 * new_features  # and numbers per channel
    with_few, with_many = growth(None)
    assert with_many > 2 * with_few > 10 * new_features


@pytest.mark.parametrize("model, millions", [(56, 1.40), (67, 3.50), (103, 9.43)])
def test_fc_densenet_sizes(model, millions):
    """As in arXiv:1611.09326, where FC-DenseNet56 is said to have 1.5 million.

    The authors' code counts running statistics, too.
    """
    network = FCDenseNet(*MODELS[model], num_classes=11)
    counted = [p.numel() for p in network.parameters()]
    counted += [b.numel() for name, b in network.named_buffers() if "running" in name]
    assert round(sum(counted) / 1e6, 2) == millions
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(module, convolutions) for module in network.modules()) == model
    if model == 103:
        read = [block.norms[-1].num_features for block in network.up]
        assert [channels + 16 for channels in read] == [1088, 816, 576, 384, 256]


def test_discs():
    images, labels = fc_densenet.discs(3, 40, 5, torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 40, 40)
    assert labels.shape == (3, 40, 40)
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, 4}
    # A class has one colour, in all images.
    for label in range(5):
        colour = [images[i].movedim(0, -1)[labels[i] == label] for i in range(3)]
        means = torch.stack([c.mean(0) for c in colour if len(c) > 50])
        assert (means - means[0]).abs().max() < 0.15


def test_fc_densenet_learns():
    torch.manual_seed(0)
    network = FCDenseNet(4, [2, 2, 2], 3, num_init_features=8, drop_rate=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    batch = fc_densenet.discs(2, 24, 3, generator)
    steps = [fc_densenet.train_step(network, optimizer, *batch) for _ in range(20)]
    (first, _), (last, accuracy) = steps[0], steps[-1]
    assert last < first / 2
    assert accuracy > 0.9


@pytest.mark.parametrize("option", [[], ["--plain"]], ids=["efficient", "plain"])
def test_fc_densenet_command_line(option, device):
    command = ["fc_densenet.py", "--steps", "2", "--batch", "2", "--size", "32"]
    process = subprocess.run(
        [sys.executable, *command, "--device", device, *option],
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "FC-DenseNet56: 1,376,795 parameters"
    steps = [
        re.fullmatch(r"step +(\d+) +loss (\S+) +pixel accuracy +(\S+)%", s) for s in lines[1:3]
    ]
    assert [int(s[1]) for s in steps] == [1, 2]
    assert all(math.isfinite(float(s[2])) and 0 <= float(s[3]) <= 100 for s in steps)
