"""Checkpoints that processes write together: read by others than wrote them, whole or not at all, and safely."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import run_and_kill
from made_trainers import make
from sharded_runs import make_trainer, state_of, train_epochs
from together import together
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from versions import CPUS_AVERAGE

from stunet.errors import CheckpointError
from stunet.files import remove_leftovers
from stunet.training import BaseSTUNetTrainer
from stunet.training.distributed import Ranks
from stunet.weights.read import read_checkpoint
from stunet.weights.sharded import ShardedSave, find_version, load_sharded, read_sharded, remove_sharded

LATEST = "checkpoint_latest.pth"


@contextmanager
def _full_device(*_: Any) -> Iterator[Any]:
    with Path("/dev/full").open("wb", buffering=0) as stream:
        yield stream


def _full_disk(trainer: BaseSTUNetTrainer) -> dict[str, Any]:
    """Three checkpoints, in another folder: rank 1 finds no space when it writes the second."""
    trainer.output_folder = str(Path(trainer.output_folder, "full_disk"))
    train_epochs(trainer, 3, save=LATEST)
    trainer.checkpoints.finish()
    before = find_version(Path(trainer.output_folder, "checkpoint_latest.dcp"))
    assert before is not None
    with pytest.MonkeyPatch.context() as patch:
        if trainer.ranks.rank == 1:
            patch.setattr(FileSystem, "create_stream", _full_device)
        train_epochs(trainer, 4, save=LATEST)
        with pytest.raises(CheckpointError) as caught:  # the one before is said to have failed
            train_epochs(trainer, 5, save=LATEST)
    dist.barrier()
    left, whole = sorted(path.name for path in before.parent.iterdir()), read_sharded(before)[0]["current_epoch"]
    dist.barrier()
    trainer.save_checkpoint(str(Path(trainer.output_folder, LATEST)))  # there is room again
    trainer.checkpoints.finish()
    (after,) = before.parent.iterdir()
    return {"error": str(caught.value), "before": before, "left": left, "whole": whole, "after": read_sharded(after)[0]}


def _write(ranks: Ranks, folder: str) -> dict[str, Any]:
    trainer = make_trainer()
    train_epochs(trainer, 1, save=LATEST)
    at_save = state_of(trainer)
    train_epochs(trainer, 2)  # while the checkpoint is being written
    trainer.checkpoints.finish()
    end = state_of(trainer)
    return {"folder": trainer.output_folder, "at_save": at_save, "end": end, "full disk": _full_disk(trainer)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint after one epoch of four processes; their state then, and after another epoch; and a full disk."""
    if not CPUS_AVERAGE:
        pytest.skip("sharding needs a newer PyTorch on CPUs")
    root = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        _make_folders(root, patch)
        results = together(4, root, _write)
    return {**results[0], "full disk": [result["full disk"] for result in results]}


def _make_folders(root: Path, patch: pytest.MonkeyPatch) -> None:
    from stunet.cli.env import trainers_folder

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        patch.setenv(name, str(root / name))
    patch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    cases = root / "nnUNet_preprocessed" / "Dataset001_Test" / "nnUNetPlans_3d_fullres"
    cases.mkdir(parents=True)
    (cases / "case.b2nd").touch()


@pytest.fixture
def copied(written: dict[str, Any], dataset: Path) -> Path:
    """The checkpoint in the fold of a trainer that is made in this test."""
    fold = dataset.parents[1] / Path(written["folder"]).relative_to(Path(written["folder"]).parents[3])
    shutil.copytree(written["folder"], fold)
    return fold


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert len([name for name in expected if name.startswith("momentum")]) > 40
    torch.testing.assert_close(state, expected, rtol=0, atol=tolerance)


class _Selection:
    """Keeps what it is given to score."""

    def __init__(self) -> None:
        self.scored: list[tuple[int, int, int]] = []

    def score(self, checkpoint: Path, epoch: int) -> None:
        content = read_checkpoint(checkpoint)
        self.scored.append((epoch, content["current_epoch"], len(content["network_weights"])))


