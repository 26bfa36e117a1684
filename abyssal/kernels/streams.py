"""streams: where a sublayer meets the N residual streams (architecture.md 2.3).

`enter` projects a token's streams, divided by one root mean square over them, to gates, and collapses the streams
into the sublayer's input; `leave` mixes the streams and adds the sublayer's output to each; `collapse` is the last
one, without gates but pre. All in float32 (float64 for float64), cast to the type of the streams.

Native kernels have a way back: `enter_backward` runs the token's gates again rather than keep the steps of Sinkhorn.
Sums over tokens are taken in one order, so gradients do not depend on the number of threads.

Gates travel as one flat tensor, [T * N * (1 + N)]: post of all tokens, then their mixes. A mix is not symmetric: its
first index is the input stream, the second the output stream (trap 24).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.choice import learning, native_for
from abyssal.kernels.linear import linear
from abyssal.kernels.rms_norm import inverse_rms, rms_norm
from abyssal.kernels.sigmoid import sigmoid
from abyssal.kernels.sinkhorn import sinkhorn
from abyssal.quant.precision import wide

MOST_STREAMS = 8  # of the native kernels


def _projection(streams_TND: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = wide(streams_TND.flatten(1))  # stream-major: stream 0 first
    return linear(flat, wide(fn)) * inverse_rms(flat, eps)


def _weighted_sum(streams_TND: Tensor, pre_TN: Tensor) -> Tensor:
    return torch.bmm(pre_TN.unsqueeze(1), wide(streams_TND)).squeeze(1).to(streams_TND.dtype)


def split_gates(gates: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """post_TN and mix_in_out_TNN of flat gates."""
    streams = round((1 / 4 + gates.numel() / max(tokens, 1)) ** 0.5 - 1 / 2)
    post, mix = gates.split([tokens * streams, tokens * streams**2])
    return post.view(tokens, streams), mix.view(tokens, streams, streams)


def enter_reference(
    streams_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The plain meaning, without the norm."""
    N = streams_TND.shape[1]
    g = _projection(streams_TND, fn, rms_eps)
    pre_gate, post_gate, comb_gate = wide(scale).split(1)
    factors = torch.cat([pre_gate.expand(N), post_gate.expand(N), comb_gate.expand(N * N)])
    pre, post, comb = torch.addcmul(wide(base), g, factors).split([N, N, N * N], dim=1)
    mix = sinkhorn(comb.unflatten(1, (N, N)), iterations, eps)
    gates = torch.cat([(2 * sigmoid(post)).flatten(), mix.flatten()])
    return _weighted_sum(streams_TND, sigmoid(pre) + eps), gates


def _enter(
    fast: ModuleType,
    streams_TND: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_D: Tensor | None,
    numbers: tuple[float, float, int],
) -> tuple[Tensor, Tensor | None]:
    """x_TD and gates; no gates for no iterations."""
    T, N, D = streams_TND.shape
    x_TD = streams_TND.new_empty(T, D)
    gates = streams_TND.new_empty(T * N * (1 + N)) if numbers[2] else None
    fast.enter(streams_TND.contiguous(), fn, base, scale, norm_D, *numbers, x_TD, gates)
    return x_TD, gates


class _Enter(torch.autograd.Function):
    """`_enter` where a gradient is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        fast: ModuleType,
        numbers: tuple[float, float, int],
        streams_TND: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm_D: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        streams_TND = streams_TND.contiguous()
        ctx.fast, ctx.numbers = fast, numbers
        ctx.save_for_backward(streams_TND, fn, base, scale, norm_D)
        return _enter(fast, streams_TND, fn, base, scale, norm_D, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor, dgates: Tensor | None) -> tuple[Tensor | None, ...]:
        entering = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in entering]
        dgates = None if dgates is None else dgates.contiguous()
        ctx.fast.enter_backward(*entering, *ctx.numbers, dx_TD.contiguous(), dgates, *grads)
        return None, None, *grads


def enter(
    streams_TND: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_D: Tensor | None,
    rms_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Collapse the streams into a sublayer's input.

    Args:
        fn: [(2 + N) N, N D]; rows for pre, post and comb in this order. base: [(2 + N) N].
        scale: [3], gating factors of pre, post and comb.
        norm_D: weight of the sublayer's RMSNorm, or None to leave it out.
        rms_eps, eps: of the root mean squares, and of the gates.
        iterations: of Sinkhorn.
    Returns:
        x_TD in the type of the streams, and the gates for `leave`, flat, in float32.
    """
    entering = (streams_TND, fn, base, scale, norm_D)
    fast = native_for(*entering, backward=True)
    if fast is None or streams_TND.shape[1] > MOST_STREAMS:
        x_TD, gates = enter_reference(streams_TND, fn, base, scale, rms_eps, eps, iterations)
        return x_TD if norm_D is None else rms_norm(x_TD, norm_D, rms_eps), gates
    return _run(fast, entering, (rms_eps, eps, iterations))


