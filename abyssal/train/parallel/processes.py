"""Several processes as one world: FSDP2 for parameters, all-to-all for experts (training.md 2, 3, 7).

Each process runs its share of a step's passes. Gradients are sums, since losses are divided by what the whole step
counts. A matrix is orthogonalised on one process, which all send their rows of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous

from abyssal.base.errors import ConfigError
from abyssal.model import Transformer
from abyssal.model.block import Block
from abyssal.model.mtp import MTPBlock
from abyssal.train.checkpoint import KEPT, Saved
from abyssal.train.parallel import shards
from abyssal.train.parallel.experts import SpreadExperts, exchanged
from abyssal.train.world import World, local

T = TypeVar("T")


class _Root(nn.Module):
    """A model as FSDP's root, whose forward is a whole pass with its losses."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


class Processes(World):
    """The processes that `torchrun` started.

    Args:
        experts: how many neighbours share the experts of a layer; 1 leaves them to FSDP.
    Raises:
        ConfigError: `experts` does not divide the number of processes, or nobody started them.
    """

    def __init__(self, experts: int = 1):
        if "WORLD_SIZE" not in os.environ:
            raise ConfigError("no processes to run on: start with torchrun --nproc-per-node N")
        if experts < 1 or int(os.environ["WORLD_SIZE"]) % experts:
            raise ConfigError(f"experts over {experts} of {os.environ['WORLD_SIZE']} processes: choose a divisor")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            store, rank, size = next(rendezvous("env://"))
            # torchrun keeps its store when it starts processes again, with the addresses of those that are gone
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
            backend = "nccl" if self.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        self.rank, self.size, self.experts = dist.get_rank(), dist.get_world_size(), experts
        self.data = init_device_mesh(self.device, (self.size,), mesh_dim_names=("data",))
        names = ("replica", "expert")
        self.grid = init_device_mesh(self.device, (self.size // experts, experts), mesh_dim_names=names)

    def spread(self, model: Transformer) -> None:
        self.model = model
        held: set[nn.Parameter] = set()  # by each process as a whole, or spread as experts are
        for name, p in model.named_parameters():
            if name.endswith("gate.bias"):
                held.add(p)
        blocks = [module for module in (*model.layers, *model.mtp) if isinstance(module, Block)]
        for block in blocks:
            if self.experts > 1:
                block.ffn.experts = SpreadExperts(block.ffn.experts, self.grid["expert"])
                if self.size > self.experts:
                    self._shard(block.ffn.experts, self.grid["replica"])
                else:
                    held.update(block.ffn.experts.parameters())
            self._shard(block, self.data, held)
            if isinstance(block, MTPBlock):
                register_fsdp_forward_method(block, "predict")
        self._root = _Root(model)
        self._shard(self._root, self.data, held)

    @staticmethod
    def _shard(module: nn.Module, mesh: Any, held: set[nn.Parameter] | None = None) -> None:
        fully_shard(module, mesh=mesh, ignored_params=held)
        assert isinstance(module, FSDPModule)
        # sums: what a process adds is divided by the step's tokens already
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # a compressor without a whole block on one process may have some on another
        module.set_reduce_scatter_unused_params(True, recurse=False)

    def inside(self, work: Callable[[], T]) -> T:
        return self._root(work)

    def share(self, passes: Sequence[T]) -> Sequence[T]:
        return passes[self.rank :: self.size]

    def settle(self, longest: int) -> None:
        for block in self.model.layers:
            assert isinstance(block, Block)
            for module in (block.attn.compressor, block.attn.indexer):
                if module is not None and block.ratio > longest:
                    for p in module.parameters():
                        p.grad = None

    def sum(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(x.device)

    def any(self, here: bool) -> bool:
        return bool(self.sum(torch.tensor(int(here))))

    def first(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def clip(self, params: Sequence[nn.Parameter], limit: float) -> float:
        grads = [local(p.grad) for p in params if p.grad is not None]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        squares = sum((grad.square().sum(dtype=torch.float64) for grad in grads), zero)
        norm = float(self.sum(squares).sqrt())
        for grad in grads:
            grad.mul_(min(limit / (norm + 1e-6), 1.0))
        return norm

    def gather(self, parts: Mapping[str, Tensor], of: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = {name: part for name, part in parts.items() if of[name].dim() > 2 and len(part)}
        owned = self._owned(parts, of)
        mine = owned[self.rank]
        cuts = {name: self._cuts(of[name]) for name in mine}
        expected = [[(cuts[name][rank], of[name].shape[1]) for name in mine] for rank in range(self.size)]
        rows = self._exchange([[parts[name] for name in names] for names in owned], expected)
        return found | {name: torch.cat([part[i] for part in rows]) for i, name in enumerate(mine)}

    def scatter(self, wholes: Mapping[str, Tensor], of: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = {name: whole for name, whole in wholes.items() if of[name].dim() > 2}
        owned = self._owned(of, of)
        pieces = [wholes[name].split(self._cuts(of[name])) for name in owned[self.rank]]
        expected = [[(self._cuts(of[name])[self.rank], of[name].shape[1]) for name in names] for names in owned]
        rows = self._exchange([[piece[rank] for piece in pieces] for rank in range(self.size)], expected)
        for names, parts in zip(owned, rows, strict=True):
            found |= dict(zip(names, parts, strict=True))
        return found

    def _owned(self, names: Iterable[str], of: Mapping[str, nn.Parameter]) -> list[list[str]]:
        """For each process, the matrices that are whole there while they are orthogonalised: by turns."""
        cut = [name for name in names if of[name].dim() == 2]
        return [cut[rank :: self.size] for rank in range(self.size)]

    def _cuts(self, p: Tensor) -> list[int]:
        """Rows of a matrix on each process, as FSDP cuts it."""
        most = -(-len(p) // self.size)
        return [max(min(len(p) - rank * most, most), 0) for rank in range(self.size)]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[list[Tensor]]:
        """Send tensors to each process, and receive some of these shapes from each."""
        sizes = [[rows * columns for rows, columns in each] for each in shapes]
        flat = [x.reshape(-1) for each in sent for x in each]
        packed = torch.cat(flat) if flat else torch.empty(0, device=self.device)
        counts = [sum(x.numel() for x in each) for each in sent]
        found = exchanged(packed, counts, [sum(each) for each in sizes], self.data.get_group())
        parts = iter(found.split([size for each in sizes for size in each]))
        return [[next(parts).view(shape) for shape in each] for each in shapes]

    def end(self) -> NoReturn:
        """End this program at once, its work done.

        A thread of gloo drops the tensors of an operation a moment after the operation is over, and asks for the
        interpreter to do so. One that asks while the interpreter ends is unwound through a destructor, which aborts
        the process. Destroying a group does not join its threads; its last reference would, but torch keeps some in
        caches and in cycles that the garbage collector does not see. So the interpreter does not end.
        """
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def save(self, run: Path, step: int, saved: Saved, kept: int = KEPT) -> Path:
        return shards.save(self, run, step, saved, kept)

    def load(self, folder: Path, like: Saved) -> Saved:
        return shards.load(self, folder, like)
