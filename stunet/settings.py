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

__all__ = [
    "SETTINGS",
    "SETTINGS_KEY",
    "STRATEGIES",
    "ActivationCheckpointing",
    "HeadPolicy",
    "Mirroring",
    "MomentumDtype",
    "Parallel",
    "Setting",
    "StemPolicy",
    "Strategy",
    "check_settings",
    "parse_settings",
]

Mirroring = Literal["all", "no-left-right", "none"]
"""Axes that augmentation may mirror, and with it prediction."""

Strategy = Literal["full", "warmup", "layerwise", "frozen-encoder", "head-only"]
"""How a network is fine-tuned; :func:`stunet.training.parameter_groups` says what each one does."""

MomentumDtype = Literal["fp32", "bf16"]
"""Precision of the optimizer's momentum between steps."""

Parallel = Literal["ddp", "fsdp"]
"""What several processes share: the batch alone, or parameters, gradients and momentum as well."""

ActivationCheckpointing = Literal["none", "encoder", "all"]
"""Where activations are computed again in the backward pass instead of being kept."""

StemPolicy = Literal["repeat-scaled", "first", "zero-new", "random"]
"""How the stem is adapted to other input channels; see :func:`stunet.weights.adapt_stem`."""

HeadPolicy = Literal["by-name", "fresh"]
"""Whether rows of the heads are copied for structures that source and target share."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

SETTINGS_KEY = "stunet"
"""Key of a plans file's configuration under which the training settings stand."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        place: Where in a configuration of the plans it is kept: ``training`` is the ``"stunet"`` block, read by
            ``STUNetTrainer``; ``architecture`` are the network's arguments and ``configuration`` is nnU-Net's own key,
            so those two count with any trainer.
        default: Its value in ``STUNetTrainer`` where the plans do not set it; None where nothing is done without it, or
            the plans always have it.
        expected: What a value must be, for messages.
        is_valid: Whether a value is that.
        help: What it does.
    """

    place: Literal["training", "architecture", "configuration"]
    default: Any
    expected: str
    is_valid: Callable[[Any], bool]
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The values as they are typed, where there are few."""
        if self.expected == _BOOL[0]:
            return "true", "false"
        listed = self.expected.removeprefix("one of ")
        return () if listed == self.expected else tuple(listed.split(", "))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < float("inf")


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(values: tuple[str, ...]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(values)}", lambda value: value in values


_COUNT = ("a positive whole number", _is_count)
_POSITIVE = ("a positive number", _is_positive)
_FRACTION = ("a number from 0 to 1", _is_fraction)
_BOOL = ("true or false", _is_bool)

