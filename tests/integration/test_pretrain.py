"""Partially annotated data from import to prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from integration.commands import Shell, edit_json, read_array, rewrite_image
from test_variants import TINY

from stunet.datasets.phantoms import write_phantom_dataset
from stunet.files import write_json
from stunet.labels.annotations import order_manifest
from stunet.weights.read import read_checkpoint

MINI, PARTIAL = "Dataset101_TotalSegmentator", "Dataset002_Partial"


def scored_labels(model: Path) -> dict[str, list[str]]:
    """By case of the validation, the labels that were scored."""
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    return {
        Path(case["reference_file"]).name: [label for label, m in case["metrics"].items() if m["TN"] is not None]
        for case in summary["metric_per_case"]
    }


@pytest.mark.slow
def test_real_cts_with_118_outputs(shell: Shell, shared: Path) -> None:
    """Four CTs that annotate 117, 5, 1 and 8 structures, through stock training and prediction."""
    source = shared / "data" / "totalsegmentator_mini"
    shell.run(f"stunet import totalsegmentator {source} -d 101 --version 2 -np 1")
    report = json.loads(shell.run("stunet labels check -d 101 --json -np 1", only_stdout=True))
    assert sum(structure["annotated"] for structure in report["structures"]) == 117 + 5 + 1 + 8
    settings = f"{TINY} patch_size=64,64,64"
    shell.run(f"stunet plan -d 101 -np 1 --preset totalsegmentator --depth 1 --width 2 --name P_mini --set {settings}")
    shell.run("nnUNetv2_preprocess -d 101 -plans_name P_mini -c 3d_fullres -np 1")
    cases = [f"s000{i}" for i in range(4)]
    splits = json.dumps([{"train": cases, "val": cases[1:2]}])
    (shell.preprocessed / MINI / "splits_final.json").write_text(splits)
    output = shell.run(
        "nnUNetv2_train 101 3d_fullres 0 -tr STUNetTrainer_pretrain -p P_mini -device cpu", trainers=True
    )
    assert "4 training cases annotate 32.8 of 117 structures on average" in output
    model = shell.model(MINI, "STUNetTrainer_pretrain__P_mini__3d_fullres")
    checkpoint = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["network_weights"]["decoder.seg_layers.4.weight"].shape[0] == 118
    assert "cases" not in json.dumps(checkpoint["init_args"]["dataset_json"])  # no manifest in a checkpoint
    (scored,) = scored_labels(model).values()
    assert len(scored) == 5  # what this case annotates
    image = shell.root / "images" / "s0002_0000.nii.gz"
    image.parent.mkdir()
    image.symlink_to(source / "s0002" / "ct.nii.gz")
    shell.run(
        "nnUNetv2_predict -i images -o predicted -d 101 -c 3d_fullres -f 0 -tr STUNetTrainer_pretrain -p P_mini "
        "-device cpu -npp 0 -nps 0 --disable_tta"
    )
    predicted = sitk.ReadImage(str(shell.root / "predicted" / "s0002.nii.gz"))
    assert predicted.GetSize() == sitk.ReadImage(str(image)).GetSize()


def write_partial(folder: Path) -> None:
    """Phantoms whose cases annotate different structures; one knows kidneys, with no side, as a superclass."""
    write_phantom_dataset(folder, n_training=6, n_test=1)
    names = ["background", "liver", "spleen", "kidney_left", "kidney_right", "spine", "kidney", "ignore"]
    edit_json(folder / "dataset.json", labels={name: value for value, name in enumerate(names)})

    def sided(labels: np.ndarray) -> np.ndarray:  # liver 1, spleen 2, kidneys 3, spine 4, aorta 5
        right = np.arange(labels.shape[2]) < labels.shape[2] // 2
        changed = np.select([labels == 3, labels == 4], [np.where(right, 4, 3), 5], np.where(labels > 4, 0, labels))
        changed[0] = 7
        return changed.astype(labels.dtype)

    cases: dict[str, list[str]] = {}
    for i, path in enumerate(sorted((folder / "labelsTr").glob("*.nii.gz"))):
        whole = np.array([0, 1, 2, 6, 0, 0], np.uint8)
        rewrite_image(path, sided if i % 2 else whole.__getitem__)
        annotated = ["kidney_left", "kidney_right", "spine"] if i % 2 else ["liver", "spleen", "kidney"]
        cases[path.name.removesuffix(".nii.gz")] = annotated
    superclasses = {"kidney": ["kidney_left", "kidney_right"]}
    content = {"version": 1, "cases": cases, "superclasses": superclasses, "weights": dict.fromkeys(list(cases)[:2], 3)}
    write_json(order_manifest(content), folder / "annotated_labels.json")


def test_superclass_ignore_label_and_weights(shell: Shell) -> None:
    write_partial(shell.raw / PARTIAL)
    shell.run("nnUNetv2_plan_and_preprocess -d 2 -c 3d_fullres -npfp 1 -np 1 --verify_dataset_integrity")
    settings = TINY.replace("mirroring=none", "mirroring=no-left-right")
    shell.run(f"stunet plan -d 2 -c 3d_fullres --depth 1 --width 2 --name P_partial --set {settings}")
    shell.run("nnUNetv2_train 2 3d_fullres 0 -tr STUNetTrainer -p P_partial -device cpu", trainers=True)
    model = shell.model(PARTIAL, "STUNetTrainer__P_partial__3d_fullres")
    saved = json.loads((model / "dataset.json").read_text())
    assert list(saved["labels"]) == ["background", "liver", "spleen", "kidney_left", "kidney_right", "spine", "ignore"]
    checkpoint = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert checkpoint["network_weights"]["decoder.seg_layers.4.weight"].shape[0] == 6
    for name, scored in scored_labels(model).items():
        assert scored == (["3", "4", "5"] if int(name[8:11]) % 2 else ["1", "2"])
    shell.run(
        f"nnUNetv2_predict -i nnUNet_raw/{PARTIAL}/imagesTs -o predicted -d 2 -c 3d_fullres -f 0 -tr STUNetTrainer "
        "-p P_partial -device cpu -npp 0 -nps 0"
    )
    (path,) = (shell.root / "predicted").glob("*.nii.gz")
    assert set(np.unique(read_array(path))) <= set(range(6))
