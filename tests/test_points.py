"""Voxels drawn from cases, windows over them, and features there beside dense maps, upsampled and indexed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from networks import UNET_PATCH, unet
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d, interpolate
from weights import STRIDES, TINY

from stunet.errors import DatasetError, FeatureError, TransferabilityError
from stunet.network import build_stunet
from stunet.ranking.points import (
    CaseFeatures,
    CasePoints,
    assign_windows,
    cut_window,
    draw_points,
    extract_case,
    read_points,
    read_stages,
)
from stunet.ranking.ranking import finest_head

IGNORE = 4


def segmentation() -> npt.NDArray[np.int16]:
    """Background, two large classes, one of three voxels, voxels outside the image, and the ignore label."""
    labels = np.random.default_rng(0).choice([-1, 0, 1, 2, IGNORE], p=[0.2, 0.4, 0.2, 0.1, 0.1], size=(14, 9, 11))
    labels = labels.astype(np.int16)
    labels[labels == 3] = 0
    labels[3, 4, 5] = labels[9, 0, 10] = labels[13, 8, 10] = 3
    return labels


def draw(labels: npt.NDArray[Any], case: str = "case_1", **more: Any) -> CasePoints:
    return draw_points(labels, case=case, **{"per_class": 20, "n_whole": 50, "ignore_label": IGNORE, **more})


def test_each_class_gets_as_many_points_as_asked_for_or_as_it_has() -> None:
    labels = segmentation()
    before = labels.copy()
    points = draw(labels)
    assert np.array_equal(labels, before)
    values, counts = np.unique(points.labels, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0: 20, 1: 20, 2: 20, 3: 3}
    assert np.array_equal(labels[tuple(points.balanced.T)], points.labels)
    assert np.array_equal(labels[tuple(points.whole.T)], points.whole_labels)
    assert (points.annotated, draw(labels, annotated=frozenset({7})).annotated) == ({1, 2, 3}, {7})
    assert {tuple(p) for p in points.balanced[points.labels == 3].tolist()} == {(3, 4, 5), (9, 0, 10), (13, 8, 10)}
    assert len({tuple(p) for p in points.balanced.tolist()}) == 63  # each voxel once
    assert points.voxels == {c: int((labels == c).sum()) for c in range(4)}
    assert json.loads(json.dumps(points.as_dict()))["fewer"] == {"3": 3}
    assert points.shape == labels.shape


def test_nothing_outside_the_image_and_nothing_ignored() -> None:
    labels = segmentation()
    points = draw(labels, per_class=10_000, n_whole=10_000)
    allowed = (labels >= 0) & (labels != IGNORE)
    for drawn in (points.balanced, points.whole):  # all that there is, and nothing else
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, np.argwhere(allowed).tolist()))
    assert IGNORE not in points.voxels
    assert points.as_dict()["whole"] == {"asked": 10_000, "drawn": int(allowed.sum())}
    without = draw(labels, per_class=10_000, n_whole=10_000, ignore_label=None)
    assert without.voxels[IGNORE] == int((labels == IGNORE).sum())
    assert sorted(map(tuple, without.whole.tolist())) == sorted(map(tuple, np.argwhere(labels >= 0).tolist()))


def test_absent_classes_are_passed_over() -> None:
    points = draw(np.where(segmentation() == 1, 0, segmentation()))
    assert set(points.labels.tolist()) == set(points.voxels) == {0, 2, 3}


def test_same_points_whatever_the_order_and_the_other_classes() -> None:
    labels = segmentation()
    first = draw(labels)
    other = draw(labels, case="case_2")
    again = draw(labels)
    for name in ("balanced", "labels", "whole"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.balanced, other.balanced)
    assert not np.array_equal(first.whole, other.whole)
    assert not np.array_equal(first.balanced, draw(labels, seed=1).balanced)
    fewer = draw(np.where(labels == 2, 0, labels))
    assert np.array_equal(first.balanced[first.labels == 1], fewer.balanced[fewer.labels == 1])
    assert np.array_equal(first.balanced, draw(labels.astype(np.int8)).balanced)
    assert np.array_equal(first.balanced, draw(np.asfortranarray(labels)).balanced)


def test_all_voxels_are_equally_likely() -> None:
    labels = np.zeros((4, 3, 5), np.int8)
    labels[1], labels[2, 0] = 1, -1
    hits = np.zeros((2, *labels.shape))
    for seed in range(400):
        points = draw(labels, per_class=5, n_whole=5, seed=seed)
        for kind, drawn in enumerate((points.balanced[points.labels == 0], points.whole)):
            np.add.at(hits[kind], tuple(drawn.T), 1)
    assert chisquare(hits[0][labels == 0]).pvalue > 1e-3
    assert chisquare(hits[1][labels >= 0]).pvalue > 1e-3
    assert hits[:, labels < 0].sum() == hits[0][labels == 1].sum() == 0


def test_cases_without_labels() -> None:
    with pytest.raises(DatasetError, match="no voxel to draw"):
        draw(np.full((3, 3, 3), -1))
    with pytest.raises(DatasetError, match="no voxel to draw"):
        draw(np.full((3, 3, 3), IGNORE))


SHAPES = [((30, 41, 24), (16, 16, 8)), ((30, 10, 7), (16, 16, 8)), ((5, 6, 7), (16, 16, 8)), ((6, 41, 22), (16, 8))]


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
def test_each_point_is_in_the_window_that_weighs_most(shape: tuple[int, ...], patch_size: tuple[int, ...]) -> None:
    points = np.stack([np.random.default_rng(0).integers(0, n, 200) for n in shape], axis=1)
    points[:8] = list(itertools.product(*[(0, n - 1) for n in shape]))
    windows = assign_windows(points, shape, patch_size)
    assert sorted(np.concatenate([w.points for w in windows])) == list(range(200))
    assert len({w.start for w in windows}) == len(windows)
    n_flat = 3 - len(patch_size)
    padded = tuple(max(n, p) for n, p in zip(shape[n_flat:], patch_size, strict=True))
    _, slicer = pad_nd_image(np.empty(shape), patch_size, "constant", {}, return_slicer=True)
    offset = np.array([s.start for s in slicer])
    gaussian = compute_gaussian(patch_size, device=torch.device("cpu"), dtype=torch.float32).numpy()
    starts = list(itertools.product(*compute_steps_for_sliding_window(padded, patch_size, 0.5)))
    for window in windows:
        assert (window.local >= 0).all()
        assert (window.local < patch_size).all()
        assert np.array_equal(points[window.points] - window.start, np.pad(window.local, ((0, 0), (n_flat, 0))))
        for point, local in zip(points[window.points], window.local, strict=True):
            inside = [(point + offset)[n_flat:] - start for start in starts]
            weights = [gaussian[tuple(i)] for i in inside if (i >= 0).all() and (i < patch_size).all()]
            assert gaussian[tuple(local)] == max(weights)


def test_windows_without_points_are_left_out() -> None:
    points = np.array([[0, 0, 0], [1, 1, 1], [99, 99, 99]])
    windows = assign_windows(points, (100, 100, 100), (16, 16, 16))
    assert [(w.start, w.points.tolist()) for w in windows] == [((0, 0, 0), [0, 1]), ((84, 84, 84), [2])]


@pytest.mark.parametrize(("shape", "patch_size"), SHAPES)
def test_windows_are_cut_as_nnunet_pads(shape: tuple[int, ...], patch_size: tuple[int, ...]) -> None:
    image = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    padded, slicer = pad_nd_image(image, patch_size, "constant", {"constant_values": 0}, return_slicer=True)
    n_flat = 3 - len(patch_size)
    corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape])))
    for window in assign_windows(corners, shape, patch_size):
        first = [start + s.start for start, s in zip(window.start, slicer[1:], strict=True)]
        box = [slice(a, a + n) for a, n in zip(first[n_flat:], patch_size, strict=True)]
        cut = cut_window(image, window.start, patch_size)
        assert cut.dtype == torch.float32
        assert np.array_equal(cut.numpy(), padded[(slice(None), *first[:n_flat], *box)])


def n_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_decoder_of_nnunets_networks_finest_first(name: str) -> None:
    network = unet(name)
    network.decoder.deep_supervision = False  # nnU-Net's decoder then runs the finest head alone
    x = torch.randn(2, 1, *UNET_PATCH)
    with torch.no_grad():
        fine, coarse = read_stages(network, x, Tensor.clone, "decoder")
        assert (tuple(fine.shape), tuple(coarse.shape)) == ((2, 4, 8, 16, 12), (2, 8, 8, 8, 6))
        # By hand: the decoder's formula.
        skips = network.encoder(x)
        expected = network.decoder.stages[0](torch.cat((network.decoder.transpconvs[0](skips[-1]), skips[-2]), 1))
        torch.testing.assert_close(coarse, expected)
        torch.testing.assert_close(network.decoder.seg_layers[-1](fine), network(x))


def test_the_decoder_of_stunet_finest_first() -> None:
    network = build_stunet(TINY, 1, 3, STRIDES).eval()
    with torch.no_grad():
        maps = read_stages(network, torch.randn(1, 1, 32, 32, 32), Tensor.clone, "decoder")
    assert [m.shape[1] for m in maps] == [2, 4, 8, 16, 32]
    assert [m.shape[4] for m in maps] == [32, 16, 8, 4, 2]


class Stages(nn.Module):
    """Runs the first stages of its decoder, and then changes what they gave in place."""

    def __init__(self, *stages: nn.Module, n_run: int) -> None:
        super().__init__()
        self.decoder, self.n_run = nn.Module(), n_run
        self.decoder.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> None:
        for stage in self.decoder.stages[: self.n_run]:
            stage(x).mul_(0)


def test_outputs_are_read_before_a_later_layer_changes_them() -> None:
    network, x = Stages(nn.Conv2d(1, 2, 1), n_run=1), torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        expected = network.decoder.stages[0](x)
        (read,) = read_stages(network, x, Tensor.clone, "decoder")
    assert torch.equal(read, expected)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_hooks_are_gone_when_the_network_fails() -> None:
    network = Stages(nn.Conv2d(1, 2, 1), Failing(), n_run=2)
    with pytest.raises(RuntimeError, match="no"), torch.no_grad():
        read_stages(network, torch.randn(1, 1, 4, 4), Tensor.clone, "decoder")
    assert n_hooks(network) == 0


def test_decoders_that_are_none() -> None:
    x = torch.randn(1, 1, 4, 4)
    for network, got in (
        (nn.Sequential(nn.Conv2d(1, 2, 1)), "0 of the 0 stages in decoder.stages of a Sequential"),
        (Stages(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), n_run=1), "1 of the 2"),
    ):
        with pytest.raises(FeatureError, match=got), torch.no_grad():
            read_stages(network, x, Tensor.clone, "decoder")


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
    names = [f"decoder.stages.{i}" for i in reversed(range(len(network.decoder.stages)))]
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
    head = finest_head(network.state_dict())
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


def test_features_that_are_not_finite() -> None:
    network = unet().eval()
    with torch.no_grad():
        network.decoder.stages[1].convs[1].norm.weight[0] = torch.nan
    with pytest.raises(TransferabilityError, match=r"scale 0: \d+ of \d+ values are NaN or infinite in case case_1"):
        extract(network)


def test_stages_that_do_not_fit() -> None:
    flattening = Coordinates([(1, 1, 1)])
    flattening.decoder.stages.append(nn.Flatten())
    with pytest.raises(FeatureError, match=r"Tensor \[1, 16\], no map of 1 windows"):
        extract(flattening, patch_size=(4, 2, 2))
