"""Pre-training without labels, command by command: import, plan, train, rank, fine-tune; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import VENOUS
from integration.commands import Shell, digests

IMAGES = "Dataset900_Images"
SETTINGS = (
    "num_epochs=3 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 save_every=1 batch_size=2 "
    "patch_size=[32,32,32]"
)


def plan(pretext: str, name: str, more: str = "", dataset: int = 900) -> str:
    options = f"-d {dataset} -c 3d_fullres --depth 1 --width 4 --pretext {pretext} --name {name}"
    return f"stunet plan {options} --overwrite --set {SETTINGS} {more}"


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Unlabelled images beside a labelled dataset."""
    shell = trained.copy(tmp_path_factory.mktemp("pretext"))
    shutil.copytree(shell.raw / VENOUS / "imagesTr", shell.root / "images")
    before = digests(shell.root / "images")
    shell.run("stunet import images images -d 900")
    assert digests(shell.root / "images") == before
    assert not list((shell.raw / IMAGES).rglob("*_0000*"))  # none is copied
    shell.run("nnUNetv2_plan_and_preprocess -d 900 -c 3d_fullres -npfp 1 -np 1")
    return shell


def model(shell: Shell, plans: str) -> Path:
    return shell.model(IMAGES, f"STUNetTrainer_pretext__{plans}__3d_fullres")


def weights(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=False))


@pytest.fixture(scope="module")
def contrastive(shell: Shell) -> Path:
    """A checkpoint whose encoder alone was trained."""
    said = shell.run(plan("simclr", "simclr"))
    assert "nnUNetv2_train 900 3d_fullres all -p simclr -tr STUNetTrainer_pretext" in said
    shell.run("nnUNetv2_train 900 3d_fullres all -p simclr -tr STUNetTrainer_pretext -device cpu", trainers=True)
    return model(shell, "simclr") / "fold_all" / "checkpoint_final.pth"


@pytest.fixture(scope="module")
def masked(shell: Shell) -> Path:
    """A checkpoint of an autoencoder, on a dataset with labels."""
    shell.run(plan("mae", "mae", "mask_block=8", dataset=1))
    shell.run("stunet train 1 3d_fullres 0 -p mae -tr STUNetTrainer_pretext -device cpu --seed 3")
    return shell.model(VENOUS, "STUNetTrainer_pretext__mae__3d_fullres") / "fold_0" / "checkpoint_final.pth"


