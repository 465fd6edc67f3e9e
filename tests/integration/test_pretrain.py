"""Partially annotated data from import to prediction, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import Shell
from test_variants import TINY

from stunet.datasets import write_phantom_dataset
from stunet.labels import write_manifest
from stunet.weights import read_checkpoint

MINI, PHANTOMS = "Dataset101_TotalSegmentator", "Dataset002_Partial"


def test_real_cts_with_118_outputs(shared: Path, tmp_path: Path) -> None:
    """Four CTs that annotate 117, 5, 1 and 8 structures, through stock training and prediction."""
    shell = Shell.make(tmp_path)
    shell.run(f"stunet import totalsegmentator {shared / 'data' / 'totalsegmentator_mini'} -d 101 --version 2 -np 2")
    report, _ = json.JSONDecoder().raw_decode(shell.run("stunet labels check -d 101 --json"))
    assert sum(structure["annotated"] for structure in report["structures"]) == 117 + 5 + 1 + 8
    shell.run(
        "stunet plan -d 101 -np 2 --preset totalsegmentator --depth 1 --width 2 --name P_mini "
        f"--set {TINY} patch_size=64,64,64 mirroring=none"
    )
    preprocessed = shell.root / "nnUNet_preprocessed" / MINI
    shell.run("nnUNetv2_preprocess -d 101 -plans_name P_mini -c 3d_fullres -np 2")
    cases = sorted(path.stem for path in (preprocessed / "STUNetPlans_totalsegmentator_3d_fullres").glob("*.pkl"))
    splits = [{"train": cases, "val": cases[1:2]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    output = shell.run(
        "nnUNetv2_train 101 3d_fullres 0 -tr STUNetTrainer_pretrain -p P_mini -device cpu", trainers=True
    )
    assert "Partial labels: 4 training cases annotate 32.8 of 117 structures on average" in output
    model = shell.model(MINI, "STUNetTrainer_pretrain__P_mini__3d_fullres")
    checkpoint = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["network_weights"]["decoder.seg_layers.4.weight"].shape[0] == 118
    assert "cases" not in json.dumps(checkpoint["init_args"]["dataset_json"])  # no manifest in a checkpoint
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    (case,) = summary["metric_per_case"]
    scored = [label for label, metrics in case["metrics"].items() if metrics["TN"] is not None]
    assert len(scored) == 5  # what this case annotates
    images = shell.root / "images"
    images.mkdir()
    (images / "s0002_0000.nii.gz").symlink_to(shared / "data" / "totalsegmentator_mini" / "s0002" / "ct.nii.gz")
    shell.run(
        "nnUNetv2_predict -i images -o predicted -d 101 -c 3d_fullres -f 0 -tr STUNetTrainer_pretrain -p P_mini "
        "-device cpu -npp 1 -nps 1 --disable_tta"
    )
    predicted = sitk.ReadImage(str(shell.root / "predicted" / "s0002.nii.gz"))
    assert predicted.GetSize() == sitk.ReadImage(str(images / "s0002_0000.nii.gz")).GetSize()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Phantoms whose cases annotate different structures; one knows kidneys, with no side, as a superclass."""
    shell = Shell.make(tmp_path_factory.mktemp("partial"))
    folder = shell.root / "nnUNet_raw" / PHANTOMS
    write_phantom_dataset(folder, n_training=6, n_test=1)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    dataset_json["labels"] = {
        "background": 0, "liver": 1, "spleen": 2, "kidney_left": 3, "kidney_right": 4, "spine": 5, "kidney": 6,
        "ignore": 7,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    cases: dict[str, list[str]] = {}
    for i, path in enumerate(sorted((folder / "labelsTr").glob("*.nii.gz"))):
        image = sitk.ReadImage(str(path))
        labels = sitk.GetArrayFromImage(image)  # liver 1, spleen 2, kidneys 3, spine 4, aorta 5
        kidneys, spine = labels == 3, labels == 4
        left = np.zeros_like(kidneys)
        left[..., kidneys.shape[2] // 2 :] = True
        labels[labels >= 4] = 0
        if i % 2:
            labels[spine], labels[kidneys & ~left] = 5, 4
            labels[0] = 7
            cases[path.name.removesuffix(".nii.gz")] = ["kidney_left", "kidney_right", "spine"]
        else:
            labels[kidneys] = 6
            cases[path.name.removesuffix(".nii.gz")] = ["liver", "spleen", "kidney"]
        changed = sitk.GetImageFromArray(labels)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(path))
    superclasses = {"kidney": ["kidney_left", "kidney_right"]}
    weights = dict.fromkeys(list(cases)[:2], 3)
    content = {"version": 1, "cases": cases, "superclasses": superclasses, "weights": weights}
    write_manifest(content, folder / "annotated_labels.json")
    return shell


def test_superclass_ignore_label_and_weights(shell: Shell) -> None:
    shell.run("nnUNetv2_plan_and_preprocess -d 2 -c 3d_fullres -npfp 1 -np 1 --verify_dataset_integrity")
    shell.run(
        f"stunet plan -d 2 -c 3d_fullres --depth 1 --width 2 --name P_partial --set {TINY} mirroring=no-left-right"
    )
    shell.run("nnUNetv2_train 2 3d_fullres 0 -tr STUNetTrainer -p P_partial -device cpu", trainers=True)
    model = shell.model(PHANTOMS, "STUNetTrainer__P_partial__3d_fullres")
    saved = json.loads((model / "dataset.json").read_text())
    assert list(saved["labels"]) == ["background", "liver", "spleen", "kidney_left", "kidney_right", "spine", "ignore"]
    checkpoint = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert checkpoint["network_weights"]["decoder.seg_layers.4.weight"].shape[0] == 6
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    for case in summary["metric_per_case"]:
        odd = int(Path(case["reference_file"]).name[8:11]) % 2
        scored = [label for label, metrics in case["metrics"].items() if metrics["TN"] is not None]
        assert scored == (["3", "4", "5"] if odd else ["1", "2"])
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{PHANTOMS}/imagesTs -o predicted -d 2 -c 3d_fullres -f 0 -tr STUNetTrainer "
        "-p P_partial -device cpu -npp 1 -nps 1"
    )
    (path,) = (shell.root / "predicted").glob("*.nii.gz")
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) <= set(range(6))
