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
