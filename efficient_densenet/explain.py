"""What runs how, and what it keeps: of a model's dense blocks, converted or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_module
from .block_spec import BlockSpec, count_rows
from .convert import why_not_converted, why_nothing_to_convert
from .dense_block import kernel_path
from .libraries import find_blocks, library_of
from .lowering import Refusal, lower, why_not_layers
from .runner import Block, lower_block


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
        unknown. Of a block that is not converted, they are those that it would keep converted.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no dense block in the model.
    """
    check_module("model", model)
    own = {n or type(m).__name__: m for n, m in model.named_modules() if isinstance(m, Block)}
    blocks = own | dict(find_blocks(model))
    if not blocks:
        raise ValueError(why_nothing_to_convert(model))
    inputs = {} if x is None else _inputs(model, blocks, x)
    reports = [_report(name, block, inputs.get(name)) for name, block in blocks.items()]
    print(_table(reports))
    return reports


def _report(name: str, block: nn.Module, x: Tensor | None) -> BlockReport:
    if not isinstance(block, Block):
        return _report_unconverted(name, block, x)
    if x is None:
        why = block.why_not_itself() or why_not_layers(block.layer_parts())
        return BlockReport(name, f"{block.instead()}: {why}" if why else "fused", None, None)
    lowered, _ = lower_block(block, x)
    return _with_bytes(name, block.kernel_path(x), lowered, x)


def _report_unconverted(name: str, block: nn.Module, x: Tensor | None) -> BlockReport:
    """What it is now, and what conversion would save."""
    why = why_not_converted(block)
    if why is not None or x is None:
        return BlockReport(name, f"library: {why or 'not converted'}", None, None)
    library = library_of(block)
    assert library is not None
    layers = {layer: library.read(module) for layer, module in block.named_children()}
    lowered = lower(layers, "bottleneck", x)
    if isinstance(lowered, Refusal):
        return BlockReport(
            name, f"library: not converted; would not be fused: {lowered.why}", None, None
        )
    path = f"library: not converted; would run on {kernel_path(lowered, x)}"
    return _with_bytes(name, path, lowered, x)


def _with_bytes(name: str, path: str, lowered: BlockSpec | Refusal, x: Tensor) -> BlockReport:
    if isinstance(lowered, Refusal):
        return BlockReport(name, path, None, None)
    return BlockReport(name, path, *lowered.kept_bytes(count_rows(x.shape)))


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
