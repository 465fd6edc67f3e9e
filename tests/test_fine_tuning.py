"""Trainers that start from the weights the plans name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from made_trainers import make, narrow_plans, save, step, trained
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from plans import DATASET_JSON
from stunet.errors import CheckpointError, SettingsError, UsageError
from stunet.settings import Strategy
from stunet.training import BaseSTUNetTrainer

TARGET = {**DATASET_JSON, "labels": {"background": 0, "Spleen": 1, "tumour": 2, "liver": 3}}


@pytest.fixture
def checkpoint(dataset: Path) -> Path:
    """A trained STU-Net that knows liver and spleen."""
    return save(trained(make(plans=narrow_plans()), 1), "checkpoint_final.pth").rename(dataset / "source.pth")


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no cases here; what nnU-Net does at the start of a training beside the network is left out."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)


def start(checkpoint: Path, dataset_json: dict[str, Any] = TARGET, **settings: Any) -> BaseSTUNetTrainer:
    trainer = make(plans=narrow_plans(pretrained_weights=str(checkpoint), **settings), dataset_json=dataset_json)
    trainer.on_train_start()
    return trainer


def source_weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=False)["network_weights"]


def test_the_training_starts_from_the_weights_with_heads_by_name(checkpoint: Path) -> None:
    trainer, weights = start(checkpoint), source_weights(checkpoint)
    for key, value in trainer.network.state_dict().items():
        if ".seg_layers." in key:
            assert torch.equal(value[[0, 1, 3]], weights[key][[0, 2, 1]])
        else:
            assert torch.equal(value, weights[key])
    log = Path(trainer.log_file).read_text()
    assert f"Starting from {checkpoint}" in log
    assert "Spleen from spleen" in log
    report = json.loads((Path(trainer.output_folder) / "weight_transfer.json").read_text())
    assert report["head"]["structures"] == {
        "background": "background", "Spleen": "spleen", "tumour": None, "liver": "liver",
    }  # fmt: skip


def test_fresh_heads_and_other_channels_by_setting(checkpoint: Path) -> None:
    two_channels = {**TARGET, "channel_names": {"0": "CT", "1": "PET"}}
    trainer = start(checkpoint, two_channels, head="fresh", stem="zero-new")
    stem = trainer.network.state_dict()["encoder.stages.0.0.conv1.weight"]
    assert torch.equal(stem[:, :1], source_weights(checkpoint)["encoder.stages.0.0.conv1.weight"])
    assert not stem[:, 1].any()
    report = json.loads((Path(trainer.output_folder) / "weight_transfer.json").read_text())
    assert report["stem"] == {"policy": "zero-new", "source": 1, "target": 2}
    assert len(report["fresh"]) == 10


def test_a_decoder_that_begins_anew_is_trained(checkpoint: Path) -> None:
    trainer, weights = start(checkpoint, head="fresh-decoder"), source_weights(checkpoint)
    same = {key for key, value in trainer.network.state_dict().items() if torch.equal(value, weights[key])}
    assert {key for key in weights if key.startswith("encoder.")} <= same
    assert not any(key.endswith("conv1.weight") for key in same if key.startswith("decoder."))
    for strategy in ("full", "warmup", "frozen-encoder"):
        start(checkpoint, head="fresh-decoder", fine_tune=strategy)
    with pytest.raises(SettingsError, match=r"head-only .* head=fresh-decoder leaves decoder\..* random for ever"):
        start(checkpoint, head="fresh-decoder", fine_tune="head-only")


@pytest.mark.parametrize("head", ["fresh", "fresh-decoder"])
def test_fresh_heads_begin_at_0_from_scratch_too_but_not_in_resuming(dataset: Path, head: str) -> None:
    torch.manual_seed(0)
    drawn = make(plans=narrow_plans())
    drawn.on_train_start()
    torch.manual_seed(0)
    fresh = make(plans=narrow_plans(head=head))
    fresh.on_train_start()
    for key, value in fresh.network.state_dict().items():
        zeros = torch.zeros_like(value) if ".seg_layers." in key else drawn.network.state_dict()[key]
        assert torch.equal(value, zeros)
    torch.nn.init.ones_(fresh.network.decoder.seg_layers[-1].weight)
    latest = save(trained(fresh, 1), "checkpoint_latest.pth")
    resumed = make(plans=narrow_plans(head=head))
    resumed.load_checkpoint(str(latest))
    resumed.on_train_start()
    assert resumed.network.decoder.seg_layers[-1].weight.all()
    torch.testing.assert_close(resumed.network.state_dict(), fresh.network.state_dict(), rtol=0, atol=0)


def test_a_continued_training_keeps_its_own_weights(checkpoint: Path) -> None:
    first = trained(start(checkpoint), 1)
    latest = save(first, "checkpoint_latest.pth")
    checkpoint.unlink()  # not needed any more
    resumed = make(plans=narrow_plans(pretrained_weights=str(checkpoint)), dataset_json=TARGET)
    resumed.load_checkpoint(str(latest))
    resumed.on_train_start()
    assert resumed.current_epoch == 1
    torch.testing.assert_close(resumed.network.state_dict(), first.network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_resuming_continues_rates_momentum_and_frozen_parts(checkpoint: Path, strategy: str) -> None:
    settings = {"fine_tune": strategy, "num_epochs": 20, "initial_lr": 0.005}
    whole, resumed = start(checkpoint, **settings), start(checkpoint, **settings)
    torch.manual_seed(3)
    images = torch.randn(6, 1, 1, 40, 56, 40)
    step_through(whole, images[:3])
    latest = save(whole, "checkpoint_latest.pth")
    resumed.load_checkpoint(str(latest))
    resumed.on_train_start()
    rates = step_through(whole, images[3:])
    assert step_through(resumed, images[3:]) == rates
    assert [len(group) for group in rates] == [len(rates[0])] * 3
    torch.testing.assert_close(resumed.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)
    ours, theirs = (t.optimizer.state_dict() for t in (resumed, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    if strategy != "full":
        log = Path(resumed.log_file).read_text()
        assert f"Learning rates ({strategy}): heads " in log


def step_through(trainer: BaseSTUNetTrainer, images: Tensor) -> list[list[float]]:
    """One step an epoch, as nnU-Net's loop calls the trainer; the learning rates of each."""
    rates = []
    for image in images:
        trainer.on_train_epoch_start()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.zero_grad()
        sum(logits.square().mean() for logits in trainer.network(image)).backward()
        step(trainer)
        trained_log(trainer)
        trainer.current_epoch += 1
    return rates


