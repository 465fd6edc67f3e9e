"""Model folders out of weights: what stands in them, and that they appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import STRIDES, TINY, published, tiny_weights, v1_plans, write_v1

from plans import DATASET_JSON, make_plans
from stunet.cli.main import main
from stunet.errors import CheckpointError, PlansError, UsageError
from stunet.labels.labels import Vocabulary
from stunet.planning.model_folder import describe_model, write_model_folder
from stunet.planning.plans import resolve_configuration
from stunet.weights.convert import open_weights
from stunet.weights.read import read_checkpoint

LABELS = Vocabulary("mine.json", ("background", "liver", "spleen"), "mine")


def convert(*args: Any) -> int:
    """Run ``stunet convert`` in this process, which saves its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stunet", "convert", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(LABELS.labels))
    return write_v1(folder, tiny_weights(), v1_plans())


def test_all_files_of_a_model(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a b" / "model"
    assert convert(source, "-o", out, "--labels", source.with_name("labels.json"), "--licence", "CC0") == 0
    printed = capsys.readouterr().out
    assert f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m '{out}' -f 0" in printed
    assert "all 130 parameters are accounted for" in printed
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["dataset.json", "fold_0/checkpoint_final.pth", "model_card.json", "plans.json"]
    assert list(out.parent.iterdir()) == [out]

    assert json.loads((out / "dataset.json").read_text()) == {
        "channel_names": {"0": "nonCT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "file_ending": ".nii.gz",
    }
    checkpoint = read_checkpoint(out / "fold_0" / "checkpoint_final.pth")
    assert all(torch.equal(checkpoint["network_weights"][key], tensor) for key, tensor in tiny_weights().items())
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["inference_allowed_mirroring_axes"] is None
    assert checkpoint["current_epoch"] == 7
    plans = json.loads((out / "plans.json").read_text())
    assert checkpoint["init_args"]["plans"] == plans
    assert checkpoint["init_args"]["configuration"] == "3d_fullres"
    assert resolve_configuration(plans, "3d_fullres")["architecture"]["arch_kwargs"]["strides"] == STRIDES

    card = json.loads((out / "model_card.json").read_text())
    assert card["sources"] == [
        {"file": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in (source, source.with_name("x.model.pkl"))
    ]
    expected = {
        "format": "nnU-Net v1", "precision_in_source": "float32", "epochs": 7, "licence": "CC0", "size": "d111111w2",
        "depth": [1] * 6, "width": 2, "input_channels": 1, "outputs": 3, "plans_from": "x.model.pkl",
        "labels_from": "labels.json", "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "parameters": sum(t.numel() for t in tiny_weights().values()),
    }  # fmt: skip
    written = out / "fold_0" / "checkpoint_final.pth"
    assert card.pop("files") == {"fold_0/checkpoint_final.pth": hashlib.sha256(written.read_bytes()).hexdigest()}
    assert {key: card[key] for key in card if key != "sources"} == expected


def test_another_checkpoint_in_the_folder_is_refused(tmp_path: Path) -> None:
    """One that is whole in itself: the card's checksum says that it is not the one that was converted."""
    source = open_weights([write_v1(tmp_path, tiny_weights(), None)])
    write_model_folder(source, LABELS, tmp_path / "out")
    path = tmp_path / "out" / "fold_0" / "checkpoint_final.pth"
    content = read_checkpoint(path)
    torch.save({**content, "current_epoch": 8}, tmp_path / "other.pth")
    path.write_bytes((tmp_path / "other.pth").read_bytes())
    for read in (read_checkpoint, lambda path: open_weights([path.parent.parent])):
        with pytest.raises(CheckpointError, match=r"not the file that was converted[\s\S]*model_card\.json"):
            read(path)


@pytest.mark.parametrize(("outputs", "third"), [(105, "aorta"), (10, "IVC")])
def test_without_pickle_and_labels_those_of_the_published_weights(
    tmp_path: Path, outputs: int, third: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_v1(tmp_path, tiny_weights(outputs), None)
    assert convert(model, "-o", tmp_path / "out") == 0
    assert "No .model.pkl was given" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"])[3] == third
    assert json.loads((tmp_path / "out" / "model_card.json").read_text())["licence"] is None
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [128, 128, 128]


def test_a_pickle_without_stages_is_not_credited_with_the_presets_spacing(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_v1(tmp_path, tiny_weights(105), None)
    shutil.copy(shared / "golden" / "published_plan_files" / "plans.pkl", tmp_path)
    assert convert(model, "-o", tmp_path / "out") == 0
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert card["plans_from"] == "plans.pkl and pre-training preset"
    assert "No .model.pkl was given" in capsys.readouterr().out


def test_the_old_ports_own_plans_are_kept(tmp_path: Path) -> None:
    """A checkpoint of nnU-Net v2 brings its plans; only the architecture is put in place of the port's."""
    plans = make_plans()
    labels = {"background": 0, "organs": [1, 2], "spleen": [2]}
    dataset_json = {**DATASET_JSON, "labels": labels, "regions_class_order": [1, 2]}
    weights = tiny_weights(num_classes=2)
    content = {
        "network_weights": published(weights), "inference_allowed_mirroring_axes": (0, 1, 2),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "dataset_json": dataset_json},
    }  # fmt: skip
    torch.save(content, tmp_path / "port.pth")
    assert convert(tmp_path / "port.pth", "-o", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert list(written["configurations"]) == ["3d_fullres"]
    configuration = written["configurations"]["3d_fullres"]
    assert configuration["architecture"]["network_class_name"] == "stunet.network.STUNet"
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == list(TINY.features)
    assert configuration["architecture"]["arch_kwargs"]["strides"] == [[1] * 3, *[[2] * 3] * 3, [1] * 3, [1] * 3]
    assert configuration["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == dataset_json
    checkpoint = read_checkpoint(tmp_path / "out" / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1, 2)

    for change, expected in (
        ({"dataset_json": DATASET_JSON}, "3 outputs.*2 outputs"),
        ({"dataset_json": {**DATASET_JSON, "labels": labels}}, "nnU-Net cannot use[\\s\\S]*regions_class_order"),
        ({"dataset_json": {}}, "no dataset description"),
        ({"configuration": "3d"}, "unknown configuration"),
        ({"plans": {"configurations": {"3d_fullres": {"a": 1}}}}, "3d_fullres cannot be read"),
        ({"plans": {"a": 1}}, "not a plans file"),
    ):
        torch.save({**content, "init_args": {**content["init_args"], **change}}, tmp_path / "port.pth")
        with pytest.raises(PlansError, match=expected):
            describe_model(open_weights([tmp_path / "port.pth"]), None)


def test_two_channels_without_pickle(tmp_path: Path) -> None:
    model = write_v1(tmp_path, tiny_weights(input_channels=2), None)
    with pytest.raises(CheckpointError, match=r"missing plans[\s\S]*2 channels[\s\S]*x\.model\.pkl"):
        describe_model(open_weights([model]), LABELS)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), ("3 outputs", "--labels FILE.json")),
        (("--labels", "{source}/two.json"), ("two.json", "2 ", "for 3 outputs")),
        (("--labels", "{source}/none.json"), ("none.json",)),
        (("{source}/none.pkl",), ("unknown weights", "none.pkl")),
        (("{source}/none.model",), ("unknown weights", "none.model")),
    ],
)
def test_bad_input_is_explained_and_leaves_nothing(
    source: Path, tmp_path: Path, args: tuple[str, ...], expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source.with_name("two.json").write_text('["background", "liver"]')
    before = sorted(tmp_path.rglob("*"))
    filled = [arg.format(source=source.parent) for arg in args]
    assert convert(source, "-o", tmp_path / "out", *filled) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["nnunet", "published"])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists_is_kept(
    source: Path, tmp_path: Path, to: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]()
    assert convert(source, "-o", out, "--labels", source.with_name("labels.json"), "--to", to) == 2
    assert "an output that exists" in capsys.readouterr().err
    assert {"folder": out.is_dir, "file": out.is_file, "dangling link": out.is_symlink}[kind]()
    with pytest.raises(UsageError, match="an output that exists"):
        write_model_folder(open_weights([source]), LABELS, out)


@pytest.mark.parametrize("to", ["nnunet", "published"])
def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(torch, "save", save)
    assert convert(source, "-o", tmp_path / "out", "--labels", source.with_name("labels.json"), "--to", to) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to test with")
@pytest.mark.parametrize("to", ["nnunet", "published"])
def test_a_write_that_the_system_refuses_half_way(source: Path, tmp_path: Path, to: str) -> None:
    """As a full disk, but with PyTorch's own writer failing in the middle of the file."""
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import resource, sys; from stunet.cli.main import main\n"
        "import torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); main()"
    )
    args = ["convert", source, "-o", tmp_path / "out", "--labels", source.with_name("labels.json"), "--to", to]
    got = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert got.returncode == 2, got.stderr
    assert "cannot be written" in got.stderr
    assert "Traceback" not in got.stderr
    assert sorted(tmp_path.rglob("*")) == before
