"""What whole steps of training and validation make a GPU do, counted without one.

Tensors on ``cuda:0`` are fake here: they have no content, so operations check devices and shapes and return at once.
Those on the CPU are real. Two things have no fake: autograd's engine, which asks the driver for its threads
(:func:`run_backward` walks the same graph), and numbers that are read from the GPU (they are 0).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from made_trainers import make, narrow_plans
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import FAKE_CUDA

from plans import DATASET_JSON
from stunet.files import write_json
from stunet.labels.annotations import order_manifest

pytest.importorskip("triton", reason="Triton is there on Linux alone")
from stunet import loss_kernels

pytestmark = FAKE_CUDA
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
#: Operations that Python waits for, as their result is a number, or has a size that the content decides.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten._unique2}
#: Operations that start no kernel, besides those that return views.
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}


class Device(TorchDispatchMode):
    """A fake GPU, and a count of what operations do to it.

    Attributes:
        launches: Kernels by operation, a ``_foreach`` operation being one.
        blocking: What makes Python wait for the GPU, by operation.
        pageable: Copies to the GPU from memory that is not pinned, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.blocking, self.pageable = Counter[str](), Counter[str](), Counter[str]()

    def reset(self) -> None:
        for counter in (self.launches, self.blocking, self.pageable):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(t.is_cuda for t in given) and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "stunet":
            assert all(t.is_cuda for t in given)  # which Triton does not check
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else []
        if packet in WAITS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.blocking[str(packet)] += 1
        if packet is aten._local_scalar_dense:
            return 0.0
        if packet is aten._to_copy and not given[0].is_cuda:  # of something real
            result = torch.empty_like(given[0], dtype=kwargs.get("dtype"), device=CUDA)
        else:
            result = func(*args, **kwargs)
        if packet in (aten._to_copy, aten.copy_) and result.is_cuda != given[-1].is_cuda:
            self._count_copy(given[-1], bool(kwargs.get("non_blocking") or args[2:3] == (True,)))
            if not result.is_cuda:
                with unset_fake_temporarily():
                    return torch.zeros(result.shape, dtype=result.dtype)
        elif not func.is_view and func.namespace != "prim" and packet not in NO_KERNEL:
            self.launches[str(packet)] += 1
        return result

    def _count_copy(self, source: Tensor, non_blocking: bool) -> None:
        what = f"copy of {tuple(source.shape)} {'from' if source.is_cuda else 'to'} the GPU"
        from_pageable = not source.is_cuda and not hasattr(source, "is_pinned_here")
        if from_pageable:
            self.pageable[what] += 1
        if from_pageable or not non_blocking:
            self.blocking[what] += 1


def pin(tensor: Tensor) -> Tensor:
    tensor.is_pinned_here = True  # type: ignore[attr-defined]
    return tensor


