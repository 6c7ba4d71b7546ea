"""Gradients of many parameters in one memory, cut into tensors that lie as the parameters do."""

import math

import pytest
import torch

import efficient_densenet  # noqa: F401  registers the operator

cut_gradients = torch.ops.efficient_densenet.cut_gradients
OFFSET = 3  # of the first gradient in memory
SHAPES = [(4, 3, 1, 1), (4, 6, 1, 1), (2, 4, 3, 5), (0, 4, 3, 3), (1, 1, 1, 1)]


def parameters(layout, device):
    made = []
    for shape in SHAPES:
        parameter = torch.empty(shape, device=device)
        if layout == "channels-last":
            parameter = parameter.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            parameter = torch.empty(shape[::-1], device=device).permute(3, 2, 1, 0)
        elif layout == "gaps":
            parameter = torch.empty(*shape, 2, device=device)[..., 0]
        elif layout == "expanded":
            parameter = torch.empty(shape[0], 1, *shape[2:], device=device).expand(shape)
        made.append(parameter)
    return made


def cut(packed, like, channels_last=False):
    lists = [], [], []
    for parameter in like:
        packed_like = torch.empty(parameter.shape)
        if channels_last:
            packed_like = packed_like.contiguous(memory_format=torch.channels_last)
        numbers = parameter.shape, packed_like.stride(), parameter.stride()
        for flat, more in zip(lists, numbers, strict=True):
            flat.extend(more)
    return cut_gradients(packed, OFFSET, 4, *lists)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed_channels_last", [False, True])
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels-last", "transposed", "gaps", "expanded"]
)
def test_values_and_strides(device, layout, packed_channels_last, compiled):
    like = parameters(layout, device)
    count = OFFSET + sum(map(torch.Tensor.numel, like))
    packed = torch.randn(count, device=device)[OFFSET:]
    torch.compiler.reset()
    function = torch.compile(cut, backend="aot_eager", fullgraph=True) if compiled else cut
    found = function(packed, like, packed_channels_last)
    for part, piece, parameter in zip(
        torch.split(packed, [p.numel() for p in like]), found, like, strict=True
    ):
        n, channels, *spatial = parameter.shape
        expected = part.view(parameter.shape)
        if packed_channels_last:
            expected = part.view(n, *spatial, channels).movedim(-1, 1)
        assert torch.equal(piece, expected)
        if layout != "expanded":  # a gradient has a place for every element
            assert piece.stride() == parameter.stride()
        fits = layout == ("channels-last" if packed_channels_last else "contiguous")
        if fits and not compiled and piece.numel():
            assert piece.data_ptr() == part.data_ptr()


# Some releases of torch print the second message and raise the first.
OUT_OF_BOUNDS = "as_strided failed|out of bounds"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, [2, 2], [2, 1], [2, 1]), "dims: expected a divisor"),
        ((-1, [2, 2], [2, 1], [2, 1]), "dims: expected a divisor"),
        ((4, [2, 2], [2, 1], [2, 1]), "dims: expected a divisor"),
        ((2, [2, 2], [2, 1], [2]), "strides: expected as many as sizes, 2, got 1"),
        ((2, [2, 2], [2], [2, 1]), "strides: expected as many as sizes"),
        ((2, [3, 3], [3, 1], [3, 1]), OUT_OF_BOUNDS),
        ((2, [2, 2, 2, 3], [2, 1, 3, 1], [2, 1, 3, 1]), OUT_OF_BOUNDS),
        ((2, [2, 2], [100, 1], [1, 2]), OUT_OF_BOUNDS),
        ((2, [-1, 2], [2, 1], [2, 1]), "as_strided failed"),
        ((2, [2**40, 2**40], [1, 1], [1, 1]), "as_strided failed"),
        ((2, [2, 2], [-2, 1], [-2, 1]), "as_strided failed"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(RuntimeError, match=text):
        cut_gradients(torch.zeros(8), 0, *arguments)


def test_they_are_views_of_the_same_memory(device):
    packed = torch.zeros(24, device=device)
    pieces = cut_gradients(packed, 0, 1, [8, 16], [1, 1], [1, 1])
    pieces[1].fill_(1)
    assert packed.sum() == 16 and math.prod(pieces[1].shape) == 16
