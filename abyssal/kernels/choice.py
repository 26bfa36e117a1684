"""Who computes: the plain reference in torch, or the native kernels for one of the processor's instruction sets.

The best that the machine has is taken, once for a process; `ABYSSAL_KERNELS` or `forced` choose another. A contract
file asks `native()` and takes its plain reference where that is None.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from abyssal.base.errors import InputError

VARIABLE = "ABYSSAL_KERNELS"
REFERENCE = "reference"
NAMES = (REFERENCE, "scalar", "avx2", "avx512", "neon")

_log = logging.getLogger("abyssal.kernels")


@dataclass(frozen=True)
class Choice:
    """What runs, and what could.

    Attributes:
        name: one of `NAMES`.
        why: a sentence.
        built: instruction sets of the extension module, best first; empty if it is missing.
        supported: those that this processor has.
    """

    name: str
    why: str
    built: tuple[str, ...]
    supported: tuple[str, ...]


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("abyssal.kernels.fast._cpu")
    except ModuleNotFoundError as error:
        if error.name != "abyssal.kernels.fast._cpu":
            raise
        return None, "the native kernels were not built when the package was installed (no C++20 compiler was found)"
    module.set_threads(torch.get_num_threads())  # what the user allowed, OMP_NUM_THREADS too
    return module, ""


_module, _missing = _load()
_choice: Choice | None = None


def _choose(wanted: str | None, asked_by: str) -> Choice:
    """Switch the extension module and say why.

    Raises:
        InputError: `wanted` is unknown, not built, or nothing for this processor.
    """
    found = _module.isas() if _module is not None else []
    built = tuple(name for name, _ in found)
    supported = tuple(name for name, has in found if has)
    if wanted is None:
        if not supported:
            _log.warning("%s: the plain reference runs instead, slower", _missing)
            return Choice(REFERENCE, _missing, built, supported)
        name, why = supported[0], "the best instruction set of this processor"
        if name == "scalar":
            # one value at a time: torch's own products are faster, and the reference is made of them
            return Choice(REFERENCE, "this processor has none of the instruction sets that pay", built, supported)
    else:
        if wanted not in NAMES:
            raise InputError(f"{asked_by} is {wanted!r}: choose from {', '.join(NAMES)}")
        if wanted != REFERENCE and wanted not in supported:
            reason = _missing or ("not built for this machine" if wanted not in built else "this processor lacks it")
            have = ", ".join((REFERENCE, *reversed(supported)))
            raise InputError(f"{asked_by} is {wanted!r}, which cannot run here ({reason}): choose from {have}")
        name, why = wanted, f"{asked_by} says so"
    if _module is not None and name != REFERENCE:
        _module.use(name)
    return Choice(name, why, built, supported)


def choice() -> Choice:
    """What runs in this process; decided at the first call.

    Raises:
        InputError: `ABYSSAL_KERNELS` names something that cannot run here.
    """
    global _choice
    if _choice is None:
        _choice = _choose(os.environ.get(VARIABLE) or None, VARIABLE)
        _log.info("kernels: %s (%s)", _choice.name, _choice.why)
    return _choice


def native() -> ModuleType | None:
    """The extension module (its functions: fast/_cpu.pyi), or None where the reference runs."""
    return _module if (_choice or choice()).name != REFERENCE else None


def extension() -> ModuleType | None:
    """The extension module if there is one, whatever runs: what was packed stays readable."""
    return _module


def native_for(*tensors: Tensor | None, backward: bool = False) -> ModuleType | None:
    """The extension module for float32 tensors on the CPU, or None for the reference.

    Whether they are dense does not count: it may depend on the number of rows, and a row's bits must not.

    Args:
        backward: the caller has a way back for gradients; without one, a tensor that needs a gradient takes the
            reference.
    """
    module = native()
    if module is None:
        return None
    refused = not backward and torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (x.dtype is not torch.float32 or not x.is_cpu or (refused and x.requires_grad)):
            return None
    return module


def learning(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded for one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Another choice for a while, for tests and measurements; not for several threads at once.

    Raises:
        InputError: it cannot run here.
    """
    global _choice
    before = choice()
    _choice = _choose(name, "the choice of kernels")
    try:
        yield
    finally:
        _choice = before
        if _module is not None and before.name != REFERENCE:
            _module.use(before.name)
