"""Predicting cases with a model folder, as a step of another command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["predict_cases_of"]


def predict_cases_of(
    model: Path,
    cases: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    folds: Sequence[str] | None = None,
    device: str = "cpu",
    mirroring: bool = True,
    trust: Sequence[str] = (),
) -> None:
    """Predict cases as ``stunet predict`` does, wherever their images lie. Progress goes to standard error.

    Args:
        model: A model folder of nnU-Net v2.
        cases: Images of each case, one for each channel.
        output: Folder that the segmentations go to.
        folds: Folds whose networks are averaged; all that are there by default.
        device: ``cpu``, ``cuda`` or ``mps``.
        mirroring: Whether mirrored images are predicted too, where the model allows that.
        trust: Classes that the model's plans may name beyond the known ones.

    Raises:
        CheckpointError: No checkpoint, or one that does not fit the plans.
        CommandError: Cases failed; the others are predicted.
        PlansError: A model folder that cannot be used.
    """
    import torch

    from stunet.cli.console import stderr
    from stunet.cli.prediction_progress import PredictionProgress
    from stunet.inference import Case, FolderRequest, predict_folder

    request = FolderRequest(
        images=[Case(name, tuple(images)) for name, images in cases.items()],
        output=output,
        model=model,
        folds=folds,
        device=torch.device(device),
        mirroring=mirroring,
        trust=trust,
    )
    with PredictionProgress(bar=stderr.is_terminal, notes=stderr) as progress:
        predict_folder(request, progress)