def _score(trainer: BaseSTUNetTrainer) -> list[tuple[int, int, int]]:
    selection: Any = _Selection()
    if trainer.local_rank == 0:
        trainer._selection = selection
    trainer._score(Path(trainer.output_folder, LATEST), trainer.current_epoch)
    assert not Path(trainer.output_folder, "checkpoint_candidate.pth").exists() or trainer.local_rank > 0
    return list(selection.scored)


def _go_on_with_two(ranks: Ranks, folder: str) -> dict[str, Any]:
    in_pieces = make_trainer(continues=True)
    assert in_pieces.sharding.group is not None
    states = {"loaded": state_of(in_pieces)}
    train_epochs(in_pieces, 2)
    states["end"] = state_of(in_pieces)
    ddp = make_trainer(continues=True, parallel="ddp")
    states["loaded by ddp"] = state_of(ddp)
    train_epochs(ddp, 2, save="checkpoint_epoch_0002.pth")
    states["end of ddp"] = state_of(ddp)
    states["scored"] = _score(in_pieces)
    path = Path(in_pieces.output_folder, "checkpoint_epoch_0002.pth")
    for parallel in ("ddp", "fsdp"):  # heads that begin anew, of which the coarsest learns nothing
        started = make_trainer(parallel=parallel, head="fresh", shards=False)
        started._start_from(str(path))
        started.sharding.shard()
        states[f"started with {parallel}"] = state_of(started)
    in_pieces.load_checkpoint(str(path))  # puts the network together
    in_pieces.sharding.shard()
    states["end of ddp in pieces"] = state_of(in_pieces)
    in_pieces.current_epoch -= 1
    in_pieces.save_checkpoint(str(path.with_name("checkpoint_epoch_0003.pth")))
    return states


def test_four_processes_write_and_two_go_on(written: dict[str, Any], copied: Path, tmp_path: Path) -> None:
    states = together(2, tmp_path, _go_on_with_two)[0]
    assert_close(states["loaded"], written["at_save"])
    assert_close(states["end"], written["end"], 1e-5)
    assert_close(states["loaded by ddp"], written["at_save"])
    assert_close(states["end of ddp"], written["end"], 1e-5)
    body = {name for name in states["end"] if name.startswith(("encoder", "decoder.stages", "decoder.upsamplings"))}
    for parallel in ("ddp", "fsdp"):
        for name in body:
            assert torch.equal(states[f"started with {parallel}"][name], states["end of ddp"][name])
    # A file of the whole network is divided, and put together again when it is written.
    assert_close(states["end of ddp in pieces"], states["end of ddp"])
    given, written_again = (
        torch.load(copied / f"checkpoint_epoch_000{n}.pth", map_location="cpu", weights_only=False) for n in (2, 3)
    )
    for part in ("network_weights", "optimizer_state"):
        torch.testing.assert_close(written_again[part], given[part], rtol=0, atol=0)
    assert states["scored"] == [(2, 2, len(given["network_weights"]))]  # a file, though the periodic ones are not
    assert written_again["current_epoch"] == given["current_epoch"] == 2


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_four_processes_write_and_one_goes_on(written: dict[str, Any], copied: Path, parallel: str) -> None:
    trainer = make_trainer(continues=True, parallel=parallel)
    assert_close(state_of(trainer), written["at_save"])
    assert trainer.current_epoch == 1
    assert trainer._best_ema == 0
    assert trainer.logger.get_checkpoint()["train_losses"] == [0]
    assert trainer.my_init_kwargs["configuration"] == "3d_fullres"
    train_epochs(trainer, 2)
    assert_close(state_of(trainer), written["end"], 1e-5)
    trainer.save_checkpoint(str(copied / LATEST))
    assert not (copied / "checkpoint_latest.dcp").exists()  # a file has taken its place


