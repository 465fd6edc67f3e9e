"""nnU-Net's trainer for datasets in which each case annotates only some structures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from stunet.datasets import has_annotations, read_annotations
from stunet.files import write_json
from stunet.loss import PartialDiceCELoss
from stunet.planning import Mirroring
from stunet.training.annotations import CaseAnnotations, count_voxels
from stunet.training.distributed import DistributedTrainer
from stunet.training.label_augmentation import LocalLabelTransform
from stunet.training.summary import mask_summary

__all__ = ["PartialLabelTrainer"]

#: The axis from right to left in the arrays that nnU-Net's readers give, before its transposition.
_LEFT_RIGHT_AXIS = 2


class PartialLabelTrainer(DistributedTrainer):
    """Loss, sampling and validation that know what each case annotates.

    Where a dataset has no ``annotated_labels.json``, every case annotates everything, and this trains as nnU-Net does,
    with less memory for the loss. Region-based datasets keep nnU-Net's own loss.

    Attributes:
        mirroring: See :data:`stunet.planning.Mirroring`; ``no-left-right`` where structures come in sides.
        nearest_labels: Whether augmentation takes the nearest label instead of interpolating each label's map, whose
            cost grows with their number; see :class:`LocalLabelTransform` for how far.
        allow_unannotated: Whether structures that no training case annotates are put up with.
    """

    mirroring: Mirroring = "all"
    nearest_labels: bool = False
    allow_unannotated: bool = False

    label_manager: LabelManager

    def __init__(
        self,
        plans: dict,  # type: ignore[type-arg] # nnU-Net inspects this signature and wants it as its own
        configuration: str,
        fold: int,
        dataset_json: dict,  # type: ignore[type-arg]
        device: torch.device = torch.device("cuda"),  # noqa: B008 - likewise
    ) -> None:
        self._annotations: CaseAnnotations | None = None
        self._full_dataset_json = dataset_json
        if has_annotations(plans["dataset_name"]):
            self._annotations = CaseAnnotations.of(read_annotations(plans["dataset_name"], dataset_json))
            # The network has outputs for leaves alone, so that is what checkpoints and model folder describe.
            dataset_json = self._annotations.of_leaves(dataset_json)
        # A list of all cases with their paths, which nnU-Net would copy into every checkpoint.
        dataset_json = {key: value for key, value in dataset_json.items() if key != "dataset"}
        super().__init__(plans, configuration, fold, dataset_json, device)

    def _build_loss(self) -> nn.Module:
        stock: nn.Module = super()._build_loss()
        self._partial_loss: PartialDiceCELoss | None = None
        if self.label_manager.has_regions:
            return stock
        outputs = self.label_manager.num_segmentation_heads
        self._partial_loss = PartialDiceCELoss(
            outputs if self._annotations is None else self._annotations.members,
            batch_dice=self.configuration_manager.batch_dice,
            ignore_label=self._ignore_value,
            ddp=self.is_ddp,
        )
        if not self.enable_deep_supervision:
            return self._partial_loss
        stock.loss = self._partial_loss  # nnU-Net's wrapper and its weights of the outputs stay
        return stock

    @property
    def _ignore_value(self) -> int | None:
        """The ignore label as it stands in the preprocessed data, where superclasses go before it."""
        value = self._full_dataset_json["labels"].get("ignore")
        return None if value is None else int(value)

    def on_train_start(self) -> None:
        """Also say what is annotated, and refuse what cannot be learned."""
        if self._annotations is not None:
            cases, _ = self.do_split()
            if not self.allow_unannotated:
                self._annotations.check_every_leaf_is_annotated(cases)
            per_case = self._annotations.mask(cases)[:, 1:].sum(1).double()
            self.print_to_log_file(
                f"Partial labels: {len(cases)} training cases annotate {per_case.mean():.1f} of "
                f"{self._annotations.num_outputs - 1} structures on average ({self._annotations.manifest.source})"
            )
        super().on_train_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, with the loss told what the batch's cases annotate."""
        with self._batch_annotations(batch):
            return cast("dict[str, Any]", super().train_step(batch))

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss and hard counts of one batch; unannotated structures count neither as hit nor as miss."""
        if self.label_manager.has_regions:
            return cast("dict[str, Any]", super().validation_step(batch))
        data = batch["data"].to(self.device, non_blocking=True)
        targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        targets = [target.to(self.device, non_blocking=True) for target in targets]
        # As in nnU-Net's steps, only CUDA computes in half precision.
        precision = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
        with self._batch_annotations(batch) as mask, precision:
            output = self.network(data)
            loss = self.loss(output, targets if self.enable_deep_supervision else targets[0])
        logits = output[0] if self.enable_deep_supervision else output
        counts = count_voxels(logits, targets[0], annotated=mask, ignore_label=self._ignore_value)
        return {
            "loss": loss.detach().cpu().numpy(), "tp_hard": counts.tp, "fp_hard": counts.fp, "fn_hard": counts.fn,
        }  # fmt: skip

    @contextmanager
    def _batch_annotations(self, batch: dict[str, Any]) -> Iterator[Tensor | None]:
        if self._annotations is None or self._partial_loss is None:
            yield None
            return
        mask = self._annotations.mask(batch["keys"])
        with self._partial_loss.annotated_in(mask):
            yield mask

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, drawing each case as often as the manifest says."""
        leaves = self.label_manager
        # Loaders look up places of labels as preprocessing has listed them, superclasses among them.
        self.label_manager = self.plans_manager.get_label_manager(self._full_dataset_json)
        try:
            train, validation = super().get_dataloaders()
        finally:
            self.label_manager = leaves
        if self._annotations is not None:
            for loader in (train, validation):
                self._weigh_cases(loader)
        return train, validation

    def _weigh_cases(self, augmenter: Any) -> None:
        assert self._annotations is not None
        single = isinstance(augmenter, SingleThreadedAugmenter)
        loader = augmenter.data_loader if single else augmenter.generator
        probabilities = self._annotations.sampling_probabilities(list(loader.indices))
        if probabilities is None:
            return
        loader.sampling_probabilities = probabilities
        if not single:
            augmenter.restart()  # its processes have a copy of the loader

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """nnU-Net's augmentation, with nearest labels where these are wanted, or the same labels in less time."""
        transforms: ComposeTransforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for index, transform in enumerate(transforms.transforms):
            if not isinstance(transform, SpatialTransform):
                continue
            if self.nearest_labels:
                transform.mode_seg = "nearest"
            else:
                transforms.transforms[index] = LocalLabelTransform.like(transform)
        return transforms

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802 - nnU-Net's
        """nnU-Net's choice, less the axes that must not be mirrored, in training or in prediction."""
        rotation, dummy_2d, initial_patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        axes = self._allowed_axes(axes)
        self.inference_allowed_mirroring_axes = axes or None  # prediction cannot do with an empty list
        return rotation, dummy_2d, initial_patch_size, axes

    def _allowed_axes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        if self.mirroring == "all":
            return axes
        if self.mirroring == "none":
            return ()
        left_right = list(self.plans_manager.transpose_forward).index(_LEFT_RIGHT_AXIS)
        if len(self.configuration_manager.patch_size) == 2:
            left_right -= 1  # slices along the first axis
        return tuple(axis for axis in axes if axis != left_right)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation; in ``summary.json`` what a case does not annotate is null and left out of means."""
        super().perform_actual_validation(save_probabilities)
        if self._annotations is None or self.local_rank != 0:
            return
        folder, ending = Path(self.output_folder) / "validation", self.dataset_json["file_ending"]
        if self._ignore_value != self.label_manager.ignore_label:
            # nnU-Net has taken a superclass for the ignore label: once more, with the one in the label maps.
            compute_metrics_on_folder(
                str(Path(self.preprocessed_dataset_folder_base) / "gt_segmentations"), str(folder),
                str(folder / "summary.json"), self.plans_manager.image_reader_writer_class(), ending,
                self.label_manager.foreground_labels, self._ignore_value, num_processes=default_num_processes,
            )  # fmt: skip
        path = folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8"))
        masked = mask_summary(summary, self._annotations.manifest, file_ending=ending)
        write_json(masked, path)
        dice = masked["foreground_mean"]["Dice"]
        text = "not defined" if dice is None else f"{dice:.4f}"
        self.print_to_log_file(f"Mean Validation Dice over what the cases annotate: {text}")
