"""The comparison of block_reference.py itself: it finds planted errors, and has no kinks."""

from functools import partial

import pytest
import torch

from block_reference import (
    MODES,
    assert_block_matches,
    make_block_problem,
    plain_batch_norm,
    plain_dense_block,
)
from reference import DTYPES

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def without_correction(x, norm, parts=("mean", "var")):
    """The right result; the gradient forgets that these statistics depend on x."""
    if not norm.training:
        return plain_batch_norm(x, norm)
    wide = x if x.dtype == torch.float64 else x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True)
    mean = mean.detach() if "mean" in parts else mean
    var = var.detach() if "var" in parts else var
    plain_batch_norm(x, norm)  # updates the statistics
    xhat = (wide - mean) / (var + norm.eps).sqrt()
    zeros = torch.zeros_like(norm.weight.detach())
    frozen = norm._replace(running_mean=zeros, running_var=zeros + 1)
    frozen = frozen._replace(training=False, eps=1e-30)
    return plain_batch_norm(xhat.to(x.dtype), frozen)


def correction_of_a_frozen_norm(x, norm):
    y = plain_batch_norm(x, norm)
    if norm.training:
        return y
    training = norm._replace(
        training=True, running_mean=None, running_var=None, num_batches_tracked=None
    )
    trained = plain_batch_norm(x, training)
    return y.detach() + trained - trained.detach()


def changed_statistics(change):
    def batch_norm(x, norm):
        before = None if norm.running_var is None else norm.running_var.clone()
        y = plain_batch_norm(x, norm)
        if norm.training:
            change(norm, before, x)
        return y

    return batch_norm


def biased(norm, before, x):
    rows = x.numel() // x.size(1)
    norm.running_var.data.sub_((norm.running_var - (1 - norm.momentum) * before) / rows)


def few_eps(x, norm, of_gradient):
    y = plain_batch_norm(x, norm)
    factor = 1 + max(16 * torch.finfo(x.dtype).eps, 1e-9)
    if not of_gradient:
        return y * factor
    y.register_hook(lambda gradient: gradient * factor)
    return y


PLANTED = {
    "a few eps in the result": partial(few_eps, of_gradient=False),
    "a few eps in the gradient": partial(few_eps, of_gradient=True),
    "no correction": without_correction,
    "no correction for the mean": partial(without_correction, parts=["mean"]),
    "no correction for the variance": partial(without_correction, parts=["var"]),
    "correction of a frozen norm": correction_of_a_frozen_norm,
    "one eps for all": lambda x, norm: plain_batch_norm(x, norm._replace(eps=0.1)),
    "bias forgotten": lambda x, norm: plain_batch_norm(x, norm._replace(bias=0 * norm.bias)),
    "biased variance": changed_statistics(biased),
    "updated twice": changed_statistics(lambda norm, before, x: plain_batch_norm(x, norm)),
    "not counted": changed_statistics(lambda norm, *_: norm.num_batches_tracked.sub_(1)),
}


def planted_problem(dtype):
    """Few rows and a high momentum, so that wrong terms are far larger than 16-bit rounding."""
    return make_block_problem(
        (2, 2, 3), dtype, norms=lambda layer, norm: dict(training=layer != 1, momentum=0.9)
    )


@pytest.mark.parametrize("planted", PLANTED)
@by_dtype
def test_planted_errors_are_found(dtype, planted):
    block = partial(plain_dense_block, batch_norm=PLANTED[planted])
    with pytest.raises(AssertionError, match="error"):
        assert_block_matches(planted_problem(dtype), block)


@pytest.mark.parametrize("norms", MODES)
@by_dtype
def test_problems_have_no_kinks(dtype, norms):
    """The masks of plain torch are those of float64, and most channels have both kinds."""
    for seed in range(8):
        problem = make_block_problem(dtype=dtype, norms=norms, seed=seed)
        masks = []
        for p in (problem.fresh(), problem.to(torch.float64).fresh()):
            found = []

            def batch_norm(x, norm, found=found):
                y = plain_batch_norm(x, norm)
                found.append((y.detach() > 0).transpose(0, 1).flatten(1))
                return y

            plain_dense_block(p.x, p.layers, batch_norm=batch_norm)
            masks.append(torch.cat(found))
        assert torch.equal(*masks)
        opened = masks[0].double().mean(1)
        assert ((opened > 0) & (opened < 1)).double().mean() > 0.5
        assert opened.mean() > 0.3
