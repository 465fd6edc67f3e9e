"""Each command once as users have it: a process of its own, with pools of processes. All else is called in-process."""

from __future__ import annotations

import pytest
from conftest import TRAINED, VENOUS
from integration.commands import Shell

ONE_EPOCH = "num_epochs=1 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 batch_size=2 mirroring=none"
MODEL = f"nnUNet_results/{VENOUS}/{TRAINED}"
CHECKPOINT = f"{MODEL}/fold_0/checkpoint_final.pth"


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = trained.copy(tmp_path_factory.mktemp("commands"))
    plan = "stunet plan -d 1 -c 3d_fullres --depth 1 --width 4"
    shell.run(f"{plan} --name P_one --set {ONE_EPOCH}")
    shell.run(f"{plan} --name P_unvalidated --set {ONE_EPOCH} final_validation=false")
    return shell


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nnUNetv2_train 1 3d_fullres 0 -tr STUNetTrainer -p P_one -device cpu", "Mean Validation Dice"),
        (f"nnUNetv2_predict_from_modelfolder -i nnUNet_raw/{VENOUS}/imagesTs -o stock -m {MODEL} -f 0 -device cpu "
         "-npp 1 -nps 1 && ls stock", "phantom_005.nii.gz"),
        ("stunet train 1 3d_fullres 0 -p P_unvalidated -device cpu", "Epoch 0"),
        (f"stunet finetune -d 2 --from {CHECKPOINT} --name P_tuned -device cpu --set {ONE_EPOCH} "
         "final_validation=false", "Epoch 0"),
        ("stunet plan -d 1 --size small --name P_small", "P_small"),
        ("stunet info --size small", "14.6M"),
        (f"stunet rank -d 2 --checkpoints {CHECKPOINT} --metrics ccfv --cases 3 -o ranking", "stunet finetune -d 2"),
        ("! stunet rank-eval nowhere.json dice.json", "nowhere.json"),
        (f"stunet evaluate -m {MODEL} -d 1 --suggest-map -o map.yaml && cat map.yaml", "aorta: aorta"),
        (f"stunet predict -i nnUNet_raw/{VENOUS}/imagesTs -o ours -m {MODEL} -device cpu && ls ours",
         "phantom_005.nii.gz"),
        (f"stunet convert {CHECKPOINT} -o back.model --to published && ls", "back.model"),
        ("stunet import union -d 700 --from 1 2 --dry-run", "stomach"),
        ("stunet labels check -d 1 -np 2", "aorta"),
        ("stunet list --of btcv", "spleen"),
        ("stunet weights list", "small_ep4k"),
        ("! stunet demo --data nowhere", "nowhere"),
    ],
    ids=lambda value: value.removeprefix("! ").split(" -")[0] if " " in value else "",
)  # fmt: skip
def test_as_typed(shell: Shell, line: str, expected: str) -> None:
    assert expected in shell.type(line, trainers=line.startswith("nnUNetv2_train"))
