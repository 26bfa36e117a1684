"""What the extension module offers; arrays are torch tensors, or anything with DLPack, dense and on the CPU."""

from torch import Tensor

def isas() -> list[tuple[str, bool]]:
    """The instruction sets of this build, best first, and whether the processor has each."""

def isa() -> str:
    """The one in use."""

def use(name: str) -> bool:
    """Use another one; False if it was not built or the processor lacks it."""

def threads() -> int:
    """The most threads that a kernel uses."""

def set_threads(count: int) -> None: ...
def read(data: Tensor) -> int:
    """Sum of the array's 8-byte words, modulo 2**64: one pass over the memory, which others are measured against."""

def index_topk(
    q: Tensor,
    weights: Tensor,
    visible: Tensor,
    firsts: Tensor,
    tables: Tensor,
    keys: Tensor,
    per_page: int,
    blocks: Tensor,
) -> None:
    """The best blocks of each query into `blocks`; see `abyssal.kernels.index_topk.choose_rows`."""

def attend(
    q: Tensor,
    turn: Tensor,
    sink: Tensor,
    eps: float,
    scale: float,
    spans: Tensor,
    fresh: Tensor,
    ring: Tensor,
    window: int,
    ring_size: int,
    ratio: int,
    entries: Tensor | None,
    tables: Tensor | None,
    per_page: int,
    blocks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention into `out`, and `fresh` into the ring; see `abyssal.kernels.attention.attend`."""

def compress(
    values: Tensor,
    logits: Tensor,
    ape: Tensor,
    spans: Tensor,
    ring_values: Tensor,
    ring_logits: Tensor,
    ring_size: int,
    norm: Tensor,
    eps: float,
    turn: Tensor,
    entries: Tensor | None,
    tables: Tensor | None,
    per_page: int,
    out: Tensor,
) -> None:
    """A compressor's step into `out`, the rings and `entries`; see `abyssal.kernels.pool.compress`."""
