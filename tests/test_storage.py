"""The shared storage, and how results on it are recomputed for the consumer's backward."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from efficient_densenet import SharedStorage, concat_bn_relu, recompute_in_backward
from reference import make_problem, plain_concat_bn_relu, requires_cuda, run


def chain(features, convs, storage):
    """A small dense block: each convolution reads all features and adds one."""
    features = list(features)
    for conv in convs:
        if storage is None:
            y = plain_concat_bn_relu(features, None, None, training=True)
            features.append(conv(y))
        else:
            y = concat_bn_relu(features, None, None, training=True, storage=storage)
            with recompute_in_backward(y):
                features.append(conv(y))
    return features[-1]


def make_chain(device, dtype=torch.float64, layers=4, channels=3, size=6):
    x = torch.randn(2, channels, size, size, dtype=dtype, device=device, requires_grad=True)
    convs = nn.ModuleList(
        nn.Conv2d(channels + 2 * i, 2, 1, dtype=dtype, device=device) for i in range(layers)
    )
    return x, convs


def gradients(x, convs, storage):
    loss = chain([x], convs, storage).square().sum()
    return torch.autograd.grad(loss, [x, *convs.parameters()])


def test_recomputed_for_every_consumer(device):
    x, convs = make_chain(device)
    for ours, plain in zip(
        gradients(x, convs, SharedStorage()), gradients(x, convs, None), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_results_share_memory(device):
    x, _ = make_chain(device)
    storage = SharedStorage()
    ys = [concat_bn_relu([x], None, None, training=True, storage=storage) for _ in range(3)]
    assert len({y.data_ptr() for y in ys}) == 1
    assert storage.nbytes == x.numel() * x.element_size()


def test_memory_kept_is_linear_in_depth(device):
    """Unique bytes kept for backward, as memory tools see them, for 4, 8 and 12 layers."""

    def kept(layers, storage):
        x, convs = make_chain(device, layers=layers, size=16)
        seen = {}

        def pack(tensor):
            memory = tensor.untyped_storage()
            seen[memory.data_ptr()] = memory.nbytes()
            return tensor

        parameters = sum(p.numel() * 8 for p in convs.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chain([x], convs, storage)
        return sum(seen.values()) - parameters

    ours = [kept(layers, SharedStorage()) for layers in (4, 8, 12)]
    plain = [kept(layers, None) for layers in (4, 8, 12)]
    per_channel = 8 * 2 * 50 * 12  # mean and var, a little more with every layer
    assert abs((ours[2] - ours[1]) - (ours[1] - ours[0])) <= per_channel
    assert (plain[2] - plain[1]) - (plain[1] - plain[0]) > 10 * per_channel
    assert ours[2] < plain[2] / 4


@pytest.mark.parametrize("frozen", ["nothing", "features", "everything but the convolution"])
def test_convolution_weight_gets_its_gradient(device, frozen):
    x, convs = make_chain(device, layers=1)
    x = x.detach().requires_grad_(frozen == "nothing")
    weight = torch.ones(3, dtype=torch.float64, device=device).requires_grad_(frozen == "features")
    storage, (conv,) = SharedStorage(), convs

    def weight_gradient(operator, storage_argument):
        y = operator([x], None, None, weight, None, training=True, **storage_argument)
        if not storage_argument:
            z = conv(y)
        else:
            with recompute_in_backward(y):
                z = conv(y)
            storage.allocate([10**4], [1], like=x).fill_(float("nan"))
        return torch.autograd.grad(z.square().sum(), conv.weight)[0]

    ours = weight_gradient(concat_bn_relu, {"storage": storage})
    torch.testing.assert_close(ours, weight_gradient(plain_concat_bn_relu, {}))


def test_consumers_that_keep_a_view(device):
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    linear = nn.Linear(8, 5, dtype=torch.float64, device=device)
    storage = SharedStorage()

    def loss(y):
        return linear(y[:, 1:3].flatten(1)).square().sum() + y.square().sum()

    y = concat_bn_relu([x], None, None, training=True, storage=storage)
    with recompute_in_backward(y):
        ours = loss(y)
    storage.allocate([10**4], [1], like=x).fill_(float("nan"))
    plain = loss(plain_concat_bn_relu([x], None, None, training=True))
    inputs = [x, *linear.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


OVERWRITTEN = "overwritten before its consumer was done"
MODIFIED = "has been modified by an inplace operation"


def test_plain_consumer_of_overwritten_storage_raises(device):
    x, convs = make_chain(device, layers=1)
    storage = SharedStorage()
    z = convs[0](concat_bn_relu([x], None, None, training=True, storage=storage))
    concat_bn_relu([x], None, None, training=True, storage=storage)
    with pytest.raises(RuntimeError, match=MODIFIED):
        z.sum().backward()


def test_plain_consumer_of_intact_storage_works(device):
    x, convs = make_chain(device, layers=1)
    inputs = [x, *convs.parameters()]
    z = convs[0](concat_bn_relu([x], None, None, training=True, storage=SharedStorage()))
    plain = convs[0](plain_concat_bn_relu([x], None, None, training=True))
    for a, b in zip(
        torch.autograd.grad(z.square().sum(), inputs),
        torch.autograd.grad(plain.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "changed", ["convolution weight", "feature", "batch norm weight", "result"]
)
def test_change_between_forward_and_backward_raises(device, changed):
    x, convs = make_chain(device, layers=1)
    feature = x.clone()
    weight = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    storage = SharedStorage()
    y = concat_bn_relu([feature], None, None, weight, training=True, storage=storage)
    with recompute_in_backward(y):
        z = convs[0](y)
    with torch.no_grad():
        {
            "convolution weight": convs[0].weight,
            "feature": feature,
            "batch norm weight": weight,
            "result": y,
        }[changed].mul_(2)
    if changed == "result":  # the storage was overwritten, but is recomputed
        z.sum().backward()
    else:
        with pytest.raises(RuntimeError, match=MODIFIED):
            z.sum().backward()


def test_result_changed_before_its_consumer_raises(device):
    x, convs = make_chain(device, layers=1)
    y = concat_bn_relu([x], None, None, training=True, storage=SharedStorage())
    with pytest.raises(RuntimeError, match=OVERWRITTEN), recompute_in_backward(y):
        convs[0](y.mul_(2))


@pytest.mark.parametrize("when", ["before the context", "in the context"])
def test_storage_overwritten_before_its_consumer_is_done_raises(device, when):
    x, convs = make_chain(device, layers=1)
    storage = SharedStorage()

    def overwrite(now):
        if now == when:
            concat_bn_relu([x], None, None, training=True, storage=storage)

    y = concat_bn_relu([x], None, None, training=True, storage=storage)
    overwrite("before the context")
    with pytest.raises(RuntimeError, match=OVERWRITTEN), recompute_in_backward(y):
        overwrite("in the context")
        convs[0](y)


def test_context_wants_a_result():
    wrong = pytest.raises(TypeError, match="y: expected a result of concat_bn_relu")
    with wrong, recompute_in_backward(torch.ones(2)):
        pass


def test_save_on_cpu_sees_what_is_kept(device):
    x, convs = make_chain(device)
    with torch.autograd.graph.save_on_cpu():
        ours = gradients(x, convs, SharedStorage())
    for a, b in zip(ours, gradients(x, convs, None), strict=True):
        torch.testing.assert_close(a, b)


def test_grows_and_clears(device):
    storage = SharedStorage()
    small, large = (torch.randn(n, 3, device=device, requires_grad=True) for n in (4, 40))
    first = concat_bn_relu([small], None, None, training=True, storage=storage)
    kept = first.clone()
    concat_bn_relu([large], None, None, training=True, storage=storage)
    assert storage.nbytes == large.numel() * 4
    assert torch.equal(first, kept)  # its own buffer was left, not overwritten
    concat_bn_relu([small], None, None, training=True, storage=storage)
    assert storage.nbytes == large.numel() * 4
    storage.clear()
    assert storage.nbytes == 0


def test_copies_and_pickles_as_empty(device):
    storage = SharedStorage()
    x = torch.randn(4, 3, device=device, requires_grad=True)
    concat_bn_relu([x], None, None, training=True, storage=storage)
    assert storage.nbytes > 0
    for other in (copy.copy(storage), copy.deepcopy(storage), pickle.loads(pickle.dumps(storage))):
        assert isinstance(other, SharedStorage) and other.nbytes == 0


def test_memory_goes_away_with_the_storage(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    gc.collect()  # what other tests have left
    before = torch.cuda.memory_allocated()
    storage = SharedStorage()
    concat_bn_relu([x], None, None, training=True, storage=storage)
    if device == "cpu":
        gone = weakref.ref(storage._buffer(0, x.device))
        assert gone() is not None
    del storage
    gc.collect()
    assert gone() is None if device == "cpu" else torch.cuda.memory_allocated() == before


def test_steps_leave_nothing_behind(device):
    x, convs = make_chain(device)
    storage = SharedStorage()

    def tensors():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    counts = []
    for _ in range(4):
        gradients(x, convs, storage)
        concat_bn_relu([x], None, None, training=True, storage=storage)  # no backward at all
        counts.append(tensors())
    assert counts[1] == counts[3]


def test_threads(device):
    """Each thread as in nn.DataParallel: its own stream (on the CPU: itself), one storage."""
    storage = SharedStorage()
    chains = [make_chain(device, layers=6, size=20) for _ in range(4)]
    expected = [gradients(x, convs, None) for x, convs in chains]
    found = [[] for _ in chains]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in chains]
    if device == "cuda":
        torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(streams[i]):
            for _ in range(5):
                found[i].append(gradients(*chains[i], storage))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chains))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if device == "cuda":
        torch.cuda.synchronize()
    for results, exact in zip(found, expected, strict=True):
        assert len(results) == 5
        for result in results:
            for a, b in zip(result, exact, strict=True):
                torch.testing.assert_close(a, b)


def test_meta_tensors_leave_no_trace():
    storage = SharedStorage()
    x = torch.randn(4, 3, device="meta", requires_grad=True)
    y = concat_bn_relu([x], None, None, training=True, storage=storage)
    assert y.shape == (4, 3) and y.is_meta and storage.nbytes == 0


def test_fake_tensors_leave_no_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    storage = SharedStorage()
    with FakeTensorMode():
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        conv = nn.Conv2d(3, 2, 1)
        y = concat_bn_relu([x], None, None, training=True, storage=storage)
        with recompute_in_backward(y):
            conv(y).sum().backward()
        assert x.grad.shape == x.shape
    assert storage.nbytes == 0


@requires_cuda
def test_cuda_graph_owns_its_memory():
    x, convs = make_chain("cuda", torch.float32)
    static_x, storage = x.detach().clone(), SharedStorage()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(static_x.requires_grad_(), convs, storage)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(static_x, convs, storage)

    larger = torch.randn(64, 3, 32, 32, device="cuda", requires_grad=True)
    gradients(larger, convs, storage)
    storage.clear()
    junk = [torch.full((10**6,), float("nan"), device="cuda") for _ in range(4)]
    with torch.no_grad():
        static_x.copy_(torch.randn_like(static_x))
    graph.replay()
    torch.cuda.synchronize()
    del junk
    for a, b in zip(captured, gradients(static_x, convs, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@requires_cuda
def test_out_of_memory_changes_nothing():
    x = torch.zeros(1, device="cuda").expand(2**20, 2**20)  # a result of 4 TB
    mean, var = torch.zeros(2**20, device="cuda"), torch.ones(2**20, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        concat_bn_relu([x], mean, var, training=True)
    assert not mean.any() and (var == 1).all()
    problem = make_problem([3], (4, 5), torch.float32, "cuda")
    run(concat_bn_relu, problem)
