"""``stunet predict`` and ``nnUNetv2_predict`` as they are typed, on real images and when they are killed."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from commands import Shell
from prediction_models import smooth_image, write_image, write_model

DATASET = "Dataset004_Hippocampus"


def read(path: Path) -> Any:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell.make(tmp_path_factory.mktemp("predict"))


def test_real_mr_images_with_the_commands_own_options(shell: Shell, shared: Path) -> None:
    """Three cases, two folds, mirroring, another spacing than the network's; found by -d, -tr, -p and -c."""
    results = shell.root / "nnUNet_results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_model(results, num_classes=3, patch=(24,) * 3, spacing=(1.2, 1.1, 1.3), folds=("0", "1"), mirroring=(0,))
    (shell.root / "nnUNet_raw" / DATASET).mkdir()
    images = shell.root / "images"
    images.mkdir()
    cases = sorted((shared / "data" / DATASET / "imagesTr").glob("*.nii.gz"))[:3]
    for case in cases:
        shutil.copy(case, images)
    options = "-d 4 -c 3d_fullres -f 0 1 -step_size 0.6 -device cpu -npp 1 -nps 1"
    shell.run(f"nnUNetv2_predict -i images -o nnunet {options}")
    output = shell.run(f"stunet predict -i images -o ours {options} --statistics")
    assert "2 folds (0, 1)" in output
    for case in cases:
        name = case.name.replace("_0000", "")
        expected = read(shell.root / "nnunet" / name)
        assert len(np.unique(expected)) == 3
        assert np.array_equal(read(shell.root / "ours" / name), expected)
    for name in ("dataset.json", "plans.json"):
        ours, nnunets = (json.loads((shell.root / folder / name).read_text()) for folder in ("ours", "nnunet"))
        assert ours == nnunets
    rows = (shell.root / "ours" / "statistics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2


@pytest.mark.parametrize(
    ("name", "spacing", "image_spacing"),
    [("isotropic", (2.0, 2.5, 2.2), None), ("anisotropic", (4.0, 2.0, 2.5), (9.0, 2.0, 2.0))],
)
def test_a_real_ct_with_118_outputs(
    shell: Shell, shared: Path, name: str, spacing: tuple[float, ...], image_spacing: tuple[float, ...] | None
) -> None:
    model = write_model(shell.root / f"model_{name}", num_classes=118, patch=(16, 32, 32), spacing=spacing)
    image = sitk.ReadImage(str(shared / "data" / "totalsegmentator_mini" / "s0000" / "ct.nii.gz"))
    images = shell.root / f"ct_{name}"
    array = sitk.GetArrayFromImage(image)[:, 20:80, 30:90]
    write_image(images / "ct_0000.nii.gz", array, image_spacing or image.GetSpacing()[::-1])
    shell.run(
        f"nnUNetv2_predict_from_modelfolder -i {images} -o nnunet_{name} -m {model} -f 0 -device cpu -npp 1 -nps 1"
    )
    shell.run(f"stunet predict -i {images} -o ours_{name} -m {model} -device cpu")
    expected, actual = (read(shell.root / f"{side}_{name}" / "ct.nii.gz") for side in ("nnunet", "ours"))
    assert len(np.unique(expected)) > 10
    assert np.array_equal(actual, expected)


def test_killed_in_the_middle_of_several_cases(shell: Shell) -> None:
    """SIGKILL in the middle of twenty; every file that is there is whole, and --continue does the other cases."""
    model = write_model(shell.root / "model_killed", num_classes=4, spacing=(1.0, 1.1, 0.9))
    images = shell.root / "twenty"
    for i in range(20):
        write_image(images / f"case_{i:02d}_0000.nii.gz", smooth_image((16, 30, 30), i), (1.5, 0.8, 0.8))
    command = f"stunet predict -i {images} -m {model} -device cpu --masks --disable_progress_bar"
    shell.run(f"{command} -o whole")
    killed = shell.root / "killed"
    shell.run_and_kill(f"{command} -o killed", lambda log: "Predicted case_08" in log)
    finished = sorted(path.name for path in killed.glob("*.nii.gz"))
    assert "case_08.nii.gz" in finished
    assert len(finished) < 20
    for path in [*killed.glob("*.nii.gz"), *killed.glob("case_*/segmentations/*")]:
        gzip.decompress(path.read_bytes())  # raises where it is not whole
    kept = {name: (killed / name).stat().st_mtime_ns for name in finished}
    output = shell.run(f"{command} -o killed --continue")
    assert f"{len(finished)} are finished already" in output
    assert "Predicted case_19" in output
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == kept
    assert not list(killed.glob(".*"))
    names = sorted(str(path.relative_to(killed)) for path in killed.rglob("*.nii.gz"))
    assert names == sorted(str(p.relative_to(shell.root / "whole")) for p in (shell.root / "whole").rglob("*.nii.gz"))
    for name in names:
        assert np.array_equal(read(killed / name), read(shell.root / "whole" / name))


def test_a_process_that_is_killed_costs_one_case(shell: Shell, tmp_path: Path) -> None:
    """The process that prepares dies of the second case; the others are predicted, and the case is named."""
    model = write_model(tmp_path / "model", num_classes=3)
    for i in range(3):
        write_image(tmp_path / "images" / f"case_{i}_0000.nii.gz", smooth_image((16, 16, 16), i))
    script = tmp_path / "die.py"
    script.write_text(
        "import os, signal\n"
        "from stunet.cli.main import main\n"
        "from stunet.inference import folders, images\n"
        "def prepare(case, **options):\n"
        "    if case.name == 'case_1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return images.prepare(case, **options)\n"
        "folders.prepare = prepare\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    process = shell.start(f"python {script} predict -i {tmp_path}/images -o {tmp_path}/out -m {model} -device cpu")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 2, output
    assert "1 of 3 failed" in output
    assert "case_1: a process was killed" in output
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["case_0.nii.gz", "case_2.nii.gz"]
