"""Each command once as users have it: a process of its own, with pools of processes. All else is called in-process."""

from __future__ import annotations

import pytest
from conftest import TRAINED, VENOUS
from integration.commands import Shell

ONE_EPOCH = "num_epochs=1 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 batch_size=2 mirroring=none"
IMAGES = f"-i nnUNet_raw/{VENOUS}/imagesTs"
MODEL = f"nnUNet_results/{VENOUS}/{TRAINED}"
CHECKPOINT = f"{MODEL}/fold_0/checkpoint_final.pth"


@pytest.fixture(scope="module")
def shell(trained: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = trained.copy(tmp_path_factory.mktemp("commands"))
    plan = "stunet plan -d 1 -c 3d_fullres --depth 1 --width 4"
    shell.run(f"{plan} --name P_one --set {ONE_EPOCH}")
    shell.run(f"{plan} --name P_unvalidated --set {ONE_EPOCH} final_validation=false")
    return shell


#: What each is typed with, and what it must print.
COMMANDS = {
    "nnUNetv2_train": ("1 3d_fullres 0 -tr STUNetTrainer -p P_one -device cpu", "Mean Validation Dice"),
    "nnUNetv2_predict_from_modelfolder": (f"{IMAGES} -o stock -m {MODEL} -f 0 -device cpu -npp 1 -nps 1 && ls stock",
                                          "phantom_005.nii.gz"),
    "stunet train": ("1 3d_fullres 0 -p P_unvalidated -device cpu", "Epoch 0"),
    "stunet finetune": (f"-d 2 --from {CHECKPOINT} --name P_tuned -device cpu --set {ONE_EPOCH} "
                        "final_validation=false", "Epoch 0"),
    "stunet plan": ("-d 1 --size small --name P_small", "P_small"),
    "stunet info": ("--size small", "14.6M"),
    "stunet rank": (f"-d 2 --checkpoints {CHECKPOINT} --metrics ccfv --cases 3 -o ranking", "stunet finetune -d 2"),
    "! stunet rank-eval": ("nowhere.json dice.json", "nowhere.json"),
    "stunet evaluate": (f"-m {MODEL} -d 1 --suggest-map -o map.yaml && cat map.yaml", "aorta: aorta"),
    "stunet predict": (f"{IMAGES} -o ours -m {MODEL} -device cpu && ls ours", "phantom_005.nii.gz"),
    "stunet convert": (f"{CHECKPOINT} -o back.model --to published && ls", "back.model"),
    "stunet import": ("union -d 700 --from 1 2 --dry-run", "stomach"),
    "stunet labels": ("check -d 1 -np 2", "aorta"),
    "stunet list": ("--of btcv", "spleen"),
    "stunet weights": ("list", "small_ep4k"),
    "! stunet demo": ("--data nowhere", "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_as_typed(shell: Shell, command: str) -> None:
    options, expected = COMMANDS[command]
    assert expected in shell.type(f"{command} {options}", trainers=command == "nnUNetv2_train")
