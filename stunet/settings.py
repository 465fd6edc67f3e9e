"""The settings that ``--set`` and a plans file's ``"stunet"`` block take. Imports neither PyTorch nor nnU-Net."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stunet.errors import SettingsError

Mirroring = Literal["all", "no-left-right", "none"]
"""Axes that augmentation may mirror, and with it prediction."""

Strategy = Literal["full", "warmup", "layerwise", "frozen-encoder", "head-only"]
"""How a network is fine-tuned; :func:`stunet.training.optimizer.parameter_groups` says what each one does."""

MomentumDtype = Literal["fp32", "bf16"]
"""Precision of the optimizer's momentum between steps."""

Parallel = Literal["ddp", "fsdp"]
"""What several processes share: the batch alone, or parameters, gradients and momentum as well."""

ActivationCheckpointing = Literal["none", "encoder", "all"]
"""Where activations are computed again in the backward pass instead of being kept."""

PretextName = Literal[
    "rotation", "relative-location", "jigsaw", "rubik", "rubik-plus", "autoencoder", "genesis", "mae",
    "volume-fusion", "simclr", "byol", "pcrl", "anatomy",
]  # fmt: skip
"""A self-supervised task, see :mod:`stunet.pretexts`."""

StemPolicy = Literal["repeat-scaled", "first", "zero-new", "random"]
"""How the stem is adapted to other input channels; see :func:`stunet.weights.transfer.adapt_stem`."""

HeadPolicy = Literal["by-name", "fresh", "fresh-decoder"]
"""Whether rows of the heads are copied for structures that source and target share; ``fresh`` ones begin at 0, and with
``fresh-decoder`` the decoder is not copied either."""

SETTINGS_KEY = "stunet"
"""Key of a plans file's configuration under which the training settings are."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        default: Its value in ``STUNetTrainer`` where the plans do not set it; None where nothing is done without it, or
            the plans always have it.
        expected: What a value must be, for messages.
        is_valid: Whether a value is that.
        choices: The values as they are typed, where there are few.
        help: What it does.
        place: Where in a configuration of the plans it is kept: ``training`` is the ``"stunet"`` block, read by
            ``STUNetTrainer``; ``architecture`` are the network's arguments and ``configuration`` is nnU-Net's own key,
            so those two count with any trainer.
    """

    default: Any
    expected: str
    is_valid: Callable[[Any], bool]
    choices: tuple[str, ...]
    help: str
    place: Literal["training", "architecture", "configuration"] = "training"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _one_of(literal: Any) -> _Kind:
    values = get_args(literal)
    return f"one of {', '.join(values)}", lambda value: value in values, values


