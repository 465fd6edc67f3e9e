"""Trained model folders: what they describe, and their networks, without running code out of checkpoints."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet.errors import CheckpointError, PlansError, reading
from stunet.files import read_json
from stunet.inference.label_names import label_names
from stunet.labels import load_vocabulary, vocabulary_for
from stunet.planning import check_configuration, describe_model, write_model_folder
from stunet.weights import (
    WeightsEntry,
    alone_with,
    check_network,
    check_weights,
    entry_folder,
    fetch,
    open_weights,
    read_checkpoint,
    read_record,
)

__all__ = ["Model", "load_model", "published_model"]

CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class Model:
    """A model folder as far as it is known before weights are loaded.

    Attributes:
        folder: The folder.
        plans: Content of ``plans.json``.
        dataset_json: Content of ``dataset.json``.
        configuration: Name of the configuration in the plans.
        trainer_name: The trainer that says how the network is built.
        mirroring_axes: Axes that prediction may mirror; None for no mirroring.
        checkpoints: File of each fold, by its name in ``fold_NAME``.
        trust: Classes that its plans may name beyond the known ones, see :func:`stunet.weights.check_network`.
    """

    folder: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    checkpoints: dict[str, Path]
    trust: Sequence[str] = ()

    @property
    def plans_manager(self) -> Any:
        """nnU-Net's view of the plans."""
        return PlansManager(self.plans)

    @property
    def configuration_manager(self) -> Any:
        """nnU-Net's view of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @property
    def label_manager(self) -> Any:
        """nnU-Net's view of the labels."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    @property
    def file_ending(self) -> str:
        """What names of images and predictions end in."""
        return str(self.dataset_json["file_ending"])

    @property
    def n_channels(self) -> int:
        """Images of a case."""
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality", ())))

    @property
    def n_outputs(self) -> int:
        """Outputs of the network."""
        return int(self.label_manager.num_segmentation_heads)

    def build_network(self) -> nn.Module:
        """The network without its weights, as the trainer builds it for prediction.

        Raises:
            CheckpointError: The plans name a class that is not trusted, or the trainer is not installed.
            PlansError: No network can be built of the plans.
        """
        trainer = _find_trainer(self.trainer_name, self.folder)
        with reading(self.folder, "a model folder that nnU-Net cannot use", PlansError):
            plans, configuration = self.plans_manager, self.configuration_manager
            n_in = determine_num_input_channels(plans, configuration, self.dataset_json)
            architecture = configuration.configuration.get("architecture")
            check_network(architecture, source=f"{self.folder / 'plans.json'}", trust=self.trust)
            described: tuple[Any, ...] = (plans, configuration)
            if "plans_manager" not in inspect.signature(trainer.build_network_architecture).parameters:
                described = (  # as trainers before nnU-Net 2.6 want it
                    configuration.network_arch_class_name,
                    configuration.network_arch_init_kwargs,
                    configuration.network_arch_init_kwargs_req_import,
                )
            network: nn.Module = trainer.build_network_architecture(
                *described, n_in, self.n_outputs, enable_deep_supervision=False
            )
        return network

    def weights(self, fold: str) -> dict[str, Tensor]:
        """Weights of a fold, mapped from its file.

        Raises:
            CheckpointError: The file cannot be read, or its weights do not fit the network, which takes no memory yet.
        """
        weights: dict[str, Tensor] = read_checkpoint(self.checkpoints[fold])["network_weights"]
        with torch.device("meta"):
            network = self.build_network()
        with reading(self.checkpoints[fold]):
            check_weights(weights, network.state_dict(), source=self.checkpoints[fold])
        return weights

    def networks(self, device: torch.device) -> list[nn.Module]:
        """The networks of all folds, ready to predict.

        Raises:
            CheckpointError: Weights that do not fit the network, or a trainer that is not installed.
        """
        networks = []
        for fold in self.checkpoints:
            weights = self.weights(fold)
            network = self.build_network()
            network.load_state_dict(weights)
            networks.append(network.to(device).eval())
        return networks


def published_model(entry: WeightsEntry, say: Callable[[str], None] = lambda text: None) -> Path:
    """The model folder of published weights in the cache; fetched and converted there where that was not done.

    Args:
        entry: The weights.
        say: Told what is being done.

    Raises:
        CheckpointError: A file is not the published one.
        DownloadError: A download failed, can only be had by hand, or the cache cannot be written to.
        LabelError: Weights whose outputs nobody has named.
    """
    models = entry_folder(entry.name).parents[1] / "models"
    folder = models / entry.name
    with alone_with(models / ".locks" / entry.name, say):
        if not _is_made_of(folder, entry):
            weights = open_weights([fetch(entry, say=say)])
            say(f"Converting {entry.name} into {folder}")
            labels = load_vocabulary(entry.labels) if entry.labels else vocabulary_for(entry.outputs)
            description = describe_model(weights, labels)
            shutil.rmtree(folder, ignore_errors=True)
            write_model_folder(weights, description, folder, licence=entry.licence)
    return folder


def _is_made_of(folder: Path, entry: WeightsEntry) -> bool:
    """Whether a model folder was converted from the weights that are in the cache and in the registry now."""
    try:
        source = read_json(folder / "model_card.json")["sources"][0]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    record = read_record(entry_folder(entry.name) / entry.weights_file.file)
    known = {entry.weights_file.sha256, record.sha256 if record else None} - {None}
    return known <= {source}


