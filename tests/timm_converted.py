"""A pytest plugin for timm's own tests: every DenseNet that timm makes is a converted one.

The last lines say how many there were, and how often a dense block ran fused.
"""

import pytest
import timm.models.densenet
import torch

import efficient_densenet
from efficient_densenet import runner

counts = {"converted": 0, "fused": 0}
create, run = timm.models.densenet._create_densenet, runner.run_dense_block


def create_converted(*arguments, **options):
    model = create(*arguments, **options)
    if options.get("feature_cls") == "fx":  # timm has traced it: there are no blocks in it
        return model
    counts["converted"] += 1
    return efficient_densenet.convert(model, strict=True)


def counted_run(*arguments):
    counts["fused"] += 1
    return run(*arguments)


timm.models.densenet._create_densenet = create_converted
runner.run_dense_block = counted_run


# They want two ways through a network, fused and module by module, to agree closer than float32
# rounds: to a relative 1e-5 at any value, and behind 150 layers.
IN_FLOAT64 = ("test_model_forward_intermediates", "test_prune_intermediate_layers_contract")


@pytest.fixture(autouse=True)
def precision(request):
    if request.node.originalname in IN_FLOAT64:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(" ".join(f"{name}={count}" for name, count in counts.items()))
