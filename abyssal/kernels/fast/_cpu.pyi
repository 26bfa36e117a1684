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
