"""router: expert scores, choice and weights (architecture.md 2.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.choice import learning, native_for
from abyssal.kernels.recompute import recomputed


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x))), in one form that neither underflows nor overflows (trap 14).

    Below about -16.6, log(1 + exp(x)) is 0 in float32, which loses a token's routed output; there
    softplus(x) equals exp(x) to rounding, so its root is exp(x / 2). The floor keeps the gradient finite.
    """
    small = logits < -15
    large = logits.masked_fill(small, 0.0)
    # written out: torch's softplus rounds by the place of an element in its tensor
    large_part = (large.clamp(min=0) + large.abs().neg().exp().log1p()).sqrt()
    small_part = (logits.masked_fill(~small, 0.0) / 2).exp()
    return torch.where(small, small_part, large_part)


def router_weights_reference(
    logits_TE: Tensor, bias_E: Tensor | None, chosen_TK: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The plain meaning; of equal scores torch takes any."""
    scores = sqrt_softplus(logits_TE)
    if chosen_TK is None:
        ranked = scores if bias_E is None else scores + bias_E
        chosen_TK = ranked.detach().topk(k, dim=-1).indices
    picked = scores.gather(1, chosen_TK)
    # relative to the largest, so that even the sum of vanishing scores is not zero
    picked = picked / picked.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(picked.dtype).tiny)
    total = picked.sum(-1, keepdim=True).clamp(min=torch.finfo(picked.dtype).tiny)
    return picked / total * scale, chosen_TK


def router_weights(
    logits_TE: Tensor, bias_E: Tensor | None, chosen_TK: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them.

    Args:
        logits_TE: router logits in float32 or float64.
        bias_E: added to the scores for the choice alone; None for no bias.
        chosen_TK: a choice made elsewhere (hash routing), or None to take the k largest.
        k: experts of a token.
        scale: what the weights of a token sum to (`routed_scaling_factor`).
    Returns:
        weights_TK in the dtype of the logits, and chosen_TK; native kernels choose by falling score, of equal ones
        the lower number first.
    """
    if (fast := native_for(logits_TE, bias_E, backward=True)) is None:
        return router_weights_reference(logits_TE, bias_E, chosen_TK, k, scale)
    weights_TK = logits_TE.new_empty(len(logits_TE), k)
    found_TK = torch.empty(weights_TK.shape, dtype=torch.int64)
    given = None if chosen_TK is None else chosen_TK.contiguous()
    fast.route(logits_TE.detach().contiguous(), bias_E, given, scale, weights_TK, found_TK)
    if learning(logits_TE):
        weights_TK = recomputed(
            weights_TK, lambda logits: router_weights_reference(logits, None, found_TK, k, scale)[0], logits_TE
        )
    return weights_TK, found_TK
