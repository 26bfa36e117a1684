"""The lightning indexer: which compressed blocks a query of a CSA layer reads (architecture.md 2.7)."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.index_topk import choose, choose_rows
from abyssal.kernels.rotary import rotate_tail
from abyssal.kernels.rounding import fake_fp4, hadamard
from abyssal.kvcache.memory import CompressedMemory
from abyssal.model.batch import Batch, Group
from abyssal.model.compressor import Compressor
from abyssal.model.linear import Linear, QuantLinear
from abyssal.model.rope import Rope
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide


class Indexer(nn.Module):
    """Scores compressed blocks with I small heads; the best `index_topk` are read.

    Both sides are turned by a Hadamard matrix before they are rounded to FP4, never one side alone.

    Attributes:
        factor: of the heads' weights.
    """

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics):
        super().__init__()
        self.config = config
        self.numerics = numerics
        I, J = config.index_n_heads, config.index_head_dim
        self.wq_b = QuantLinear(config.q_lora_rank, I * J, numerics)
        self.weights_proj = Linear(config.hidden_size, I)
        self.compressor = Compressor(config, ratio, J)
        self.factor = J**-0.5 * I**-0.5

    def remember(
        self, x_TD: Tensor, batch: Batch, memory: CompressedMemory, rope: Rope, fast: ModuleType | None = None
    ) -> None:
        """Add the index keys of the blocks that these tokens complete."""
        keys = self.compressor(x_TD, batch, memory, rope, fast)
        if keys is not None:
            self.compressor.store(self._turned(keys), batch, memory)

    def rows(
        self, latent_TQ: Tensor, x_TD: Tensor, turn_T: Tensor, batch: Batch, memory: CompressedMemory
    ) -> tuple[Tensor, Tensor]:
        """Rows of the entries that each token reads, [A, K], and which of them are there.

        Args:
            latent_TQ: the attention's normed query latent, which both share.
            x_TD: normed input of the sublayer.
            turn_T: rotations at the positions of the tokens.
            batch: where the tokens stand; A is `batch.attending`.
            memory: the index keys, those of these tokens among them.
        """
        k, ratio = batch.topk, memory.ratio
        rows, mask = batch.first_rows(ratio, k)
        visible = batch.visible(ratio)
        last = [span.first + span.length - 1 for span in batch.spans]
        noted = [np.arange(min(int(visible[row]), k)) for row in last]
        if batch.watched is not None:
            batch.watched.append(noted)
        if int(visible.max()) <= k:
            return rows, mask
        with torch.no_grad():  # a choice has no gradient
            rows, mask = rows.clone(), mask.clone()
            q_TIJ, weights_TI = self.queries(latent_TQ, x_TD, turn_T)
            for group in batch.groups:
                most = int(visible[group.rows].max())
                if most <= k:
                    continue

                def read(first: int, stop: int, group: Group = group) -> Tensor:
                    found = batch.shared_rows(group, ratio, first, stop)
                    if len(found) == 1:
                        return wide(memory.read_run(found[0])).unsqueeze(0)
                    return wide(memory.read(torch.from_numpy(found)))

                seen = torch.from_numpy(visible[group.rows]).unflatten(0, (-1, group.length))
                blocks = choose(group.take(q_TIJ), group.take(weights_TI), seen, k, read, most)
                rows[group.rows] = batch.rows_of_chosen(group, ratio, blocks).flatten(0, 1)
                mask[group.rows] = (blocks >= 0).flatten(0, 1)
                if batch.watched is not None:
                    first = batch.spans.index(group.spans[0])
                    for i, chosen in enumerate(blocks[:, -1]):
                        noted[first + i] = chosen[chosen >= 0].numpy()
        return rows, mask

    def blocks(
        self,
        fast: ModuleType,
        latent_TQ: Tensor,
        x_TD: Tensor,
        turn_T: Tensor,
        batch: Batch,
        memory: CompressedMemory,
    ) -> Tensor | None:
        """Blocks that each token reads by the native kernels, [count, K]; None where each reads all that it sees.

        Args:
            fast: the native kernels; the others as of `rows`.
        """
        k, ratio = batch.topk, memory.ratio
        visible = batch.visible(ratio)
        chosen = None
        if int(visible.max()) > k:
            with torch.no_grad():
                q_TIJ, weights_TI = self.queries(latent_TQ, x_TD, turn_T)
                chosen = choose_rows(
                    fast,
                    q_TIJ,
                    weights_TI,
                    batch.visible_Q(ratio),
                    batch.firsts,
                    batch.table_GP,
                    memory.entries.detach(),
                    memory.per_page,
                    k,
                )
        batch.note(ratio, chosen)
        return chosen

    def queries(self, latent_TQ: Tensor, x_TD: Tensor, turn_T: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [T, I, J] and head weights [T, I], in float32 (float64 for float64)."""
        I, J = self.config.index_n_heads, self.config.index_head_dim
        q = rotate_tail(self.wq_b(latent_TQ).unflatten(-1, (I, J)), turn_T.unsqueeze(1))
        q = self._turned(q)
        if self.numerics.index != "exact":
            q = fake_fp4(q)
        return wide(q), wide(self.weights_proj(x_TD) * self.factor)

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.numerics.index == "exact" else hadamard(x)
