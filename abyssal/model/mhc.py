"""Manifold-constrained hyper-connections: N residual streams (paper 2.2, architecture.md 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.linear import linear
from abyssal.kernels.rms_norm import inverse_rms
from abyssal.kernels.sigmoid import sigmoid
from abyssal.kernels.sinkhorn import sinkhorn
from abyssal.quant.precision import wide


def _projection(streams_TND: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Project all streams of a token, divided by one root mean square over them, in float32."""
    flat = wide(streams_TND.flatten(1))  # stream-major: stream 0 first
    return linear(flat, wide(fn)) * inverse_rms(flat, eps)


def _collapse(streams_TND: Tensor, pre_TN: Tensor) -> Tensor:
    """Weighted sum of the streams, in float32, cast to the type of the streams."""
    return torch.bmm(pre_TN.unsqueeze(1), wide(streams_TND)).squeeze(1).to(streams_TND.dtype)


class Site:
    """One place where a sublayer meets the streams: its three parameters and the two mixes.

    The parameters belong to the block, under the checkpoint's names (hc_attn_fn and so on).

    Args:
        fn: [(2 + N) N, N D]; rows for pre, post and comb in this order.
        base: [(2 + N) N].
        scale: [3], gating factors of pre, post and comb.
    """

    def __init__(self, config: ModelConfig, fn: Tensor, base: Tensor, scale: Tensor):
        self.config = config
        self.fn, self.base, self.scale = fn, base, scale

    def enter(self, streams_TND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams into a sublayer's input.

        Returns:
            x_TD in the type of the streams; post_TN and mix_in_out_TNN in float32, for `leave`. The mix
            is not symmetric: index 1 is the input stream, index 2 the output stream (trap 24).
        """
        c = self.config
        N = c.hc_mult
        g = _projection(streams_TND, self.fn, c.rms_norm_eps)
        pre_gate, post_gate, comb_gate = wide(self.scale).split(1)
        factors = torch.cat([pre_gate.expand(N), post_gate.expand(N), comb_gate.expand(N * N)])
        pre, post, comb = torch.addcmul(wide(self.base), g, factors).split([N, N, N * N], dim=1)
        mix = sinkhorn(comb.unflatten(1, (N, N)), c.hc_sinkhorn_iters, c.hc_eps)
        return _collapse(streams_TND, sigmoid(pre) + c.hc_eps), 2 * sigmoid(post), mix

    @staticmethod
    def leave(y_TD: Tensor, streams_TND: Tensor, post_TN: Tensor, mix_in_out_TNN: Tensor) -> Tensor:
        """Mix the streams and add the sublayer's output to each; float32, cast to the streams' type."""
        added = post_TN.unsqueeze(-1) * wide(y_TD).unsqueeze(1)
        return torch.baddbmm(added, mix_in_out_TNN.transpose(1, 2), wide(streams_TND)).to(streams_TND.dtype)


def collapse_head(streams_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Tensor:
    """The last collapse before the final norm: weights without Sinkhorn, z_TD.

    Args:
        fn: [N, N D]; base: [N]; scale: [1] (hc_head_fn, hc_head_base, hc_head_scale).
    """
    g = _projection(streams_TND, fn, config.rms_norm_eps)
    return _collapse(streams_TND, sigmoid(g * wide(scale) + wide(base)) + config.hc_eps)


def site_parameters(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn, base and scale of one site, zero."""
    N, D = config.hc_mult, config.hidden_size
    rows = (2 + N) * N
    return (
        nn.Parameter(torch.zeros(rows, N * D)),
        nn.Parameter(torch.zeros(rows)),
        nn.Parameter(torch.zeros(3)),
    )


def head_parameters(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """hc_head_fn, hc_head_base and hc_head_scale, zero."""
    N, D = config.hc_mult, config.hidden_size
    return nn.Parameter(torch.zeros(N, N * D)), nn.Parameter(torch.zeros(N)), nn.Parameter(torch.zeros(1))
