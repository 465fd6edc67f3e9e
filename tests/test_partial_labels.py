"""Trainers on datasets whose cases annotate only some structures."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from made_trainers import make, narrow_plans
from masks import bind_manifest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from plans import DATASET_JSON
from stunet.errors import LabelError
from stunet.files import write_json
from stunet.labels.annotations import AnnotationManifest, order_manifest
from stunet.loss import PartialDiceCELoss, partial_dice_ce_loss
from stunet.training.labels import PartialLabels, count_voxels, mask_summary

LABELS = {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3, "kidney": 4}
CONTENT = {
    "version": 1,
    "groups": {"all": ["liver", "kidney_left", "kidney_right"]},
    "cases": {"a": "all", "b": ["liver"], "c": ["kidney"], "d": ["kidney_left", "kidney_right"]},
    "superclasses": {"kidney": ["kidney_left", "kidney_right"]},
    "weights": {"a": 2, "b": 0.5},
}
DATASET = {**DATASET_JSON, "labels": LABELS}


def manifest(content: dict[str, Any] = CONTENT, labels: dict[str, int] = LABELS) -> AnnotationManifest:
    return bind_manifest(content, labels=labels, source="test")


@pytest.fixture
def annotated(dataset: Path) -> Path:
    """A preprocessed dataset with the manifest above."""
    write_json(order_manifest(CONTENT), dataset / "annotated_labels.json")
    (dataset / "dataset.json").write_text(json.dumps(DATASET))
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["a", "b", "c"], "val": ["d"]}]))
    return dataset


def test_masks_have_a_column_for_each_label_value() -> None:
    annotations = PartialLabels(manifest())
    assert annotations.num_outputs == 4
    assert annotations.mask(["b", "c", "a"]).int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 0]]
    assert annotations.members.int().tolist()[4] == [0, 0, 1, 1]


def test_leaves_alone_are_described() -> None:
    described = PartialLabels(manifest()).of_leaves({**DATASET, "labels": {**LABELS, "ignore": 5}})
    assert described["labels"] == {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3, "ignore": 4}
    assert DATASET["labels"] == LABELS


def test_superclasses_must_follow_the_leaves() -> None:
    labels = {"background": 0, "kidney": 1, "kidney_left": 2, "kidney_right": 3, "liver": 4}
    with pytest.raises(LabelError, match="then the superclasses"):
        PartialLabels(manifest(labels=labels))


def test_a_structure_that_no_training_case_annotates() -> None:
    annotations = PartialLabels(manifest())
    annotations.check_every_leaf_is_annotated(["a", "b"])
    with pytest.raises(LabelError, match=r"kidney_left, kidney_right[\s\S]*allow_unannotated"):
        annotations.check_every_leaf_is_annotated(["b", "c"])  # "kidney" does not tell its sides apart


def test_cases_are_drawn_by_their_weights() -> None:
    annotations = PartialLabels(manifest())
    assert annotations.sampling_probabilities(["a", "b", "c"]) == pytest.approx([2 / 3.5, 0.5 / 3.5, 1 / 3.5])
    assert annotations.sampling_probabilities(["c", "d"]) is None


def naive_counts(predicted: np.ndarray, true: np.ndarray, masks: np.ndarray, ignore: int | None) -> np.ndarray:
    counts = np.zeros((3, 3))
    for p, t, mask in zip(predicted, true, masks, strict=True):
        for c in (1, 2, 3):
            if mask[c]:
                keep = t != ignore
                counts[:, c - 1] += [
                    (keep & (p == c) & (t == c)).sum(), (keep & (p == c) & (t != c)).sum(),
                    (keep & (p != c) & (t == c)).sum(),
                ]  # fmt: skip
    return counts


@pytest.mark.parametrize("ignore", [None, 5])
def test_online_counts_leave_unannotated_structures_out(ignore: int | None) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5, 6, 7), torch.randint(0, 6 if ignore else 5, (3, 1, 5, 6, 7))
    mask = PartialLabels(manifest()).mask(["a", "b", "c"])
    counts = count_voxels(logits, target.float(), annotated=mask, ignore_label=ignore)
    expected = naive_counts(logits.argmax(1).numpy(), target[:, 0].numpy(), mask.numpy(), ignore)
    np.testing.assert_array_equal(counts, expected)


def test_online_counts_are_nnunets_where_everything_is_annotated(dataset: Path) -> None:
    trainer = make(plans=narrow_plans())
    trainer.initialize()
    batch = random_batch(trainer, ["x", "y"], 3)
    ours = trainer.validation_step(batch)
    theirs = nnUNetTrainer.validation_step(trainer, batch)
    for key in ("tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def random_batch(trainer: Any, keys: list[str], n_labels: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    full = torch.randint(0, n_labels, (len(keys), 1, 40, 56, 40), generator=generator).float()
    scales = trainer._get_deep_supervision_scales()
    targets = [full[(..., *(slice(None, None, round(1 / s)) for s in scale))] for scale in scales]
    data = torch.randn(len(keys), 1, 40, 56, 40, generator=generator)
    return {"data": data, "target": targets, "keys": keys}


def test_the_loss_of_every_trainer_is_nnunets_in_value_and_gradient(dataset: Path) -> None:
    trainer = make(plans=narrow_plans())
    trainer.initialize()
    assert isinstance(trainer.loss, PartialDiceCELoss)
    stock = nnUNetTrainer._build_loss(trainer)
    batch = random_batch(trainer, ["x", "y"], 3)
    logits = [torch.randn(2, 3, *t.shape[2:], requires_grad=True) for t in batch["target"]]
    values, gradients = [], []
    for loss in (trainer.loss, stock):
        value = loss(logits, batch["target"])
        values.append(value.item())
        # the coarsest output has the weight 0
        gradients.append(torch.autograd.grad(value, logits[:-1]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_heads_are_for_leaves_and_steps_know_the_cases(annotated: Path) -> None:
    trainer = make(plans=narrow_plans(), dataset_json=DATASET)
    trainer.initialize()
    assert trainer.network.decoder.seg_layers[-1].out_channels == 4
    assert "kidney" not in trainer.dataset_json["labels"]
    assert trainer.label_manager.all_labels == [0, 1, 2, 3, 4]  # in the data
    assert trainer.label_manager.foreground_labels == [1, 2, 3]  # that are predicted and scored
    batch = random_batch(trainer, ["b", "c"], 5)
    with torch.no_grad():
        logits = trainer.network(batch["data"])
    result = trainer.validation_step(batch)
    mask = PartialLabels(manifest()).mask(["b", "c"])
    weights = trainer.loss.weight_factors
    expected = sum(
        weight * oracle(out, target, mask)
        for weight, out, target in zip(weights, logits, batch["target"], strict=False)
    )
    assert float(result["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(oracle(logits[0], batch["target"][0], mask)) != pytest.approx(
        float(partial_dice_ce_loss(logits[0], batch["target"][0] % 4, batch_dice=False)), rel=1e-3
    )
    assert not result["tp_hard"][1:].any()  # "kidney" says nothing about its sides


def oracle(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy on summed probabilities and Dice, by definition, for two cases."""
    ce, dice = [], []
    members = {0: [0], 1: [1], 2: [2], 3: [3], 4: [2, 3]}
    for p, t, annotated in zip(logits.double().softmax(1), target[:, 0].long(), mask, strict=True):
        labels = [label for label in range(1, 5) if annotated[label]]
        covered = [c for label in labels for c in members[label]]
        merged = [c for c in range(4) if c not in covered]
        q = p[merged].sum(0)
        for label in labels:
            # kidney's sides are labels that case c does not annotate, but kidney contains them
            there = torch.isin(t, torch.tensor([label, *(members[label] if label == 4 else [])]))
            probability = p[members[label]].sum(0)
            q = torch.where(there, probability, q)
            dice.append((2 * (probability * there).sum() + 1e-5) / (probability.sum() + there.sum() + 1e-5))
        ce.append(-q.log())
    return torch.stack(ce).mean() - torch.stack(dice).mean()