def trained_log(trainer: BaseSTUNetTrainer) -> None:
    for key in ("train_losses", "val_losses", "mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps"):
        trainer.logger.log(key, 0.5, trainer.current_epoch)
    trainer.logger.log("dice_per_class_or_region", [0.5], trainer.current_epoch)


def test_weights_from_two_places_are_refused(checkpoint: Path) -> None:
    trainer = make(plans=narrow_plans(pretrained_weights=str(checkpoint)), dataset_json=TARGET)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(checkpoint))  # what nnUNetv2_train -pretrained_weights does
    with pytest.raises(UsageError, match="pre-trained weights from two places"):
        trainer.on_train_start()


def test_nnunets_pretrained_weights_go_with_a_strategy(checkpoint: Path) -> None:
    trainer = make(plans=narrow_plans(fine_tune="frozen-encoder"), dataset_json=TARGET)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(checkpoint))
    trainer.on_train_start()
    stem = "encoder.stages.0.0.conv1.weight"
    assert torch.equal(trainer.network.state_dict()[stem], source_weights(checkpoint)[stem])


@pytest.mark.parametrize("strategy", ["frozen-encoder", "head-only"])
def test_a_fresh_stem_that_would_never_be_trained(checkpoint: Path, strategy: str) -> None:
    with pytest.raises(SettingsError, match=rf"{strategy}[\s\S]*encoder\.stages\.0\.0\.conv1\.weight"):
        start(checkpoint, fine_tune=strategy, stem="random")


def test_weights_that_are_gone_or_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing checkpoint"):
        start(tmp_path / "nothing.pth")
    checkpoint.write_bytes(checkpoint.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="truncated"):
        start(checkpoint)


def test_warmup_longer_than_the_training(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="at most 4"):
        start(checkpoint, fine_tune="warmup", warmup_epochs=5, num_epochs=10)