# What a value must be, the check, and the values where there are few.
_Kind = tuple[str, Callable[[Any], bool], tuple[str, ...]]
_COUNT: _Kind = ("a positive whole number", _is_count, ())
_SEVERAL: _Kind = ("a whole number above 1", lambda v: _is_count(v) and v > 1, ())
_POSITIVE: _Kind = ("a positive number", lambda v: _is_number(v) and v > 0, ())
_NOT_NEGATIVE: _Kind = ("a number >= 0", lambda v: _is_number(v) and v >= 0, ())
_FRACTION: _Kind = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1, ())
_DECAY: _Kind = ("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1, ())
_BOOL: _Kind = ("true or false", lambda v: isinstance(v, bool), ("true", "false"))
_PATH: _Kind = ("an absolute path", lambda v: isinstance(v, str) and Path(v).is_absolute(), ())
_DATASET: _Kind = ("the id or name of a dataset", lambda v: type(v) in (int, str) and v != "", ())
_PATCH: _Kind = (
    "2 or 3 positive whole numbers, for example 64,64,64",
    lambda v: isinstance(v, list) and len(v) in (2, 3) and all(_is_count(n) for n in v),
    (),
)

SETTINGS: dict[str, Setting] = {
    "num_epochs": Setting(1000, *_COUNT, "epochs of training"),
    "num_iterations_per_epoch": Setting(250, *_COUNT, "training batches in an epoch"),
    "num_val_iterations_per_epoch": Setting(50, *_COUNT, "validation batches in an epoch"),
    "initial_lr": Setting(0.01, *_POSITIVE, "learning rate at the start of the schedule"),
    "weight_decay": Setting(3e-5, *_NOT_NEGATIVE, "L2 penalty on weights"),
    "oversample_foreground_percent": Setting(0.33, *_FRACTION, "share of patches centred on foreground"),
    "probabilistic_oversampling": Setting(False, *_BOOL, "draw that share at random, not fixed in each batch"),
    "save_every": Setting(50, *_COUNT, "epochs between two checkpoint_latest.pth"),
    "keep_every": Setting(None, *_COUNT, "epochs between two checkpoints that are kept, as checkpoint_epoch_0100.pth"),
    "final_validation": Setting(True, *_BOOL, "predict all validation cases at the end; false leaves that to --val"),
    "mirroring": Setting("all", *_one_of(Mirroring), "axes to mirror; no-left-right where structures come in sides"),
    "nearest_labels": Setting(False, *_BOOL, "augmentation takes the nearest label: faster with many structures"),
    "allow_unannotated": Setting(False, *_BOOL, "train although no case annotates some structure"),
    "pretrained_weights": Setting(None, *_PATH, "weights to start from; --from sets it"),
    "fine_tune": Setting("full", *_one_of(Strategy), "which parameters are trained, and how fast"),
    "warmup_epochs": Setting(None, *_COUNT, "epochs of each of the two ramps of fine_tune=warmup"),
    "layer_decay": Setting(0.85, *_DECAY, "fine_tune=layerwise: factor of the rate per stage away from the output"),
    "stem": Setting("repeat-scaled", *_one_of(StemPolicy), "how weights are adapted to other input channels"),
    "head": Setting(
        "by-name", *_one_of(HeadPolicy), "fresh: heads begin at 0; fresh-decoder: the decoder begins anew, too"
    ),
    "select_for": Setting(None, *_DATASET, "dataset for which periodic checkpoints are scored; the best one is kept"),
    "pretext": Setting(None, *_one_of(PretextName), "self-supervised task, beside labels or alone"),
    "pretext_weight": Setting(0.1, *_POSITIVE, "weight of pretext beside labels, in the other trainers"),
    "pretext_skips": Setting(True, *_BOOL, "autoencoder, genesis, mae: whether the decoder gets skip connections"),
    "mask_ratio": Setting(None, *_DECAY, "share that is masked: mae 0.75, rubik-plus 0.25"),
    "mask_block": Setting(16, *_COUNT, "mae: voxels of a masked block along each axis"),
    "grid": Setting(2, *_SEVERAL, "jigsaw, rubik, rubik-plus: blocks along each axis"),
    "permutations": Setting(100, *_SEVERAL, "jigsaw, rubik, rubik-plus: permutations to tell apart"),
    "pairs": Setting(4, *_COUNT, "relative-location: pairs of blocks of a patch"),
    "block_share": Setting(0.8, *_DECAY, "relative-location: side of a block relative to its cell"),
    "nonlinear": Setting(0.9, *_FRACTION, "genesis: share of cases whose intensities are changed"),
    "shuffling": Setting(0.5, *_FRACTION, "genesis: share of cases whose voxels are shuffled locally"),
    "painting": Setting(0.9, *_FRACTION, "genesis: share of cases that are painted over"),
    "outer_painting": Setting(0.8, *_FRACTION, "genesis: share of these of which all but some boxes is painted"),
    "fusion_levels": Setting(4, *_COUNT, "volume-fusion: weights of the second image to tell apart, beside none"),
    "fewest_boxes": Setting(10, *_COUNT, "volume-fusion: boxes in which images are mixed"),
    "most_boxes": Setting(39, *_COUNT, "volume-fusion: likewise"),
    "smallest_box": Setting(8, *_COUNT, "volume-fusion: voxels of a box along each axis"),
    "largest_box": Setting(0.625, *_DECAY, "volume-fusion: largest box relative to the patch"),
    "crop_size": Setting(64, *_COUNT, "simclr, byol, pcrl: voxels of a crop along each axis"),
    "crop_overlap": Setting(0.5, *_FRACTION, "simclr, byol, pcrl: share of a crop that the other one has, too"),
    "swaps": Setting(100, *_COUNT, "pcrl: pairs of small boxes of a crop that change places"),
    "embedding": Setting(128, *_COUNT, "simclr, byol, pcrl, anatomy: numbers in an embedding"),
    "temperature": Setting(None, *_POSITIVE, "divides similarities: simclr and pcrl 0.5, anatomy 0.2"),
    "ema_momentum": Setting(0.996, *_FRACTION, "byol, anatomy: momentum of the moving average"),
    "anatomy_levels": Setting(2, *_COUNT, "anatomy: levels of parts"),
    "pruned_above": Setting(0.8, *_FRACTION, "anatomy: similarity above which parts are no negatives"),
    "gradient_accumulation": Setting(1, *_COUNT, "micro-batches of a batch: less memory, the same step"),
    "momentum_dtype": Setting("fp32", *_one_of(MomentumDtype), "precision of the momentum; bf16 halves its memory"),
    "fused_optimizer": Setting(False, *_BOOL, "the optimizer's step in one kernel: less memory"),
    "parallel": Setting("ddp", *_one_of(Parallel), "with several processes: replicate (ddp) or shard (fsdp)"),
    "activation_checkpointing": Setting(
        "none", *_one_of(ActivationCheckpointing), "blocks that are recomputed: less memory, more time", "architecture"
    ),
    "batch_size": Setting(None, *_COUNT, "patches in a batch", "configuration"),
    "batch_dice": Setting(None, *_BOOL, "Dice over the whole batch instead of each patch", "configuration"),
    "patch_size": Setting(None, *_PATCH, "voxels of a patch along each axis", "configuration"),
}


def check_settings(settings: Mapping[str, Any], *, source: str) -> None:
    """Check names and values of settings.

    Args:
        settings: Values by name.
        source: Where they come from, for messages.

    Raises:
        SettingsError: A setting that does not exist, or a value that it cannot have.
    """
    if not isinstance(settings, Mapping):
        raise SettingsError(f'{source}: {json.dumps(settings)} instead of an object such as {{"num_epochs": 200}}')
    for name, value in settings.items():
        if name not in SETTINGS:
            close = "".join(f"did you mean {n}? " for n in difflib.get_close_matches(name, SETTINGS, n=1))
            raise SettingsError(f"{source}: unknown setting {name}: {close}choose one of {', '.join(SETTINGS)}")
        setting = SETTINGS[name]
        if not setting.is_valid(value):
            raise SettingsError(f"{source}: {name}={json.dumps(value)} must be {setting.expected} ({setting.help})")


def parse_settings(assignments: Iterable[str]) -> dict[str, Any]:
    """Read settings as they are typed on the command line.

    >>> parse_settings(["initial_lr=0.001", "patch_size=64,64,64", "mirroring=none"])
    {'initial_lr': 0.001, 'patch_size': [64, 64, 64], 'mirroring': 'none'}

    Args:
        assignments: ``name=value`` each; values are JSON, bare words, or numbers with commas.

    Returns:
        Checked values by name.

    Raises:
        SettingsError: Not of the form ``name=value``, an unknown name or an impossible value.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name:
            raise SettingsError(f"--set {assignment}: write name=value without spaces, for example initial_lr=0.001")
        if re.fullmatch(r"\d+(,\d+)+", text):
            text = f"[{text}]"
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    check_settings(settings, source="--set")
    return settings
