"""``stunet predict`` beside ``nnUNetv2_predict``, on real images and when it is killed."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from integration.commands import Shell, read_array
from prediction_models import smooth_image, write_image, write_model

DATASET = "Dataset004_Hippocampus"


def test_real_mr_images_with_the_commands_own_options(shell: Shell, shared: Path) -> None:
    """Three cases, two folds, mirroring, another spacing than the network's; found by -d, -tr, -p and -c."""
    model = shell.model(DATASET, "nnUNetTrainer__nnUNetPlans__3d_fullres")
    write_model(model, num_classes=3, patch=(24,) * 3, spacing=(1.2, 1.1, 1.3), folds=("0", "1"), mirroring=(0,))
    (shell.raw / DATASET).mkdir()
    images = shell.root / "images"
    images.mkdir()
    cases = sorted((shared / "data" / DATASET / "imagesTr").glob("*.nii.gz"))[:3]
    for case in cases:
        shutil.copy(case, images)
    options = "-d 4 -c 3d_fullres -f 0 1 -step_size 0.6 -device cpu -npp 0 -nps 0"
    shell.run(f"nnUNetv2_predict -i images -o nnunet {options}")
    output = shell.run(f"stunet predict -i images -o ours {options} --statistics")
    assert "2 folds (0, 1)" in output
    for case in cases:
        name = case.name.replace("_0000", "")
        expected = read_array(shell.root / "nnunet" / name)
        assert len(np.unique(expected)) == 3
        assert np.array_equal(read_array(shell.root / "ours" / name), expected)
    for name in ("dataset.json", "plans.json"):
        ours, nnunets = (json.loads((shell.root / folder / name).read_text()) for folder in ("ours", "nnunet"))
        assert ours == nnunets
    rows = (shell.root / "ours" / "statistics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2


@pytest.mark.parametrize(
    ("spacing", "image_spacing"), [((2.0, 2.5, 2.2), None), ((4.0, 2.0, 2.5), (9.0, 2.0, 2.0))],
    ids=["isotropic", "anisotropic"],
)  # fmt: skip
def test_a_real_ct_with_118_outputs(
    shell: Shell, shared: Path, spacing: tuple[float, ...], image_spacing: tuple[float, ...] | None
) -> None:
    write_model(shell.model(DATASET, "T__P__3d_fullres"), num_classes=118, patch=(16, 32, 32), spacing=spacing)
    (shell.raw / DATASET).mkdir()
    image = sitk.ReadImage(str(shared / "data" / "totalsegmentator_mini" / "s0000" / "ct.nii.gz"))
    array = sitk.GetArrayFromImage(image)[:, 25:65, 35:75]
    write_image(shell.root / "images" / "ct_0000.nii.gz", array, image_spacing or image.GetSpacing()[::-1])
    options = "-i images -d 4 -c 3d_fullres -tr T -p P -f 0 -device cpu -npp 0 -nps 0"
    shell.run(f"nnUNetv2_predict -o nnunet {options}")
    shell.run(f"stunet predict -o ours {options}")
    expected, actual = (read_array(shell.root / side / "ct.nii.gz") for side in ("nnunet", "ours"))
    assert len(np.unique(expected)) > 10
    assert np.array_equal(actual, expected)


@pytest.mark.slow
def test_killed_in_the_middle_of_several_cases(shell: Shell) -> None:
    """SIGKILL in the middle of twenty; every file that is there is complete, and --continue does the other cases."""
    write_model(shell.root / "model", num_classes=4, spacing=(1.0, 1.1, 0.9))
    for i in range(20):
        image = smooth_image((16, 30, 30), i)
        write_image(shell.root / "images" / f"case_{i:02d}_0000.nii.gz", image, (1.5, 0.8, 0.8))
    command = "stunet predict -i images -m model -device cpu --masks --disable_progress_bar"
    shell.run(f"{command} -o whole -npp 0 -nps 0")
    killed, whole = shell.root / "killed", shell.root / "whole"
    shell.type_and_kill(f"{command} -o killed", lambda log: "Predicted case_08" in log)
    finished = sorted(path.name for path in killed.glob("*.nii.gz"))
    assert "case_08.nii.gz" in finished
    assert len(finished) < 20
    for path in [*killed.glob("*.nii.gz"), *killed.glob("case_*/segmentations/*")]:
        gzip.decompress(path.read_bytes())  # raises where it is truncated
    kept = {name: (killed / name).stat().st_mtime_ns for name in finished}
    output = shell.run(f"{command} -o killed -npp 0 -nps 0 --continue")
    assert f"{len(finished)} are finished already" in output
    assert "Predicted case_19" in output
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == kept
    assert not list(killed.glob(".*"))
    names = sorted(str(path.relative_to(killed)) for path in killed.rglob("*.nii.gz"))
    assert names == sorted(str(path.relative_to(whole)) for path in whole.rglob("*.nii.gz"))
    for name in names:
        assert np.array_equal(read_array(killed / name), read_array(whole / name))


@pytest.mark.slow
def test_a_process_that_is_killed_costs_one_case(shell: Shell) -> None:
    """The process that prepares dies of the second case; the others are predicted, and the case is named."""
    write_model(shell.root / "model", num_classes=3)
    for i in range(3):
        write_image(shell.root / "images" / f"case_{i}_0000.nii.gz", smooth_image((16, 16, 16), i))
    # nnU-Net's preprocessor, which prepares each case, dies of an image that only the second case has.
    image = smooth_image((16, 16, 17), 1)
    write_image(shell.root / "images" / "case_1_0000.nii.gz", image)
    (shell.root / "die.py").write_text(
        "import os, signal\n"
        "from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor\n"
        "from stunet.cli.main import main\n"
        "run = DefaultPreprocessor.run_case_npy\n"
        "def die(self, data, *args, **more):\n"
        "    if data.shape[-1] == 17:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, data, *args, **more)\n"
        "DefaultPreprocessor.run_case_npy = die\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    output = shell.type("python die.py predict -i images -o out -m model -device cpu", status=2)
    assert "1 of 3 failed" in output
    assert "case_1: a process" in output
    assert sorted(path.name for path in (shell.root / "out").glob("*.nii.gz")) == ["case_0.nii.gz", "case_2.nii.gz"]
