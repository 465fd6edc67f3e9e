"""Where nnU-Net keeps datasets and plans: finding, reading and writing them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from stunet.environment import find_dataset, find_plans, nnunet_folder, require_plans
from stunet.errors import DatasetError, PlansError
from stunet.files import write_json
from stunet.planning.rewrite import check_plans, resolve_configuration

__all__ = [
    "find_dataset",
    "find_plans",
    "load_plans",
    "missing_preprocessed_cases",
    "nnunet_folder",
    "plan_with_nnunet",
    "write_plans",
]

#: nnU-Net's planners by the plans identifier that they write.
_PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}


def load_plans(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a plans file of nnU-Net v2.

    Raises:
        PlansError: Missing, not JSON, of nnU-Net v1, or no plans.
    """
    path = require_plans(Path(path))
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlansError(
            "a plans file that is not JSON",
            got=f"{path}: {error}",
            expected="a JSON object",
            remedy="Plan the dataset again with nnUNetv2_plan_experiment (v1 plans, *.pkl, cannot be used).",
        ) from error
    check_plans(plans, source=str(path))
    assert isinstance(plans, dict)
    return plans


def plan_with_nnunet(dataset_name: str, identifier: str, *, num_processes: int) -> None:
    """Run nnU-Net's fingerprint extraction and planner, which write the plans with this identifier.

    Raises:
        PlansError: No planner of nnU-Net writes that identifier.
        NnUNetPathError: ``nnUNet_raw`` is not set.
    """
    if identifier not in _PLANNERS:
        raise PlansError(
            "missing plans file, and no planner of nnU-Net writes it",
            got=find_plans(dataset_name, identifier),
            expected=f"an existing file, or one of {', '.join(_PLANNERS)}",
            remedy="Check --plans.",
        )
    raw = nnunet_folder("nnUNet_raw") / dataset_name
    try:
        content = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        _ = content["channel_names"], content["labels"], content["file_ending"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            "a dataset that cannot be planned",
            got=f"{raw / 'dataset.json'}: {type(error).__name__}: {error}",
            expected="an nnU-Net raw dataset, with channel_names, labels and file_ending",
            remedy="Put the dataset into nnUNet_raw, or complete its dataset.json.",
        ) from error
    dataset_id = convert_dataset_name_to_id(dataset_name)
    if len(find_candidate_datasets(dataset_id)) > 1:
        raise DatasetError(
            "an id that stands for several datasets, which nnU-Net's planner cannot tell apart",
            got=", ".join(find_candidate_datasets(dataset_id)),
            expected="one dataset for each id",
            remedy="Give one of them another id.",
        )
    workers = os.environ.get("nnUNet_n_proc_DA")
    if workers == "0":  # good for training; but the planner takes it for its number of threads, which cannot be 0
        os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        extract_fingerprints([dataset_id], num_processes=num_processes, clean=False)
        plan_experiments([dataset_id], _PLANNERS[identifier])
    finally:
        if workers is not None:
            os.environ["nnUNet_n_proc_DA"] = workers


def missing_preprocessed_cases(dataset_name: str, plans: dict[str, Any], configuration: str) -> list[str]:
    """Training cases that are not preprocessed yet, or not to the end.

    nnU-Net trains on whatever lies in the folder, so after an interrupted preprocessing it would do with fewer cases
    without a word.

    Args:
        dataset_name: For example ``Dataset004_Hippocampus``.
        plans: The plans.
        configuration: Name of a configuration in them.

    Raises:
        DatasetError: Nothing is preprocessed and there is no raw dataset to do it from.
        NnUNetPathError: ``nnUNet_preprocessed`` is not set.
    """
    data = nnunet_folder("nnUNet_preprocessed") / dataset_name
    data /= resolve_configuration(plans, configuration)["data_identifier"]
    done = {path.stem for path in data.glob("*.pkl")}  # the last file of a case that nnU-Net writes
    raw = Path(os.environ.get("nnUNet_raw", "")) / dataset_name
    if not os.environ.get("nnUNet_raw") or not (raw / "dataset.json").is_file():
        if done:
            return []
        raise DatasetError(
            "a dataset that is not preprocessed, and cannot be",
            got=f"no cases in {data}, and no dataset.json in {raw}",
            expected="the raw dataset, or one that is preprocessed",
            remedy="Put the dataset into nnUNet_raw.",
        )
    return sorted(set(get_filenames_of_train_images_and_targets(str(raw))) - done)


def write_plans(plans: dict[str, Any], path: str | os.PathLike[str], *, overwrite: bool) -> bool:
    """Write a plans file, whole or not at all.

    Args:
        plans: The plans.
        path: Where to.
        overwrite: Whether a file with other content may be replaced.

    Returns:
        Whether a file was written; False where the same plans stand there already.

    Raises:
        PlansError: A file with other content stands there and ``overwrite`` is False.
    """
    path = Path(path)
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(plans))
        except ValueError:
            same = False
        if same:
            return False
        if not overwrite:
            raise PlansError(
                "a plans file that differs stands there already",
                got=path,
                expected="no file, or the same plans",
                remedy="Choose another name with --name, or replace the whole file with --overwrite.",
            )
    write_json(plans, path)
    return True
