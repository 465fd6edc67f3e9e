"""Features at points beside dense maps, upsampled and indexed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from networks import UNET_PATCH, unet
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d, interpolate
from weights import STRIDES, TINY

from stunet.errors import FeatureError
from stunet.network import build_stunet
from stunet.ranking import (
    CaseFeatures,
    CasePoints,
    assign_windows,
    decoder_stages,
    draw_points,
    extract_case,
    finest_head,
    read_points,
)


class Pooling(nn.Module):
    def __init__(self, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        pool = avg_pool2d if len(self.stride) == 2 else avg_pool3d
        return pool(x, self.stride) if max(self.stride) > 1 else x.clone()


class Coordinates(nn.Module):
    """Gives its image back at three resolutions; counts the windows that it is run on."""

    def __init__(self, strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList(Pooling(stride) for stride in strides)
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return [stage(x) for stage in self.decoder.stages][-1]


def coordinate_image(shape: Sequence[int]) -> npt.NDArray[np.float32]:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def points_of(shape: Sequence[int], n: int = 40, corners: bool = True, case: str = "case_1") -> CasePoints:
    """Points of two classes, the volume's corners among them."""
    labels = np.ones(tuple(shape), np.int16)
    if corners:
        labels[np.ix_(*[(0, size - 1) for size in shape])] = 0
    return draw_points(labels, case=case, per_class=n, n_whole=n)


CASES = [  # volume, patch, strides of the two coarser maps
    ((40, 30, 23), (16, 16, 8), [(4, 4, 2), (1, 2, 2)]),
    ((40, 9, 5), (16, 16, 8), [(4, 4, 2), (1, 2, 2)]),  # padded on two axes
    ((7, 9, 5), (16, 16, 8), [(4, 4, 2), (1, 2, 2)]),  # one window
    ((5, 30, 23), (16, 8), [(4, 2), (1, 2)]),  # 2D, slice by slice
    ((5, 9, 23), (16, 8), [(4, 2), (1, 2)]),
]


