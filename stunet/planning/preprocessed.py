"""Preprocessed cases of a dataset, read with nnU-Net's own code."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from stunet.environment import find_dataset, find_plans, nnunet_folder, preprocessed_folder
from stunet.errors import DatasetError, UsageError, reading
from stunet.labels.annotations import MANIFEST_NAME, AnnotationManifest, read_manifest
from stunet.labels.labels import Labels
from stunet.planning.plans import load_plans, resolve_configuration


@dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """One case as the network sees it."""

    name: str
    image: npt.NDArray[np.float32]  # (C, X, Y, Z), normalised and resampled
    segmentation: npt.NDArray[np.int16]  # (X, Y, Z); -1 outside the image's nonzero part


class PreprocessedDataset:
    """The preprocessed cases of one configuration, sorted, with the plans and the description that they belong to."""

    def __init__(self, name: str, plans: dict[str, Any], configuration: str) -> None:
        self.name = name
        self.plans = plans
        self.configuration_name = configuration
        self.configuration = resolve_configuration(plans, configuration)  # with what it inherits
        self._base = nnunet_folder("nnUNet_preprocessed") / name
        self._folder = preprocessed_folder(name, plans, configuration)
        self.dataset_json: dict[str, Any] = _read_json(self._base / "dataset.json")
        self._dataset = infer_dataset_class(str(self._folder))(str(self._folder))
        self.cases: list[str] = sorted(self._dataset.identifiers)
        #: Of voxels that nobody annotated.
        self.ignore_label: int | None = PlansManager(plans).get_label_manager(self.dataset_json).ignore_label

    @property
    def input_channels(self) -> int:
        """Channels of the images."""
        return len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])

    @property
    def structures(self) -> dict[int, str]:
        """Name of each label value, background and the ignore label left out; regions have no one name."""
        structures = Labels(self.dataset_json).structures.items()
        return {values[0]: name for name, values in structures if len(values) == 1}

    @cached_property
    def _manifest(self) -> AnnotationManifest:
        return read_manifest(self._base / MANIFEST_NAME, labels=self.dataset_json["labels"])

    def annotated(self, case: str) -> frozenset[int]:
        """Return the label values that a case annotates: all of them, unless a manifest says otherwise."""
        return frozenset(self.structures if self._manifest.is_complete else self._manifest.annotated(case))

    def check_origin(self) -> None:
        """Check on one case that the data were preprocessed with these plans: its shape and its channels are theirs."""
        if self.configuration.get("preprocessor_name") != "DefaultPreprocessor":
            return
        case = self.cases[0]
        image, properties = self.load(case).image, self._dataset.load_case(case)[-1]
        try:
            spacing = [properties["spacing"][axis] for axis in self.plans["transpose_forward"]]
            before = properties["shape_after_cropping_and_before_resampling"]
        except KeyError:  # not as nnU-Net's preprocessing leaves them
            return
        planned = [*spacing[: len(spacing) - len(self.configuration["spacing"])], *self.configuration["spacing"]]
        expected = (self.input_channels, *compute_new_shape(before, spacing, planned).tolist())
        if image.shape != expected:
            got = f"{case} in {self._folder} has shape {tuple(image.shape)} instead of {expected}, as planned"
            raise DatasetError(f"{got}: remove this folder, and run nnUNetv2_preprocess again")

    def training_cases(self, fold: str) -> list[str]:
        """List the cases that a fold trains on."""
        if fold == "all":
            return self.cases
        path = self._base / "splits_final.json"
        if not path.is_file():
            raise DatasetError(f"no {path}, as no fold was trained yet: leave -f out, or train one")
        splits = _read_json(path)
        if not fold.isdigit() or int(fold) >= len(splits):
            raise UsageError(f"no fold {fold}: choose one of 0 to {len(splits) - 1}, or all")
        return sorted(set(splits[int(fold)]["train"]) & set(self.cases))

    def load(self, case: str) -> PreprocessedCase:
        """Read one case."""
        with reading(f"{case} in {self._folder}", "damaged", DatasetError, "preprocess it again"):
            image, segmentation, _, _ = self._dataset.load_case(case)
            labels = np.asarray(segmentation[:])[0].astype(np.int16)
            return PreprocessedCase(case, np.asarray(image[:], dtype=np.float32), labels)

    def choose(self, cases: Sequence[str], n: int, seed: int) -> list[str]:
        """Draw at most ``n`` of the cases by seed, sorted."""
        if n >= len(cases):
            return sorted(cases)
        drawn = np.random.default_rng(seed).choice(len(cases), n, replace=False)
        return sorted(cases[i] for i in drawn)


def open_preprocessed(dataset: str, plans: str, configuration: str) -> PreprocessedDataset:
    """Find the preprocessed cases of a dataset.

    Raises:
        DatasetError: Unknown, or not preprocessed with these plans; names the command that does it.
        PlansError: No such plans or configuration.
        NnUNetPathError: nnU-Net's variables are not set.
    """
    name = find_dataset(dataset)
    found = PreprocessedDataset(name, load_plans(find_plans(name, plans)), configuration)
    found.check_origin()
    return found


def _read_json(path: Path) -> Any:
    with reading(path, "a file of a preprocessed dataset that cannot be read", DatasetError, "preprocess it again"):
        return json.loads(path.read_text(encoding="utf-8"))