def test_the_newest_of_all_is_taken(written: dict[str, Any], copied: Path) -> None:
    trainer = make_trainer(continues=True)
    train_epochs(trainer, 3)
    trainer.current_epoch -= 1
    trainer.save_checkpoint(str(copied / "checkpoint_best.pth"))
    assert make_trainer(continues=True).current_epoch == 3
    log = max(copied.glob("training_log*"), key=lambda path: path.stat().st_mtime_ns).read_text()
    assert (
        "checkpoint_best.pth after epoch 2, checkpoint_latest.dcp after epoch 0; continuing from checkpoint_bes" in log
    )


def test_another_network_is_refused(copied: Path) -> None:
    other = make("STUNetTrainer_small")
    shutil.copytree(copied / "checkpoint_latest.dcp", Path(other.output_folder, "checkpoint_latest.dcp"))
    with pytest.raises(CheckpointError) as caught:
        other.load_checkpoint(str(Path(other.output_folder, LATEST)))
    message = str(caught.value)
    assert "does not fit the network" in message
    assert "encoder.stages.0.0.conv1.weight is (2, 1, 3, 3, 3) instead of (16, 1, 3, 3, 3)" in message
    assert "use the plans" in message


def test_one_without_what_a_training_needs(copied: Path) -> None:
    version = find_version(copied / "checkpoint_latest.dcp")
    assert version is not None
    torch.save({"current_epoch": 1, "logging": {}}, version / "training.pth")
    with pytest.raises(CheckpointError, match=r"cannot continue from.*optimizer"):
        make_trainer(continues=True)


