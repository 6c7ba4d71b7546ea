"""A model whose forward and backward passes are one CUDA graph each.

Launched from Python, a step takes as long as the host needs for its hundreds of launches. A graph
is one launch. ``torch.cuda.make_graphed_callables`` makes graphs as well; it leaves to its caller
what :func:`graphed` does: a graph per shape and mode, statistics and random numbers as they were
before, gradients that the next step does not overwrite, and a model that was changed since.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .arguments import check_module, check_positive
from .lowering import any_global_hook, has_hooks, synchronises
from .remembered import facts_of_modules

_logger = logging.getLogger("efficient_densenet")

_WARM_UP_STEPS = 3  # as torch.cuda.make_graphed_callables has


def graphed(model: nn.Module, max_graphs: int = 8) -> GraphedModel:
    """The model, called by CUDA graphs: one for forward, one for backward.

    The first call with new shapes, strides, dtypes, modes or autocast settings runs a few steps and
    captures the next one; it leaves running statistics, random numbers and gradients as one
    ordinary step would. Later calls copy their arguments to where the graph reads them and replay
    it. Results and gradients are copies, which later calls do not overwrite. Parameters stay those
    of ``model``: optimizers and checkpoints see no difference, and in-place changes of them count.

    Some calls run without a graph, and the logger ``efficient_densenet`` says why, once per reason:
    arguments other than CUDA tensors, hooks on modules, synchronised batch norms, whatever cannot
    be captured (a value that is read on the host, say), and more than ``max_graphs`` graphs. Each
    graph keeps the memory of a step. Classes, modes, hooks, numbers of norms and rates of dropout
    are compared in every call; other attributes of modules are those of the capture.

    Args:
        model: on a CUDA device. Our networks, converted ones, or any other module whose work is
            that of the GPU alone. For several processes, DistributedDataParallel goes around the
            result, not inside.
        max_graphs: that are kept, > 0. Those of a model that got other parameters are dropped.

    Returns:
        A module that has ``model`` as its attribute ``module``. Copies and pickles have no graphs.
        Once differentiable; the backward pass of a call has to come before the next call with the
        same shapes.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_module("model", model)
    check_positive(max_graphs=max_graphs)
    return GraphedModel(model, max_graphs)


class _NotCaptured(Exception):
    """The message says why."""