def load_model(
    folder: str | os.PathLike[str],
    folds: Sequence[str] | None = None,
    checkpoint_name: str = CHECKPOINT,
    *,
    trust: Sequence[str] = (),
) -> Model:
    """Read a folder that nnU-Net's training wrote.

    Args:
        folder: With ``plans.json``, ``dataset.json`` and ``fold_*``.
        folds: Names of folds, such as ``0`` or ``all``; None for those that are there, ``all`` only without others.
        checkpoint_name: File in each fold's folder.
        trust: Classes that the plans may name beyond the known ones.

    Raises:
        PlansError: Plans or dataset description are missing or cannot be used.
        CheckpointError: A checkpoint is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PlansError("missing model folder", got=folder,
                         expected="a folder with plans.json, dataset.json and fold_0",
                         remedy="Check -m, or -d, -tr, -p and -c.")  # fmt: skip
    plans, dataset_json = (_read_json(folder / name) for name in ("plans.json", "dataset.json"))
    checkpoints = _find_checkpoints(folder, folds, checkpoint_name)
    first = next(iter(checkpoints.values()))
    checkpoint = read_checkpoint(first)
    remedy = "Copy the whole folder again from where it was trained."
    with reading(folder, "a model folder that nnU-Net cannot use", PlansError, remedy=remedy):
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        model = Model(
            folder,
            plans,
            dataset_json,
            str(checkpoint["init_args"]["configuration"]),
            str(checkpoint["trainer_name"]),
            None if axes is None else tuple(int(a) for a in axes),
            checkpoints,
            tuple(trust),
        )
        for needed in ("channel_names", "labels", "file_ending"):
            if needed not in dataset_json and not (needed == "channel_names" and "modality" in dataset_json):
                raise KeyError(needed)
        configuration = model.configuration_manager
        check_configuration(plans, configuration.configuration, model.n_channels)
        check_network(configuration.configuration["architecture"], source=str(folder / "plans.json"), trust=trust)
        if not re.fullmatch(r"(\.\w+)+", model.file_ending) or model.n_outputs < 1:
            raise ValueError(f"file_ending {model.file_ending[:40]}, {model.n_outputs} outputs")
        for name, values in label_names(dataset_json).structures.items():
            if any(not 0 < value < 2**16 for value in values):
                raise ValueError(f"label {values} of {name[:40]}")
        used = (model.plans_manager.image_reader_writer_class, configuration.preprocessor_class)
        resampling = (configuration.resampling_fn_data, configuration.resampling_fn_seg,
                      configuration.resampling_fn_probabilities)  # fmt: skip
        for found in (*used, *(function.func for function in resampling)):
            if not str(getattr(found, "__module__", "")).startswith("nnunetv2."):
                raise ValueError(f"{found} is nothing that nnU-Net prepares images with")
        if any(not 0 <= axis < len(configuration.patch_size) for axis in model.mirroring_axes or ()):
            raise ValueError(f"mirroring along {model.mirroring_axes}")
    return model


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_file():
        with reading(path, "a file of the model that cannot be read", PlansError,
                     remedy=f"Copy {path.name} from where the model was trained."):  # fmt: skip
            return read_json(path)
    present = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) or "nothing"
    raise PlansError(f"a model folder without {path.name}", got=f"{path.parent} with {present}",
                     expected=f"{path.name}, as training writes it",
                     remedy=f"Copy {path.name} from where the model was trained.")  # fmt: skip


def _find_checkpoints(folder: Path, folds: Sequence[str] | None, name: str) -> dict[str, Path]:
    present = {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{name}"))}
    if folds is None:
        folds = [fold for fold in present if fold != "all"] or list(present)
    missing = [fold for fold in folds if fold not in present]
    if missing or not folds:
        others = sorted({path.name for path in folder.glob("fold_*/checkpoint_*.pth")} - {name})
        found = ", ".join(f"fold_{fold}" for fold in present) or "none"
        raise CheckpointError(
            "missing checkpoint",
            got=f"{folder}: {name} of {found}" + (f"; other files: {', '.join(others)}" if others else ""),
            expected=", ".join(f"fold_{fold}/{name}" for fold in folds) or f"fold_0/{name}",
            remedy="Name the folds that are there with -f, or the file with -chk.",
        )
    return {fold: present[fold] for fold in folds}


def _find_trainer(name: str, folder: Path) -> Any:
    try:
        trainer = recursive_find_trainer_class_by_name(name)
    except (RuntimeError, ImportError) as error:
        raise _unknown_trainer(name, folder, str(error)) from error
    if trainer is None:
        raise _unknown_trainer(name, folder, "not found")
    return trainer


def _unknown_trainer(name: str, folder: Path, reason: str) -> CheckpointError:
    return CheckpointError("a trainer that is not installed",
                           got=f"{folder}: {name} ({reason.splitlines()[0][:200] if reason else 'not found'})",
                           expected="nnU-Net's own trainer, or one in the folder that nnUNet_extTrainer names",
                           remedy="Set nnUNet_extTrainer to the folder with this trainer.")  # fmt: skip
