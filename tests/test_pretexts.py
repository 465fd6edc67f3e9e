"""Self-supervised tasks: what they do to a batch against closed forms, what they train, and whether they learn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_trainers import make, narrow_plans
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as PyTorch's users write it

from stunet.errors import SettingsError
from stunet.network import STUNet, default_strides
from stunet.pretexts import PRETEXTS, find_pretext
from stunet.pretexts.anatomy import pruned_contrast
from stunet.pretexts.contrastive import follow, nt_xent, overlapping_crops, spread
from stunet.pretexts.jigsaw import distant_permutations, half_turns, permuted
from stunet.pretexts.pcrl import swap_boxes
from stunet.pretexts.pretext import Pretext, split_blocks, to_unit_range
from stunet.pretexts.reconstruction import block_mask, change_intensities, paint_over, random_box, shuffle_locally
from stunet.pretexts.rotation import turn, turns
from stunet.pretexts.volume_fusion import mix

PATCH = (16, 16, 16)
NEEDS_TWO = ["volume-fusion", "simclr", "pcrl"]


def network(patch: tuple[int, ...] = PATCH, channels: int = 1) -> STUNet:
    conv_op = nn.Conv3d if len(patch) == 3 else nn.Conv2d
    sizes: dict[str, Any] = {"features_per_stage": (4, 4, 8, 8, 16, 16), "n_blocks_per_stage": (1,) * 6}
    return STUNet(channels, 3, **sizes, strides=default_strides(patch), conv_op=conv_op).apply(STUNet.initialize)


def images(n: int = 2, patch: tuple[int, ...] = PATCH, channels: int = 1) -> Tensor:
    return torch.randn(n, channels, *patch, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PRETEXTS)
@pytest.mark.parametrize(("patch", "channels"), [(PATCH, 2), ((32, 32), 1)])
def test_gradients_reach_what_a_task_says_it_trains_and_its_heads(name: str, patch: Any, channels: int) -> None:
    net = network(patch, channels)
    task = PRETEXTS[name](net, patch)
    step = task(images(3, patch, channels))
    step.loss.backward()
    assert step.loss.shape == ()
    assert torch.isfinite(step.loss)
    reached = {key for key, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    named = {key: part for part in ("encoder", "decoder") for key, _ in net.named_parameters() if key.startswith(part)}
    # The network's own heads are for structures, and the bias before a norm has no effect.
    wanted = {key for key, part in named.items() if part in task.trains and "seg_layers" not in key}
    without_effect = {key for key in wanted if key.endswith(("conv1.bias", "conv2.bias"))}
    assert wanted - without_effect <= reached
    assert {key for key in reached if key in named} <= wanted
    assert any(key.startswith(("head", "projector")) for key in reached)
    assert not any(key.startswith("target") for key in reached)
    assert set(task.chance) <= set(step.measures)


@pytest.mark.parametrize("k", range(10))
def test_rotations_are_numpys(k: int) -> None:
    image = images(1, (4, 4, 4))[0]
    quarter, plane = turns(3)[k]
    expected = np.rot90(image.numpy(), quarter, (1 + plane[0], 1 + plane[1]))
    np.testing.assert_array_equal(turn(image, (quarter, plane)).numpy(), expected)
    others = [turn(image, how) for i, how in enumerate(turns(3)) if i != k]
    assert not any(torch.equal(other, turn(image, (quarter, plane))) for other in others)


@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 2, 4)])
def test_blocks_are_cut(grid: tuple[int, ...]) -> None:
    x = images(2, (4, 8, 8), 3)
    blocks = split_blocks(x, grid)
    for i, (a, b, c) in enumerate(itertools.product(*map(range, grid))):
        size = [n // g for n, g in zip((4, 8, 8), grid, strict=True)]
        box = tuple(slice(j * s, (j + 1) * s) for j, s in zip((a, b, c), size, strict=True))
        assert torch.equal(blocks[:, i], x[(slice(None), slice(None), *box)])


def test_permutations_have_inverses_and_lie_far_apart() -> None:
    order = torch.from_numpy(distant_permutations(8, 100))
    assert len({tuple(row) for row in order.tolist()}) == 100
    blocks = images(1, (4, 4, 4))[:, :, :2].reshape(1, 8, 4).expand(100, 8, 4)
    assert torch.equal(permuted(permuted(blocks, order), order.argsort(1)), blocks)
    distances = (order[:, None] != order[None]).sum(2)[~torch.eye(100, dtype=torch.bool)]
    random = torch.stack([torch.randperm(8) for _ in range(100)])
    of_random = (random[:, None] != random[None]).sum(2)[~torch.eye(100, dtype=torch.bool)]
    assert distances.min() > of_random.min()
    assert len(distant_permutations(4, 100)) == 24


def test_half_turns_undo_themselves() -> None:
    x = images(1, (4, 6, 8))[0]
    for axes in half_turns(3):
        flipped = x.flip([1 + axis for axis in axes])
        assert torch.equal(flipped.flip([1 + axis for axis in axes]), x)
        if axes:
            np.testing.assert_array_equal(flipped, np.rot90(x.numpy(), 2, tuple(1 + axis for axis in axes)))


@pytest.mark.parametrize("size", [(32, 32, 32), (20, 36, 16)])
def test_masks_have_their_share_and_consist_of_blocks(size: tuple[int, ...]) -> None:
    mask = block_mask(5, size, (8, 8, 8), 0.75)
    assert mask.shape == (5, 1, *size)
    starts = mask[:, :, ::8, ::8, ::8]
    n_blocks = starts[0].numel()
    assert (starts.flatten(1).sum(1) == round(0.75 * n_blocks)).all()
    for i, j, k in itertools.product(*(range(n) for n in starts.shape[2:])):
        block = mask[:, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8, 8 * k : 8 * k + 8].flatten(1)
        assert (block == block[:, :1]).all()


def test_masked_error_counts_where_the_mask_is(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = PRETEXTS["mae"](network(), PATCH)
    x = images()
    monkeypatch.setattr(task, "reconstruct", lambda seen: seen)  # a network that copies what it sees
    step = task(x)
    seen, mask = step.picture["input"], step.picture["input"] == 0
    assert 0.7 < mask.float().mean() < 0.8
    assert torch.equal(seen[~mask], x[0, 0][~mask])
    assert float(step.loss) == pytest.approx(1, abs=0.1)  # zero for values with variance 1
    monkeypatch.setattr(task, "reconstruct", lambda seen: x)
    assert float(task(x).loss) == 0


def test_bezier_curves() -> None:
    x = torch.linspace(0, 1, 101)
    straight = torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert (change_intensities(x, straight, reverse=False) - x).abs().max() < 2e-3
    assert (change_intensities(x, straight, reverse=True) - (1 - x)).abs().max() < 2e-3
    bent = change_intensities(x, torch.tensor([0.9, 0.1, 0.9, 0.1]), reverse=False)
    t = 0.5  # the curve's own middle
    middle = (3 * t * (1 - t) ** 2 + 3 * t**2 * (1 - t)) * torch.tensor([0.9, 0.1]) + t**3
    assert float(bent[round(float(middle[0]) * 100)]) == pytest.approx(float(middle[1]), abs=0.01)
    assert (bent.diff() >= 0).all()


def test_shuffling_keeps_the_values_and_where_they_roughly_are() -> None:
    x = torch.arange(32**3, dtype=torch.float32).view(1, 32, 32, 32)
    shuffled = x.clone()
    shuffle_locally(shuffled)
    assert torch.equal(shuffled.flatten().sort().values, x.flatten())
    assert not torch.equal(shuffled, x)


def test_swapped_boxes_change_places_and_nothing_else() -> None:
    x = torch.arange(2 * 16 * 24 * 8, dtype=torch.float32).view(2, 16, 24, 8)
    displaced = []
    for _ in range(50):
        swapped = x.clone()
        swap_boxes(swapped, 1)
        displaced.append(int((swapped != x).sum()))
        assert torch.equal(swapped.flatten(1).sort().values, x.flatten(1))
    assert {*displaced} <= {0, 2 * 2 * (2 * 3 * 1)}  # both channels of two boxes
    assert np.mean(displaced) > 12


def test_pcrl_sees_crops_whose_boxes_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stunet.pretexts.pcrl.vary_intensities", lambda x: x)
    for swaps, is_changed in ((100, True), (0, False)):
        picture = find_pretext("pcrl")(network(), PATCH, {"swaps": swaps})(images(3)).picture
        assert torch.equal(picture["input"], picture["truth"]) != is_changed
        assert torch.equal(picture["input"].flatten().sort().values, picture["truth"].flatten().sort().values)


def test_rubik_plus_hides_a_share_of_the_voxels_in_all_channels() -> None:
    task = find_pretext("rubik-plus")(network(channels=2), PATCH)
    seen: list[Tensor] = []
    task.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(torch.ones(4, 2, 32, 32, 32))
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_painting() -> None:
    x = torch.full((1, 32, 32, 32), 2.0)
    inner, outer = x.clone(), x.clone()
    paint_over(inner, outside=False)
    paint_over(outer, outside=True)
    assert 0 < (inner != 2).float().mean() < 5 * (1 / 3) ** 3
    assert (3 / 7 - 1 / 32) ** 3 < (outer == 2).float().mean() < 1
    assert inner[inner != 2].min() >= 0
    assert inner[inner != 2].max() <= 1


def test_boxes_have_sides_between_their_bounds() -> None:
    boxes = [random_box((20, 40), 0.25, 0.5) for _ in range(200)]
    for axis, n in enumerate((20, 40)):
        sides = {box[axis].stop - box[axis].start for box in boxes}
        assert min(sides) == n // 4
        assert max(sides) == n // 2
        assert all(box[axis].start >= 0 and box[axis].stop <= n for box in boxes)


def test_unit_range() -> None:
    x = images(3, channels=2)
    unit, low, span = to_unit_range(x)
    assert unit.flatten(2).amin(2).eq(0).all()
    assert torch.allclose(unit.flatten(2).amax(2), torch.ones(3, 2))
    assert torch.allclose(unit * span + low, x, atol=1e-6)


def test_mixing_weights_sum_to_one() -> None:
    share = torch.rand(2, 1, *PATCH)
    ones, twos = torch.ones(2, 1, *PATCH), torch.full((2, 1, *PATCH), 2.0)
    assert torch.allclose(mix(ones, ones, share), ones)
    assert torch.allclose(mix(ones, twos, share), 2 - share)


def test_fused_levels_are_those_of_the_picture() -> None:
    task: Any = PRETEXTS["volume-fusion"](network(), PATCH)
    x = torch.stack([torch.zeros(1, *PATCH), torch.ones(1, *PATCH)])
    step = task(x)
    # The first case is 0 and is mixed into a 1: what is seen is 1 less its share.
    assert torch.allclose(step.picture["input"], 1 - step.picture["truth"] / 4)
    assert set(step.picture["truth"].unique().tolist()) <= {0, 1, 2, 3, 4}


def test_guessing_the_fused_levels_gets_the_dice_that_is_given_as_chance() -> None:
    task: Any = PRETEXTS["volume-fusion"](network(), PATCH)
    levels = torch.stack([task._levels(PATCH) for _ in range(40)]).flatten()
    guess = levels[torch.randperm(len(levels))]
    dice = [2 * ((guess == k) & (levels == k)).sum() / ((guess == k).sum() + (levels == k).sum()) for k in range(1, 5)]
    assert float(torch.stack(dice).mean()) == pytest.approx(task.chance["Dice"], abs=0.02)


def test_genesis_distorts_within_the_intensities_of_each_case() -> None:
    x = torch.stack([images()[0] * 200 - 50, images()[1]])
    nothing = dict.fromkeys(("nonlinear", "shuffling", "painting"), 0.0)
    assert torch.allclose(find_pretext("genesis")(network(), PATCH, nothing).corrupt(x)[0], x, atol=1e-3)
    distorted, _ = find_pretext("genesis")(network(), PATCH).corrupt(x)
    for before, after in zip(x, distorted, strict=True):
        assert not torch.allclose(before, after)
        assert before.min() - 1e-3 <= after.min() <= after.max() <= before.max() + 1e-3


def test_nt_xent_is_its_definition() -> None:
    z = torch.nn.functional.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)
    loss, _ = nt_xent(z, 0.5)
    total = 0.0
    for i in range(8):
        j = (i + 4) % 8
        denominator = sum(float(torch.exp(z[i] @ z[k] / 0.5)) for k in range(8) if k != i)
        total -= np.log(float(torch.exp(z[i] @ z[j] / 0.5)) / denominator)
    assert float(loss) == pytest.approx(total / 8, rel=1e-5)


def test_pruned_contrast_is_its_definition() -> None:
    z, other = (torch.nn.functional.normalize(torch.randn(6, 3), dim=1) for _ in range(2))
    loss, _ = pruned_contrast(z, other, 0.2, 0.3)
    total = 0.0
    for i in range(6):
        kept = [k for k in range(6) if k == i or float(other[i] @ other[k]) <= 0.3]
        scores = [float(z[i] @ other[k]) / 0.2 for k in kept]
        total -= scores[kept.index(i)] - np.log(np.exp(scores).sum())
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)


def test_moving_average_in_closed_form() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    start = target.weight.detach().clone()
    for _ in range(5):
        follow(target, source, 0.9)
    assert torch.allclose(target.weight, 0.9**5 * start + (1 - 0.9**5) * source.weight)


def test_target_starts_as_a_copy_and_follows_the_last_step() -> None:
    task: Any = PRETEXTS["byol"](network(), PATCH, {"ema_momentum": 0.5})
    with torch.no_grad():
        task.projector[0].weight.add_(1)  # after the copy was made, as weights that are loaded
    task(images())
    before = task.projector[0].weight.detach().clone()
    assert torch.equal(task.target["projector"][0].weight, before)
    with torch.no_grad():
        task.projector[0].weight.add_(1)
    task(images())
    assert torch.equal(task.target["projector"][0].weight, before)  # as in each part of a batch that is accumulated
    task.after_step()
    assert torch.allclose(task.target["projector"][0].weight, before + 0.5)
    task.eval()(images())
    assert torch.allclose(task.target["projector"][0].weight, before + 0.5)


def test_crops_overlap() -> None:
    for _ in range(200):
        a, b = overlapping_crops((40, 56, 40), (24, 32, 24), 0.5)
        shared = 1.0
        for one, other, n in zip(a, b, (40, 56, 40), strict=True):
            assert one.start >= 0
            assert one.stop <= n
            assert other.start >= 0
            assert other.stop <= n
            shared *= max(0, min(one.stop, other.stop) - max(one.start, other.start)) / (one.stop - one.start)
        assert shared >= 0.5


def test_spread_finds_the_collapse() -> None:
    same = torch.nn.functional.normalize(torch.ones(8, 4), dim=1)
    collapsed, apart = spread(same), spread(torch.cat((torch.eye(4), torch.eye(4))))
    assert float(collapsed["rank"]) == pytest.approx(1, abs=1e-3)
    assert float(collapsed["uniformity"]) == pytest.approx(0)
    assert float(apart["rank"]) == pytest.approx(4)
    assert float(apart["alignment"]) == 0
    pairs = 8 * 7 / 2
    assert float(apart["uniformity"]) == pytest.approx(np.log((4 + (pairs - 4) * np.exp(-4)) / pairs))


@pytest.mark.parametrize("name", PRETEXTS)
def test_the_best_checkpoint_is_that_of_the_best_first_measure(name: str) -> None:
    task = PRETEXTS[name](network(), PATCH).eval()
    measures = {key: float(value) for key, value in task(images(3)).measures.items()}
    assert "loss" not in measures  # that name is the trainer's
    first = next(iter(measures))
    lower_is_better = {"accuracy": False, "Dice": False, "error": True}[first]
    assert (task.score({**measures, first: 0.4}) < task.score({**measures, first: 0.5})) != lower_is_better
    assert first in task.chance


def test_embeddings_that_are_not_finite_have_no_spread() -> None:
    assert all(torch.isnan(value) for value in spread(torch.full((4, 3), torch.inf)).values())


@pytest.mark.parametrize("name", ["autoencoder", "mae", "genesis", "pcrl"])
def test_an_error_in_air_alone_is_no_thousand(name: str) -> None:
    patch = (32, 32, 32)
    step = PRETEXTS[name](network(patch), patch)(torch.full((2, 1, *patch), -1.5))
    assert float(step.measures["error"]) < 20


def test_boxes_of_flat_patches_are_flat() -> None:
    boxes = [random_box((16, 256), [2 / 16, 8 / 256], 0.625) for _ in range(400)]
    sides = np.array([[axis.stop - axis.start for axis in box] for box in boxes])
    assert sides.min(0).tolist() == [2, 8]
    assert (sides.max(0) > [8, 140]).all()
    assert (sides.max(0) <= [10, 160]).all()
    with pytest.raises(SettingsError, match="fewest_boxes=50 and most_boxes=39"):
        PRETEXTS["volume-fusion"](network(), PATCH, {"fewest_boxes": 50})


@pytest.mark.parametrize("name", ["rotation", "mae", "simclr"])
def test_the_same_seed_gives_the_same_step(name: str) -> None:
    net = network()
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(float(PRETEXTS[name](net, PATCH)(images()).loss.detach()))
    assert losses[0] == losses[1]


def test_without_skips_the_encoder_alone_is_trained() -> None:
    task: Any = PRETEXTS["mae"](network(), PATCH, {"pretext_skips": False})
    assert task.trains == ("encoder",)
    assert not any(key.startswith("decoder") for key in task.state_dict())
    features = task.encoder(images())
    seen = task.head(task.reconstruction.finest([*map(torch.zeros_like, features[:-1]), features[-1]]))
    assert torch.allclose(task.reconstruct(images()), seen)


@pytest.mark.parametrize(
    ("name", "patch", "expected"),
    [("rotation", (4, 16, 16), "2 x 4"), ("jigsaw", (16, 16, 15), "16"), ("nothing", PATCH, "mae")],
)
def test_what_cannot_be_is_refused(name: str, patch: tuple[int, ...], expected: str) -> None:
    net = network()
    with pytest.raises(SettingsError, match=expected):
        find_pretext(name)(net, patch)


def test_the_task_of_the_documentation_works() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "pretexts.md").read_text(encoding="utf-8")
    code = text.rpartition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    task: Pretext = names["Mirrored"](network(), PATCH)
    assert set(task(images()).measures) == set(task.chance)
    assert learned(task, 80)["accuracy"] > 0.9


def learned(task: Pretext, steps: int, lr: float = 1e-3, x: Tensor | None = None) -> dict[str, float]:
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr)
    x = images(4) if x is None else x
    history = []
    for _ in range(steps):
        step = task(x)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        history.append(step.measures)
    return {key: float(torch.stack([measures[key] for measures in history[-10:]]).mean()) for key in history[0]}


def test_a_task_is_learned() -> None:
    task = PRETEXTS["autoencoder"](network(), PATCH)
    assert learned(task, 60)["error"] < 0.9


def test_turns_of_blocks_are_learned_where_their_edges_lie_between_coarsest_voxels() -> None:
    patch = (24, 24, 24)
    ramps = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in patch], indexing="ij"), 0).sum(0)
    task = PRETEXTS["rubik"](network(patch), patch)
    assert learned(task, 60, lr=3e-3, x=ramps.expand(4, 1, *patch))["accuracy of rotations"] > 0.7


def test_reconstruction_leaves_finest_features_that_learn() -> None:
    """With usual weights of the head and nnU-Net's clipping, the median of these shares is 0.05."""
    assert np.median([positive_share(seed) for seed in range(3)]) > 0.2


