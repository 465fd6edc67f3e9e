"""Importing TotalSegmentator's layout: against a plain importer, and with all that can be wrong with a source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from masks import AFFINE, SHAPE, STRUCTURES, naive_label_map, random_masks, save, write_case, write_meta, write_source

from stunet.datasets.imports import ImportReport, dataset_folder
from stunet.datasets.totalsegmentator import choose_structures, import_cases, read_totalsegmentator
from stunet.errors import CommandError, DatasetError, LabelError, UsageError
from stunet.labels.annotations import read_manifest
from stunet.labels.labels import load_vocabulary


def run(source: Path, folder: Path, structures: list[str] | None = None, **options: Any) -> ImportReport:
    cases = list(read_totalsegmentator(source).cases.values())
    return import_cases(cases, structures or list(STRUCTURES), folder, details={}, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "Dataset101_T"


@pytest.mark.parametrize("order", [STRUCTURES, STRUCTURES[::-1]])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_label_maps_and_overlaps_are_the_plain_importers(
    source: Path, folder: Path, order: tuple[str, ...], num_processes: int
) -> None:
    report = run(source, folder, list(order), num_processes=num_processes)
    total: dict[tuple[str, str], int] = {}
    for name in ("a0", "a1", "a2"):
        expected, lost = naive_label_map(source / name, list(order))
        for pair, n in lost.items():
            total[pair] = total.get(pair, 0) + n
        written = nib.load(folder / "labelsTr" / f"{name}.nii.gz")
        assert written.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(written.dataobj), expected)
        assert np.array_equal(written.affine, AFFINE)
        image = folder / "imagesTr" / f"{name}_0000.nii.gz"
        assert image.read_bytes() == (source / name / "ct.nii.gz").read_bytes()
        voxels = json.loads((folder / "import_report.json").read_text())["cases"][name]["voxels"]
        assert voxels == {s: int((expected == i).sum()) for i, s in enumerate(order, 1) if s in voxels}
    assert total  # the masks do overlap
    assert report.overlaps == total
    assert list(report.overlaps.values()) == sorted(total.values(), reverse=True)


def test_a_missing_mask_is_not_annotated_and_a_blank_one_is(source: Path, folder: Path) -> None:
    run(source, folder)
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "aorta": 1, "heart": 2, "liver": 3, "spleen": 4},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    manifest = read_manifest(folder / "annotated_labels.json", labels=dataset["labels"], cases=["a0", "a1", "a2"])
    assert [manifest.annotated(case) for case in ("a0", "a1", "a2")] == [(1, 2, 3, 4), (1, 3), (2,)]
    assert not random_masks(0)["spleen"].any()
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": ["a0", "a1"], "val": ["a2"]}]
    assert not (folder / ".import.jsonl").exists()


def test_test_cases_go_aside_and_folds_need_both_parts(source: Path, folder: Path) -> None:
    write_meta(source, {"a0": "train", "a1": "test", "gone": "val"})
    found = read_totalsegmentator(source)
    assert (found.unlisted, found.absent) == (("a2",), ("gone",))
    report = run(source, folder)
    assert report.splits == {"a0": "train", "a1": "test", "a2": "train"}
    assert not report.has_folds
    assert not (folder / "splits_final.json").exists()
    assert [p.name for p in (folder / "labelsTs").iterdir()] == ["a1.nii.gz"]
    assert [p.name for p in (folder / "imagesTs").iterdir()] == ["a1_0000.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


def test_importing_twice_gives_identical_bytes_and_does_nothing_again(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    run(source, folder)
    run(shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile), tmp_path / "other", num_processes=2)
    first = contents(folder)
    assert first == contents(tmp_path / "other")
    times = {path: (folder / path).stat().st_mtime_ns for path in first if "Tr" in path}
    again = run(source, folder)
    assert again.reused == 3
    assert contents(folder) == first
    assert times == {path: (folder / path).stat().st_mtime_ns for path in times}


def test_what_has_changed_since_is_done_again(source: Path, folder: Path, tmp_path: Path) -> None:
    run(source, folder)
    save(random_masks(9)["aorta"], source / "a0" / "segmentations" / "aorta.nii.gz")
    (source / "a1" / "segmentations" / "aorta.nii.gz").unlink()
    (folder / "labelsTr" / "a2.nii.gz").write_bytes(b"damaged")
    assert run(source, folder).reused == 0
    run(source, tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")


def test_a_case_that_changes_its_split_moves(source: Path, folder: Path, tmp_path: Path) -> None:
    run(source, folder)
    write_meta(source, {"a0": "train", "a1": "test", "a2": "val"})
    run(source, folder)
    run(source, tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")
    assert not (folder / "labelsTr" / "a1.nii.gz").exists()
    write_meta(source, {"a0": "train", "a1": "train", "a2": "val"})
    run(source, folder)
    assert not (folder / "labelsTs").exists()


def truncate(case: Path) -> None:
    mask = case / "segmentations" / "liver.nii.gz"
    mask.write_bytes(mask.read_bytes()[:-20])


def truncate_ct(case: Path) -> None:
    (case / "ct.nii.gz").write_bytes((case / "ct.nii.gz").read_bytes()[:-20])


def reshape(case: Path) -> None:
    save(np.zeros((3, 4, 5), np.uint8), case / "segmentations" / "liver.nii.gz")


def shift_origin(case: Path) -> None:
    moved = AFFINE.copy()
    moved[2, 3] += 1
    save(np.zeros(SHAPE, np.uint8), case / "segmentations" / "liver.nii.gz", affine=moved)


def remove_ct(case: Path) -> None:
    (case / "ct.nii.gz").unlink()


def remove_masks(case: Path) -> None:
    shutil.rmtree(case / "segmentations")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ("unreadable image file", "a1/segmentations/liver.nii.gz")),
        (truncate_ct, ("unreadable image file", "a1/ct.nii.gz")),
        (reshape, ("another shape", "a1/segmentations/liver.nii.gz", "(3, 4, 5)", "(11, 9, 7)", "a1/ct.nii.gz")),
        (shift_origin, ("affine", "a1/segmentations/liver.nii.gz", "1 mm elsewhere", "a1/ct.nii.gz")),
        (remove_ct, ("unreadable file", "a1/ct.nii.gz")),
        (remove_masks, ("no masks", "a1/segmentations")),
    ],
)
def test_one_bad_case_is_named_and_stops_no_other(
    source: Path, folder: Path, tmp_path: Path, damage: Callable[[Path], None], expected: tuple[str, ...]
) -> None:
    whole = shutil.copytree(source, tmp_path / "whole")
    damage(source / "a1")
    report = run(source, folder)
    assert list(report.failed) == ["a1"]
    assert all(part in str(report.failed["a1"]) for part in expected), str(report.failed["a1"])
    assert list(report.splits) == ["a0", "a2"]
    assert [p.name for p in sorted((folder / "labelsTr").iterdir())] == ["a0.nii.gz", "a2.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert list(json.loads((folder / "annotated_labels.json").read_text())["cases"]) == ["a0", "a2"]
    mended = run(whole, folder)
    assert (mended.reused, mended.failed) == (2, {})
    run(whole, tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")


def test_a_case_that_breaks_later_stays_as_it_was(source: Path, folder: Path) -> None:
    run(source, folder)
    before = contents(folder)
    truncate(source / "a1")
    shutil.rmtree(source / "a2")
    report = run(source, folder)
    assert (list(report.failed), report.kept) == (["a1"], ["a1", "a2"])
    after = contents(folder)
    assert {k: v for k, v in after.items() if k != "import_report.json"} == {
        k: v for k, v in before.items() if k != "import_report.json"
    }
    assert list(run(source, folder, excluded=["a2"]).splits) == ["a0", "a1"]
    assert not (folder / "labelsTr" / "a2.nii.gz").exists()


def test_nothing_can_be_imported(source: Path, folder: Path) -> None:
    for case in ("a0", "a1", "a2"):
        truncate_ct(source / case)
    with pytest.raises(
        DatasetError, match=r"no training case annotates aorta, heart.*3 cases failed, a0 first: unreadable"
    ):
        run(source, folder, allow_unannotated=True)
    assert not (folder / "dataset.json").exists()


def test_a_structure_annotated_nowhere(source: Path, folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"no training case annotates brain, .*--allow-unannotated"):
        run(source, folder, [*STRUCTURES, "brain"])
    assert not folder.exists()
    write_meta(source, {"a0": "test", "a1": "train", "a2": "val"})
    with pytest.raises(DatasetError, match="annotates spleen, and"):  # a test case teaches nothing
        run(source, folder)
    write_meta(source, {"a0": "train", "a1": "train", "a2": "val"})
    truncate(source / "a0")
    with pytest.raises(DatasetError, match=r"spleen \(1 cases failed, a0 first: unreadable image file \S*liver"):
        run(source, folder)
    report = run(source, folder, allow_unannotated=True)
    assert list(report.splits) == ["a1", "a2"]


def test_cases_that_annotate_none_of_the_chosen_structures_are_left_out(source: Path, folder: Path) -> None:
    report = run(source, folder, ["aorta", "liver"])
    assert (report.left_out, list(report.splits)) == (["a2"], ["a0", "a1"])
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "aorta": 1, "liver": 2}


def test_many_structures_take_two_bytes(tmp_path: Path, folder: Path) -> None:
    structures = [f"s{i:03d}" for i in range(300)]
    masks = {}
    for i, name in enumerate(structures):
        masks[name] = np.zeros(SHAPE, np.uint8)
        masks[name].ravel()[2 * i : 2 * i + 3] = 1  # the last voxel is lost to the next
    write_case(tmp_path / "s", "a", masks)
    report = run(tmp_path / "s", folder, structures)
    written = nib.load(folder / "labelsTr" / "a.nii.gz")
    assert written.get_data_dtype() == np.uint16
    assert np.array_equal(np.asarray(written.dataobj), naive_label_map(tmp_path / "s" / "a", structures)[0])
    assert len(report.overlaps) == 299


def test_images_can_be_linked(source: Path, folder: Path) -> None:
    run(source, folder, link_images=True)
    image, ct = folder / "imagesTr" / "a0_0000.nii.gz", source / "a0" / "ct.nii.gz"
    assert image.samefile(ct)
    assert run(source, folder, link_images=True).reused == 3
    (folder / "labelsTr" / "a0.nii.gz").unlink()
    assert run(source, folder, link_images=True).reused == 2
    assert {p.name for p in (folder / "imagesTr").iterdir()} == {f"a{i}_0000.nii.gz" for i in range(3)}
    with pytest.raises(DatasetError, match="an import with other images"):
        run(source, folder)


def test_a_folder_that_holds_something_else_is_kept(source: Path, folder: Path) -> None:
    run(source, folder)
    before = contents(folder)
    with pytest.raises(DatasetError, match=r"there already, .*, an import with other structures"):
        run(source, folder, ["liver", "aorta"])
    assert contents(folder) == before
    stray = folder / "imagesTr" / "mine_0000.nii.gz"
    stray.write_bytes(b"precious")
    with pytest.raises(DatasetError, match=r"did not write \S*mine_0000"):
        run(source, folder)
    stray.rename(folder.parent / stray.name)
    run(source, folder)
    assert contents(folder) == before
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"there already, .*, no import of this kind"):
        run(source, folder)
    assert contents(folder) == {"dataset.json": b"{}"}


def test_two_imports_at_once(source: Path, folder: Path) -> None:
    errors = []

    def intrude(case: str, reused: bool) -> None:
        with pytest.raises(CommandError, match="another import"):
            run(source, folder)
        errors.append(case)

    run(source, folder, on_case=intrude)
    assert len(errors) == 3


def test_ids_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    assert dataset_folder(7, "A_b") == tmp_path / "nnUNet_raw" / "Dataset007_A_b"
    (tmp_path / "nnUNet_results" / "Dataset007_Other").mkdir()
    with pytest.raises(DatasetError, match=r"id that is taken, 7 by \S*Dataset007_Other"):
        dataset_folder(7, "A")
    for number, name in ((0, "A"), (1000, "A"), (1, "../A"), (1, "")):
        with pytest.raises(UsageError, match="impossible id or name"):
            dataset_folder(number, name)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ("image_id;split\na0;train\na0;val\n", "case a0 2 times"),
        ("image_id;split\na0;training\n", "'training'"),
        ("image_id,split\na0,train\n", "image_id and split"),
        ("", "no rows"),
    ],
)
def test_meta_files_that_cannot_be_used(source: Path, meta: str, expected: str) -> None:
    (source / "meta.csv").write_text(meta)
    with pytest.raises(DatasetError, match=expected):
        read_totalsegmentator(source)


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        read_totalsegmentator(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no cases in"):
        read_totalsegmentator(tmp_path / "empty")
    shutil.copytree(source / "a0", source / "A0")
    with pytest.raises(DatasetError, match="'A0' and 'a0'"):
        read_totalsegmentator(source)
    shutil.rmtree(source / "A0")
    (source / "a0" / "segmentations" / "brain.nii").touch()
    with pytest.raises(DatasetError, match=r"uncompressed mask \S*brain\.nii"):
        read_totalsegmentator(source)


def test_versions_orders_and_groups(tmp_path: Path) -> None:
    source = tmp_path / "s"
    masks = random_masks(0)
    write_case(source, "a", {"liver": masks["liver"]})
    with pytest.raises(DatasetError, match=r"cannot be told: .*1 and 2 both have.*--version"):
        choose_structures(read_totalsegmentator(source))
    write_case(source, "b", {"face": masks["liver"]})
    version, structures = choose_structures(read_totalsegmentator(source))
    assert version == "1"
    assert structures == list(load_vocabulary("totalsegmentator_104").labels[1:])
    write_case(source, "c", {"heart": masks["liver"]})
    found = read_totalsegmentator(source)
    with pytest.raises(DatasetError, match=r"only version 1 has face; only version 2 has heart"):
        choose_structures(found)
    official = list(load_vocabulary("totalsegmentator_v2").labels[1:])
    assert choose_structures(found, version="2", label_order="official") == ("2", official)
    assert choose_structures(found, version="2") == ("2", sorted(official))
    ribs = choose_structures(found, version="2", groups=["ribs"], structures=["liver"], label_order="official")[1]
    assert (len(ribs), ribs[0]) == (27, "liver")
    for options, expected in (
        ({"groups": ["rib"]}, "unknown group"),
        ({"structures": ["Liver"]}, "unknown structure Liver: .*liver"),
        ({"task": "nothing"}, "unknown task"),
    ):
        with pytest.raises((LabelError, UsageError), match=expected):
            choose_structures(found, **{"version": "2", **options})
    write_case(source, "d", {"Aorta": masks["liver"]})
    with pytest.raises(DatasetError, match=r"Aorta\.nii\.gz must be spelled aorta"):
        choose_structures(read_totalsegmentator(source), version="2")


def test_tasks_of_ones_own(tmp_path: Path, source: Path) -> None:
    found, task = read_totalsegmentator(source), tmp_path / "task.json"
    task.write_text(json.dumps(["spleen", "aorta"]))
    assert choose_structures(found, task=str(task)) == ("", ["spleen", "aorta"])
    assert choose_structures(found, task=str(task), label_order="stunet") == ("", ["aorta", "spleen"])
    for content, expected in (
        (["a", "A"], "'a' and 'A'"),
        (["a", "a"], "a twice"),
        (["background", "a"], "background twice, or"),
        ([], "length >= 1"),
        ({"a": 1}, "got object"),
    ):
        task.write_text(json.dumps(content))
        with pytest.raises(LabelError, match=expected):
            choose_structures(found, task=str(task))


def test_links_take_the_place_of_earlier_ones_at_once(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, folder, link_images=True)
    (folder / "labelsTr" / "a0.nii.gz").unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source, folder, link_images=True)
    assert (folder / "imagesTr" / "a0_0000.nii.gz").samefile(source / "a0" / "ct.nii.gz")
    run(source, folder, link_images=True)
    assert not list(folder.rglob("*.tmp"))


def test_an_import_that_ends_while_another_begins(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is there when it is asked for, and gone when it is read."""
    run(source, folder)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name == ".import.jsonl" or exists(path))
    assert run(source, folder).reused == 3