class GraphedModel(nn.Module):
    """See :func:`graphed`."""

    def __init__(self, module: nn.Module, max_graphs: int) -> None:
        super().__init__()
        self.module = module
        self._max_graphs = max_graphs
        self._kept = _Kept()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if _somebody_records():
            return self.module(*arguments, **keywords)
        try:
            return self._graph_for(arguments, keywords)(arguments)
        except _NotCaptured as reason:
            self._kept.log(str(reason))
            return self.module(*arguments, **keywords)

    def _graph_for(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> _Graph:
        _check_arguments(arguments, keywords)
        if getattr(self, "_is_replica", False):  # which shares what is kept with the others
            raise _NotCaptured("the model is a replica of DataParallel")
        tensors = _tensors_of(self.module)
        self._kept.drop_unless((list(map(id, tensors)), list(map(Tensor.data_ptr, tensors))))
        facts = _facts(self.module, arguments, tensors)
        found = self._kept.find(facts)
        if found is None:
            found = self._capture(arguments, tensors)
            self._kept.graphs.append((facts, found))
        if isinstance(found, str):
            raise _NotCaptured(found)
        return found

    def _capture(self, arguments: Sequence[Tensor], tensors: list[Tensor]) -> _Graph | str:
        """Or why there is none, which holds for all calls with the same facts."""
        _check_model(self.module, tensors, arguments[0].device)
        if len(self._kept.graphs) >= self._max_graphs:
            raise _NotCaptured(f"max_graphs={self._max_graphs} are there")
        try:
            with torch.cuda.device(arguments[0].device), _as_it_was(tensors):
                return _Graph(self.module, arguments, tensors)
        except _NotCaptured as reason:
            return str(reason)
        except Exception as error:  # whatever the model does that cannot be captured
            text = " ".join(str(error.__context__ or error).split()).partition(". ")[0]
            return f"the model cannot be captured: {type(error).__name__}: {text}"


class _Kept:
    """Graphs, or why there are none, with the facts that they follow from. Copies are empty."""

    def __init__(self) -> None:
        self.graphs: list[tuple[object, _Graph | str]] = []
        self._tensors: object = None
        self._logged: set[str] = set()

    def find(self, facts: object) -> _Graph | str | None:
        return next((found for known, found in self.graphs if known == facts), None)

    def drop_unless(self, tensors: object) -> None:
        """Graphs read and write the tensors that the model had."""
        if tensors != self._tensors:
            self.graphs.clear()
            self._tensors = tensors

    def log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _logger.warning("graphed: a call runs without a CUDA graph: %s", reason)

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


# ------------------------------------------------------------------------------------------------
# What a graph follows from


def _somebody_records() -> bool:
    """A compiler, a tracer or another capture, or somebody who keeps what autograd saves."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _check_arguments(arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
    if keywords or not arguments:
        raise _NotCaptured("arguments: expected tensors by position")
    for argument in arguments:
        if type(argument) not in (Tensor, nn.Parameter):
            kind = type(argument).__name__
            raise _NotCaptured(f"arguments: expected CUDA tensors, got {kind}")
        if not argument.is_cuda:
            raise _NotCaptured(f"arguments: expected CUDA tensors, got one on {argument.device}")


def _check_model(model: nn.Module, tensors: list[Tensor], device: torch.device) -> None:
    if any_global_hook() or any(map(has_hooks, model.modules())):
        raise _NotCaptured("a module has hooks")
    if any(synchronises(module) for module in model.modules()):
        raise _NotCaptured("batch norms are synchronised over processes")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise _NotCaptured("DistributedDataParallel goes around the graphed model, not inside")
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        raise _NotCaptured("parameters or buffers are subclasses of Tensor")
    if any(tensor.device != device for tensor in tensors):
        raise _NotCaptured("the model is not on the device of its first argument")


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; without the names and sets of ``model.parameters()``."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    for module in modules:  # which grows
        if module is not None:
            found += module._parameters.values()
            found += module._buffers.values()
            modules += module._modules.values()
    return [tensor for tensor in found if tensor is not None]


def _facts(model: nn.Module, arguments: Sequence[Tensor], tensors: list[Tensor]) -> object:
    return (
        [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in arguments],
        [tensor.requires_grad for tensor in tensors],
        facts_of_modules([model]),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
        (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        torch.cuda.current_stream(arguments[0].device).cuda_stream,
    )


@contextlib.contextmanager
def _as_it_was(tensors: list[Tensor]) -> Iterator[None]:
    """Buffers and random numbers, which the warm-up moves."""
    buffers = list(dict.fromkeys(t for t in tensors if not isinstance(t, nn.Parameter)))
    saved, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


# ------------------------------------------------------------------------------------------------
# Graphs


class _Graph:
    """Both passes of a model for arguments of these shapes, and the memory that they work in."""

    def __init__(
        self, model: nn.Module, arguments: Sequence[Tensor], tensors: list[Tensor]
    ) -> None:
        self.tensors = tensors  # alive, so that nobody else gets their addresses
        self.inputs = [_leaf(x.detach().clone(), x) for x in arguments]
        named = dict(model.named_parameters())
        self.parameters = [p for p in named.values() if p.requires_grad]
        # Somebody may still hold what autograd has recorded of the parameters themselves, on
        # another stream; a capture cannot be part of that.
        leaves = {name: _leaf(p.detach(), p) for name, p in named.items()}
        self._wanted = [t for t in [*self.inputs, *leaves.values()] if t.requires_grad]
        call = functools.partial(functional_call, model, leaves, tuple(self.inputs))
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.calls = 0
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with _autocast_without_cache(), torch.cuda.stream(stream), _no_synchronisation():
            for _ in range(_WARM_UP_STEPS):
                self._differentiate(_outputs_of(call())[0])
        torch.cuda.synchronize()
        settings: dict[str, Any] = {
            "pool": torch.cuda.graph_pool_handle(),
            "stream": stream,
            "capture_error_mode": "thread_local",  # threads of data loaders may go on
        }
        with _autocast_without_cache(), torch.cuda.graph(self._forward, **settings):
            result = call()
        outputs, self._structure = _outputs_of(result)
        self.is_differentiable = [y.requires_grad for y in outputs]
        self.gradients: list[Tensor | None] = []
        self.grad_outputs = [torch.zeros_like(y) for y in outputs if y.requires_grad]
        if self.grad_outputs:
            torch.cuda.synchronize()
            with torch.cuda.graph(self._backward, **settings):
                self.gradients = self._differentiate(outputs, self.grad_outputs)
        # What autograd has recorded belongs to the stream of the capture.
        self.outputs = [y.detach() for y in outputs]

    def _differentiate(
        self, outputs: Sequence[Tensor], grad_outputs: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """Of the inputs and parameters that want one, in their order."""
        differentiable = [y for y in outputs if y.requires_grad]
        if not differentiable:
            return []
        if grad_outputs is None:
            grad_outputs = [torch.zeros_like(y) for y in differentiable]
        return list(
            torch.autograd.grad(differentiable, self._wanted, grad_outputs, allow_unused=True)
        )

    def __call__(self, arguments: Sequence[Tensor]) -> Any:
        results = _Replay.apply(self, *arguments, *self.parameters)
        return tree_unflatten(results, self._structure)

    def replay_forward(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        for to, value in zip(self.inputs, arguments, strict=False):
            to.detach().copy_(value)
        self._forward.replay()
        self.calls += 1
        return [y.clone() for y in self.outputs]

    def replay_backward(self, grad_outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of inputs and parameters, None where there is none."""
        for to, value in zip(self.grad_outputs, grad_outputs, strict=True):
            to.copy_(value)
        self._backward.replay()
        present = [gradient for gradient in self.gradients if gradient is not None]
        copies = iter(torch._foreach_mul(present, 1) if present else [])
        fresh = iter([None if g is None else next(copies) for g in self.gradients])
        surface = [*self.inputs, *self.parameters]
        return [next(fresh) if tensor.requires_grad else None for tensor in surface]


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.requires_grad_(like.requires_grad)


def _outputs_of(result: Any) -> tuple[list[Tensor], TreeSpec]:
    outputs, structure = tree_flatten(result)
    if not outputs or any(type(y) is not Tensor for y in outputs):
        raise _NotCaptured("the model returns something other than tensors")
    return outputs, structure


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Finds out here, where it does no harm, what would break a capture.

    Raises:
        _NotCaptured: something waited for the GPU.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        caught.clear()  # that this is a prototype
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            raise _NotCaptured("the model cannot be captured: it waits for the GPU")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _autocast_without_cache() -> torch.autocast:
    """That of the caller. Casts that a cache keeps would be made once, outside of the graph."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        outputs = graph.replay_forward(tensors)
        ctx.call = graph.calls
        known = zip(outputs, graph.is_differentiable, strict=True)
        ctx.mark_non_differentiable(*[y for y, differentiable in known if not differentiable])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        if ctx.call != graph.calls:
            raise RuntimeError(
                "graphed: a later call with the same shapes has overwritten what this backward "
                "pass needs; call backward before the next forward pass, or use the model itself"
            )
        known = zip(grad_outputs, graph.is_differentiable, strict=True)
        return None, *graph.replay_backward([g for g, differentiable in known if differentiable])