def test_what_was_imported_has_a_body(shell: Shell) -> None:
    described = json.loads((shell.raw / IMAGES / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "CT"}
    assert described["labels"] == {"background": 0, "body": 1}
    for case, files in described["dataset"].items():
        image, body = (sitk.ReadImage(str(shell.raw / IMAGES / path)) for path in (files["images"][0], files["label"]))
        expected = sitk.GetArrayFromImage(sitk.OtsuThreshold(image, 0, 1))
        assert (sitk.GetArrayFromImage(body) == expected).mean() > 0.98, case  # ITK has other bins


def test_a_checkpoint_says_what_was_trained(contrastive: Path, masked: Path) -> None:
    for path, name, trains in ((contrastive, "simclr", ["encoder"]), (masked, "mae", ["encoder", "decoder"])):
        pretext = weights(path)["pretext"]
        assert (pretext["name"], pretext["trains"]) == (name, trains)
        assert not [key for key in pretext["weights"] if key.startswith(("encoder.", "decoder."))]
        assert (path.parent / "progress.png").is_file() or name  # nnU-Net's plots are left out in tests
    assert weights(masked)["pretext"]["settings"]["mask_block"] == 8
    assert (masked.parent / "montage.png").is_file()
    assert not (contrastive.parent / "montage.png").exists()


def test_ranking_compares_encoders_where_a_decoder_is_random(shell: Shell, contrastive: Path, masked: Path) -> None:
    trained = shell.model(VENOUS, "STUNetTrainer__STUNetPlans_narrow__3d_fullres") / "fold_0" / "checkpoint_final.pth"
    read = {}
    for folder, checkpoints in (("both", (contrastive, trained)), ("one", (masked, trained))):
        given = " ".join(map(str, checkpoints))
        rank = f"stunet rank -d 1 --cases 3 --checkpoints {given} -o {folder} -device cpu --metrics ccfv,zero-shot"
        measure = f"stunet study plan {folder}/study.yaml -o {folder}/study"
        assert measure in " ".join(shell.run(rank).split())
        assert "Trainings: 3" in shell.run(f"{measure} -device cpu")  # two checkpoints, and from scratch
        read[folder] = json.loads((shell.root / folder / "ranking.json").read_text())
    assert read["both"]["settings"]["features"] == "stages of the encoder"
    assert read["one"]["settings"]["features"] == "stages of the decoder"
    scores = {row["path"]: row["scores"] for row in read["one"]["candidates"]}
    assert scores[str(masked)]["zero-shot"] is None
    assert scores[str(trained)]["zero-shot"] is not None


@pytest.mark.parametrize("kind", ["contrastive", "masked"])
def test_fine_tuning_takes_what_was_trained(shell: Shell, kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(kind)
    settings = SETTINGS.replace("num_epochs=3", "num_epochs=1")
    line = f"stunet finetune -d 1 --from {checkpoint} --name ft_{kind} -device cpu -np 1 --set {settings}"
    shell.run(f"{line} final_validation=false")
    fold = shell.model(VENOUS, f"STUNetTrainer__ft_{kind}__3d_fullres") / "fold_0"
    report = json.loads((fold / "weight_transfer.json").read_text())
    fresh = {key.split(".")[0] for key in report["fresh"] if ".seg_layers." not in key}
    assert fresh == ({"decoder"} if kind == "contrastive" else set())
    heads = [key for key in weights(checkpoint)["network_weights"] if ".seg_layers." in key]
    assert set(heads) <= set(report["fresh"])


def test_one_task_after_another(shell: Shell, contrastive: Path) -> None:
    shell.run(plan("mae", "second", f"num_epochs=1 pretrained_weights={contrastive}"))
    shell.run("stunet train 900 3d_fullres all -p second -tr STUNetTrainer_pretext -device cpu")
    fold = model(shell, "second") / "fold_all"
    fresh = json.loads((fold / "weight_transfer.json").read_text())["fresh"]
    assert {key.split(".")[0] for key in fresh} == {"decoder"}
    assert weights(fold / "checkpoint_final.pth")["pretext"]["name"] == "mae"


def test_killed_and_resumed(shell: Shell, masked: Path) -> None:
    expected, fold = weights(masked), masked.parent
    fold.rename(shell.root / "whole")
    line = "stunet train 1 3d_fullres 0 -p mae -tr STUNetTrainer_pretext -device cpu --seed 3"
    shell.type_and_kill(line, lambda log: (fold / "checkpoint_latest.pth").is_file())
    shell.run(f"{line} --c")
    resumed = weights(masked)
    torch.testing.assert_close(resumed["network_weights"], expected["network_weights"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["pretext"]["weights"], expected["pretext"]["weights"], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_accumulate_keep_checkpoints_and_score_them(shell: Shell) -> None:
    run = "torchrun --standalone --nproc-per-node 2 --no-python stunet train 900 3d_fullres all -device cpu"
    more = "keep_every=1 select_for=1 gradient_accumulation=2 activation_checkpointing=all batch_size=8"
    shell.run(plan("simclr", "many", more))
    shell.type(f"{run} -p many -tr STUNetTrainer_pretext")
    fold = model(shell, "many") / "fold_all"
    assert [each.name for each in sorted(fold.glob("checkpoint_epoch*"))] == [
        "checkpoint_epoch_0001.pth", "checkpoint_epoch_0002.pth"
    ]  # fmt: skip
    curve = json.loads((fold / "transfer_curve.json").read_text())
    assert [point["epoch"] for point in curve] == [1, 2, 3]
    # The encoder's features are scored, as it alone was trained.
    shell.run(f"stunet rank -d 1 --checkpoints {fold / 'checkpoint_epoch_0002.pth'} -o curve -device cpu")
    ranked = json.loads((shell.root / "curve" / "ranking.json").read_text())
    assert ranked["settings"]["features"] == "stages of the encoder"
    assert ranked["candidates"][0]["scores"]["ccfv"] == pytest.approx(curve[1]["score"], abs=1e-6)


def test_what_cannot_be_is_refused(shell: Shell, contrastive: Path) -> None:
    shell.refuse("stunet train 900 3d_fullres 0 -p nnUNetPlans -tr STUNetTrainer_pretext -device cpu", "--pretext")
    shell.run(plan("simclr", "one", "batch_size=1"))
    shell.refuse("stunet train 900 3d_fullres 0 -p one -tr STUNetTrainer_pretext -device cpu", "compares cases", "1")
    shell.run(plan("jigsaw", "grid", "grid=3"))
    line = "stunet train 900 3d_fullres 0 -p grid -tr STUNetTrainer_pretext -device cpu"
    shell.refuse(line, "[3, 3, 3]", "[36, 24, 24]")  # multiples of 3 and of the strides
    shell.run(plan("mae", "frozen", "fine_tune=frozen-encoder"))
    shell.refuse(line.replace("grid", "frozen"), "frozen-encoder", "trains the encoder")
    labelled = f"stunet plan -d 1 -c 3d_fullres --depth 1 --width 4 --name turned --set {SETTINGS}"
    shell.run(f"{labelled} pretext=rotation")
    shell.refuse("stunet train 1 3d_fullres 0 -p turned -tr STUNetTrainer -device cpu", "rotation", "mirroring=none")
    shell.refuse(plan("nothing", "no"), "mae")
    folder = model(shell, "simclr")
    shell.refuse(f"stunet predict -i images -o out -m {folder} -device cpu", "fine-tune it first")
    nnunets = "-d 900 -c 3d_fullres -f all -p simclr -tr STUNetTrainer_pretext -device cpu"
    assert "fine-tune it first" in shell.type(f"nnUNetv2_predict -i images -o out {nnunets}", status=1)
    # Another task than the one that the checkpoint is of.
    shell.run(plan("byol", "simclr"))
    shell.refuse(
        "stunet train 900 3d_fullres all -p simclr -tr STUNetTrainer_pretext -device cpu --c", "simclr", "byol"
    )


def test_images_that_cannot_be_imported(shell: Shell, tmp_path: Path) -> None:
    files = sorted((shell.root / "images").iterdir())
    shell.refuse(f"stunet import images {tmp_path} -d 901", "no image")
    (tmp_path / "a").mkdir()
    shutil.copy(files[0], tmp_path / "a" / "two_0000.nii.gz")
    shutil.copy(files[0], tmp_path / "a" / "two_0001.nii.gz")
    shutil.copy(files[1], tmp_path / "a" / "one.nii.gz")
    shell.refuse(f"stunet import images {tmp_path / 'a'} -d 901", "one has 1 channel", "two has 2")
    shell.run(f"stunet import images {tmp_path / 'a'} -d 901 --pattern 'two_*'")
    described = json.loads((shell.raw / "Dataset901_Images" / "dataset.json").read_text())
    assert list(described["dataset"]) == ["two"]
    assert len(described["dataset"]["two"]["images"]) == 2
    (tmp_path / "list.txt").write_text(f"{files[0]}\na/one.nii.gz\nbroken.nii.gz\n")
    (tmp_path / "broken.nii.gz").write_bytes(files[1].read_bytes()[:1000])
    said = shell.run(f"stunet import images {tmp_path / 'list.txt'} -d 902", status=2)
    assert "broken.nii.gz" in said
    assert "2 cases" in said
    described = json.loads((shell.raw / "Dataset902_Images" / "dataset.json").read_text())
    assert len(described["dataset"]) == 2


def test_a_hundred_images_stay_where_they_are(shell: Shell, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((100, 12, 12, 12), dtype=np.float32)
    for number, each in enumerate(values):
        sitk.WriteImage(sitk.GetImageFromArray(each), str(tmp_path / f"scan_{number:03d}.nii.gz"))
    before = digests(tmp_path)
    shell.run(f"stunet import images {tmp_path} -d 904")
    assert digests(tmp_path) == before
    folder = shell.raw / "Dataset904_Images"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(json.loads((folder / "dataset.json").read_text())["dataset"]) == 100
    written = sum(path.stat().st_size for path in files)
    assert written < 0.2 * sum(path.stat().st_size for path in tmp_path.iterdir())
    assert not [path for path in files if path.is_symlink()]


def test_other_formats_and_a_bids_tree(shell: Shell, tmp_path: Path) -> None:
    image = sitk.ReadImage(str(sorted((shell.root / "images").iterdir())[0]))
    for subject, ending in (("01", "mha"), ("02", "nrrd"), ("03", "nii")):
        folder = tmp_path / f"sub-{subject}" / "anat"
        folder.mkdir(parents=True)
        sitk.WriteImage(image, str(folder / f"sub-{subject}_T1w.{ending}"))
    (tmp_path / "derivatives").mkdir()
    sitk.WriteImage(image, str(tmp_path / "derivatives" / "sub-01_T1w.nii.gz"))
    shell.run(f"stunet import images {tmp_path} -d 903 --channel-names T1")
    described = json.loads((shell.raw / "Dataset903_Images" / "dataset.json").read_text())
    assert list(described["dataset"]) == ["sub-01_T1w", "sub-02_T1w", "sub-03_T1w"]
    assert described["channel_names"] == {"0": "T1"}
    shell.run("nnUNetv2_plan_and_preprocess -d 903 -c 3d_fullres -npfp 1 -np 1")


@pytest.mark.slow
def test_beside_labels_every_case_gives_what_it_has(shell: Shell) -> None:
    """Of three cases one annotates nothing: its image counts through the pretext alone."""
    preprocessed = shell.preprocessed / VENOUS
    cases = json.loads((preprocessed / "splits_final.json").read_text())[0]["train"]
    labels = [
        name for name in json.loads((preprocessed / "dataset.json").read_text())["labels"] if name != "background"
    ]
    manifest = {"version": 1, "groups": {"all": labels}, "default": "all", "cases": {cases[0]: []}}
    for folder in (preprocessed, shell.raw / VENOUS):
        (folder / "annotated_labels.json").write_text(json.dumps(manifest))
    try:
        options = "-d 1 -c 3d_fullres --depth 1 --width 4"
        shell.run(f"stunet plan {options} --name both --set {SETTINGS} pretext=mae mask_block=8 pretext_weight=0.5")
        line = "stunet train 1 3d_fullres 0 -p both -tr STUNetTrainer -device cpu --seed 3"
        shell.run(line)
        fold = shell.model(VENOUS, "STUNetTrainer__both__3d_fullres") / "fold_0"
        content = weights(fold / "checkpoint_final.pth")
        assert content["pretext"]["labels"]
        assert not [key for key in content["network_weights"] if "pretext" in key]
        # It predicts as any other model, by nnU-Net's own command too.
        shell.run(f"stunet predict -i images -o both -m {fold.parent} -device cpu -f 0")
        assert (fold / "validation" / "summary.json").is_file()
        trained = weights(fold / "checkpoint_final.pth")["network_weights"]
        fold.rename(shell.root / "both_whole")
        shell.type_and_kill(line, lambda log: (fold / "checkpoint_latest.pth").is_file())
        shell.run(f"{line} --c")
        again = weights(fold / "checkpoint_final.pth")["network_weights"]
        torch.testing.assert_close(again, trained, rtol=0, atol=0)
    finally:
        for folder in (preprocessed, shell.raw / VENOUS):
            (folder / "annotated_labels.json").unlink()
