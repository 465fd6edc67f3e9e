"""Published weights through ``stunet convert`` into the network that nnU-Net's own predictor builds."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from integration.commands import Shell
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from prediction_models import write_image
from weights import v1_plans, v1_stage

from stunet.datasets.phantoms import make_phantom
from stunet.network import build_stunet
from stunet.weights.convert import to_published_key

CASES = ["totalseg_strides", "anisotropic_2ch", "shallow_padded"]


def write_golden(golden: dict[str, Any], folder: Path, name: str) -> Path:
    """A golden case as the files of nnU-Net v1, with a list of labels."""
    spacing, patch = np.array([1.5, 1.5, 1.5]), np.array(golden["input"].shape[2:])
    stage = v1_stage(patch_size=patch, current_spacing=spacing, pool_op_kernel_sizes=golden["strides"])
    plans = v1_plans(golden["num_classes"], golden["input_channels"], plans_per_stage={0: stage})
    path = folder / f"{name}.model"
    torch.save({"epoch": 1, "state_dict": OrderedDict(golden["published_state_dict"])}, path)
    path.with_name(f"{path.name}.pkl").write_bytes(pickle.dumps(OrderedDict(init=(), name="x", plans=plans)))
    labels = ["background", *(f"structure {i}" for i in range(1, golden["num_classes"]))]
    path.with_suffix(".json").write_text(json.dumps(labels))
    return path


@pytest.fixture(scope="module")
def shell(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """The golden cases as published files, converted and converted back."""
    shell = Shell.make(tmp_path_factory.mktemp("convert"))
    for case in CASES:
        golden = torch.load(shared / "golden" / f"stunet_{case}.pt", weights_only=True)
        write_golden(golden, shell.root, case)
        shell.run(f"stunet convert {case}.model -o {case} --labels {case}.json")
        shell.run(f"stunet convert {case} -o {case}_back.model --to published")
    return shell


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_the_predictors_network_are_the_published_ones(
    shell: Shell, shared: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    golden = torch.load(shared / "golden" / f"stunet_{case}.pt", weights_only=True)
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(shell.root / case), (0,), "checkpoint_final.pth")
    assert predictor.allowed_mirroring_axes is None
    network = predictor.network.eval()
    with torch.no_grad():
        assert float((network(golden["input"]) - golden["outputs"][0]).abs().max()) <= 5e-5  # rounding of another order
        network.decoder.deep_supervision = True
        outputs = network(golden["input"])
    assert len(outputs) == 5
    for mine, theirs in zip(outputs, golden["outputs"], strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 5e-5


@pytest.mark.parametrize("case", CASES)
def test_back_to_published_bit_for_bit(shell: Shell, shared: Path, case: str) -> None:
    original = torch.load(shared / "golden" / f"stunet_{case}.pt", weights_only=True)["published_state_dict"]
    back = torch.load(shell.root / f"{case}_back.model", weights_only=True)["state_dict"]
    assert list(back) == list(original)
    for key, tensor in original.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key].view(torch.int32), tensor.view(torch.int32))


def test_stock_prediction(shell: Shell) -> None:
    """``nnUNetv2_predict`` on an image of another spacing than the model's, in a folder where nnU-Net looks for it."""
    image = sitk.ReadImage(
        write_image(shell.root / "images" / "a_0000.nii.gz", make_phantom(0, 6).image, (1.5, 2.0, 1.5))
    )
    model = shell.model("Dataset009_Golden", "nnUNetTrainer__nnUNetPlans__3d_fullres")
    shutil.copytree(shell.root / "totalseg_strides", model)
    output = shell.run(
        "nnUNetv2_predict -i images -o predictions -d 9 -c 3d_fullres -f 0 -device cpu -npp 0 -nps 0 --disable_tta"
    )
    assert "nnUNet_extTrainer" not in output
    labels = sitk.ReadImage(str(shell.root / "predictions" / "a.nii.gz"))
    assert labels.GetSize() == image.GetSize()
    assert labels.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(labels))) <= set(range(5))


@pytest.mark.parametrize("order", ["{model} {pkl} {plans}", "{plans} {model} {pkl}"])
def test_full_size_with_the_published_pickles(shell: Shell, shared: Path, order: str) -> None:
    """A small STU-Net of 105 outputs, random weights, with the pickles that belong to the published ones."""
    folder = shell.root / "small"
    model, out = folder / "small_ep4k.model", shell.root / f"model_{order[1]}"
    files = {"model": model, "pkl": folder / "small_ep4k.model.pkl", "plans": folder / "plans.pkl"}
    if not folder.is_dir():
        folder.mkdir()
        for name in ("small_ep4k.model.pkl", "plans.pkl"):
            shutil.copy(shared / "golden" / "published_plan_files" / name, folder)
        torch.manual_seed(0)
        weights = build_stunet("small", 1, 105, [1, 2, 2, 2, 2, (1, 1, 2)]).state_dict()
        state = OrderedDict((to_published_key(key), tensor) for key, tensor in weights.items())
        torch.save({"epoch": 4000, "state_dict": state, "optimizer_state_dict": None}, model)
    output = shell.run(f"stunet convert {order.format(**files)} -o {out}")
    assert "STU-Net small, 14.6M parameters" in output
    assert f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {out} -f 0" in output

    configuration = json.loads((out / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [1.5, 1.5, 1.5]
    assert configuration["patch_size"] == [128, 128, 128]
    assert configuration["batch_size"] == 2
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["architecture"]["arch_kwargs"]["strides"] == [[1] * 3, *[[2] * 3] * 4, [1, 1, 2]]
    dataset_json = json.loads((out / "dataset.json").read_text())
    assert dataset_json["labels"]["spleen"] == 77
    assert len(dataset_json["labels"]) == 105
    card = json.loads((out / "model_card.json").read_text())
    assert card["epochs"] == 4000
    assert sorted(entry["file"] for entry in card["sources"]) == sorted(path.name for path in files.values())
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(out), (0,), "checkpoint_final.pth")
    state = torch.load(model, weights_only=True)["state_dict"]
    for key, tensor in predictor.network.state_dict().items():
        assert torch.equal(tensor, state[to_published_key(key)])