def test_training_refuses_what_it_cannot_learn(annotated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    make(plans=narrow_plans(), dataset_json=DATASET).on_train_start()
    (annotated / "splits_final.json").write_text(json.dumps([{"train": ["b", "c"], "val": ["a"]}]))
    with pytest.raises(LabelError, match="kidney_left, kidney_right"):
        make(plans=narrow_plans(), dataset_json=DATASET).on_train_start()
    make(plans=narrow_plans(allow_unannotated=True), dataset_json=DATASET).on_train_start()


def test_an_epoch_without_dice_does_not_end_the_choice_of_the_best(dataset: Path) -> None:
    trainer = make()
    none, some = np.zeros(3), np.array([3.0, 0.0, 0.0])
    for epoch, (hits, expected) in enumerate(zip([none, some, none, some], [np.nan, 0.5, 0.5, 0.5], strict=True)):
        trainer.current_epoch = epoch
        counts = {"loss": np.float32(1), "tp_hard": hits, "fp_hard": hits, "fn_hard": hits}
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # mean of empty slice
            trainer.on_validation_epoch_end([counts])
        assert trainer._best_ema is None
        np.testing.assert_equal(trainer.logger.get_value("ema_fg_dice", step=-1), expected)
        trainer._best_ema = np.nan  # as nnU-Net takes it from the first epoch


def test_mirroring_leaves_the_sides_where_they_are(dataset: Path) -> None:
    choose = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    for policy, axes in (("all", (0, 1, 2)), ("no-left-right", (0, 1)), ("none", ())):
        trainer = make(plans=narrow_plans(mirroring=policy))
        assert getattr(trainer, choose)()[3] == axes
        assert trainer.inference_allowed_mirroring_axes == (axes or None)
    # the axis from right to left comes first after this transposition
    transposed = {**narrow_plans(mirroring="no-left-right"), "transpose_forward": [2, 0, 1]}
    assert getattr(make(plans=transposed), choose)()[3] == (1, 2)
    flat = make(plans=narrow_plans(mirroring="no-left-right"), configuration="2d")
    assert getattr(flat, choose)()[3] == (0,)


@pytest.mark.parametrize("nearest", [False, True])
def test_labels_are_interpolated_as_the_settings_say(dataset: Path, nearest: bool) -> None:
    trainer = make(plans=narrow_plans(nearest_labels=nearest))
    transforms = trainer.get_training_transforms([40, 56, 40], (-0.5, 0.5), None, (0, 1, 2), False, [False])
    (spatial,) = (t for t in transforms.transforms if isinstance(t, SpatialTransform))
    assert spatial.mode_seg == ("nearest" if nearest else "bilinear")


def entry(case: str, **dice: float) -> dict[str, Any]:
    metrics = {label.removeprefix("l"): {"Dice": value, "FP": 3, "n_pred": 5} for label, value in dice.items()}
    return {"reference_file": f"/gt/{case}.nii.gz", "prediction_file": f"/p/{case}.nii.gz", "metrics": metrics}


def test_summary_leaves_out_what_a_case_does_not_annotate() -> None:
    summary = {
        "metric_per_case": [
            entry("a", l1=0.8, l2=0.6, l3=math.nan), entry("b", l1=0.6, l2=0.0, l3=0.0),
            entry("d", l1=0.0, l2=0.4, l3=math.nan),
        ],
        "mean": {}, "foreground_mean": {"Dice": math.nan},
    }  # fmt: skip
    masked = mask_summary(summary, manifest(), file_ending=".nii.gz")
    assert masked["mean"]["1"]["Dice"] == pytest.approx(0.7)  # a and b
    assert masked["mean"]["2"]["Dice"] == pytest.approx(0.5)  # a and d
    assert masked["mean"]["3"]["Dice"] is None  # annotated by a and d, and absent there
    assert masked["foreground_mean"]["Dice"] == pytest.approx(0.6)
    assert masked["metric_per_case"][1]["metrics"]["2"] == {"Dice": None, "FP": None, "n_pred": 5}
    assert json.loads(json.dumps(masked, allow_nan=False)) == masked


def test_changed_annotations_are_noticed(annotated: Path, nnunet_folders: dict[str, Path]) -> None:
    raw = nnunet_folders["nnUNet_raw"] / annotated.name
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    write_json(order_manifest({**CONTENT, "weights": {}}), raw / "annotated_labels.json")
    with pytest.raises(Exception, match=r"annotated_labels\.json"):
        make(plans=narrow_plans(), dataset_json=DATASET)
