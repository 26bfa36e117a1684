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

def norm(
    x: Tensor, normed: bool, weight: Tensor | None, eps: float, turn: Tensor | None, inverse: bool, y: Tensor
) -> None:
    """Rows x [..., D]: RMSNorm if `normed`, times weight [D]; then the last R times turn, complex64 [..., R/2]."""

def encode(key: bool, rotated: int, x: Tensor, y: Tensor) -> None:
    """Rows x [..., D] as the cache's packed index keys or entries, y [..., bytes] uint8."""

def enter(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    rms_eps: float,
    eps: float,
    iterations: int,
    y: Tensor,
    gates: Tensor | None,
) -> None:
    """Streams x [T, N, D] to y [T, D] and gates: all post [T, N], then all mixes [T, N, N]; None: no gates but pre."""

def leave(y: Tensor, x: Tensor, gates: Tensor, out: Tensor) -> None: ...
def rounding(kind: int, block: int, x: Tensor, y: Tensor) -> None:
    """Rows x [..., D] rounded to FP8 (0) or FP4 (1), a scale for `block` values, or times a Hadamard matrix (2)."""

def route(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, scale: float, weights: Tensor, chosen: Tensor
) -> None:
    """Logits [T, E] to weights [T, K] and chosen [T, K] int64, or the weights of the experts in `given`."""

def experts(
    w1: object,
    w3: object,
    w2: object,
    shared: tuple[object, object, object] | None,
    x: Tensor,
    gains: Tensor,
    chosen: Tensor,
    limit: float,
    block: int,
    y: Tensor,
) -> None:
    """Rows x [T, D] through their experts chosen [T, K], summed with gains [T, K], and the shared one; y [T, D]."""

def swiglu(gate: Tensor, up: Tensor, gains: Tensor | None, limit: float, y: Tensor) -> None:
    """Rows [R, F] of gate and up, clamped, activated and multiplied, times gains [R]."""

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
