"""Pre-training without labels: the trainer of the tasks in ``stunet.pretexts``."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch import distributed as dist

from stunet.errors import SettingsError
from stunet.files import atomic_path
from stunet.pretexts import Pretext, PretextNetwork, find_pretext
from stunet.settings import SETTINGS_KEY
from stunet.training.trainer import BaseSTUNetTrainer
from stunet.weights.read import PRETEXT_ONLY

#: Largest rotation in augmentation where a task asks how images lie; radians.
_SMALL_ROTATION = 10 / 360 * 2 * np.pi


class PretextTrainer(BaseSTUNetTrainer):
    """Pre-train a STU-Net on images alone, by the task that the plans' ``pretext`` names.

    Patches, intensities and spatial augmentation are nnU-Net's; labels are loaded with the patches, and not looked at.
    Of a dataset that was imported without labels, the mask of the body still decides where a share of the patches lies.

    Checkpoints hold the whole network, like any other, and under ``pretext`` the task, its settings, its heads, and
    which parts it trained: fine-tuning and ranking take these alone. ``progress.png`` has the task's own measures, of
    validation cases; the best checkpoint is that of the best first measure.
    """

    with_labels = False
    default_settings: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        plans: dict,  # type: ignore[type-arg] # nnU-Net inspects this signature and wants it as its own
        configuration: str,
        fold: int,
        dataset_json: dict,  # type: ignore[type-arg]
        device: torch.device = torch.device("cuda"),  # noqa: B008 - likewise
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.pretext is None:
            raise SettingsError(
                f"-tr {type(self).__name__} with plans of no pretext: write plans with stunet plan --pretext NAME"
            )
        if self.fine_tune in ("frozen-encoder", "head-only"):
            raise SettingsError(
                f"fine_tune={self.fine_tune} with pretext={self.pretext}, which trains the encoder: "
                "set it to full, warmup or layerwise"
            )
        self.enable_deep_supervision = False
        self.partial_labels = None
        given = self.configuration_manager.configuration.get(SETTINGS_KEY, {})
        if not self.dataset_json.get("unlabelled") and "oversample_foreground_percent" not in given:
            self.oversample_foreground_percent = 0.0
        self.logger.local_logger = PretextLogger()

    # The network

    @property
    def task(self) -> Pretext:
        """The self-supervised task."""
        return cast("PretextNetwork", self.whole_network).pretext

    @property
    def max_gradient_norm(self) -> float:
        """What the task wants."""
        return self.task.max_gradient_norm

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: no task has outputs at several levels."""

    def _build_loss(self) -> nn.Module:
        return nn.Identity()  # each task has its own

    # Data

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Keep what is spatial in nnU-Net's augmentation: what intensities do is up to the task."""
        spatial = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)
        transforms = super().get_training_transforms(*args, **kwargs)
        transforms.transforms = [each for each in transforms.transforms if isinstance(each, spatial)]
        return transforms

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802 - nnU-Net's
        """Take nnU-Net's choice; without mirroring and large rotations where the task asks how images lie."""
        rotation, dummy, size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if find_pretext(self.pretext).oriented:
            rotation, axes = (-_SMALL_ROTATION, _SMALL_ROTATION), ()
        return rotation, dummy, size, axes

    # The training

    def on_train_start(self) -> None:
        """Also let the plans beside the checkpoints say that there is nothing to predict with."""
        plans: dict[str, Any] = deepcopy(
            self.plans_manager.plans
        )  # the checkpoints keep those that the network was built by
        plans["configurations"][self.configuration_name]["architecture"]["network_class_name"] = PRETEXT_ONLY
        self.plans_manager: PlansManager = PlansManager(plans)
        super().on_train_start()

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return loss and measures of one batch, and keep a picture of the last one."""
        whole = self._on_device(batch)
        with self.precision():
            step = self.network(whole.data)
        self._picture = {title: image.float().cpu() for title, image in step.picture.items()}
        measures = {name: float(value) for name, value in step.measures.items()}
        return {"loss": step.loss.detach().cpu().numpy(), **measures}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the means of loss and measures over all processes."""
        means = {name: np.mean([output[name] for output in val_outputs]) for name in val_outputs[0]}
        if self.is_ddp:
            of_all: list[Any] = [None] * self.ranks.size
            dist.all_gather_object(of_all, means)
            means = {name: np.mean([each[name] for each in of_all]) for name in means}
        loss = means.pop("loss")
        self.logger.log("val_losses", loss, self.current_epoch)
        # What nnU-Net chooses the best checkpoint by: higher is better.
        self.logger.log("mean_fg_dice", self.task.score(means), self.current_epoch)
        self.logger.log("dice_per_class_or_region", [means[name] for name in means], self.current_epoch)
        self.logger.local_logger.names, self.logger.local_logger.chance = list(means), dict(self.task.chance)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        """Print the measures by their names where nnU-Net prints pseudo Dice."""
        if args and args[0] == "Pseudo dice":
            values = zip(self.logger.local_logger.names, args[1], strict=True)
            args = (", ".join(f"{name} {value}" for name, value in values),)
        elif args and isinstance(args[0], str):
            args = (args[0].replace("EMA pseudo Dice", "moving average of the score"), *args[1:])
        super().print_to_log_file(*args, **kwargs)

    def on_epoch_end(self) -> None:
        """Also draw what the task has made of a validation case, each time a checkpoint is due."""
        super().on_epoch_end()
        if self.local_rank == 0 and self._picture and self.current_epoch % self.save_every == 0:
            draw_montage(self._picture, Path(self.output_folder, "montage.png"))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing but say why."""
        self.print_to_log_file("No validation: this network was trained without labels. Fine-tune it, or rank it")


class PretextLogger(LocalLogger):
    """nnU-Net's log with the task's measures in place of Dice; ``progress.png`` shows them with their chance level."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.chance: dict[str, float] = {}

    def plot_progress_png(self, output_folder: str) -> None:
        """Plot losses and measures, one below the other."""
        log = self.my_fantastic_logging
        panels = {"loss": {"training": log["train_losses"], "validation": log["val_losses"]}}
        for name, values in zip(self.names, zip(*log["dice_per_class_or_region"], strict=True), strict=True):
            chance = {"nothing learned": [self.chance[name]] * len(values)} if name in self.chance else {}
            panels[name] = {"validation cases": list(values), **chance}
        figure = Figure(figsize=(9, 3 * len(panels)), layout="constrained")
        for axes, (name, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            for title, values in curves.items():
                axes.plot(values, "--" if title == "nothing learned" else "-", label=title)
            axes.set(xlabel="epoch", ylabel=name)
            axes.legend()
        figure.savefig(Path(output_folder, "progress.png"))


def draw_montage(pictures: dict[str, Tensor], path: Path) -> None:
    """Draw the central planes of images of a case, ``(X, Y[, Z])``, side by side, on the last one's grey scale."""
    planes = {title: image[len(image) // 2] if image.ndim == 3 else image for title, image in pictures.items()}
    low, high = (float(value) for value in [*planes.values()][-1].aminmax())
    figure = Figure(figsize=(4 * len(planes), 4.3), layout="constrained")
    for axes, (title, plane) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes.items(), strict=True):
        axes.imshow(plane.numpy(), cmap="gray", vmin=low, vmax=high)
        axes.set_title(title)
        axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
