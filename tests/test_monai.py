"""MONAI end to end: a converted network in its loaders, trainer, maps and windows against its own.

Small volumes on the CPU. Types and metadata of results are those of the unconverted network.
"""

import copy

import pytest
import torch
from torch import nn

from efficient_densenet import convert, explain
from test_convert import library, monai

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def networks(dims=3):
    torch.manual_seed(0)
    plain = monai(dims).double()
    return plain, convert(copy.deepcopy(plain), strict=True)


def meta_tensors(count, size=33):
    """Volumes with an affine matrix and a name, as MONAI's readers give them."""
    data = library("monai.data")
    generator = torch.Generator().manual_seed(1)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    return [
        data.MetaTensor(
            torch.randn(3, size, size, size, generator=generator, dtype=torch.float64),
            affine=affine * (i + 1),
            meta={"filename_or_obj": f"volume{i}.nii"},
        )
        for i in range(count)
    ]


def items(count):
    return [{"image": x, "label": torch.tensor(i % 5)} for i, x in enumerate(meta_tensors(count))]


def assert_same_tensor(found, expected):
    """Values, class and metadata."""
    assert type(found) is type(expected)
    plain = (torch.as_tensor(t).as_subclass(torch.Tensor) for t in (found, expected))
    torch.testing.assert_close(*plain)
    if hasattr(expected, "meta"):
        assert found.meta.keys() == expected.meta.keys()
        assert found.is_batch == expected.is_batch
        torch.testing.assert_close(found.affine, expected.affine)


def assert_same_state(model, plain):
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_meta_tensors(training, grad):
    batch = library("monai.data").list_data_collate(meta_tensors(2))
    results = []
    for model in networks():
        with torch.set_grad_enabled(grad):
            results.append(model.train(training)(batch))
            results.append(model.features(batch))
    assert_same_tensor(results[2], results[0])
    assert_same_tensor(results[3], results[1])


@pytest.mark.parametrize("dataset", ["Dataset", "CacheDataset"])
def test_loaders(dataset):
    data, transforms = library("monai.data"), library("monai.transforms")
    transform = transforms.Compose(
        [
            transforms.ScaleIntensityd(keys="image"),
            transforms.RandFlipd(keys="image", prob=0.5, spatial_axis=0),
        ]
    )
    transform.set_random_state(0)
    options = {"progress": False} if dataset == "CacheDataset" else {}
    loader = data.DataLoader(
        getattr(data, dataset)(items(4), transform, **options), batch_size=2, num_workers=0
    )
    batches = [(batch["image"].double(), batch["label"]) for batch in loader]
    assert all(type(image) is data.MetaTensor for image, _ in batches)
    plain, model = networks()
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-2)
        for image, label in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(image), label).backward()
            optimizer.step()
    assert_same_state(model, plain)


def test_supervised_trainer():
    pytest.importorskip("ignite")
    data, engines, inferers = map(library, ("monai.data", "monai.engines", "monai.inferers"))
    plain, model = networks()
    for each in (plain, model):
        loader = data.DataLoader(data.Dataset(items(4)), batch_size=2)
        trainer = engines.SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=loader,
            network=each,
            optimizer=torch.optim.SGD(each.parameters(), lr=1e-2),
            loss_function=nn.CrossEntropyLoss(),
            inferer=inferers.SimpleInferer(),
        )
        trainer.run()
    assert_same_state(model, plain)


@pytest.mark.parametrize(
    "layer", ["features.denseblock2", "features.transition1", "class_layers.relu"]
)
@pytest.mark.parametrize("method", ["GradCAM", "GradCAMpp"])
def test_class_activation_maps(layer, method):
    visualize = library("monai.visualize")
    maps = []
    for model in networks():
        x = meta_tensors(1)[0].as_tensor()[None]
        maps.append(getattr(visualize, method)(nn_module=model.eval(), target_layers=layer)(x=x))
    assert_same_tensor(maps[1], maps[0])


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_sliding_windows(mode):
    infer = library("monai.inferers").sliding_window_inference
    data = library("monai.data")
    volume = data.list_data_collate(meta_tensors(1, size=48))
    results = []
    for model in networks():
        features = model.eval().features

        def scores(x, features=features):
            return nn.functional.interpolate(features(x), x.shape[2:])

        with torch.no_grad():
            results.append(infer(volume, (33, 33, 33), 2, scores, overlap=0.25, mode=mode))
    assert_same_tensor(results[1], results[0])


def test_all_blocks_run_fused():
    _, model = networks()
    reports = explain(model, meta_tensors(1)[0][None])
    assert all(report.path.startswith("matrix products") for report in reports)
    assert all(report.kept_bytes < report.plain_bytes for report in reports)
