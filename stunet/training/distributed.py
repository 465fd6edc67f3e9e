"""Processes that train together: who they are, that they do the same, and the network that they share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.backends import cudnn
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from stunet.environment import find_dataset, find_plans, nnunet_folder
from stunet.errors import SettingsError, UsageError
from stunet.network import shard
from stunet.planning.plans import load_plans, resolve_configuration

if TYPE_CHECKING:
    from stunet.training.trainer import BaseSTUNetTrainer

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_POLL = 0.2  # seconds


def seed_everything(*seed: int) -> None:
    """Seed Python, NumPy and PyTorch with one number made of several."""
    state = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


@dataclass(frozen=True)
class Ranks:
    """Where a process stands among all that train together, as ``torchrun`` numbers them."""

    rank: int = 0  # number of the process among all
    size: int = 1  # how many there are
    local_rank: int = 0  # its number on its machine
    local_size: int = 1  # how many there are on its machine
    n_restarts: int = 0  # how often torchrun has started them again

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; one process where there are none."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        values = {name: environment.get(name, "missing") for name in (*names, "MASTER_ADDR")}
        if "missing" in values.values() or not all(values[name].isdecimal() for name in names):
            shown = ", ".join(f"{name}={value}" for name, value in values.items())
            raise UsageError(f"{shown} in the environment: start with torchrun, or unset RANK and WORLD_SIZE")
        rank, size, local_rank, local_size = (int(values[name]) for name in names[:4])
        return cls(rank, size, local_rank, local_size, int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")))

    @classmethod
    def of_group(cls) -> Ranks:
        """Return where this process stands in the process group; one process where there is none."""
        if not dist.is_initialized():
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        if "LOCAL_RANK" in os.environ and (ranks := cls.from_environment()).rank == rank and ranks.size == size:
            return ranks
        # nnUNetv2_train -num_gpus tells its processes nothing but what the group knows; they are on one machine.
        return cls(rank, size, rank, size)


def share_of_batch(global_batch: int, ranks: Ranks) -> range:
    """Return which samples of the whole batch are this process's; the first ones take one more where needed.

    >>> [list(share_of_batch(5, Ranks(rank, 2))) for rank in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    if global_batch < ranks.size:
        raise UsageError(f"{global_batch} samples for {ranks.size} processes: raise --global-batch, or start fewer")
    each, more = divmod(global_batch, ranks.size)
    first = ranks.rank * each + min(ranks.rank, more)
    return range(first, first + each + (ranks.rank < more))


@contextmanager
def join_others(device: str, timeout: float) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, where there are any; they wait ``timeout`` seconds for all."""
    ranks = Ranks.from_environment()
    with ExitStack() as stack:
        if ranks.rank > 0:  # nnU-Net prints in every process what is the same in all
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        if ranks.size > 1:
            stack.enter_context(process_group(ranks, device, timeout))
        _use_device(ranks, device)
        yield ranks


def _use_device(ranks: Ranks, device: str) -> None:
    if device != "cuda":
        # torchrun sets OMP_NUM_THREADS to 1 by itself; of one process it is what the user wants.
        if ranks.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // ranks.local_size))
        return
    if (found := torch.cuda.device_count()) <= ranks.local_rank:
        raise UsageError(f"{found} CUDA devices for local rank {ranks.local_rank}: start fewer, or take -device cpu")
    torch.cuda.set_device(ranks.local_rank)
    torch.set_num_threads(1)  # as nnU-Net does: more do not help a GPU
    cudnn.deterministic, cudnn.benchmark = False, True


@contextmanager
def process_group(ranks: Ranks, device_type: str, timeout: float) -> Iterator[None]:
    """Join the others, by NCCL on CUDA and gloo on the CPU; name the ranks that do not within ``timeout`` seconds."""
    if device_type not in _BACKENDS:
        raise UsageError(f"several processes cannot share {device_type}: choose -device cuda or cpu, or one process")
    # torchrun's own agent holds a store at that address already.
    is_host = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=timeout)
    try:
        host = TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=wait)
    except (dist.DistError, RuntimeError) as error:
        got = f"{address}:{port} cannot be reached ({str(error).splitlines()[0]})"
        raise UsageError(f"{got}: check MASTER_ADDR, MASTER_PORT and that rank 0 runs") from error
    store = PrefixStore(f"stunet/{ranks.n_restarts}", host)
    store.set(f"joined/{ranks.rank}", socket.gethostname())
    missing, deadline = list(range(ranks.size)), time.monotonic() + timeout
    with suppress(dist.DistError):  # rank 0, which holds the store, has given up first
        while (missing := [r for r in missing if not store.check([f"joined/{r}"])]) and time.monotonic() < deadline:
            time.sleep(_POLL)
    if missing:
        got = f"joined within {timeout:g} s: {ranks.size - len(missing)} of {ranks.size}"
        raise UsageError(f"{got}; missing: rank {', '.join(map(str, missing))}: see what they print, or --timeout")
    dist.init_process_group(_BACKENDS[device_type], store=store, rank=ranks.rank, world_size=ranks.size, timeout=wait)
    try:
        yield
    finally:
        if device_type == "cpu":  # PyTorch 2.7 waits forever for gloo's threads if they still let go of a tensor
            time.sleep(_POLL)
        dist.destroy_process_group()


def check_same(ranks: Ranks, dataset: str, configuration: str, plans_name: str, arguments: list[Any]) -> None:
    """Check that all processes would train the same thing: arguments, plans, data and versions.

    Raises:
        UsageError: They would not.
    """
    if ranks.size == 1:
        return
    name = find_dataset(dataset)
    folder = nnunet_folder("nnUNet_preprocessed") / name
    plans = load_plans(find_plans(name, plans_name))
    cases = folder / str(resolve_configuration(plans, configuration)["data_identifier"])
    files = {
        file: path.read_text(encoding="utf-8") if (path := folder / file).is_file() else None
        for file in ("dataset.json", "splits_final.json", "annotated_labels.json")
    }
    listed = sorted((p.name, p.stat().st_size) for p in cases.glob("*")) if cases.is_dir() else []
    versions = {package: version(package) for package in ("stunet", "nnunetv2", "torch")}
    content = {f"plans {plans_name}": plans, **files, "preprocessed cases": listed, "versions": versions}
    check_agreement({**content, "arguments": [configuration, *arguments]})


def check_agreement(content: Mapping[str, Any]) -> None:
    """Compare what must be the same for all processes: anything that JSON can hold, by name."""
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in content.items()}
    mine = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    of_all = _gather((socket.gethostname(), mine))
    first_host, first = of_all[0]
    others = [
        f"{name} of rank {rank} ({host})"
        for rank, (host, theirs) in enumerate(of_all)
        for name in mine
        if theirs.get(name) != first.get(name)
    ]
    if others:
        got = f"{', '.join(others)} differ from rank 0's ({first_host})"
        raise UsageError(f"{got}: copy plans and data to every machine anew")


def check_shared_folder(folder: Path, ranks: Ranks) -> None:
    """Find out whether all processes see the same folder."""
    path = folder / _gather(f".{uuid4().hex}.shared")[0]
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    dist.barrier()
    # Network file systems cache what a folder held; listing it asks anew.
    seen = path.exists() or (folder.is_dir() and path in folder.iterdir())
    of_all = _gather((socket.gethostname(), seen))
    if ranks.rank == 0:
        path.unlink()
    blind = [f"rank {rank} ({host})" for rank, (host, sees) in enumerate(of_all) if not sees]
    if blind:
        raise UsageError(f"{folder} of rank 0 is not there for {', '.join(blind)}: share nnUNet_results everywhere")


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Sharding:
    """Parameters, gradients and momentum sharded among the processes, where the plans say ``parallel: fsdp``.

    Until the training starts each process has the plain network, with the same weights, so whatever loads weights
    finds what it knows. Afterwards the network is sharded, and so is the optimizer's state; before the final
    validation, in which each process predicts cases of its own, it is gathered again.

    On CUDA the network computes in bf16, which needs no scaling of gradients, and gradients are summed in fp32.
    ``torch.compile`` stays off: nnU-Net compiles the network as one, and gathering between stages would break that up.

    Attributes:
        group: The processes that write checkpoints; None while the network is not sharded.
    """

    def __init__(self, trainer: BaseSTUNetTrainer) -> None:
        self._trainer = trainer
        self.group: dist.ProcessGroup | None = None

    @property
    def enabled(self) -> bool:
        """Whether the network will be sharded while it is trained."""
        return self._trainer.parallel == "fsdp" and self._trainer.ranks.size > 1

    def shard(self) -> None:
        """Shard the network and the optimizer's state, where they are to be and are not yet; all processes at once."""
        if not self.enabled or self.group is not None:
            return
        trainer = self._trainer
        mean = torch.empty(1, device=trainer.device)
        dist.reduce_scatter_tensor(mean, torch.ones(trainer.ranks.size, device=trainer.device), op=dist.ReduceOp.AVG)
        if mean.item() != 1:  # FSDP would sum gradients
            got = (
                f"parallel=fsdp, and PyTorch {torch.__version__} cannot average over processes on {trainer.device.type}"
            )
            raise SettingsError(f"{got}: set parallel=ddp, or update PyTorch (seen with 2.15)")
        network, state = trainer.plain_network, trainer.optimizer.state_dict()
        # Norms return views, and blocks work in place within a stage; upon a stage's output nothing does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = dist.device_mesh.init_device_mesh(trainer.device.type, (trainer.ranks.size,))
        shard(network, mesh, dtype=torch.bfloat16 if trainer.device.type == "cuda" else None)
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            p = parameters[number]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    on_device = value.to(p.device)
                    values[key] = distribute_tensor(on_device, p.device_mesh, p.placements, src_data_rank=None)
        trainer.optimizer.load_state_dict(state)
        # One of its own, as checkpoints are written beside the training, and of gloo, as they are written from the CPU.
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        trainer.print_to_log_file(f"The network is sharded among {trainer.ranks.size} processes")

    def gather(self) -> None:
        """Gather the network again, in each process; the optimizer begins anew."""
        if self.group is None:
            return
        trainer = self._trainer
        managers, outputs = (trainer.plans_manager, trainer.configuration_manager), trainer.label_manager
        network: nn.Module = trainer.build_network_architecture(
            *managers, trainer.num_input_channels, outputs.num_segmentation_heads, trainer.enable_deep_supervision
        ).to(trainer.device)
        values = network.state_dict()
        for name, value in trainer.plain_network.state_dict().items():
            values[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        trainer.network = network
        self.group = None
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()

    def states(self, *, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return weights and the optimizer's state by the parameters' names; all processes must ask for them.

        Args:
            full: Gathered, on rank 0's CPU alone, instead of this process's shards.
        """
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        network = self._trainer.plain_network
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a validation some are whole, and PyTorch 2.7 does not know these by name
        optimizer_state = get_optimizer_state_dict(network, self._trainer.optimizer, options=options)
        return get_model_state_dict(network, options=options), optimizer_state