def run_backward(value: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
    """Do what ``value.backward()`` does: call each node of the graph after all those that it gets gradients from."""
    root: Any = value.grad_fn
    nodes, users = [root], Counter[Any]()
    for node in nodes:
        for following, _slot in node.next_functions:
            if following is not None:
                if not users[following]:
                    nodes.append(following)
                users[following] += 1
    gradients: dict[Any, dict[int, Tensor]] = {node: {} for node in nodes}
    gradients[root][value.output_nr] = torch.ones_like(value) if gradient is None else gradient
    ready = [root]
    while ready:
        node = ready.pop()
        own = gradients.pop(node)
        call, edges = getattr(node, "apply", node), node.next_functions  # the former of functions in Python
        results: Any = None
        if own:
            with torch.no_grad():
                results = call(*(own.get(i) for i in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,) * len(edges)
        # Before the tensors' come those of other arguments.
        for (following, slot), result in zip(edges, results[len(results) - len(edges) :], strict=True):
            if following is not None:
                if result is not None:
                    expected, others = following._input_metadata[slot], gradients[following]
                    result = result.sum_to_size(expected.shape).to(expected.dtype)
                    others[slot] = others[slot] + result if slot in others else result
                users[following] -= 1
                if not users[following]:
                    ready.append(following)


@contextmanager
def fake_cuda() -> Iterator[Device]:
    """Within this context tensors may be on ``cuda:0``."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),  # the first, as it makes up a device where there is none
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.Tensor.pin_memory", pin),
        patch("torch.autograd.backward", run_backward),
        patch("stunet.loss._kernels", lambda device_type: loss_kernels),
        Device() as device,
    ):
        yield device


def make_trainer(folder: Path, *, outputs: int = 3, labels: str = "", **settings: Any) -> Any:
    """A trainer of a narrow network, still on the CPU.

    Args:
        folder: Of the preprocessed dataset.
        outputs: C.
        labels: ``ignore``, ``partial`` (with superclasses and an ignore label), or ``regions``.
        settings: Of the plans, or ``configuration``.
    """
    values: dict[str, Any] = {"background": 0, **{f"structure {i}": i for i in range(1, outputs)}}
    dataset_json = {**DATASET_JSON, "labels": values}
    if labels == "partial":
        values["either"] = outputs
        everything = list(values)[1:-1]
        cases = {"a": everything, "b": [*everything[2:], "either"]}
        manifest = {"version": 1, "cases": cases, "superclasses": {"either": everything[:2]}}
        write_json(order_manifest(manifest), folder / "annotated_labels.json")
    if labels == "regions":
        values |= {"structure 1": [1, 2]}
        dataset_json["regions_class_order"] = [1, 2]
    if labels in ("ignore", "partial"):
        values["ignore"] = len(values)
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    configuration = settings.pop("configuration", "3d_fullres")
    trainer: Any = make(plans=narrow_plans(**settings), configuration=configuration, dataset_json=dataset_json)
    trainer.initialize()
    return trainer


def move(trainer: Any) -> None:
    """Move a trainer to the fake GPU."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    trainer.device = CUDA
    trainer.network.to_empty(device=CUDA)
    torch.__future__.set_overwrite_module_params_on_conversion(before)
    trainer.optimizer, _ = trainer.configure_optimizers()
    trainer.grad_scaler = torch.amp.GradScaler("cuda")


def make_batch(trainer: Any) -> dict[str, Any]:
    """A batch as nnU-Net's loaders give it on CUDA, in pinned memory."""
    size, patch_size = trainer.batch_size, trainer.configuration_manager.patch_size
    full = torch.zeros(size, 2 if trainer.label_manager.has_regions else 1, *patch_size, dtype=torch.int16)
    scales = trainer._get_deep_supervision_scales()
    targets = [full[(..., *(slice(None, None, round(1 / s)) for s in scale))].contiguous() for scale in scales]
    data = torch.zeros(size, trainer.num_input_channels, *patch_size)
    return {"data": pin(data), "target": [pin(target) for target in targets], "keys": ["a", "b"]}


#: What nnU-Net's own step waits for: the gradient scaler's look for infinities, and the loss.
TRAINING = 2
#: The loss and the counts.
VALIDATION = 2
NNUNETS_VALIDATION = 4

STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignore label": {"labels": "ignore"},
    "partial labels with superclasses": {"labels": "partial", "outputs": 5},
    "Dice of each case": {"labels": "partial", "outputs": 5, "batch_dice": False},
    "micro-batches": {"labels": "partial", "outputs": 5, "gradient_accumulation": 2},
    "micro-batches, Dice of each case": {"labels": "ignore", "gradient_accumulation": 2, "batch_dice": False},
    "2d": {"configuration": "2d"},
    "regions": {"labels": "regions"},
    "frozen encoder": {"fine_tune": "frozen-encoder"},
    "labels and self-supervision": {"pretext": "mae"},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_wait_for_the_gpu_no_more_than_nnunets(dataset: Path, name: str) -> None:
    trainer = make_trainer(dataset, **STEPS[name])
    with fake_cuda() as device:
        move(trainer)
        trainer.train_step(make_batch(trainer))
        assert sum(device.launches.values()) > 100
        assert device.blocking.total() <= TRAINING, device.blocking
        assert not device.pageable
        device.reset()
        trainer.network.eval()
        with torch.no_grad():
            trainer.validation_step(make_batch(trainer))
        limit = NNUNETS_VALIDATION if name == "regions" else VALIDATION
        assert device.blocking.total() <= limit, device.blocking
        assert not device.pageable


def test_nnunets_own_steps_are_the_measure(dataset: Path) -> None:
    trainer = make_trainer(dataset)
    trainer.loss = nnUNetTrainer._build_loss(trainer)
    with fake_cuda() as device:
        move(trainer)
        nnUNetTrainer.train_step(trainer, make_batch(trainer))
        assert device.blocking.total() == TRAINING
        device.reset()
        with torch.no_grad():
            nnUNetTrainer.validation_step(trainer, make_batch(trainer))
        assert device.blocking.total() == NNUNETS_VALIDATION


LOSSES: dict[str, dict[str, Any]] = {
    "3 outputs": {},
    "25 outputs": {"outputs": 25},
    "105 outputs": {"outputs": 105},
    "105 outputs, partial labels": {"outputs": 105, "labels": "partial"},
    "Dice of each case": {"outputs": 25, "labels": "ignore", "batch_dice": False},
    "2d": {"configuration": "2d"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_kernels_of_the_loss_in_a_step(dataset: Path, name: str) -> None:
    trainer = make_trainer(dataset, **LOSSES[name])
    with fake_cuda() as device:
        trainer.device = CUDA
        batch = trainer._on_device(make_batch(trainer))
        n_outputs = trainer.plain_network.decoder.seg_layers[-1].out_channels
        logits = [
            torch.empty(2, n_outputs, *target.shape[2:], dtype=torch.half, device=CUDA, requires_grad=True)
            for target in batch.target[:-1]
        ]  # of four levels: the coarsest weighs nothing
        device.reset()
        with trainer.precision():
            loss = trainer.loss_of(logits, batch)
        loss.backward()
        assert all(level.grad is not None and level.grad.dtype == torch.half for level in logits)
        assert device.launches["stunet.loss_sums"] == device.launches["stunet.loss_gradient"] == 4
        assert device.launches.total() <= 60, device.launches


def test_what_waits_is_seen() -> None:
    with fake_cuda() as device:
        x = torch.ones(3).to(CUDA)
        assert (device.blocking.total(), device.pageable.total()) == (1, 1)
        x.copy_(torch.ones(3).pin_memory(), non_blocking=True)
        assert (device.blocking.total(), device.pageable.total()) == (1, 1)
        assert x.cpu().tolist() == [0, 0, 0]
        assert float(x[0]) == 0
        assert not (x > 0).any()
        assert device.blocking.total() == 4
        assert device.launches.total() == 2
        with pytest.raises(RuntimeError, match="device"):
            torch.add(x, torch.ones(3))


def test_the_walk_through_the_graph_gives_autograds_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.LeakyReLU())
    image = torch.randn(2, 2, 8, 8, requires_grad=True)
    results = []
    for backward in (torch.autograd.backward, run_backward):
        for tensor in (image, *network.parameters()):
            tensor.grad = None
        features = network(image)
        backward((features * features.mean() + image[:, :1, 1:7, 1:7].exp()).sum())
        results.append([tensor.grad for tensor in (image, *network.parameters())])
    torch.testing.assert_close(*results)
