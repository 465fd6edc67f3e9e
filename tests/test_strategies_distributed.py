"""Every strategy over two processes (gloo) against one process with both processes' images."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from together import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from versions import CPUS_AVERAGE
from weights import STRIDES, TINY

from stunet.network import build_stunet, shard
from stunet.settings import Parallel, Strategy
from stunet.training.distributed import Ranks
from stunet.training.optimizer import GroupSchedule, freeze_others, parameter_groups

EPOCHS, LR = 6, 1e-5  # small, so that rounding does not grow from step to step
SIZE = (32, 32, 64)
PARALLEL: tuple[Parallel, ...] = get_args(Parallel) if CPUS_AVERAGE else ("ddp",)
Results = list[dict[tuple[Strategy, Parallel], dict[str, Tensor]]]


def train(strategy: Strategy, images: list[Tensor], parallel: Parallel | None = None) -> dict[str, Tensor]:
    """One step an epoch, in the order of the trainer: groups and optimizer before DDP's wrapper, and after FSDP's."""
    torch.manual_seed(0)
    network = build_stunet(TINY, 1, 3, STRIDES, deep_supervision=True)
    if parallel == "fsdp":
        shard(network, init_device_mesh("cpu", (2,)))
    groups = parameter_groups(network, strategy, num_epochs=EPOCHS, warmup_epochs=2)
    freeze_others(network, groups)
    optimizer = torch.optim.SGD([{"params": list(g.parameters)} for g in groups], LR, momentum=0.99, nesterov=True)
    schedule = GroupSchedule(optimizer, groups, LR)
    wrapped: nn.Module = DistributedDataParallel(network) if parallel == "ddp" else network
    for epoch, image in enumerate(images):
        schedule.step(epoch)
        optimizer.zero_grad(set_to_none=True)
        sum(logits.square().mean() for logits in wrapped(image)).backward()
        optimizer.step()
    state = network.state_dict()
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in state.items()}


def make_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 1, *SIZE, generator=generator) for _ in range(EPOCHS)]


def train_all(ranks: Ranks, folder: str) -> dict[tuple[Strategy, Parallel], dict[str, Tensor]]:
    images = [image[ranks.rank : ranks.rank + 1] for image in make_images()]
    return {(s, parallel): train(s, images, parallel) for s in get_args(Strategy) for parallel in PARALLEL}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return together(2, tmp_path_factory.mktemp("ranks"), train_all)


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_two_processes_train_as_one(ranks: Results, strategy: Strategy, parallel: Parallel) -> None:
    first, second = (results[strategy, parallel] for results in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    start, alone = train(strategy, []), train(strategy, make_images())
    moved = {name for name, value in alone.items() if not torch.equal(value, start[name])}
    assert moved
    for name, value in alone.items():
        # Biases before a norm have no effect, and a gradient that is rounding alone.
        if name in moved and not name.endswith((".conv1.bias", ".conv2.bias")):
            assert (first[name] - value).abs().max() <= 0.02 * (value - start[name]).abs().max()
        elif name not in moved:
            assert torch.equal(first[name], start[name])