SETTINGS: dict[str, Setting] = {
    "num_epochs": Setting("training", 1000, *_COUNT, "epochs of training"),
    "num_iterations_per_epoch": Setting("training", 250, *_COUNT, "training batches in an epoch"),
    "num_val_iterations_per_epoch": Setting("training", 50, *_COUNT, "validation batches in an epoch"),
    "initial_lr": Setting("training", 0.01, *_POSITIVE, "learning rate at the start of the schedule"),
    "weight_decay": Setting(
        "training", 3e-5, "a number >= 0", lambda v: _is_number(v) and v >= 0, "L2 penalty on weights"
    ),
    "oversample_foreground_percent": Setting("training", 0.33, *_FRACTION, "share of patches centred on foreground"),
    "probabilistic_oversampling": Setting(
        "training", False, *_BOOL, "draw that share at random instead of fixing it in each batch"
    ),
    "save_every": Setting("training", 50, *_COUNT, "epochs between two checkpoint_latest.pth"),
    "keep_every": Setting(
        "training", None, *_COUNT, "epochs between two checkpoints that are kept, as checkpoint_epoch_0100.pth"
    ),
    "final_validation": Setting(
        "training", True, *_BOOL, "predict all validation cases after training; false leaves that to --val"
    ),
    "mirroring": Setting(
        "training", "all", *_one_of(get_args(Mirroring)), "axes to mirror; no-left-right where structures come in sides"
    ),
    "nearest_labels": Setting(
        "training", False, *_BOOL, "resample labels by nearest neighbour in augmentation: faster with many structures"
    ),
    "allow_unannotated": Setting("training", False, *_BOOL, "train although no case annotates some structure"),
    "pretrained_weights": Setting(
        "training",
        None,
        "an absolute path",
        lambda v: isinstance(v, str) and Path(v).is_absolute(),
        "weights to start from; --from sets it",
    ),
    "fine_tune": Setting("training", "full", *_one_of(STRATEGIES), "which parameters are trained, and how fast"),
    "warmup_epochs": Setting("training", None, *_COUNT, "epochs of each of the two ramps of fine_tune=warmup"),
    "layer_decay": Setting(
        "training",
        0.85,
        "a number above 0, at most 1",
        lambda v: _is_positive(v) and v <= 1,
        "with fine_tune=layerwise, learning rate of a stage relative to the next one towards the output",
    ),
    "stem": Setting(
        "training", "repeat-scaled", *_one_of(get_args(StemPolicy)), "how weights are adapted to other input channels"
    ),
    "head": Setting(
        "training", "by-name", *_one_of(get_args(HeadPolicy)), "whether heads of pretrained_weights are used"
    ),
    "select_for": Setting(
        "training",
        None,
        "the id or name of a dataset",
        lambda v: isinstance(v, str | int) and not isinstance(v, bool) and v != "",
        "dataset for which periodic checkpoints are scored; the best one is kept",
    ),
    "gradient_accumulation": Setting(
        "training", 1, *_COUNT, "micro-batches that a batch is computed in: less memory, the same step"
    ),
    "momentum_dtype": Setting(
        "training", "fp32", *_one_of(get_args(MomentumDtype)), "precision of the momentum; bf16 halves its memory"
    ),
    "fused_optimizer": Setting("training", False, *_BOOL, "the optimizer's step in one kernel: less memory"),
    "parallel": Setting(
        "training", "ddp", *_one_of(get_args(Parallel)), "with several processes: replicate (ddp) or shard (fsdp)"
    ),
    "activation_checkpointing": Setting(
        "architecture",
        "none",
        *_one_of(get_args(ActivationCheckpointing)),
        "blocks that compute activations again instead of keeping them: less memory, more time",
    ),
    "batch_size": Setting("configuration", None, *_COUNT, "patches in a batch"),
    "batch_dice": Setting("configuration", None, *_BOOL, "Dice over the whole batch instead of each patch"),
    "patch_size": Setting(
        "configuration",
        None,
        "2 or 3 positive whole numbers, for example 64,64,64",
        lambda v: isinstance(v, list) and len(v) in (2, 3) and all(_is_count(n) for n in v),
        "voxels of a patch along each axis",
    ),
}


def check_settings(settings: Mapping[str, Any], *, source: str) -> None:
    """Check names and values of settings.

    Args:
        settings: Values by name.
        source: Where they stand, for messages.

    Raises:
        SettingsError: A setting that does not exist, or a value that it cannot have.
    """
    if not isinstance(settings, Mapping):
        raise SettingsError(
            f"settings that are no object in {source}",
            got=json.dumps(settings),
            expected='an object, for example {"num_epochs": 200}',
            remedy="Correct or remove them.",
        )
    for name, value in settings.items():
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, SETTINGS, n=1)
            raise SettingsError(
                f"unknown setting in {source}",
                got=name,
                expected=f"one of {', '.join(SETTINGS)}",
                remedy=f"Did you mean {close[0]}?" if close else "Remove it, or choose one of the known settings.",
            )
        setting = SETTINGS[name]
        if not setting.is_valid(value):
            raise SettingsError(
                f"impossible value of {name} in {source}",
                got=json.dumps(value),
                expected=setting.expected,
                remedy=f"Correct {name} ({setting.help}).",
            )


def parse_settings(assignments: Iterable[str]) -> dict[str, Any]:
    """Read settings as they are typed on the command line.

    Args:
        assignments: For example ``["initial_lr=0.001", "patch_size=64,64,64"]``; values are JSON, bare words, or
            numbers with commas.

    Returns:
        Checked values by name.

    Raises:
        SettingsError: Not of the form ``name=value``, an unknown name or an impossible value.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name:
            raise SettingsError(
                "a setting that cannot be read",
                got=assignment,
                expected="name=value, for example initial_lr=0.001",
                remedy="Write each setting as name=value without spaces.",
            )
        if re.fullmatch(r"\d+(,\d+)+", text):
            text = f"[{text}]"
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    check_settings(settings, source="--set")
    return settings
