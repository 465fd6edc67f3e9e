"""The trainer that all classes in ``trainers/`` derive from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch.optim import Optimizer

from stunet.errors import PlansError, SettingsError, UsageError
from stunet.files import write_json
from stunet.labels import outputs_of
from stunet.network import STUNetSize, find_size
from stunet.planning import (
    SETTINGS_KEY,
    MomentumDtype,
    Strategy,
    check_plans,
    is_stunet,
    open_preprocessed,
    plans_size,
    resolve_configuration,
    rewrite_configuration,
)
from stunet.training.checkpointing import CheckpointingTrainer
from stunet.training.optimizer import BF16MomentumSGD, set_kernel
from stunet.training.selection import TransferSelection
from stunet.training.strategies import GroupSchedule, freeze_others, parameter_groups
from stunet.weights import (
    HeadPolicy,
    StemPolicy,
    TransferReport,
    check_weights,
    open_weights,
    read_checkpoint,
    transfer_weights,
)

__all__ = ["BaseSTUNetTrainer"]


class BaseSTUNetTrainer(CheckpointingTrainer):
    """nnU-Net's trainer with a STU-Net in the plans, settings from the plans, and checkpoints that are always whole.

    The network is put into the plans before nnU-Net reads them, so ordinary plans train a STU-Net and the model folder
    describes itself: its ``plans.json`` is the rewritten one. Checkpoints name nnU-Net's built-in trainer, because the
    plans alone determine the network; prediction therefore needs this package but no ``nnUNet_extTrainer``.

    Attributes:
        size: Name of a published size, or None for the size that the plans have (``base`` where they have none).
        default_settings: Training settings that hold where the plans' ``"stunet"`` block does not set them.
    """

    size: ClassVar[str | None] = None
    default_settings: ClassVar[Mapping[str, Any]] = {}

    # Settings that nnU-Net's trainer does not have; see stunet.planning.SETTINGS.
    pretrained_weights: str | None = None
    fine_tune: Strategy = "full"
    warmup_epochs: int | None = None
    layer_decay: float = 0.85
    stem: StemPolicy = "repeat-scaled"
    head: HeadPolicy = "by-name"
    select_for: str | int | None = None
    keep_every: int | None = None
    final_validation: bool = True
    momentum_dtype: MomentumDtype = "fp32"
    fused_optimizer: bool = False

    _selection: TransferSelection | None = None
    _was_trained = False

    def __init__(
        self,
        plans: dict,  # type: ignore[type-arg] # nnU-Net inspects this signature and wants it as its own
        configuration: str,
        fold: int,
        dataset_json: dict,  # type: ignore[type-arg]
        device: torch.device = torch.device("cuda"),  # noqa: B008 - likewise
    ) -> None:
        self._goes_on = bool(plans.get("continue_training", False))
        plans = self._with_stunet(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings = {**self.default_settings, **self.configuration_manager.configuration.get(SETTINGS_KEY, {})}
        for name, value in settings.items():
            setattr(self, name, value)
        size = plans_size(self.configuration_manager.configuration)
        self.print_to_log_file(f"STU-Net {size.name}: depth {size.depth}, width {size.width}; settings {settings}")

    @classmethod
    def _with_stunet(cls, plans: dict[str, Any], configuration: str) -> dict[str, Any]:
        check_plans(plans, source=str(plans.get("plans_name", "the given plans")))
        size = cls._choose_size(plans, configuration)
        rewritten = rewrite_configuration(plans, configuration, size=size)
        # nnU-Net's command puts this key into the plans and its constructor takes it out again.
        continue_training = plans.get("continue_training", False)
        configurations = {**plans["configurations"], configuration: rewritten}
        return {**plans, "configurations": configurations, "continue_training": continue_training}

    @classmethod
    def _choose_size(cls, plans: dict[str, Any], name: str) -> STUNetSize:
        configuration = resolve_configuration(plans, name)
        if not is_stunet(configuration):
            others = [other for other, own in plans["configurations"].items() if is_stunet(own)]
            if others:
                # Their size was chosen when the plans were written; another one here would contradict the plans' name.
                raise PlansError(
                    "a configuration without a STU-Net in plans where others have one",
                    got=f"{name} of {plans.get('plans_name')}",
                    expected=f"one of {', '.join(others)}, or plans written for {name} too",
                    remedy=f"Write the plans again with `stunet plan`, leaving -c out or naming {name} in it.",
                )
            return find_size(cls.size or "base")
        planned = plans_size(configuration)
        if cls.size is not None and planned.name != cls.size:
            raise PlansError(
                "a trainer and plans that disagree on the size",
                got=f"-tr {cls.__name__} with plans of size {planned.name}",
                expected=f"plans of size {cls.size}, or ordinary nnU-Net plans",
                remedy="Take -tr STUNetTrainer (or STUNetTrainer_ft), which follows the plans, or other plans with -p.",
            )
        return planned

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """nnU-Net's optimizer, its parameters grouped as the strategy wants them, as lean as the plans want it."""
        if self.fine_tune == "full" and self.momentum_dtype == "fp32":
            optimizer, schedule = super().configure_optimizers()
            set_kernel(optimizer, fused=self.fused_optimizer)
            return optimizer, schedule
        network = self._plain_network()
        groups = parameter_groups(
            network,
            self.fine_tune,
            num_epochs=self.num_epochs,
            warmup_epochs=self.warmup_epochs,
            layer_decay=self.layer_decay,
        )
        freeze_others(network, groups)
        sgd = BF16MomentumSGD if self.momentum_dtype == "bf16" else torch.optim.SGD
        optimizer = sgd(
            [{"params": list(group.parameters), "name": group.name} for group in groups],
            self.initial_lr,
            weight_decay=self.weight_decay,
            momentum=0.99,
            nesterov=True,
        )
        set_kernel(optimizer, fused=self.fused_optimizer)
        return optimizer, GroupSchedule(optimizer, groups, self.initial_lr)

    def initialize(self) -> None:
        """Also leave out heads that the loss weighs 0, and remember the stem, by which other weights are noticed."""
        super().initialize()
        if self.enable_deep_supervision:
            weights = cast("DeepSupervisionWrapper", self.loss).weight_factors
            self._plain_network().decoder.supervised_levels = sum(weight != 0 for weight in weights)
        self._initial_stem = self._stem_weight().detach().clone()

    def on_train_start(self) -> None:
        """Also start from the plans' pre-trained weights, or go on from a checkpoint that nnU-Net does not know."""
        if not self.was_initialized:
            self.initialize()
        if self._goes_on and not self._continued and self.has_only_pieces():
            self.load_checkpoint(str(Path(self.output_folder, "checkpoint_latest.pth")))
        if self.pretrained_weights is not None and not self._continued:
            self._start_from(self.pretrained_weights)
        super().on_train_start()
        if self.local_rank == 0 and self.select_for is not None:
            target = open_preprocessed(str(self.select_for), "nnUNetPlans", self.configuration_name)
            self._selection = TransferSelection.prepare(
                target, Path(self.output_folder), self.device, self.print_to_log_file
            )

    def on_epoch_end(self) -> None:
        """Also keep checkpoints for good, and score the periodic one, where the plans ask for it."""
        super().on_epoch_end()
        done = self.current_epoch
        if done == self.num_epochs:  # checkpoint_final.pth is about to be written
            return
        if self.keep_every is not None and done % self.keep_every == 0:
            self._save_finished_epoch(f"checkpoint_epoch_{done:04d}.pth")
        if self.select_for is not None and done % self.save_every == 0:
            self._score_epoch(done)

    def on_train_end(self) -> None:
        """Also score the final checkpoint, where the plans name a dataset to select for."""
        super().on_train_end()
        self._was_trained = True
        if self._selection is not None:
            self._selection.score(Path(self.output_folder, "checkpoint_final.pth"), self.current_epoch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases; after a training only where the plans do not say otherwise."""
        if self._was_trained and not self.final_validation:
            self.print_to_log_file("No final validation, as the plans have final_validation=false; --val runs it")
            return
        super().perform_actual_validation(save_probabilities)

    def _save_finished_epoch(self, name: str) -> Path:
        path = Path(self.output_folder, name)
        self.current_epoch -= 1  # save_checkpoint counts the epoch that is being finished
        self.save_checkpoint(str(path))
        self.current_epoch += 1
        return path

    def _score_epoch(self, done: int) -> None:
        path = Path(self.output_folder, "checkpoint_latest.pth")
        if self.is_divided:  # then that is a folder; all processes put together what one of them scores
            path = self._save_finished_epoch("checkpoint_candidate.pth")
        if self._selection is not None:
            self._selection.score(path, done)
            if self.is_divided:
                path.unlink(missing_ok=True)

    def load_pretrained_weights(self, path: str | os.PathLike[str]) -> None:
        """``-pretrained_weights``: all but the heads, as nnU-Net takes them, from a checked file and on any device.

        Raises:
            CheckpointError: Truncated, no checkpoint, asks for code to be run, or of another network.
        """
        if not self.was_initialized:
            self.initialize()
        network = self._plain_network()
        weights, own = (
            {key: value for key, value in state.items() if ".seg_layers." not in key}
            for state in (read_checkpoint(path)["network_weights"], network.state_dict())
        )
        check_weights(weights, own, source=path)
        network.load_state_dict(weights, strict=False)
        self.print_to_log_file(f"Starting from the weights in {path}, all but the heads")

    def _start_from(self, path: str) -> None:
        if not torch.equal(self._stem_weight(), self._initial_stem):
            raise UsageError(
                "pre-trained weights from two places",
                got=f"-pretrained_weights, and {path} in the plans",
                expected="one of them",
                remedy="Leave -pretrained_weights out, or take plans without pretrained_weights.",
            )
        report = transfer_weights(
            open_weights([path]), self._plain_network(), outputs_of(self.dataset_json), stem=self.stem, head=self.head
        )
        self._check_fresh_parts(report)
        self.print_to_log_file(f"Starting from {report.source}")
        for what, count, which in report.rows():
            self.print_to_log_file(f"  {what}: {count}{f' ({which})' if which else ''}", add_timestamp=False)
        if self.local_rank == 0:
            write_json(report.as_dict(), Path(self.output_folder) / "weight_transfer.json")

    def _check_fresh_parts(self, report: TransferReport) -> None:
        network, unused = self._plain_network(), {id(parameter) for parameter in self._unused_parameters()}
        fresh = {key: network.get_parameter(key) for key in report.fresh}
        frozen = [key for key, value in fresh.items() if not value.requires_grad and id(value) not in unused]
        if frozen:
            raise SettingsError(
                f"random parameters that fine_tune={self.fine_tune} would never train",
                got=", ".join(frozen[:4]),
                expected="parameters from the source, or parameters that are trained",
                remedy=f"Choose another stem than {self.stem}, or another strategy.",
            )

    def on_train_epoch_start(self) -> None:
        """Also log the learning rate of each group where there are several."""
        super().on_train_epoch_start()
        groups = self.optimizer.param_groups
        if self.fine_tune != "full":
            rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in groups)
            self.print_to_log_file(f"Learning rates ({self.fine_tune}): {rates}")

    def load_checkpoint(self, filename_or_checkpoint: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint, with the optimizer's kernel that the plans want, not that of the checkpoint."""
        super().load_checkpoint(filename_or_checkpoint)
        set_kernel(self.optimizer, fused=self.fused_optimizer)

    def _stem_weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self._plain_network().get_parameter("encoder.stages.0.0.conv1.weight"))
