from __future__ import annotations

import json
from pathlib import Path

import pytest

from plans import make_plans
from stunet.environment import find_dataset, find_plans, nnunet_folder
from stunet.errors import DatasetError, NnUNetPathError, PlansError
from stunet.planning.plans import load_plans, plan_with_nnunet, write_plans

Folders = dict[str, Path]


@pytest.fixture
def dataset(nnunet_folders: Folders) -> Path:
    folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset001_Test"
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    return folder


@pytest.mark.parametrize("name", ["1", 1, "Dataset001_Test"])
def test_a_dataset_is_found_by_id_and_name(dataset: Path, name: str | int) -> None:
    assert find_dataset(name) == "Dataset001_Test"
    assert find_plans("Dataset001_Test", "nnUNetPlans") == dataset / "nnUNetPlans.json"
    assert load_plans(dataset / "nnUNetPlans.json") == make_plans()


@pytest.mark.parametrize("name", ["7", "Dataset007_Other", "Hippocampus", "Dataset001_Tes"])
def test_an_unknown_dataset_lists_the_known(dataset: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=rf"{name}[\s\S]*Dataset001_Test"):
        find_dataset(name)


def test_an_id_with_two_names(dataset: Path, nnunet_folders: Folders) -> None:
    (nnunet_folders["nnUNet_raw"] / "Dataset001_Other").mkdir()
    with pytest.raises(DatasetError, match=r"Dataset001_Other, Dataset001_Test[\s\S]*full name"):
        find_dataset(1)


def test_missing_variables_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    with pytest.raises(NnUNetPathError, match=r"export nnUNet_preprocessed="):
        nnunet_folder("nnUNet_preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nowhere"))
    with pytest.raises(NnUNetPathError, match=r"mkdir -p \S+nowhere"):
        nnunet_folder("nnUNet_preprocessed")


def test_missing_plans_list_those_that_are_there(dataset: Path) -> None:
    with pytest.raises(PlansError, match=r"missing plans file .*one of nnUNetPlans"):
        load_plans(dataset / "nnUNetPlan.json")


@pytest.mark.parametrize("content", ["{", "\x00\x01", ""])
def test_plans_that_are_not_json(dataset: Path, content: str) -> None:
    (dataset / "bad.json").write_text(content)
    with pytest.raises(PlansError, match="not JSON"):
        load_plans(dataset / "bad.json")


def test_plans_of_nnunet_v1(dataset: Path, shared: Path) -> None:
    with pytest.raises(PlansError, match=r"not JSON[\s\S]*v1"):
        load_plans(shared / "golden" / "published_plan_files" / "plans.pkl")
    (dataset / "nnUNetPlansv2.1_plans_3D.pkl").touch()
    for name in ("nnUNetPlansv2.1_plans_3D", "nnUNetPlansv2.1_plans_3D.pkl", "any.pkl"):
        with pytest.raises(PlansError, match=r"\S+\.pkl are plans of nnU-Net v1"):
            find_plans("Dataset001_Test", name)
    (dataset / "v1.json").write_text('{"plans_per_stage": {}}')
    with pytest.raises(PlansError, match="nnU-Net v1"):
        load_plans(dataset / "v1.json")


def test_plans_that_differ_are_not_replaced_unasked(dataset: Path) -> None:
    path = dataset / "nnUNetPlans.json"
    assert not write_plans(make_plans(), path, overwrite=False)
    changed = {**make_plans(), "plans_name": "other"}
    before = path.read_bytes()
    with pytest.raises(PlansError, match="--overwrite"):
        write_plans(changed, path, overwrite=False)
    assert path.read_bytes() == before
    assert write_plans(changed, path, overwrite=True)
    assert load_plans(path) == changed


def test_no_planner_writes_that_identifier(dataset: Path) -> None:
    with pytest.raises(PlansError, match=r"myPlans[\s\S]*nnUNetResEncUNetLPlans"):
        plan_with_nnunet("Dataset001_Test", "myPlans", num_processes=1)


def test_planning_needs_the_raw_data(dataset: Path, nnunet_folders: Folders) -> None:
    with pytest.raises(DatasetError, match=r"cannot be planned.*FileNotFoundError"):
        plan_with_nnunet("Dataset001_Test", "nnUNetPlans", num_processes=1)
    raw = nnunet_folders["nnUNet_raw"] / "Dataset001_Test"
    raw.mkdir()
    (raw / "dataset.json").write_text('{"labels": {}, "channel_names": {}}')
    with pytest.raises(DatasetError, match=r"KeyError: 'file_ending'"):
        plan_with_nnunet("Dataset001_Test", "nnUNetPlans", num_processes=1)


def test_nnunet_cannot_plan_one_of_two_datasets_with_an_id(dataset: Path, nnunet_folders: Folders) -> None:
    for name in ("Dataset001_Test", "Dataset001_Other"):
        raw = nnunet_folders["nnUNet_raw"] / name
        raw.mkdir()
        (raw / "dataset.json").write_text('{"labels": {}, "channel_names": {}, "file_ending": ".nii.gz"}')
    with pytest.raises(DatasetError, match=r"Dataset001_Other, Dataset001_Test[\s\S]*another id"):
        plan_with_nnunet("Dataset001_Test", "nnUNetPlans", num_processes=1)


@pytest.mark.parametrize("name", ["a/b", "../../evil", "", "a__b", "-x", "a b", ".hidden"])
def test_names_that_plans_cannot_have(dataset: Path, name: str) -> None:
    with pytest.raises(PlansError, match="cannot be named"):
        find_plans("Dataset001_Test", name)
