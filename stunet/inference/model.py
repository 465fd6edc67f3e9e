"""Trained models: what a folder or checkpoint describes, and its network, without running code out of either."""

import inspect
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from stunet.errors import CheckpointError, PlansError, UsageError, reading
from stunet.files import read_json
from stunet.labels.labels import Labels, load_vocabulary, vocabulary_for
from stunet.planning.model_folder import write_model_folder
from stunet.planning.plans import check_configuration
from stunet.weights.convert import open_weights
from stunet.weights.published import WeightsEntry, alone_with, entry_folder, fetch, find_entry, noted_sha256
from stunet.weights.read import MODEL_CARD, check_network, check_weights, read_checkpoint

CHECKPOINT = "checkpoint_final.pth"
_VOLUME_READERS = {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"}


@dataclass
class Model:
    """A trained nnU-Net v2 model: what is known of it before weights are loaded, and its network once it is used."""

    folder: Path  # the model folder; of a checkpoint by itself, the folder that it lies in
    plans: dict[str, Any]  # content of plans.json
    dataset_json: dict[str, Any]  # content of dataset.json
    configuration: str  # name of the configuration in the plans
    trainer_name: str  # the trainer that says how the network is built
    mirroring_axes: tuple[int, ...] | None  # axes that prediction may mirror; None for no mirroring
    checkpoints: dict[str, Path]  # file of each fold, by its name in fold_NAME
    trust: tuple[str, ...] = ()  # classes that its plans may name beyond the known ones
    _loaded = ""  # the fold whose weights the network has

    def __getstate__(self) -> dict[str, Any]:
        """Leave the network out: processes that read and write images need none."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def plans_manager(self) -> Any:
        """nnU-Net's view of the plans."""
        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> Any:
        """nnU-Net's view of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @cached_property
    def label_manager(self) -> Any:
        """nnU-Net's view of the labels."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """Label values of each structure that is predicted; regions have several."""
        return Labels(self.dataset_json).structures

    @property
    def file_ending(self) -> str:
        """What names of images and predictions end in."""
        return str(self.dataset_json["file_ending"])

    @property
    def reads_volumes(self) -> bool:
        """Whether its images are volumes, one channel a file."""
        return self.plans_manager.image_reader_writer_class.__name__ in _VOLUME_READERS

    @property
    def n_channels(self) -> int:
        """Channels of an image."""
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality", ())))

    @property
    def n_outputs(self) -> int:
        """Outputs of the network."""
        return int(self.label_manager.num_segmentation_heads)

    @cached_property
    def _network(self) -> nn.Module:
        return self.build_network().eval()

    @cached_property
    def _mapped(self) -> dict[str, dict[str, Tensor]]:
        """Weights of several folds, which stay in their files until they are used."""
        return {}

    @property
    def network(self) -> nn.Module:
        """The network in evaluation mode, with the first fold's weights."""
        return self.load_fold(next(iter(self.checkpoints)))

    def load_fold(self, fold: str) -> nn.Module:
        """Load the weights of a fold into the network, which is one for all folds, and return it."""
        if fold != self._loaded:
            weights = self._mapped.get(fold) or self.weights(fold)
            if len(self.checkpoints) > 1:
                self._mapped[fold] = weights
            self._network.load_state_dict(weights)
            self._loaded = fold
        return self._network

    def weights(self, fold: str) -> dict[str, Tensor]:
        """Map the weights of a fold from its file; they must fit the network, which takes no memory yet."""
        weights: dict[str, Tensor] = read_checkpoint(self.checkpoints[fold])["network_weights"]
        with torch.device("meta"):
            network = self.build_network()
        with reading(self.checkpoints[fold]):
            check_weights(weights, network.state_dict(), source=self.checkpoints[fold])
        return weights

    def build_network(self) -> nn.Module:
        """Build the network without its weights, as the trainer does for prediction.

        Raises:
            CheckpointError: The trainer is not installed.
            PlansError: No network can be built of the plans.
        """
        try:
            trainer: Any = recursive_find_trainer_class_by_name(self.trainer_name)
        except (RuntimeError, ImportError) as error:
            said = f"the trainer {self.trainer_name} of {self.folder} is not installed"
            raise CheckpointError(f"{said} ({error}): set nnUNet_extTrainer to the folder with it") from error
        with reading(self.folder, "a model folder that nnU-Net cannot use", PlansError):
            plans, configuration = self.plans_manager, self.configuration_manager
            n_in = determine_num_input_channels(plans, configuration, self.dataset_json)
            described: tuple[Any, ...] = (plans, configuration)
            if "plans_manager" not in inspect.signature(trainer.build_network_architecture).parameters:
                names = ("class_name", "init_kwargs", "init_kwargs_req_import")  # as before nnU-Net 2.6
                described = tuple(getattr(configuration, f"network_arch_{name}") for name in names)
            build: Callable[..., nn.Module] = trainer.build_network_architecture
            return build(*described, n_in, self.n_outputs, enable_deep_supervision=False)


def load_model(
    source: str | os.PathLike[str],
    folds: Sequence[str] | None = None,
    checkpoint_name: str = CHECKPOINT,
    *,
    trust: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Model:
    """Read a trained model. Its weights are loaded when they are first used.

    Args:
        source: A model folder of nnU-Net v2 with ``plans.json``, ``dataset.json`` and ``fold_*``; a checkpoint of its
            training; or the name of published weights, which are downloaded and converted once.
        folds: Names of folds, such as ``0`` or ``all``; None for those that are there, ``all`` only without others.
        checkpoint_name: File in each fold's folder.
        trust: Classes that the plans may name beyond the known ones.
        say: Told what is being downloaded and converted.

    Raises:
        PlansError: Plans or dataset description are missing or cannot be used.
        CheckpointError: A checkpoint is missing or cannot be read.
        UsageError: No published weights have this name.
        DownloadError: Published weights that cannot be downloaded.

    >>> model = load_model(model_folder)
    >>> model.structures
    {'structure_1': (1,), 'structure_2': (2,)}
    >>> model.network(torch.zeros(1, 1, 16, 16, 16)).shape  # one output for the background
    torch.Size([1, 3, 16, 16, 16])
    """
    folder = Path(source)
    if not folder.exists() and os.sep not in str(source):
        folder = published_model(find_entry(str(source)), say)
    if folder.is_file():
        if folds is not None or checkpoint_name != CHECKPOINT:
            raise UsageError(f"{folder} is one checkpoint: leave -f and -chk out, or name its model folder")
        checkpoints, checkpoint = {"0": folder}, read_checkpoint(folder)
        with reading(folder, "a checkpoint that was not written by nnU-Net v2's training"):
            plans, dataset_json = (dict(checkpoint["init_args"][name]) for name in ("plans", "dataset_json"))
            folder = folder.resolve().parent
    elif folder.is_dir():
        plans, dataset_json = (_read_json(folder / name) for name in ("plans.json", "dataset.json"))
        checkpoints = _find_checkpoints(folder, folds, checkpoint_name)
        checkpoint = read_checkpoint(next(iter(checkpoints.values())))
    else:
        raise PlansError(f"the model folder {folder} is missing: check -m, or -d, -tr, -p and -c")
    with reading(folder, "a model folder that nnU-Net cannot use", PlansError):
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        axes = None if axes is None else tuple(int(axis) for axis in axes)
        configuration, trainer = str(checkpoint["init_args"]["configuration"]), str(checkpoint["trainer_name"])
        model = Model(folder, plans, dataset_json, configuration, trainer, axes, checkpoints, tuple(trust))
        _check(model)
    return model


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        present = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) or "nothing"
        raise PlansError(f"{path.parent} has {present}, but no {path.name}: copy it from where the model was trained")
    with reading(path, "a file of the model that cannot be read", PlansError):
        return read_json(path)


def _find_checkpoints(folder: Path, folds: Sequence[str] | None, name: str) -> dict[str, Path]:
    present = {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{name}"))}
    if folds is None:
        folds = [fold for fold in present if fold != "all"] or list(present) or ["0"]
    missing = [f"fold_{fold}/{name}" for fold in folds if fold not in present]
    if missing or not folds:
        others = sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/checkpoint_*.pth"))
        found = f"{folder} has no {', '.join(missing)}, but {', '.join(others) or 'no checkpoint'}"
        raise CheckpointError(f"{found}: name a fold with -f, or a file with -chk")
    return {fold: present[fold] for fold in folds}


def _check(model: Model) -> None:
    """Check what others' plans say of images and labels; what else is wrong raises what it may."""
    configuration, n_axes = model.configuration_manager, len(model.configuration_manager.patch_size)
    if "channel_names" not in model.dataset_json and "modality" not in model.dataset_json:
        raise KeyError("channel_names")
    check_configuration(model.plans, configuration.configuration, model.n_channels)
    architecture = configuration.configuration["architecture"]
    check_network(architecture, source=str(model.folder / "plans.json"), trust=model.trust)
    if not re.fullmatch(r"(\.\w+)+", model.file_ending) or model.n_outputs < 1:
        raise ValueError(f"file_ending {model.file_ending[:40]}, {model.n_outputs} outputs")
    if not model.structures or any(not 0 < v < 2**16 for values in model.structures.values() for v in values):
        raise ValueError(f"labels {str(model.structures)[:100]}")
    resampling = [getattr(configuration, f"resampling_fn_{name}").func for name in ("data", "seg", "probabilities")]
    for found in (model.plans_manager.image_reader_writer_class, configuration.preprocessor_class, *resampling):
        if not str(getattr(found, "__module__", "")).startswith("nnunetv2."):
            raise ValueError(f"{found} is nothing that nnU-Net prepares images with")
    if any(not 0 <= axis < n_axes for axis in model.mirroring_axes or ()):
        raise ValueError(f"mirroring along {model.mirroring_axes}")


def published_model(entry: WeightsEntry, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the model folder of published weights in the cache; fetch and convert them where that was not done.

    Raises:
        CheckpointError: A file is not the published one.
        DownloadError: A download failed, can only be had by hand, or the cache cannot be written to.
        LabelError: Weights whose outputs nobody has named.
    """
    cached = entry_folder(entry.name) / entry.weights_file.file
    folder = entry_folder(entry.name).parents[1] / "models" / entry.name
    with alone_with(folder.with_name(".locks") / entry.name, say):  # of two commands that need them, one waits
        if not _is_made_of(folder / MODEL_CARD, cached, entry.weights_file.sha256):
            weights = open_weights([fetch(entry, say=say)])
            say(f"Converting {entry.name} into {folder}")
            labels = load_vocabulary(entry.labels) if entry.labels else vocabulary_for(entry.outputs)
            shutil.rmtree(folder, ignore_errors=True)
            write_model_folder(weights, labels, folder, licence=entry.licence)
    return folder


def _is_made_of(card: Path, weights: Path, sha256: str | None) -> bool:
    """Whether a model was converted from the weights in the cache, and from those that the registry knows."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        made_of = read_json(card)["sources"][0]["sha256"]
        return sha256 in (None, made_of) and (not weights.exists() or noted_sha256(weights) == made_of)
    return False