def _run(
    fast: ModuleType, entering: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], numbers: tuple[float, float, int]
) -> Any:
    if learning(*entering):
        return _Enter.apply(fast, numbers, *entering)  # type: ignore[no-untyped-call]
    return _enter(fast, *entering, numbers)


def leave_reference(y_TD: Tensor, streams_TND: Tensor, gates: Tensor) -> Tensor:
    """The plain meaning."""
    post_TN, mix_in_out_TNN = split_gates(gates, len(y_TD))
    added = post_TN.unsqueeze(-1) * wide(y_TD).unsqueeze(1)
    return torch.baddbmm(added, mix_in_out_TNN.transpose(1, 2), wide(streams_TND)).to(streams_TND.dtype)


def _leave(fast: ModuleType, y_TD: Tensor, streams_TND: Tensor, gates: Tensor) -> Tensor:
    out_TND = torch.empty_like(streams_TND)
    fast.leave(y_TD, streams_TND, gates, out_TND)
    return out_TND


class _Leave(torch.autograd.Function):
    """`_leave` where a gradient is needed."""

    @staticmethod
    def forward(ctx: Any, fast: ModuleType, *leaving: Tensor) -> Tensor:
        ctx.fast = fast
        ctx.save_for_backward(*leaving)
        return _leave(fast, *leaving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TND: Tensor) -> tuple[Tensor | None, ...]:
        leaving = ctx.saved_tensors  # once: a block that runs again gives them once
        grads = [torch.empty_like(x) for x in leaving]
        ctx.fast.leave_backward(*leaving, dout_TND.contiguous(), *grads)
        return None, *grads


def leave(y_TD: Tensor, streams_TND: Tensor, gates: Tensor) -> Tensor:
    """streams_TND after the sublayer returned y_TD: mixed, and y added to each."""
    fast = native_for(y_TD, streams_TND, gates, backward=True)
    if fast is None or streams_TND.shape[1] > MOST_STREAMS:
        return leave_reference(y_TD, streams_TND, gates)
    leaving = y_TD.contiguous(), streams_TND.contiguous(), gates
    return _Leave.apply(fast, *leaving) if learning(*leaving) else _leave(fast, *leaving)  # type: ignore[no-untyped-call]


def collapse_reference(
    streams_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, eps: float
) -> Tensor:
    """The plain meaning, without the norm."""
    g = _projection(streams_TND, fn, rms_eps)
    return _weighted_sum(streams_TND, sigmoid(g * wide(scale) + wide(base)) + eps)


def collapse(
    streams_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_D: Tensor | None, rms_eps: float, eps: float
) -> Tensor:
    """The last collapse: weights without Sinkhorn, z_TD, normed by `norm_D` unless that is None.

    Args:
        fn: [N, N D]; base: [N]; scale: [1].
    """
    entering = (streams_TND, fn, base, scale, norm_D)
    fast = native_for(*entering, backward=True)
    if fast is None or streams_TND.shape[1] > MOST_STREAMS:
        z_TD = collapse_reference(streams_TND, fn, base, scale, rms_eps, eps)
        return z_TD if norm_D is None else rms_norm(z_TD, norm_D, rms_eps)
    return _run(fast, entering, (rms_eps, eps, 0))[0]
