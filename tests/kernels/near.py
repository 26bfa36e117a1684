"""Numbers in float64 that carry a bound on the rounding errors of a float32 computation of the same steps.

A test writes a kernel's steps once more in terms of `Near`; the value must be the truth, and the kernel's result must
lie within the error. Bounds of sums hold for every order of adding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.native import UNIT, gamma

EXP = 4 * UNIT  # relative error of exp (vec/exp.hpp)


@dataclass(frozen=True)
class Near:
    """A value, and how far float32 may be from it.

    Attributes:
        value: in float64.
        error: of the same shape.
    """

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(x: Tensor) -> Near:
        """What enters as it is."""
        return Near(x.double(), torch.zeros_like(x, dtype=torch.float64))

    @staticmethod
    def of(number: float) -> Near:
        """A constant, which is rounded once."""
        value = torch.tensor(number, dtype=torch.float64)
        return Near(value, value.abs() * UNIT)

    @property
    def most(self) -> Tensor:
        """The largest size that the computed value may have."""
        return self.value.abs() + self.error

    def rounded(self, times: float = 1.0) -> Near:
        """The same, rounded."""
        return Near(self.value, self.error + gamma(times) * self.most)

    def __getitem__(self, at: object) -> Near:
        return Near(self.value[at], self.error[at])  # type: ignore[index]

    def __add__(self, other: Near | float) -> Near:
        other = other if isinstance(other, Near) else Near.of(other)
        return Near(self.value + other.value, self.error + other.error).rounded()

    def __neg__(self) -> Near:
        return Near(-self.value, self.error)

    def __sub__(self, other: Near) -> Near:
        return self + -other

    def __rsub__(self, one: float) -> Near:
        return Near.of(one) - self

    def __mul__(self, other: Near | float) -> Near:
        other = other if isinstance(other, Near) else Near.of(other)
        error = self.value.abs() * other.error + self.error * other.most
        return Near(self.value * other.value, error).rounded()

    def __matmul__(self, other: Near) -> Near:
        error = self.value.abs() @ other.error + self.error @ other.most
        rounding = gamma(self.value.shape[-1] + 4) * (self.most @ other.most)
        return Near(self.value @ other.value, error + rounding)

    @property
    def mT(self) -> Near:
        """Rows for columns."""
        return Near(self.value.mT, self.error.mT)

    def sum(self, dim: int, keepdim: bool = False) -> Near:
        """The sum over a dimension."""
        rounding = gamma(self.value.shape[dim] + 4) * self.most.sum(dim, keepdim)
        return Near(self.value.sum(dim, keepdim), self.error.sum(dim, keepdim) + rounding)

    def where(self, mask: Tensor) -> Near:
        """Zero where the mask is false."""
        return Near(self.value * mask, self.error * mask)

    def clamp(self, low: float, high: float) -> Near:
        """Between two numbers; no value moves further than before."""
        return Near(self.value.clamp(low, high), self.error)

    def sigmoid(self) -> Near:
        """Slope at most a quarter; exp, a sum and a division."""
        value = torch.sigmoid(self.value)
        return Near(value, self.error / 4 + value * (EXP + gamma(2)))

    def rsqrt(self) -> Near:
        """1 / sqrt, for errors that are small beside the value."""
        value = self.value.rsqrt()
        return Near(value, value * (self.error / self.value) / 2 * 1.01 + value * gamma(2))

    def unsqueeze(self, dim: int) -> Near:
        """As torch's."""
        return Near(self.value.unsqueeze(dim), self.error.unsqueeze(dim))

    def rotated(self, turn: Tensor, inverse: bool = False) -> Near:
        """The last pairs times complex numbers, or their conjugates."""
        turn = (turn.conj() if inverse else turn).to(torch.complex128)
        size = 2 * turn.shape[-1]
        if not size:
            return self
        re, im = self[..., -size::2], self[..., -size + 1 :: 2]
        cosine, sine = Near.exact(turn.real), Near.exact(turn.imag)
        first, second = re * cosine - im * sine, im * cosine + re * sine
        value, error = self.value.clone(), self.error.clone()
        for kept, a, b in ((value, first.value, second.value), (error, first.error, second.error)):
            kept[..., -size:] = torch.stack([a, b], dim=-1).flatten(-2)
        return Near(value, error)

    def holds(self, got: Tensor, truth: Tensor) -> None:
        """The value is the truth, up to float64, and `got` lies within the error."""
        size = truth.abs().max() if truth.numel() else 0.0
        assert ((self.value - truth).abs() <= 1e-9 * (truth.abs() + size) + 1e-13 * (1 + self.error)).all()
        assert got.isfinite().all()
        assert ((got.double() - truth).abs() <= self.error + 1e-37).all(), float(
            ((got.double() - truth).abs() / (self.error + 1e-37)).max()
        )


def gradients(run: object, inputs: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of run(*inputs), and the gradients of their sum, weighted, for all inputs."""
    assert callable(run)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        found = run(*leaves)
        outputs = list(found) if isinstance(found, tuple) else [found]
        total = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(total, leaves, materialize_grads=True)  # type: ignore[arg-type]
    return [out.detach() for out in outputs], list(grads)


def flat(found: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, ...]:
    """Outputs, then gradients."""
    return *found[0], *found[1]
