"""What is not converted, or not fused: changed layers, other norms and activations."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from efficient_densenet import convert, explain
from test_convert import assert_same, blocks_of, build, images, monai, timm, torchvision, train

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(change):
    model = build("torchvision")
    change(model.features.denseblock2.denselayer1)
    return model


CHANGES = {
    "has hooks": lambda la: la.conv1.register_forward_hook(lambda *a: None),
    "prune": lambda la: prune.l1_unstructured(la.conv2, "weight", amount=0.5),
    "Parametrized": lambda la: parametrize.register_parametrization(
        la.conv1, "weight", nn.Identity()
    ),
    "GroupNorm": lambda la: setattr(la, "norm1", nn.GroupNorm(1, 8).double()),
    "SiLU": lambda la: setattr(la, "relu2", nn.SiLU()),
    "groups or a bias": lambda la: setattr(
        la, "conv1", nn.Conv2d(la.conv1.in_channels, 16, 1).double()
    ),
    "has a forward of its own": lambda la: setattr(la, "forward", type(la).forward.__get__(la)),
}


@pytest.mark.parametrize("why", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_layer_runs_as_it_did(why, when):
    if when == "before":
        model = changed(CHANGES[why])
        copyable = why not in ("prune", "has a forward of its own")
        plain = copy.deepcopy(model) if copyable else None
        convert(model)
    else:
        model = convert(build("torchvision"))
        CHANGES[why](model.features.denseblock2.denselayer1)
        plain = None
    paths = blocks_of(model)
    # Whatever a convolution is, a known norm in front of it runs in linear memory.
    instead = "layer by layer: " if why == "groups or a bias" else "library: "
    assert paths["features.denseblock2"].startswith(instead)
    if why != "prune":
        assert why in paths["features.denseblock2"]
    others = [path for name, path in paths.items() if name != "features.denseblock2"]
    assert all(path.startswith("matrix products") for path in others)
    x = images("torchvision")
    if plain is not None:
        assert_same(train(model, x, 2), train(plain, x, 2))
    else:
        train(model, x, 1)


def test_hooks_see_what_the_library_shows():
    model, x, seen = convert(build("torchvision")), images("torchvision"), []
    model.features.denseblock1.denselayer2.conv1.register_forward_hook(
        lambda module, arguments, y: seen.append(y.shape[1])
    )
    model.features.denseblock3.register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    model(x)
    assert seen == [16, model.features.norm5.num_features]


def with_dropout(dropout):
    model = monai(dropout_prob=0.2)
    for module in model.features.modules():
        if hasattr(module, "dropout"):
            module.dropout = dropout
    return model


@pytest.mark.parametrize(
    "build_model, why",
    [
        (lambda: monai(norm="instance"), "InstanceNorm"),
        (lambda: monai(norm=("group", {"num_groups": 1})), "GroupNorm"),
        (lambda: monai(act="prelu"), "PReLU"),
        (lambda: with_dropout(nn.AlphaDropout(0.2)), "AlphaDropout"),
        (lambda: with_dropout(nn.Dropout3d(0.2)), "Dropout3d"),  # of images: of something else
        (lambda: monai(dropout_prob=1.0), "everything"),
        (lambda: torchvision(drop_rate=1), "everything"),
        (lambda: timm(act_layer="silu"), "SiLU"),
        (lambda: timm(norm_layer="groupnorm1"), "GroupNorm"),
    ],
    ids=["instance", "group", "prelu", "alpha", "dropout3d", "p=1", "rate 1", "silu", "timm group"],
)
def test_other_norms_and_activations(build_model, why, caplog):
    torch.manual_seed(0)
    model = build_model().double()
    x = images("torchvision")
    expected = train(copy.deepcopy(model), x, 2)
    with caplog.at_level(logging.INFO, "efficient_densenet"):
        convert(model)
    assert sum(why in record.getMessage() for record in caplog.records) == len(explain(model))
    assert all(why in report.path for report in explain(model))
    assert_same(train(model, x, 2), expected, limit=0)
    with pytest.raises(ValueError, match="cannot be converted wholly"):
        convert(build_model(), strict=True)


def test_strict_changes_nothing():
    model = changed(CHANGES["SiLU"])
    with pytest.raises(ValueError, match="denseblock2: denselayer1: activation is SiLU"):
        convert(model, strict=True)
    assert type(model.features) is nn.Sequential


def test_errors():
    with pytest.raises(ValueError, match="no dense block"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="no dense block"):
        explain(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="recompute"):
        convert(build("torchvision"), recompute="nothing")


def test_one_line_per_block_is_logged(caplog):
    with caplog.at_level(logging.INFO, "efficient_densenet"):
        convert(build("torchvision"))
    assert [record.getMessage() for record in caplog.records] == [
        f"features.denseblock{i}: converted, {n} layers" for i, n in ((1, 2), (2, 3), (3, 2))
    ]