def test_of_another_strategy(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parameter group that doesn't match.*fine_tune"):
        make_trainer(continues=True, fine_tune="head-only")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_no_code_is_run_out_of_it(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    version = find_version(copied / "checkpoint_latest.dcp")
    assert version is not None
    (version / ".metadata").write_bytes(pickle.dumps(_Evil()))  # PyTorch's table of contents, which is not read
    make_trainer(continues=True)
    (file,) = version.glob("__1_*.distcp")
    evil = tmp_path / "evil.pt"
    torch.save(_Evil(), evil)
    index = json.loads((version / "tensors.json").read_text())
    pieces = index["tensors"]["network.decoder.seg_layers.4.weight"]["pieces"]
    (place,) = (piece for piece in pieces if piece["file"] == file.name)
    place.update(start=file.stat().st_size, bytes=evil.stat().st_size)
    with file.open("ab") as end:
        end.write(evil.read_bytes())
    (version / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        make_trainer(continues=True)
    torch.save({"current_epoch": _Evil()}, version / "training.pth")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        make_trainer(continues=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index, version: (version / "tensors.json").write_text("{"), "tensors.json"),
        (lambda index, version: next(version.glob("__2_*")).unlink(), "has 0 bytes instead of"),
        (lambda index, version: os.truncate(next(version.glob("__2_*")), 100), "has 100 bytes instead of"),
        (lambda index, version: _put(index, version, "file", "../../__0_0.distcp"), r"pieces\[0\].file"),
        (lambda index, version: _put(index, version, "start", -1), r"pieces\[0\].start"),
        (lambda index, version: _put(index, version, "sizes", [2**40, 2, 3, 3, 3]), "outside of it"),
        (lambda index, version: _put(index, version, "offsets", [1, 0, 0, 0, 0]), "outside of it|at one place"),
        (lambda index, version: _put(index, version, "sizes", [0, 0, 0, 0, 0]), "do not make it up"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_said(copied: Path, change: Any, said: str) -> None:
    version = find_version(copied / "checkpoint_latest.dcp")
    assert version is not None
    change(json.loads((version / "tensors.json").read_text()), version)
    with pytest.raises(CheckpointError, match=said):
        read_sharded(version)


def _put(index: Any, version: Path, key: str, value: Any) -> None:
    index["tensors"]["network.encoder.stages.0.0.conv2.weight"]["pieces"][0][key] = value
    (version / "tensors.json").write_text(json.dumps(index))


def test_the_format_stays(tmp_path: Path) -> None:
    """As it has been from the first version on, by hand."""
    version = tmp_path / "checkpoint_latest.dcp" / "0007"
    version.mkdir(parents=True)
    whole = torch.arange(12.0).reshape(4, 3)
    torch.save({"current_epoch": 3, "optimizer": {"lr": 0.5}}, version / "training.pth")
    pieces = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 4))):
        file = version / f"__{rank}_0.distcp"
        with file.open("wb") as stream:
            stream.write(b"\0" * 64 * rank)
            torch.save(whole[rows].clone(), stream)
        start = {"file": file.name, "start": 64 * rank, "bytes": file.stat().st_size - 64 * rank}
        pieces.append({"offsets": [rows.start, 0], "sizes": [rows.stop - rows.start, 3], **start})
    index = {"tensors": {"network.a": {"dtype": "float32", "size": [4, 3], "pieces": pieces}}}
    (version / "tensors.json").write_text(json.dumps(index))
    assert find_version(version.parent) == version
    content, shapes = read_sharded(version)
    assert content == {"current_epoch": 3, "optimizer": {"lr": 0.5}}
    assert {name: (tuple(t.shape), t.dtype, t.is_meta) for name, t in shapes.items()} == {
        "network.a": ((4, 3), torch.float32, True)
    }
    found = {"network.a": torch.zeros(4, 3)}
    load_sharded(version, found)
    assert torch.equal(found["network.a"], whole)


def test_what_is_not_in_it(copied: Path) -> None:
    version = find_version(copied / "checkpoint_latest.dcp")
    assert version is not None
    with pytest.raises(CheckpointError, match=r"Missing key.*network\.other"):
        load_sharded(version, {"network.other": torch.zeros(1)})


def test_no_space_leaves_the_last_good_one(written: dict[str, Any]) -> None:
    for seen in written["full disk"]:
        for part in ("could not be written", "No space left on device (rank 1)", f"{seen['before']}, is whole"):
            assert part in seen["error"]
        assert seen["left"] == [seen["before"].name]
        assert (seen["whole"], seen["after"]["current_epoch"]) == (3, 5)


def _save_alone(folder: Path, epoch: int) -> None:
    """One process that writes a checkpoint. It ends without leaving its group, where PyTorch 2.7 may wait forever."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    tensors = {"network.a": torch.full((3, 2), float(epoch)), "network.b": torch.tensor(float(epoch))}
    save = ShardedSave(folder, tensors, {"current_epoch": epoch}, dist.group.WORLD)
    tensors["network.a"].zero_()  # as a training goes on
    save.wait()


def _check_whole(folder: Path) -> int:
    version = find_version(folder)
    assert version is not None
    content, shapes = read_sharded(version)
    found = {name: torch.zeros(shape.shape) for name, shape in shapes.items()}
    load_sharded(version, found)
    epoch = int(content["current_epoch"])
    torch.testing.assert_close(
        found, {"network.a": torch.full((3, 2), float(epoch)), "network.b": torch.tensor(1.0 * epoch)}
    )
    return epoch


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_each_change(tmp_path: Path, after: bool) -> None:
    folder = tmp_path / "checkpoint_latest.dcp"
    _in_child(lambda: _save_alone(folder, 1))
    moments, seen = 0, set()
    while run_and_kill(lambda: _save_alone(folder, 2), moments + 1, after):
        moments += 1
        seen.add(_check_whole(folder))
        shutil.rmtree(folder)
        _in_child(lambda: _save_alone(folder, 1))
    assert moments >= 4
    assert seen == {1, 2}
    assert _check_whole(folder) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["0002"]


def _in_child(function: Any) -> None:
    assert not run_and_kill(function, -1, after=False)


def test_an_unfinished_one_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_latest.dcp"
    (folder / ".unfinished").mkdir(parents=True)
    assert find_version(folder) is None
    for name in ("0009", "0010"):
        (folder / name).mkdir()
    assert find_version(folder) == folder / "0010"
    remove_sharded(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".checkpoint_best.dcp.here.1.tmp" / "0001").mkdir(parents=True)  # killed while it was removed
    remove_leftovers(tmp_path, "checkpoint_*")
    assert list(tmp_path.iterdir()) == []