@pytest.mark.parametrize(("shape", "patch_size", "strides"), CASES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_coordinates_come_back(shape: Any, patch_size: Any, strides: Any, batch_size: int) -> None:
    points, image = points_of(shape), coordinate_image(shape)
    before = image.copy()
    network = Coordinates([*strides, (1,) * len(patch_size)])
    features = extract_case(network, image, points, patch_size=patch_size, batch_size=batch_size)
    assert np.array_equal(image, before)
    assert np.array_equal(features.scales[0], points.balanced)
    assert np.array_equal(features.variety[0], points.whole)
    assert np.array_equal(features.labels, points.labels)
    everywhere = np.concatenate((points.balanced, points.whole))
    windows = assign_windows(everywhere, shape, patch_size)
    assert sum(network.batches) == len(windows)
    assert max(network.batches) == min(batch_size, len(windows))
    n_flat = 3 - len(patch_size)
    if any(n < p for n, p in zip(shape[n_flat:], patch_size, strict=True)):
        return  # coarse maps mix coordinates with padding; those are compared with dense maps below
    for scale, stride in ((1, strides[1]), (2, strides[0])):
        # Averages of coordinates interpolate to coordinates, but for half a coarse voxel at the window's borders.
        both = np.concatenate((features.scales[scale], features.variety[scale]))[:, n_flat:]
        half = (np.array(stride) - 1) / 2
        for window in windows:
            expected = np.clip(window.local, half, np.array(patch_size) - 1 - half) + window.start[n_flat:]
            np.testing.assert_allclose(both[window.points], expected, atol=1e-4)


@pytest.mark.parametrize(("patch_size", "coarse"), [
    ((16, 24, 12), (16, 24, 12)), ((16, 24, 12), (16, 12, 6)), ((16, 24, 12), (2, 3, 3)), ((64, 144, 112), (2, 5, 4)),
    ((24, 12), (12, 3)), ((24, 12), (1, 1)),
])  # fmt: skip
def test_points_equal_the_interpolated_map(patch_size: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    feature_map = torch.from_numpy(generator.standard_normal((5, *coarse)).astype(np.float32))
    points = np.stack([generator.integers(0, n, 60) for n in patch_size], axis=1)
    points[:2] = [[0] * len(coarse), [n - 1 for n in patch_size]]
    mode = "bilinear" if len(coarse) == 2 else "trilinear"
    dense = interpolate(feature_map[None], size=patch_size, mode=mode, align_corners=False)[0]
    expected = dense.numpy()[(slice(None), *points.T)].T
    ours = read_points(feature_map, points, patch_size)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)
    assert ours.dtype == torch.float32
    half = read_points(feature_map.half(), points, patch_size)
    np.testing.assert_allclose(half.numpy(), expected, atol=5e-3)
    assert half.dtype == torch.float32


def dense_features(
    network: nn.Module, image: npt.NDArray[Any], points: npt.NDArray[Any], patch_size: tuple[int, ...]
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Point by point: the padded window, all maps upsampled, the dense softmax; then the one voxel."""
    shape, n_flat = image.shape[1:], 3 - len(patch_size)
    padded, slicer = pad_nd_image(image, patch_size, "constant", {"constant_values": 0}, return_slicer=True)
    offset = np.array([s.start for s in slicer[1:]])
    maps: dict[str, Tensor] = {}
    names = decoder_stages(network)
    rows: list[list[Tensor]] = [[] for _ in (*names, "softmax")]
    for window in assign_windows(points, shape, patch_size):
        start = (np.array(window.start) + offset)[n_flat:]
        box = [slice(a, a + n) for a, n in zip(start, patch_size, strict=True)]
        x = torch.from_numpy(padded[(slice(None), *window.start[:n_flat], *box)].copy())[None]
        handles = [
            network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: maps.update({name: o.clone()}))
            for name in names
        ]
        with torch.no_grad():
            logits = network(x)
        for handle in handles:
            handle.remove()
        logits = logits[0] if isinstance(logits, list) else logits
        mode = "bilinear" if len(patch_size) == 2 else "trilinear"
        dense = [interpolate(maps[name], size=patch_size, mode=mode, align_corners=False)[0] for name in names]
        for row, values in zip(rows, [*dense, logits[0].softmax(0)], strict=True):
            row.append(torch.cat((torch.from_numpy(window.points)[None], values[(slice(None), *window.local.T)])))
    ordered = [torch.cat(row, 1)[:, torch.cat(row, 1)[0].argsort()][1:].T.numpy() for row in rows]
    return ordered[:-1], ordered[-1]


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:
    torch.manual_seed(2)
    flat = [[stride[1], stride[2]] for stride in STRIDES]
    return {
        "STU-Net": (build_stunet(TINY, 2, 3, STRIDES), (32, 32, 32), (40, 37, 20)),
        "STU-Net 2D": (build_stunet(TINY, 2, 3, flat, conv_op=nn.Conv2d), (64, 64), (3, 80, 50)),
        "PlainConvUNet": (unet("PlainConvUNet", 2), UNET_PATCH, (11, 20, 9)),
        "ResidualEncoderUNet": (unet("ResidualEncoderUNet", 2), UNET_PATCH, (11, 20, 9)),
        "PlainConvUNet 2D": (unet("PlainConvUNet", 2, strides=[[1, 1], [2, 2], [2, 1]]), (16, 12), (4, 20, 9)),
    }


@pytest.mark.parametrize("name", networks())
def test_networks_as_dense_maps_have_it(name: str) -> None:
    network, patch_size, shape = networks()[name]
    network.eval()
    image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    points = points_of(shape, 15)
    head = finest_head(network.state_dict(), source="here")
    features = extract_case(network, image, points, patch_size=patch_size, batch_size=2, head=head)
    everywhere = np.concatenate((points.balanced, points.whole))
    expected, softmax = dense_features(network, image, everywhere, patch_size)
    n = len(points.balanced)
    assert len(features.scales) == len(features.variety) == len(expected)
    for scale, variety, dense in zip(features.scales, features.variety, expected, strict=True):
        assert scale.dtype == variety.dtype == np.float32
        np.testing.assert_allclose(scale, dense[:n], atol=5e-5)
        np.testing.assert_allclose(variety, dense[n:], atol=5e-5)
    assert features.probabilities is not None
    np.testing.assert_allclose(features.probabilities, softmax[:n], atol=1e-5)
    assert features.case == "case_1"


def extract(network: nn.Module, **more: Any) -> CaseFeatures:
    shape = (11, 20, 9)
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    return extract_case(network, image, points_of(shape, 10), **{"patch_size": UNET_PATCH, **more})


def test_the_networks_mode_and_supervision_come_back() -> None:
    network = unet()
    network.decoder.deep_supervision = True
    network.train()
    network.encoder.stages[0].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    features = extract(network)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert network.decoder.deep_supervision is True
    assert features.probabilities is None
    with pytest.raises(FeatureError):
        extract(network, layers=["decoder.seg_layers.0"])  # a coarse head, which is switched off
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert network.decoder.deep_supervision is True
    assert not any(module._forward_hooks for module in network.modules())
    for scale, wrapped in zip(features.scales, extract(nn.DataParallel(network)).scales, strict=True):
        assert np.array_equal(scale, wrapped)


def test_dropout_draws_nothing() -> None:
    network = unet()
    network.encoder.stages[1].append(nn.Dropout3d(0.5))
    network.train()
    for first, second in zip(extract(network).scales, extract(network).scales, strict=True):
        assert np.array_equal(first, second)


def test_chosen_layers_and_the_head_beside_them() -> None:
    network = unet()
    head = finest_head(network.state_dict(), source="here")
    features = extract(network, layers=["encoder.stages.2", "decoder.stages.0"], head=head)
    default = extract(network, head=head)
    assert [scale.shape[1] for scale in features.scales] == [16, 8]
    assert np.array_equal(features.scales[1], default.scales[1])
    assert features.probabilities is not None
    assert np.array_equal(features.probabilities, default.probabilities)


def test_a_tensor_is_an_image_too_and_larger_steps_run_fewer_windows() -> None:
    shape, points = (40, 30, 23), points_of((40, 30, 23))
    dense, sparse = (Coordinates([(1, 1, 1)]) for _ in range(2))
    image = torch.from_numpy(coordinate_image(shape))
    for network, step_size in ((dense, 0.5), (sparse, 1.0)):
        features = extract_case(network, image, points, patch_size=(16, 16, 8), step_size=step_size)
        assert np.array_equal(features.scales[0], points.balanced)
    assert sum(sparse.batches) < sum(dense.batches)


def test_features_that_are_not_finite_name_layer_and_checkpoint() -> None:
    network = unet()
    with torch.no_grad():
        network.decoder.stages[1].convs[1].norm.weight[0] = torch.nan
    with pytest.raises(FeatureError, match=r"some\.pth: decoder\.stages\.1 has \d+ NaN or infinite[\s\S]*case_1"):
        extract(network, source="some.pth")


def test_images_and_layers_that_do_not_fit() -> None:
    network = unet()
    points = points_of((11, 20, 9))
    for shape in ((1, 11, 20, 10), (11, 20, 9)):
        with pytest.raises(FeatureError, match="do not belong together"):
            extract_case(network, np.zeros(shape, np.float32), points, patch_size=UNET_PATCH)
    with pytest.raises(FeatureError, match="batch size"):
        extract(network, batch_size=0)
    flattening = Coordinates([(1, 1, 1)])
    flattening.decoder.stages.append(nn.Flatten())
    with pytest.raises(FeatureError, match=r"decoder\.stages\.1 with an output of shape \(1, 16\)"):
        extract(flattening, layers=["decoder.stages.1"], patch_size=(4, 2, 2))


def test_an_unsuitable_head() -> None:
    head = finest_head(unet().state_dict(), source="here")
    with pytest.raises(FeatureError, match="16 channels"):
        head.probabilities(torch.zeros(2, 16))
