"""Predicting cases with a model folder, as a step of another command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

__all__ = ["predict_folder"]


def predict_folder(
    model: Path,
    cases: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    folds: Sequence[str] | None = None,
    device: str = "cpu",
    mirroring: bool = True,
    num_processes: int = 3,
) -> None:
    """Predict cases with a model folder, through nnU-Net's own predictor.

    Args:
        model: A model folder of nnU-Net v2.
        cases: Images of each case, one for each channel.
        output: Folder that the segmentations go to; exists.
        folds: Folds whose networks are averaged; all that are there by default.
        device: ``cpu``, ``cuda`` or ``mps``.
        mirroring: Whether mirrored images are predicted too, where the model allows that.
        num_processes: Processes for preprocessing, and as many for export.

    Raises:
        CheckpointError: No checkpoint, or one that does not fit the plans.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with redirect_stdout(sys.stderr):  # standard output may be JSON
        predictor = nnUNetPredictor(
            use_mirroring=mirroring, device=torch.device(device), allow_tqdm=sys.stderr.isatty()
        )
        _load(predictor, model, folds)
        predictor.predict_from_files(
            [[str(image) for image in images] for images in cases.values()],
            [str(output / case) for case in cases],
            num_processes_preprocessing=num_processes,
            num_processes_segmentation_export=num_processes,
        )


def _load(predictor: Any, model: Path, folds: Sequence[str] | None) -> None:
    # Not initialize_from_trained_model_folder, which would run code out of a checkpoint.
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from stunet.checkpoints import check_weights, read_checkpoint
    from stunet.cli.evaluate_steps import read_model_names
    from stunet.planning import load_plans

    names = read_model_names(model, None)
    manager = PlansManager(load_plans(model / "plans.json"))
    found = sorted(path.parent.name.removeprefix("fold_") for path in model.glob("fold_[0-9]/checkpoint_final.pth"))
    paths = [model / f"fold_{fold}" / "checkpoint_final.pth" for fold in folds or found or ["0"]]
    checkpoints = {path: read_checkpoint(path) for path in paths}
    first = checkpoints[paths[0]]
    configuration = manager.get_configuration(first["init_args"]["configuration"])
    network = nnUNetTrainer.build_network_architecture(
        manager,
        configuration,
        determine_num_input_channels(manager, configuration, names.dataset_json),
        manager.get_label_manager(names.dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    for path, checkpoint in checkpoints.items():
        check_weights(checkpoint["network_weights"], network.state_dict(), source=path)
    predictor.manual_initialization(
        network,
        manager,
        configuration,
        [checkpoint["network_weights"] for checkpoint in checkpoints.values()],
        names.dataset_json,
        first["trainer_name"],
        first.get("inference_allowed_mirroring_axes"),
    )
