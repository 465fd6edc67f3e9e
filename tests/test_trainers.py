"""Trainers as nnU-Net's own finder finds them, built on real plans without training."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from made_trainers import NARROW, find, make, narrow_plans, save, trained
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import stunet
from plans import DATASET_JSON, make_plans
from stunet.errors import CheckpointError, PlansError, SettingsError, UsageError
from stunet.files import write_json
from stunet.labels.annotations import order_manifest
from stunet.network import STUNet, STUNetSize, build_stunet
from stunet.planning.plans import plans_size, rewrite_plans
from stunet.training.trainer import check_seams
from stunet.weights.read import read_checkpoint

SIZES = ("small", "base", "large", "huge")
NAMES = [
    "STUNetTrainer",
    "STUNetTrainer_ft",
    *(f"STUNetTrainer_{size}{suffix}" for size in SIZES for suffix in ("", "_ft", "_ep1k", "_ep2k", "_ep4k")),
]


@pytest.mark.parametrize("name", NAMES)
def test_nnunets_finder_finds_every_trainer(dataset: Path, name: str) -> None:
    trainer = find(name)
    assert trainer.__name__ == name
    assert issubclass(trainer, nnUNetTrainer)
    assert "stunet_trainers" not in sys.modules


def test_seams_of_nnunet_that_have_moved() -> None:
    check_seams()  # of the installed one

    class Moved(nnUNetTrainer):
        def train_step(self, batch: Any, accumulate: bool) -> None: ...

    with pytest.raises(UsageError, match=r"Moved.train_step\(batch, accumulate\) of nnU-Net .* was .*\(batch\)"):
        check_seams(Moved)
    with pytest.raises(UsageError, match=r"object.build_network_architecture\(missing\)"):
        check_seams(type("object", (), {"__init__": nnUNetTrainer.__init__}))


def test_seams_of_nnunets_next_release(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(trained(make(plans=narrow_plans()), 1), "checkpoint_latest.pth")
    for name in ("filename_or_checkpoint", "checkpoint"):
        resumed = make(plans=narrow_plans())
        resumed.load_checkpoint(**{name: str(path)})
        assert resumed.current_epoch == 1
    theirs, given = nnUNetTrainer.build_network_architecture, []

    def build(*args: Any, verbose: bool) -> torch.nn.Module:
        given.append(verbose)
        return theirs(*args)

    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(build))
    managers = (resumed.plans_manager, resumed.configuration_manager)
    assert isinstance(resumed.build_network_architecture(*managers, 1, 3, True, verbose=True), STUNet)
    assert given == [True]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_settings_are_what_the_name_says(dataset: Path, name: str) -> None:
    trainer = make(name)
    _, _, rest = name.partition("_")
    size, _, suffix = rest.partition("_") if rest != "ft" else ("", "", "ft")
    assert plans_size(trainer.configuration_manager.configuration).name == (size or "base")
    assert trainer.initial_lr == (1e-3 if suffix == "ft" else 1e-2)
    assert trainer.num_epochs == {"ep2k": 2000, "ep4k": 4000}.get(suffix, 1000)
    assert trainer.weight_decay == 3e-5


def test_ordinary_plans_are_rewritten_before_nnunet_reads_them(dataset: Path) -> None:
    plans = make_plans()
    untouched = deepcopy(plans)
    trainer = make("STUNetTrainer_small", plans)
    assert plans == untouched
    assert Path(trainer.output_folder_base).name == "STUNetTrainer_small__nnUNetPlans__3d_fullres"
    expected = rewrite_plans(make_plans(), size=plans_size(trainer.configuration_manager.configuration), plans_name="x")
    fullres = trainer.plans_manager.plans["configurations"]["3d_fullres"]
    assert fullres == expected["configurations"]["3d_fullres"]
    assert trainer.my_init_kwargs["plans"] is trainer.plans_manager.plans
    assert json.loads(json.dumps(trainer.plans_manager.plans)) == trainer.plans_manager.plans


@pytest.mark.parametrize("configuration", ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"])
def test_the_network_of_every_configuration_is_built(dataset: Path, configuration: str) -> None:
    trainer = make(plans=narrow_plans(), configuration=configuration)
    trainer.initialize()
    assert isinstance(trainer.network, STUNet)
    assert len(trainer._get_deep_supervision_scales()) == 5
    channels = 3 if "cascade" in configuration else 1  # one-hot of the previous stage's two structures
    outputs = trainer.network(torch.zeros(1, channels, *trainer.configuration_manager.patch_size))
    assert all(o.shape[1] == 3 for o in outputs)
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (1e-2, 0.99, True)


@pytest.mark.parametrize(
    ("labels", "order", "heads"),
    [
        ({"background": 0, "organ": [1, 2], "tumour": 2}, [1, 2], 2),
        ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, None, 3),
    ],
)
def test_regions_and_ignore_label(dataset: Path, labels: Any, order: Any, heads: int) -> None:
    dataset_json = {**DATASET_JSON, "labels": labels, **({"regions_class_order": order} if order else {})}
    trainer = make(plans=narrow_plans(), dataset_json=dataset_json)
    trainer.initialize()
    image = torch.randn(2, 1, 40, 56, 40)
    outputs = trainer.network(image)
    assert outputs[0].shape[1] == heads
    values = list(dict.fromkeys((0, 1, 2, 3) if order is None else (0, 1)))
    shape = (2, 1 if order is None else heads, 40, 56, 40)
    target = torch.from_numpy(np.random.default_rng(0).choice(values, shape).astype(np.float32))
    targets = [torch.nn.functional.interpolate(target, o.shape[2:], mode="nearest") for o in outputs]
    result = trainer.train_step({"data": image, "target": targets})
    assert np.isfinite(result["loss"])
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(image[:1]).shape == (1, heads, 40, 56, 40)


def test_plans_set_what_the_name_sets_too(dataset: Path) -> None:
    plans = narrow_plans(num_epochs=7, initial_lr=0.5, save_every=3, oversample_foreground_percent=0.1)
    trainer = make("STUNetTrainer_ft", plans)
    assert (trainer.num_epochs, trainer.initial_lr, trainer.save_every) == (7, 0.5, 3)
    assert trainer.oversample_foreground_percent == 0.1
    trainer.initialize()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_unknown_setting_in_the_plans(dataset: Path) -> None:
    plans = narrow_plans()
    plans["configurations"]["3d_fullres"]["stunet"] = {"epochs": 7}
    with pytest.raises(SettingsError, match=r"3d_fullres[\s\S]*num_epochs"):
        make(plans=plans)


def test_plans_of_another_size(dataset: Path) -> None:
    with pytest.raises(PlansError, match=r"-tr STUNetTrainer_small with plans of size d111111w2"):
        make("STUNetTrainer_small", narrow_plans())


def test_a_configuration_that_the_plans_left_out(dataset: Path) -> None:
    plans = rewrite_plans(make_plans(), size=NARROW, plans_name="STUNetPlans_narrow", configurations=["2d"])
    make(plans=plans, configuration="2d")
    with pytest.raises(PlansError, match=r"3d_fullres of STUNetPlans_narrow[\s\S]*one of 2d"):
        make(plans=plans)


def test_plans_of_nnunet_v1(dataset: Path) -> None:
    with pytest.raises(PlansError, match="nnU-Net v1"):
        find("STUNetTrainer")({"plans_per_stage": {}}, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))


def test_a_checkpoint_has_what_nnunets_own_has(dataset: Path, tmp_path: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    ours = read_checkpoint(save(trainer, "checkpoint_final.pth"))
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "stock.pth"))
    stock = torch.load(tmp_path / "stock.pth", weights_only=False)
    assert list(ours) == list(stock)
    assert ours["trainer_name"] == "nnUNetTrainer"
    assert ours["init_args"] == stock["init_args"]
    assert ours["logging"] == stock["logging"]
    assert ours["inference_allowed_mirroring_axes"] == (0, 1, 2)


def test_resuming_restores_everything(dataset: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 2)
    path = save(trainer, "checkpoint_latest.pth")
    resumed = make(plans=narrow_plans())
    resumed.load_checkpoint(str(path))
    assert resumed.current_epoch == 2
    assert resumed.logger.get_checkpoint() == trainer.logger.get_checkpoint()
    assert resumed._best_ema == 0.5
    torch.testing.assert_close(resumed.network.state_dict(), trainer.network.state_dict(), rtol=0, atol=0)
    momenta = [
        [state["momentum_buffer"] for state in t.optimizer.state_dict()["state"].values()] for t in (resumed, trainer)
    ]
    torch.testing.assert_close(*momenta, rtol=0, atol=0)


def test_the_later_of_latest_and_best_is_taken(dataset: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    latest = save(trainer, "checkpoint_latest.pth")
    save(trained(trainer, 3), "checkpoint_best.pth")
    resumed = make(plans=narrow_plans())
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 3
    log = Path(resumed.log_file).read_text()
    assert (
        "checkpoint_latest.pth after epoch 0, checkpoint_best.pth after epoch 2; continuing from checkpoint_best" in log
    )


def test_the_best_is_loaded_exactly_where_it_is_asked_for(dataset: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    best = save(trainer, "checkpoint_best.pth")
    latest = save(trained(trainer, 3), "checkpoint_latest.pth")
    for path, epoch in ((best, 1), (latest, 3)):
        resumed = make(plans=narrow_plans())
        resumed.load_checkpoint(str(path))
        assert resumed.current_epoch == epoch


def test_a_truncated_latest_falls_back_to_best(dataset: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    best = save(trainer, "checkpoint_best.pth")
    latest = best.with_name("checkpoint_latest.pth")
    latest.write_bytes(best.read_bytes()[:1000])
    resumed = make(plans=narrow_plans())
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 1
    log = Path(resumed.log_file).read_text()
    assert re.search(r"Passing over checkpoint_latest\.pth: .* truncated", log)
    best.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint_latest.* is .*truncated"):
        make(plans=narrow_plans()).load_checkpoint(str(latest))


def test_a_checkpoint_of_another_size(dataset: Path) -> None:
    path = save(trained(make(plans=narrow_plans()), 1), "checkpoint_latest.pth")
    other = rewrite_plans(make_plans(), size=STUNetSize("other", (1,) * 6, 3), plans_name="STUNetPlans_narrow")
    with pytest.raises(CheckpointError, match=r"encoder\.stages\.0\.0\.conv1\.weight is \(2, 1, 3, 3, 3\)"):
        make(plans=other).load_checkpoint(str(path))


def test_a_full_disk_leaves_the_old_checkpoint(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    path = save(trainer, "checkpoint_latest.pth")
    before = path.read_bytes()

    def full(checkpoint: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*.tmp"))


def test_kept_checkpoints_are_saved_as_all_others(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(make(plans=narrow_plans(keep_every=2)), 2)
    saved = []
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", lambda self: None)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, epochs: saved.append((Path(path).name, epochs)))
    trainer.on_epoch_end()
    assert saved == [("checkpoint_epoch_0002.pth", 2)]
    assert trainer.current_epoch == 2


def test_a_trainer_is_initialised_once(dataset: Path) -> None:
    trainer = make(plans=narrow_plans())
    trainer.initialize()
    with pytest.raises(RuntimeError, match="already initialized"):
        trainer.initialize()


def test_disabled_checkpointing_writes_nothing(dataset: Path) -> None:
    trainer = trained(make(plans=narrow_plans()), 1)
    trainer.disable_checkpointing = True
    assert not save(trainer, "checkpoint_latest.pth").exists()


@pytest.mark.parametrize("command", ["nnUNetv2_train", "stunet train"])
def test_nnunets_pretrained_weights_take_all_but_the_heads(dataset: Path, command: str) -> None:
    source = trained(make(plans=narrow_plans()), 1)
    path = save(source, "checkpoint_final.pth")
    target = make(plans=narrow_plans(), dataset_json={**DATASET_JSON, "labels": {"background": 0, "tumour": 1}})
    target.initialize()
    heads = {k: v.clone() for k, v in target.network.state_dict().items() if ".seg_layers." in k}
    if command == "stunet train":
        target.load_pretrained_weights(path)
    else:
        load_pretrained_weights(target.network, str(path))
    theirs = source.network.state_dict()
    for key, value in target.network.state_dict().items():
        assert torch.equal(value, heads[key] if key in heads else theirs[key])


def test_heads_that_the_loss_weighs_0_are_left_out(dataset: Path) -> None:
    trainer = make(plans=narrow_plans())
    trainer.initialize()
    image, shape = torch.randn(2, 1, 40, 56, 40), (40, 56, 40)
    with torch.no_grad():
        outputs = trainer.network(image)
        trainer.network.decoder.supervised_levels = 5
        every = trainer.network(image)
        targets = [torch.randint(3, (2, 1, *o.shape[2:])) for o in every]
        assert len(outputs) == sum(weight > 0 for weight in trainer.loss.weight_factors) == 4
        assert shape == tuple(outputs[0].shape[2:])
        assert trainer.loss(outputs, targets) == trainer.loss(every, targets)


def test_pretrained_weights_of_another_network(dataset: Path) -> None:
    path = save(trained(make(plans=narrow_plans()), 1), "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match="instead of"):
        make("STUNetTrainer_small").load_pretrained_weights(path)


def test_a_sharded_network_computes_in_bf16_on_cuda(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(plans=narrow_plans(parallel="fsdp"))
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    monkeypatch.setattr(trainer.sharding, "group", object())
    before = torch.get_autocast_dtype("cuda")
    with trainer.precision(enabled=False):
        assert torch.get_autocast_dtype("cuda") is torch.bfloat16  # what nnU-Net's own autocast, within, takes
        assert not torch.is_autocast_enabled("cuda")
    assert torch.get_autocast_dtype("cuda") is before is torch.float16


@pytest.mark.parametrize("name", ["STUNetTrainer", "STUNetTrainer_pretext"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pretext": "simclr", "batch_size": 4, "gradient_accumulation": 2}, "raise batch_size to 8"),
        ({"pretext": "volume-fusion", "batch_size": 3}, "got 1 at a time"),
        ({"pretext": "mae", "batch_size": 8, "parallel": "fsdp"}, "parallel=ddp"),
    ],
)
def test_tasks_that_do_not_go_with_several_processes(
    name: str, settings: dict[str, Any], expected: str, dataset: Path
) -> None:
    trainer = make(name, plans=narrow_plans(**settings))
    trainer.ranks = replace(trainer.ranks, size=2, local_size=2)
    with pytest.raises(SettingsError, match=expected):
        trainer.initialize()


def test_beside_a_task_the_parts_of_the_network_are_compiled(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of it, as a task draws in Python, which would be compiled anew in each step."""
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    trainer = make(plans=narrow_plans(pretext="mae"))
    trainer.initialize()
    network = trainer.plain_network
    compiled = {name for name, module in trainer.network.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"network.encoder", *(f"network.decoder.stages.{i}" for i in range(5))}
    assert isinstance(network, STUNet)
    assert set(network.state_dict()) == set(build_stunet(NARROW, 1, 2, [1] * 6).state_dict())


def test_a_training_step_passes_through_few_files(dataset: Path) -> None:
    content = {"version": 1, "cases": {"a": ["liver"], "b": ["spleen"]}}
    write_json(order_manifest(content), dataset / "annotated_labels.json")
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON))
    trainer = make(plans=narrow_plans())
    trainer.initialize()
    target = torch.randint(3, (2, 1, 40, 56, 40))
    scales = trainer._get_deep_supervision_scales()
    targets = [target[(..., *(slice(None, None, round(1 / s)) for s in scale))] for scale in scales]
    root, entered = str(Path(stunet.__file__).parent), set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code.co_filename.startswith(root):
            entered.add(Path(frame.f_code.co_filename).relative_to(root))

    sys.setprofile(enter)
    try:
        trainer.train_step({"data": torch.randn(2, 1, 40, 56, 40), "target": targets, "keys": ["a", "b"]})
    finally:
        sys.setprofile(None)
    assert len(entered) <= 8, sorted(map(str, entered))
