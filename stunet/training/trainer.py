"""The trainer that all classes in ``trainers/`` derive from."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from stunet.errors import CheckpointError, PlansError, SettingsError, UsageError
from stunet.files import remove_leftovers, write_json
from stunet.labels.labels import Labels
from stunet.loss import PartialDiceCELoss, WholeBatch
from stunet.network import STUNet, find_size
from stunet.planning.plans import check_plans, is_stunet, plans_size, resolve_configuration, rewrite_configuration
from stunet.pretexts import Pretext, PretextNetwork, Step, WithLabels, find_pretext
from stunet.settings import SETTINGS, SETTINGS_KEY
from stunet.training.checkpoints import Checkpoints, TransferSelection
from stunet.training.distributed import Ranks, Sharding, seed_everything, share_of_batch
from stunet.training.labels import LocalLabelTransform, PartialLabels, count_voxels, mask_summary
from stunet.training.optimizer import (
    BF16MomentumSGD,
    GroupSchedule,
    ParameterGroup,
    freeze_others,
    parameter_groups,
    set_kernel,
)
from stunet.weights.convert import open_weights
from stunet.weights.read import check_weights, read_checkpoint
from stunet.weights.transfer import transfer_weights

#: The axis from right to left in the arrays that nnU-Net's readers give, before its transposition.
_LEFT_RIGHT_AXIS = 2

#: Methods of nnU-Net's trainer that these override or call, with their parameters; after a * may follow any.
_SEAMS = {
    "__init__": "plans configuration fold dataset_json device",
    "build_network_architecture":
        "plans_manager configuration_manager num_input_channels num_output_channels enable_deep_supervision *",
    "save_checkpoint": "filename", "load_checkpoint": "*", "get_training_transforms": "*", "print_to_log_file": "*",
    "set_deep_supervision_enabled": "enabled", "train_step": "batch", "validation_step": "batch",
    "on_validation_epoch_end": "val_outputs", "perform_actual_validation": "save_probabilities",
    **dict.fromkeys((
        "initialize", "configure_optimizers", "configure_rotation_dummyDA_mirroring_and_inital_patch_size", "do_split",
        "get_dataloaders", "on_train_start", "on_train_end", "on_epoch_start", "on_epoch_end", "on_train_epoch_start",
        "plot_network_architecture", "_build_loss", "_do_i_compile", "_set_batch_size_and_oversample",
    ), ""),
}  # fmt: skip


def check_seams(trainer: type = nnUNetTrainer) -> None:
    """Check that nnU-Net's trainer is one that those of this package know how to extend.

    Raises:
        UsageError: The installed nnU-Net has moved a method or a parameter.
    """
    for name, parameters in _SEAMS.items():
        method = getattr(trainer, name, None)
        found = [p for p in inspect.signature(method).parameters if p != "self"] if method else ["missing"]
        expected, *more = parameters.split("*")
        if (found[: len(expected.split())] if more else found) != expected.split() or not method:
            got = f"{trainer.__name__}.{name}({', '.join(found)}) of nnU-Net {version('nnunetv2')}"
            raise UsageError(f"{got} was {name}({', '.join(expected.split())}): install nnunetv2>=2.8.1,<2.9")


check_seams()


class BaseSTUNetTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a STU-Net in the plans, settings from the plans, and atomic checkpoints.

    The network is put into the plans before nnU-Net reads them, so ordinary plans train a STU-Net and the model folder
    describes itself: its ``plans.json`` is the rewritten one. Checkpoints name nnU-Net's built-in trainer, because the
    plans alone determine the network; prediction therefore needs this package but no ``nnUNet_extTrainer``.

    Loss, sampling and validation respect what each case annotates. Where a dataset has no ``annotated_labels.json``,
    every case annotates everything, and this trains as nnU-Net does, with less memory for the loss. Region-based
    datasets keep nnU-Net's own loss.

    Several processes may train on any number of machines, on CPUs too: the device is that of the *local* rank, and the
    batch need not be divisible. ``local_rank`` stays what nnU-Net makes of it, the rank among all, by which it chooses
    who writes. Under ``nnUNetv2_train -num_gpus`` nothing changes.

    Attributes:
        size: Name of a published size, or None for the size that the plans have (``base`` where they have none).
        default_settings: Training settings that hold where the plans' ``"stunet"`` block does not set them.
        partial_labels: What the cases annotate; None where each annotates everything.
        label_manager: The labels in the preprocessed data; of superclasses among them, the network has no outputs, nor
            has ``dataset_json``.
        is_ddp: Whether the network is shared among several processes.
        seed: Where it is set, each epoch of each process draws its random numbers from it, the rank and the epoch; with
            ``nnUNet_n_proc_DA=0`` a training then gives the same weights again, interrupted or not.

    Each training setting of :data:`stunet.settings.SETTINGS` is an attribute, too, with the default that it has there.
    """

    size: ClassVar[str | None] = None
    default_settings: ClassVar[Mapping[str, Any]] = {}
    seed: int | None = None
    with_labels = True
    network: nn.Module
    loss: nn.Module
    is_ddp: bool
    grad_scaler: Any
    _best_ema: float | None
    oversample_foreground_percent: float
    partial_loss: PartialDiceCELoss | None = None
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
        self.checkpoints = Checkpoints(self, asked_to_resume=bool(plans.get("continue_training", False)))
        self.ranks, self.sharding = Ranks.of_group(), Sharding(self)
        plans = self._with_stunet(plans, configuration)
        labelled = dataset_json
        self.partial_labels = PartialLabels.read(plans["dataset_name"], dataset_json)
        if self.partial_labels is not None:
            # The network has outputs for leaves alone, so that is what checkpoints and model folder describe.
            dataset_json = self.partial_labels.of_leaves(dataset_json)
        # A list of all cases with their paths, which nnU-Net would copy into every checkpoint.
        dataset_json = {key: value for key, value in dataset_json.items() if key != "dataset"}
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.partial_labels is not None:
            self.label_manager = self.partial_labels.label_manager(labelled)
        if self.is_ddp:
            self.device = torch.device("cuda", self.ranks.local_rank) if device.type == "cuda" else device
            self.grad_scaler = self.grad_scaler if device.type == "cuda" else None
        self.is_ddp = False  # until `initialize` has shared the network among the processes
        settings = {**self.default_settings, **self.configuration_manager.configuration.get(SETTINGS_KEY, {})}
        for name, value in settings.items():
            setattr(self, name, value)
        size = plans_size(self.configuration_manager.configuration)
        self.print_to_log_file(f"STU-Net {size.name}: depth {size.depth}, width {size.width}; settings {settings}")

    @classmethod
    def _with_stunet(cls, plans: dict[str, Any], name: str) -> dict[str, Any]:
        check_plans(plans, source=str(plans.get("plans_name", "the given plans")))
        configuration = resolve_configuration(plans, name)
        others = [other for other, own in plans["configurations"].items() if is_stunet(own)]
        planned = is_stunet(configuration)
        if others and not planned:
            # Their size was chosen when the plans were written; another one here would contradict the plans' name.
            where, listed = f"{name} of {plans.get('plans_name')}", ", ".join(others)
            raise PlansError(f"no STU-Net in {where}: choose one of {listed}, or plan it with -c {name}")
        size = plans_size(configuration) if planned else find_size(cls.size or "base")
        if cls.size not in (None, size.name):
            raise PlansError(f"-tr {cls.__name__} with plans of size {size.name}: take -tr STUNetTrainer, or other -p")
        configurations = {**plans["configurations"], name: rewrite_configuration(plans, name, size=size)}
        # nnU-Net's command puts the first key into the plans, and its constructor takes it out again.
        return {"continue_training": False, **plans, "configurations": configurations}

    # The network and what trains it

    def build_network_architecture(  # nnU-Net's is static, and is called on the trainer
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
        *args: Any,  # nnU-Net's next release gives more
        **kwargs: Any,
    ) -> nn.Module:
        """Build the STU-Net of the plans, with the heads of the self-supervised task that they may have beside it."""
        options = (num_input_channels, num_output_channels, enable_deep_supervision, *args)
        build: Any = nnUNetTrainer.build_network_architecture
        built: nn.Module = build(plans_manager, configuration_manager, *options, **kwargs)
        network = cast("STUNet", built)
        if self.pretext is None:
            return network
        kind, given = find_pretext(self.pretext), configuration_manager.configuration[SETTINGS_KEY]
        if kind.oriented and self.with_labels and self.mirroring != "none":
            got = f"pretext={self.pretext} beside labels with mirroring={self.mirroring}"
            raise SettingsError(f"{got}, after which it cannot tell how images lay: set mirroring=none")
        settings = {name: given[name] for name in kind.defaults if name in given}
        task = kind(network, configuration_manager.patch_size, settings)
        return PretextNetwork(network, task, with_labels=self.with_labels)

    def initialize(self) -> None:
        """Build network, optimizer and loss as nnU-Net does, but wrap the network for this process's own device.

        nnU-Net, which is told of one process until here, would wrap it for the GPU of the rank's number, which only one
        machine has. Heads that the loss weighs 0 are left out.
        """
        self._check_pretext()
        super().initialize()
        if self.pretext is not None and super()._do_i_compile():
            for part in (self.plain_network.encoder, *self.plain_network.decoder.stages):
                part.compile()
        if dist.is_initialized():
            self._share_network()
        if self.enable_deep_supervision:
            weights = cast("DeepSupervisionWrapper | PartialDiceCELoss", self.loss).weight_factors
            self.plain_network.decoder.supervised_levels = sum(weight != 0 for weight in weights)
        self._initial_stem = self._stem_weight().detach().clone()

    def _check_pretext(self) -> None:
        if self.pretext is None:
            return
        if self.sharding.enabled:
            raise SettingsError(f"parallel=fsdp with pretext={self.pretext}, whose heads stay whole: set parallel=ddp")
        least, n = find_pretext(self.pretext).min_batch, self.ranks.size * self.gradient_accumulation
        if (smallest := int(self.configuration_manager.batch_size) // n) < least:
            raise SettingsError(
                f"pretext={self.pretext} compares cases, and got {smallest} at a time: raise batch_size to {least * n}"
            )

    def _share_network(self) -> None:
        self.is_ddp = True
        self.loss = self._build_loss()  # again, for all processes
        if self.sharding.enabled:
            self.grad_scaler = None
            for tensor in self.plain_network.state_dict().values():
                dist.broadcast(tensor, src=0)  # each process has initialised its own
            return
        # DistributedDataParallel waits for the gradient of each parameter that has them switched on.
        for parameter in self._unused_parameters():
            parameter.requires_grad_(False)
        network, devices = self.network, None
        if self.device.type == "cuda":  # alone has such norms
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
            devices = [self.device.index]
        self.network = DistributedDataParallel(network, device_ids=devices)

    @property
    def whole_network(self) -> STUNet | PretextNetwork:
        """The network without the wrappers of PyTorch's that it may have, with the heads of a self-supervised task."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return cast("STUNet", network._orig_mod if isinstance(network, OptimizedModule) else network)

    @property
    def plain_network(self) -> STUNet:
        """The STU-Net alone."""
        whole = self.whole_network
        return whole.network if isinstance(whole, PretextNetwork) else whole

    @property
    def max_gradient_norm(self) -> float:
        """What gradients are clipped to: by nnU-Net's limit."""
        return Pretext.max_gradient_norm

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Let the network give the logits of all levels or not, whatever it is wrapped in."""
        self.plain_network.decoder.deep_supervision = enabled

    def _do_i_compile(self) -> bool:
        # A task draws in Python, anew in each step, so beside one the parts of the network are compiled.
        return not self.sharding.enabled and self.pretext is None and bool(super()._do_i_compile())

    def _set_batch_size_and_oversample(self) -> None:
        whole = int(self.configuration_manager.batch_size)
        mine = share_of_batch(whole, self.ranks)
        self.batch_size = len(mine)
        if self.ranks.size > 1:
            # The samples that nnU-Net's loader would force to hold foreground, were it one for all.
            first_forced = round(whole * (1 - self.oversample_foreground_percent))
            self.oversample_foreground_percent = sum(i >= first_forced for i in mine) / len(mine)

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """Make nnU-Net's optimizer, its parameters grouped by the strategy, as small as the plans want it."""
        if self.fine_tune == "full" and self.momentum_dtype == "fp32":
            optimizer, schedule = super().configure_optimizers()
        else:
            network, epochs = self.plain_network, {"num_epochs": self.num_epochs, "warmup_epochs": self.warmup_epochs}
            groups = parameter_groups(network, self.fine_tune, **epochs, layer_decay=self.layer_decay)
            freeze_others(network, groups)
            if isinstance(whole := self.whole_network, PretextNetwork):
                whole.freeze()
                known = {id(parameter) for parameter in network.parameters()}
                heads = tuple(p for p in whole.parameters() if id(p) not in known and p.requires_grad)
                groups.append(ParameterGroup("pretext", heads, groups[0].factor))
            sgd = BF16MomentumSGD if self.momentum_dtype == "bf16" else torch.optim.SGD
            named = [{"params": list(group.parameters), "name": group.name} for group in groups]
            optimizer = sgd(named, self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True)
            schedule = GroupSchedule(optimizer, groups, self.initial_lr)
        set_kernel(optimizer, fused=self.fused_optimizer)
        return optimizer, schedule

    def _build_loss(self) -> nn.Module:
        loss: nn.Module = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper):
            weights = np.array(loss.weight_factors)
            weights[-1] = 0  # with several processes too, for which nnU-Net makes it 1e-6
            loss.weight_factors = tuple(weights / weights.sum())
        if self.label_manager.has_regions:
            return loss
        self.partial_loss = PartialDiceCELoss(
            self.label_manager.num_segmentation_heads if self.partial_labels is None else self.partial_labels.members,
            batch_dice=self.configuration_manager.batch_dice,
            ignore_label=self.label_manager.ignore_label,
            ddp=self.is_ddp,
            weight_factors=getattr(loss, "weight_factors", (1.0,)),
        )
        return self.partial_loss

    def _unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the head whose loss weighs nothing."""
        return list(self.plain_network.decoder.seg_layers[0].parameters()) if self.enable_deep_supervision else []

    def _stem_weight(self) -> Tensor:
        return self.plain_network.get_parameter("encoder.stages.0.0.conv1.weight")

    # Weights to start from

    def load_pretrained_weights(self, path: str | os.PathLike[str]) -> None:
        """Load ``-pretrained_weights``: all but the heads, as nnU-Net does, from a checked file and on any device."""
        if not self.was_initialized:
            self.initialize()
        weights, own = (
            {key: value for key, value in state.items() if ".seg_layers." not in key}
            for state in (read_checkpoint(path)["network_weights"], self.plain_network.state_dict())
        )
        check_weights(weights, own, source=path)
        self.plain_network.load_state_dict(weights, strict=False)
        self.print_to_log_file(f"Starting from the weights in {path}, all but the heads")

    def _start_from(self, path: str) -> None:
        if not torch.equal(self._stem_weight(), self._initial_stem):
            raise UsageError(f"pre-trained weights from two places: drop -pretrained_weights, or {path} of the plans")
        network, outputs = self.plain_network, Labels(self.dataset_json).outputs
        report = transfer_weights(open_weights([path]), network, outputs, stem=self.stem, head=self.head)
        fresh, unused = {key: network.get_parameter(key) for key in report.fresh}, self._unused_parameters()
        stuck = [key for key, p in fresh.items() if not p.requires_grad and all(p is not other for other in unused)]
        if stuck and self.with_labels:  # a task without labels leaves what it does not train to fine-tuning
            listed = ", ".join(stuck[:4])
            given = f"fine_tune={self.fine_tune} with stem={self.stem} and head={self.head}"
            raise SettingsError(f"{given} leaves {listed} random for ever: change one of them")
        self.print_to_log_file(f"Starting from {report.source}")
        for what, count, which in report.rows():
            self.print_to_log_file(f"  {what}: {count}{f' ({which})' if which else ''}", add_timestamp=False)
        if self.local_rank == 0:
            write_json(report.as_dict(), Path(self.output_folder) / "weight_transfer.json")

    def save_checkpoint(self, filename: str, *, epochs: int | None = None) -> None:
        """Write a checkpoint after so many epochs; one more than are counted by default, as nnU-Net counts later."""
        self.checkpoints.save(Path(filename), self.current_epoch + 1 if epochs is None else epochs)

    def load_checkpoint(self, *path: str | os.PathLike[str], **named: str | os.PathLike[str]) -> None:
        """Resume from a checkpoint, the one argument, whose name changes with nnU-Net; see :meth:`Checkpoints.load`."""
        (given,) = (*path, *named.values())
        self.checkpoints.load(Path(given))

    def pretext_state(self) -> dict[str, Any]:
        """Return what checkpoints keep of a self-supervised task: its name, settings, what it trains, and its heads."""
        whole = self.whole_network
        if not isinstance(whole, PretextNetwork):
            return {}
        described = {"name": self.pretext, "settings": dict(whole.pretext.settings)}
        trains = ["encoder", "decoder"] if self.with_labels else list(whole.pretext.trains)
        return {"pretext": {**described, "trains": trains, "labels": self.with_labels, "weights": whole.heads()}}

    def load_pretext_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the heads of the task, which must be the same one."""
        theirs, whole = checkpoint.get("pretext") or {}, self.whole_network
        mine = dict(whole.pretext.settings) if isinstance(whole, PretextNetwork) else None
        if (theirs.get("name"), theirs.get("settings")) != (self.pretext, mine):
            raise CheckpointError(
                f"the checkpoint is of pretext={theirs.get('name')}, {theirs.get('settings')}, the plans are of "
                f"{self.pretext}, {mine}: continue with the plans it began with"
            )
        if isinstance(whole, PretextNetwork):
            whole.load_heads(theirs["weights"])

    # Data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Make nnU-Net's loaders, which draw each case as often as the manifest says."""
        augmenters: tuple[Any, Any] = super().get_dataloaders()
        if self.partial_labels is not None:
            for augmenter in augmenters:
                single = isinstance(augmenter, SingleThreadedAugmenter)
                loader = augmenter.data_loader if single else augmenter.generator
                loader.sampling_probabilities = self.partial_labels.sampling_probabilities(list(loader.indices))
                if not single and loader.sampling_probabilities is not None:
                    augmenter.restart()  # its processes have a copy of the loader
        return augmenters

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Make nnU-Net's augmentation, with nearest labels where these are wanted, or the same labels in less time."""
        transforms: ComposeTransforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for index, transform in enumerate(transforms.transforms):
            if isinstance(transform, SpatialTransform) and self.nearest_labels:
                transform.mode_seg = "nearest"
            elif isinstance(transform, SpatialTransform):
                transforms.transforms[index] = LocalLabelTransform.like(transform)
        return transforms

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802 - nnU-Net's
        """Take nnU-Net's choice, less the axes that must not be mirrored, in training or in prediction."""
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        left_right = list(self.plans_manager.transpose_forward).index(_LEFT_RIGHT_AXIS)
        if len(self.configuration_manager.patch_size) == 2:
            left_right -= 1  # slices along the first axis
        if self.mirroring != "all":
            axes = tuple(axis for axis in axes if self.mirroring == "no-left-right" and axis != left_right)
        self.inference_allowed_mirroring_axes = axes or None  # prediction cannot do with an empty list
        return *others, axes

    # The training

    def on_train_start(self) -> None:
        """Also resume or start from weights, refuse what cannot be learned, and shard the network."""
        if not self.was_initialized:
            self.initialize()
        self.checkpoints.resume_from_sharded()
        if self.pretrained_weights is not None and not self.checkpoints.resumed:
            self._start_from(self.pretrained_weights)
        elif self.head != "by-name" and not self.checkpoints.resumed:
            for parameter in self.plain_network.decoder.seg_layers.parameters():
                nn.init.zeros_(parameter)
        self._check_accumulation()
        if self.partial_labels is not None:
            cases, _ = self.do_split()
            if not self.allow_unannotated:
                self.partial_labels.check_every_leaf_is_annotated(cases)
            self.print_to_log_file(self.partial_labels.describe(cases))
        super().on_train_start()
        self.sharding.shard()
        if self.local_rank == 0:
            remove_leftovers(self.output_folder, "checkpoint_*")  # of a killed process
            self._selection = None if self.select_for is None else TransferSelection(self)

    def plot_network_architecture(self) -> None:
        """Plot the network, unless it is sharded: one process would wait for the others in it."""
        if self.sharding.group is None:
            super().plot_network_architecture()

    def on_epoch_start(self) -> None:
        """Also draw this epoch's random numbers from the seed."""
        super().on_epoch_start()
        if self.seed is not None:
            seed_everything(self.seed, self.ranks.rank, self.current_epoch)
        if isinstance(whole := self.whole_network, PretextNetwork):
            whole.pretext.progress = self.current_epoch / self.num_epochs

    def on_train_epoch_start(self) -> None:
        """Also log the learning rate of each group where there are several."""
        super().on_train_epoch_start()
        if self.fine_tune != "full":
            rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in self.optimizer.param_groups)
            self.print_to_log_file(f"Learning rates ({self.fine_tune}): {rates}")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take nnU-Net's step: a network, a loss that knows what the cases annotate, clipped gradients."""
        scaler = self.grad_scaler or GradScaler(enabled=False)
        self.optimizer.zero_grad(set_to_none=True)
        whole = self._on_device(batch)
        loss = self._backward(whole, scaler)
        scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.network.parameters(), self.max_gradient_norm)
        scaler.step(self.optimizer)
        scaler.update()
        if isinstance(self.whole_network, PretextNetwork):
            self.whole_network.pretext.after_step()
        return {"loss": self._read(loss, whole)}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return loss and hard counts of one batch; unannotated structures count neither as hit nor as miss."""
        if self.label_manager.has_regions:
            with self.precision(enabled=False):  # nnU-Net's own autocast, within, takes its type
                return cast("dict[str, Any]", super().validation_step(batch))
        whole = self._on_device(batch)
        with self.precision():
            output = self.network(whole.data)
            loss = self.loss_of(output, whole)
        logits, labels = (output[0], whole.target[0]) if isinstance(whole.target, list) else (output, whole.target)
        ignore_label = self.label_manager.ignore_label
        tp, fp, fn = count_voxels(logits, labels, annotated=whole.annotated, ignore_label=ignore_label)
        return {"loss": self._read(loss, whole), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Also keep the average of Dice, which chooses the best checkpoint, over epochs in which no Dice is defined."""
        super().on_validation_epoch_end(val_outputs)
        averages = self.logger.get_value("ema_fg_dice", step=None)
        if np.isnan(averages[-1]):  # no annotated structure occurred in this epoch, or in any before it
            defined = [average for average in averages if not np.isnan(average)]
            averages[-1] = defined[-1] if defined else self.logger.get_value("mean_fg_dice", step=-1)
        if self._best_ema is not None and np.isnan(self._best_ema):
            self._best_ema = None

    def _on_device(self, batch: dict[str, Any]) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        target = batch["target"]
        target = [moved(each) for each in target] if isinstance(target, list) else moved(target)
        annotated = None if self.partial_labels is None else self.partial_labels.mask(batch["keys"])
        return Batch(moved(batch["data"]), target, annotated)

    def _read(self, loss: Tensor, batch: Batch) -> npt.NDArray[np.float32]:
        """Wait for the loss of a batch; where it is NaN, that may be for its labels."""
        value = loss.detach().cpu().numpy()
        if self.partial_loss is not None and np.isnan(value):
            self.partial_loss.check_labels(batch.target)
        return cast("npt.NDArray[np.float32]", value)

    def precision(self, *, enabled: bool = True) -> AbstractContextManager[Any]:
        """Compute in half precision on CUDA alone, as nnU-Net does; in bf16 where the network is sharded."""
        if self.device.type != "cuda":
            return nullcontext()
        dtype = None if self.sharding.group is None else torch.bfloat16
        return torch.autocast("cuda", dtype=dtype, enabled=enabled)

    def loss_of(self, output: Any, batch: Batch) -> Tensor:
        """Return the loss of a network's output, given what the cases annotate; of a task, its share of the batch."""
        if isinstance(output, Step):
            return output.loss * (len(batch.data) / int(self.batch_size))
        if isinstance(output, WithLabels):
            share = self.loss_of(output.step, batch)
            return self.loss_of(output.logits, batch) + float(self.pretext_weight) * share
        known = nullcontext() if self.partial_loss is None else self.partial_loss.annotated_in(batch.annotated)
        with known:
            return cast("Tensor", self.loss(output, batch.target))

    # Gradient accumulation: the step is that of the whole batch, over the plans' number of micro-batches. The loss of a
    # micro-batch is weighed by what the whole batch annotates, which is counted first. With batch_dice that takes the
    # probabilities of the whole batch, so the network runs once more for each micro-batch, without gradients.

    def _check_accumulation(self) -> None:
        n = self.gradient_accumulation
        # The same in each process, so that all of them stop: the smallest share of the batch.
        smallest = int(self.configuration_manager.batch_size) // self.ranks.size
        if n > smallest:
            raise SettingsError(f"gradient_accumulation={n} for {smallest} samples a process: set at most {smallest}")
        if n > 1 and self.partial_loss is None and self.with_labels:
            raise SettingsError(f"gradient_accumulation={n} with regions: set activation_checkpointing=all instead")

    def _backward(self, batch: Batch, scaler: GradScaler) -> Tensor:
        """Add the scaled gradients of a batch to the network's, and return its loss."""
        network, partial_loss, losses, whole = self.network, self.partial_loss, list[Tensor](), WholeBatch()
        *others, last = micro_batches = batch.split(self.gradient_accumulation)
        if partial_loss is not None and others:
            for micro_batch in micro_batches:
                with torch.no_grad(), self.precision(), partial_loss.counted_in(whole):
                    # Targets stand in for logits where these are not read.
                    output = network(micro_batch.data) if partial_loss.batch_dice else micro_batch.target
                    self.loss_of(output, micro_batch)
        for micro_batch in micro_batches:
            # Processes exchange gradients with the last micro-batch's, all at once.
            waits = isinstance(network, DistributedDataParallel) and micro_batch is not last
            with cast("DistributedDataParallel", network).no_sync() if waits else nullcontext():
                part = partial_loss.as_part_of(whole) if partial_loss is not None and others else nullcontext()
                with self.precision(), part:
                    loss = self.loss_of(network(micro_batch.data), micro_batch)
                torch.autograd.backward(scaler.scale(loss))
            losses.append(loss.detach())
        return sum(losses[:-1], losses[-1])

    def on_epoch_end(self) -> None:
        """Also keep checkpoints for good, and score the periodic one, where the plans ask for it."""
        self.checkpoints.finish()  # the sharded one of the last epoch
        super().on_epoch_end()
        done, folder = self.current_epoch, Path(self.output_folder)
        if done == self.num_epochs:  # checkpoint_final.pth is about to be written
            return
        if self.keep_every is not None and done % self.keep_every == 0:
            self.save_checkpoint(str(folder / f"checkpoint_epoch_{done:04d}.pth"), epochs=done)
        if self.select_for is not None and done % self.save_every == 0:
            self._score(folder / "checkpoint_latest.pth", done)

    def _score(self, path: Path, done: int) -> None:
        if self.sharding.group is not None:  # then that is a folder; all processes gather what one of them scores
            path = path.with_name("checkpoint_candidate.pth")
            self.save_checkpoint(str(path), epochs=done)
        if self._selection is not None:
            self._selection.score(path, done)
            path.with_name("checkpoint_candidate.pth").unlink(missing_ok=True)

    def on_train_end(self) -> None:
        """Also replace sharded checkpoints by nnU-Net's files, and score the final one where the plans want it."""
        self.checkpoints.finish()
        super().on_train_end()
        self.checkpoints.replace_sharded()
        self._was_trained = True
        if self._selection is not None:
            self._selection.score(Path(self.output_folder, "checkpoint_final.pth"), self.current_epoch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases with the gathered network, each process cases of its own.

        After a training only where the plans do not say otherwise. In ``summary.json`` what a case does not annotate
        is null and left out of means.
        """
        if self._was_trained and not self.final_validation:
            self.print_to_log_file("No final validation, as the plans have final_validation=false; --val runs it")
            return
        self.sharding.gather()
        super().perform_actual_validation(save_probabilities)
        if self.partial_labels is not None and self.local_rank == 0:
            path = Path(self.output_folder, "validation", "summary.json")
            summary, ending = json.loads(path.read_text(encoding="utf-8")), self.dataset_json["file_ending"]
            masked = mask_summary(summary, self.partial_labels.manifest, file_ending=ending)
            write_json(masked, path)
            dice = masked["foreground_mean"]["Dice"]
            text = "not defined" if dice is None else f"{dice:.4f}"
            self.print_to_log_file(f"Mean Validation Dice over what the cases annotate: {text}; above, over all leaves")


for _name, _setting in SETTINGS.items():
    if _setting.place == "training":
        setattr(BaseSTUNetTrainer, _name, _setting.default)


@dataclass(frozen=True)
class Batch:
    """Images ``(B, C, X, Y[, Z])``, targets (a list with deep supervision), and what each case annotates."""

    data: Tensor
    target: Tensor | list[Tensor]
    annotated: Tensor | None

    def split(self, n: int) -> list[Batch]:
        """Split it into micro-batches that differ by one case at most."""
        bounds = [len(self.data) * i // n for i in range(n + 1)]
        return [self] if n == 1 else [self._of(slice(*pair)) for pair in pairwise(bounds)]

    def _of(self, cases: slice) -> Batch:
        target = [t[cases] for t in self.target] if isinstance(self.target, list) else self.target[cases]
        return Batch(self.data[cases], target, None if self.annotated is None else self.annotated[cases])
