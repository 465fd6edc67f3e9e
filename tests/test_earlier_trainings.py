"""Checkpoints and a model folder as earlier code wrote them still resume, fine-tune and predict.

``data/earlier_training.tar.xz`` holds a narrow network after two layer-wise epochs (a model folder), one
sharded by two processes after one epoch, logits of the first, and sums over the tensors of the other.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from made_trainers import make, trained
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from stunet.labels.labels import Vocabulary
from stunet.planning.model_folder import write_model_folder
from stunet.training import BaseSTUNetTrainer
from stunet.weights.convert import open_weights
from stunet.weights.read import read_checkpoint


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).parent / "data" / "earlier_training.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
    return folder


def make_trainer(earlier: Path, **settings: object) -> BaseSTUNetTrainer:
    plans = json.loads((earlier / "model" / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["stunet"] = settings
    return make(plans=plans, dataset_json=json.loads((earlier / "model" / "dataset.json").read_text()))


def logits(trainer: BaseSTUNetTrainer) -> torch.Tensor:
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        image = torch.linspace(-2, 2, 32 * 48 * 40).sin().reshape(1, 1, 32, 48, 40)
        return trainer.network(image)[:, :, ::8, ::8, ::8]


def test_a_checkpoint_resumes_and_predicts(dataset: Path, earlier: Path) -> None:
    file = earlier / "model" / "fold_0" / "checkpoint_latest.pth"
    trainer = make_trainer(earlier, fine_tune="layerwise")
    trainer.load_checkpoint(file)
    assert trainer.current_epoch == 2
    torch.testing.assert_close(logits(trainer), torch.load(earlier / "logits.pt")["logits"], rtol=1e-3, atol=1e-3)
    written = read_checkpoint(file)["optimizer_state"]
    resumed = trainer.optimizer.state_dict()
    assert [g["name"] for g in resumed["param_groups"]] == [g["name"] for g in written["param_groups"]]
    torch.testing.assert_close(resumed["state"], written["state"], rtol=0, atol=0)
    trainer.set_deep_supervision_enabled(True)
    trained(trainer, 3)


def test_a_sharded_checkpoint_resumes_in_one_process(dataset: Path, earlier: Path) -> None:
    trainer = make_trainer(earlier, parallel="fsdp", initial_lr=1e-3)
    shutil.copytree(earlier / "checkpoint_latest.dcp", Path(trainer.output_folder, "checkpoint_latest.dcp"))
    trainer.load_checkpoint(Path(trainer.output_folder, "checkpoint_latest.pth"))
    assert trainer.current_epoch == 1
    momenta = trainer.optimizer.state_dict()["state"]
    found = {name: float(value.sum()) for name, value in trainer.network.state_dict().items()}
    found |= {f"momentum {number}": float(values["momentum_buffer"].sum()) for number, values in momenta.items()}
    assert found == pytest.approx(torch.load(earlier / "sums.pt")["sum"], rel=1e-5, abs=1e-5)
    trained(trainer, 2)


def test_fine_tuning_starts_from_it(dataset: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    file = earlier / "model" / "fold_0" / "checkpoint_latest.pth"
    trainer = make_trainer(earlier, pretrained_weights=str(file))
    trainer.on_train_start()
    torch.testing.assert_close(logits(trainer), torch.load(earlier / "logits.pt")["logits"], rtol=1e-3, atol=1e-3)


def test_it_becomes_a_model_folder(earlier: Path, tmp_path: Path) -> None:
    weights = open_weights([earlier / "model" / "fold_0" / "checkpoint_latest.pth"])
    write_model_folder(weights, Vocabulary("mine", ("background", "liver", "spleen"), "mine"), tmp_path / "out")
    written = read_checkpoint(tmp_path / "out" / "fold_0" / "checkpoint_final.pth")
    torch.testing.assert_close(written["network_weights"], dict(weights.tensors), rtol=0, atol=0)
