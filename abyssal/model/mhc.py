"""Manifold-constrained hyper-connections: N residual streams (paper 2.2, architecture.md 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels import streams
from abyssal.model.norm import RMSNorm


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

    def enter(self, streams_TND: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Collapse the streams into a sublayer's normed input x_TD; and the gates for `leave`."""
        c = self.config
        eps = c.hc_eps, c.hc_sinkhorn_iters
        return streams.enter(streams_TND, self.fn, self.base, self.scale, norm.weight, norm.eps, *eps)

    @staticmethod
    def leave(y_TD: Tensor, streams_TND: Tensor, gates: Tensor) -> Tensor:
        """Mix the streams and add the sublayer's output to each."""
        return streams.leave(y_TD, streams_TND, gates)


def collapse_head(
    streams_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_D: Tensor, config: ModelConfig
) -> Tensor:
    """The last collapse, weights without Sinkhorn, and the final norm; z_TD.

    Args:
        fn: [N, N D]; base: [N]; scale: [1] (hc_head_fn, hc_head_base, hc_head_scale).
        norm_D: weight of the norm.
    """
    return streams.collapse(streams_TND, fn, base, scale, norm_D, config.rms_norm_eps, config.hc_eps)


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