def positive_share(seed: int) -> float:
    """Train with nnU-Net's optimizer and return the share of finest features to which leaky ReLU gives gradients."""
    torch.manual_seed(seed)
    net = network()
    task = PRETEXTS["genesis"](net, PATCH)
    optimizer = torch.optim.SGD(task.parameters(), 0.01, momentum=0.99, nesterov=True)
    for step in range(50):
        optimizer.zero_grad()
        task(smooth_images(2, step)).loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), task.max_gradient_norm)
        optimizer.step()
    with torch.no_grad():
        return float((net.decoder.finest(net.encoder(smooth_images(4, 1000))) > 0).float().mean())


def smooth_images(n: int, seed: int) -> Tensor:
    coarse = torch.randn(n, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=PATCH, mode="trilinear")
    return smooth / smooth.std()


def test_a_trainer_without_labels_clips_gradients_as_the_task_wants(dataset: Path) -> None:
    trainer: Any = make("STUNetTrainer_pretext", narrow_plans(pretext="mae", batch_size=2))
    trainer.initialize()
    trainer.task.head.weight.data.mul_(1000)
    trainer.train_step({"data": images(2, (32, 32, 32)), "target": torch.zeros(2, 1, 32, 32, 32), "keys": ["a", "b"]})
    gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(1, rel=1e-3)
