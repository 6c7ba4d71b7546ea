"""What runs how, and what it keeps: of a model's dense blocks, converted or not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .convert import _ConvertedBlock, _dense_blocks, _why_not_block, _why_not_structure
from .densenet import DenseBlock


class BlockReport(NamedTuple):
    """One dense block; see :func:`explain`.

    Args:
        name: of the block in the model.
        path: what runs.
        kept_bytes: kept for the backward pass of a training step; None where unknown.
        plain_bytes: the same by a block of plain modules.
    """

    name: str
    path: str
    kept_bytes: int | None
    plain_bytes: int | None


@torch.no_grad()
def explain(model: nn.Module, x: Tensor | None = None) -> list[BlockReport]:
    """Prints, per dense block, what runs and what is kept for the backward pass; returns the rows.

    Args:
        model: any module: with our blocks, converted ones, or those that :func:`convert` knows.
        x: an input of the model. It runs once in evaluation mode, so that the shapes of the blocks'
            inputs are known; without it, the structure alone is looked at.

    Returns:
        Per block its name, the path (``"tensor cores"``, ``"matrix products: why"``,
        ``"convolutions: why"``, ``"layer by layer: why"``, ``"library: why"``; without x
        ``"fused"`` in place of the first three), and the bytes kept for the backward pass of a
        training step: those of the block, and those of the same block of plain modules. None where
        unknown.

    Raises:
        ValueError: there is no dense block in the model.
    """
    blocks = {name or type(m).__name__: m for name, m in model.named_modules()}
    known = dict(_dense_blocks(model))
    blocks = {n: m for n, m in blocks.items() if n in known or isinstance(m, DenseBlock)}
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no dense block")
    inputs = {} if x is None else _inputs(model, blocks, x)
    reports = [_report(name, block, inputs.get(name)) for name, block in blocks.items()]
    print(_table(reports))
    return reports


def _report(name: str, block: nn.Module, x: Tensor | None) -> BlockReport:
    if not isinstance(block, (DenseBlock, _ConvertedBlock)):
        return BlockReport(name, f"library: {_why_not_converted(block)}", None, None)
    if x is None:
        if isinstance(block, DenseBlock):
            why = None if block.efficient else "layer by layer: efficient=False"
        else:
            structure = _why_not_structure(block)
            why = structure and f"library: {structure}"
        return BlockReport(name, why or "fused", None, None)
    plan = block.plan(x)
    if plan is None:
        if isinstance(block, DenseBlock):
            return BlockReport(name, f"layer by layer: {block.why_not_fused(x)}", None, None)
        return BlockReport(name, f"library: {_why_not_block(block, x)}", None, None)
    kept, plain = plan.kept_bytes(x.size(0) * math.prod(x.shape[2:]))
    return BlockReport(name, plan.kernel_path(x), kept, plain)


def _why_not_converted(block: nn.Module) -> str:
    return _why_not_structure(block) or "not converted"


def _inputs(model: nn.Module, blocks: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What each block gets, of a forward pass in evaluation mode; modes are restored."""
    inputs: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}

    def remember(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return blocks[name].register_forward_pre_hook(hook)

    handles = [remember(name) for name in blocks]
    try:
        model.eval()
        model(x)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return inputs


def _table(reports: list[BlockReport]) -> str:
    def megabytes(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:,.1f}"

    columns = ["block", "runs on", "kept MB", "plain MB"]
    rows = [[r.name, r.path, megabytes(r.kept_bytes), megabytes(r.plain_bytes)] for r in reports]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
