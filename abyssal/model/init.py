"""Fresh parameters for training (architecture.md 5.2, paper 2.2)."""

from __future__ import annotations

import torch

from abyssal.model.transformer import Transformer


@torch.no_grad()
def initialise(
    model: Transformer,
    seed: int,
    mixing: float = 3.0,
    embedding_std: float | None = None,
    turned_head: bool = False,
) -> Transformer:
    """Fill a model with its starting values, in place.

    Matrices are normal with `initializer_range`; those that write into the residual streams (wo_b, w2) are
    smaller by the square root of twice the depth. mHC gates start small, as the paper asks, so that a block
    begins as a plain residual: its mix is close to the identity, `pre` reads the mean of the streams and
    `post` is 1.

    Args:
        model: a model on a real device.
        seed: of the generator; equal seeds give equal models.
        mixing: logit that favours a stream's own row in the starting mix.
        embedding_std: of the embedding in place of `initializer_range`. Blocks soon write values near 1 into the
            streams; beside them a small embedding of a rare token is not seen before long training.
        turned_head: whether the head begins as the embedding, turned at random, instead of with numbers of its
            own. To repeat a token that it has read, a model then needs one linear map for all tokens, which it
            learns from a few; otherwise it learns every token's way from embedding to head apart.
    """
    c = model.config
    N = c.hc_mult
    generator = torch.Generator().manual_seed(seed)
    residual = (2 * c.num_hidden_layers) ** -0.5
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("hc_"):
            if leaf.endswith("_fn"):
                p.normal_(0.0, c.initializer_range, generator=generator)
            elif leaf.endswith("_scale"):
                p.fill_(0.01)
            else:
                p.zero_()
                p[:N] = -torch.log(torch.tensor(float(N - 1))) if N > 1 else 4.0  # sigmoid is 1 / N
                if leaf != "hc_head_base":
                    p[2 * N :] = mixing * torch.eye(N).flatten()
        elif p.dim() >= 2 and leaf != "ape":
            std = c.initializer_range
            if name == "embed.weight" and embedding_std is not None:
                std = embedding_std
            if name.endswith(("wo_b.weight", "experts.w2", "w2.weight")):
                std *= residual
            p.normal_(0.0, std, generator=generator)
        elif leaf == "weight":
            p.fill_(1.0)
        else:
            p.zero_()
    if turned_head:
        turn_DD = torch.linalg.qr(torch.empty(c.hidden_size, c.hidden_size).normal_(generator=generator)).Q
        embed_VD = model.embed.weight
        model.head.weight.copy_(embed_VD @ turn_DD * (c.initializer_range / embed_VD.std()))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            rows = torch.rand(table.shape[0], c.n_routed_experts, generator=generator)
            table.copy_(rows.topk(table.shape[1]).indices)
    return model
