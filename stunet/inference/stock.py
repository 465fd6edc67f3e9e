"""nnU-Net's own predictor, for models that cannot be predicted plane by plane."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from stunet.files import move_into_place
from stunet.inference.images import Case, as_nifti
from stunet.inference.labels import label_type
from stunet.inference.outputs import WritingJob, Written, write_outputs
from stunet.inference.pipeline import Listener, Prediction, describe, report_written
from stunet.inference.preparation import save_array

__all__ = ["predict_with_nnunet"]


def predict_with_nnunet(
    cases: Sequence[Case],
    prediction: Prediction,
    scratch: Path,
    listener: Listener,
    *,
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
) -> dict[str, str]:
    """Predict cases one after another with nnU-Net's predictor; files appear whole or not at all.

    Args:
        cases: The cases.
        prediction: How; its strategy is not looked at.
        scratch: Folder for unfinished files, on the file system of the predictions.
        listener: Told of the progress.
        save_probabilities: Whether nnU-Net's ``.npz`` and ``.pkl`` are written too.
        previous_stage: Folder with predictions of a cascade's first stage.

    Returns:
        What went wrong, by the name of each case that failed.

    Raises:
        CheckpointError: The weights do not fit.
    """
    predictor = _predictor(prediction)
    failures: dict[str, str] = {}
    for case in cases:
        folder = scratch / case.name
        folder.mkdir()
        try:
            case = as_nifti(case, prediction.model.file_ending, folder)
            predictor.predict_from_files_sequential(
                [[str(path) for path in case.files]],
                [str(folder / "stock")],
                save_probabilities=save_probabilities,
                folder_with_segs_from_prev_stage=None if previous_stage is None else str(previous_stage),
            )
            written = _write(case, prediction, folder, save_probabilities=save_probabilities)
        except Exception as error:  # the other cases can do without this one
            failures[case.name] = describe(error)
            listener.failed(case, failures[case.name])
        else:
            report_written(case, written, listener)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return failures


def _predictor(prediction: Prediction) -> nnUNetPredictor:
    model = prediction.model
    predictor = nnUNetPredictor(
        tile_step_size=prediction.step_size,
        use_mirroring=prediction.mirroring,
        perform_everything_on_device=prediction.results_on_device,
        device=prediction.device,
    )
    weights = [model.weights(fold) for fold in model.checkpoints]
    predictor.manual_initialization(
        model.build_network(),
        model.plans_manager,
        model.configuration_manager,
        weights,
        model.dataset_json,
        model.trainer_name,
        model.mirroring_axes or None,
    )
    return predictor


def _write(case: Case, prediction: Prediction, folder: Path, *, save_probabilities: bool) -> Written:
    model = prediction.model
    labels, properties = model.plans_manager.image_reader_writer_class().read_seg(
        str(folder / f"stock{model.file_ending}")
    )
    save_array(folder / "labels.npy", np.asarray(labels[0]).astype(label_type(model.label_manager)))
    if save_probabilities:
        for ending in (".npz", ".pkl"):
            move_into_place(folder / f"stock{ending}", prediction.output / f"{case.name}{ending}")
    return write_outputs(
        WritingJob(
            case,
            folder / "labels.npy",
            properties,
            model.plans,
            model.file_ending,
            prediction.names,
            prediction.output,
            folder,
            prediction.options,
        )
    )
