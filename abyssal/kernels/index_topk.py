"""index_topk: the lightning indexer's scores and its choice (architecture.md 2.7).

Keys are read a tile at a time and only the best so far are kept, so memory does not grow with the context. The native
kernel reads them where they lie and unpacks FP4 in registers; scores that are equal are so on every path, but sums run
in another order than torch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

TILE = 8192  # keys that are ranked at once
LONG_TILE = 65536  # the same for a few queries
DOTS = 1 << 18  # products of one step: they stay in the cache between the product and the sum over heads
QUERIES = 64  # queries of one step
FEW = 4  # queries up to which the keys take the place of the rows in the product

_LOWEST = torch.iinfo(torch.int64).min
_BLOCK = (1 << 32) - 1


def _sum_heads(x: Tensor, dim: int) -> Tensor:
    """Sum over heads by adding one half to the other, so that the order is the same in every layout; in place."""
    count = x.shape[dim]
    while count > 1:
        half = (count + 1) // 2
        x.narrow(dim, 0, count - half).add_(x.narrow(dim, half, count - half))
        count = half
    return x.select(dim, 0)


def index_scores(q_GSIJ: Tensor, weights_GSI: Tensor, keys_GNJ: Tensor) -> Tensor:
    """I[t, s] = sum over heads of w[t, h] * relu(q[t, h] . k[s]).

    Returns:
        scores_GSN in the dtype of the inputs. Weights may be negative; exact zeros are common.
    """
    G, S, I, _ = q_GSIJ.shape
    step = max(DOTS // (G * S * I) // 64, 1) * 64
    scores = []
    if G == 1 and S <= FEW:  # reading the keys is the work
        q_JQ, weights_Q = q_GSIJ.flatten(0, 2).T, weights_GSI.flatten()
        for keys in keys_GNJ[0].split(step):
            dots = keys.mm(q_JQ).relu_().mul_(weights_Q)
            scores.append(_sum_heads(dots.view(-1, S, I), 2).T)
        return (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).unsqueeze(0)
    q, weights = q_GSIJ.flatten(1, 2), weights_GSI.unsqueeze(-1)
    for keys in keys_GNJ.split(step, dim=1):
        # mm and bmm agree to the bit; mm alone takes a view of the keys without a copy
        dots = q[0].mm(keys[0].T).unsqueeze(0) if G == 1 else torch.bmm(q, keys.transpose(1, 2))
        scores.append(_sum_heads(dots.relu_().view(G, S, I, -1).mul_(weights), 2))
    return scores[0].contiguous() if len(scores) == 1 else torch.cat(scores, dim=-1)


def choose_reference(scores_QT: Tensor, visible_Q: Tensor, k: int) -> Tensor:
    """The plain meaning: the k largest visible scores of each query, ties to the lowest block.

    Returns:
        blocks_QK: their numbers in rising order, [Q, k], -1 in unused places.
    """
    chosen = torch.full((len(scores_QT), k), -1)
    for row, (scores, visible) in enumerate(zip(scores_QT.tolist(), visible_Q.tolist(), strict=True)):
        best = sorted(sorted(range(visible), key=lambda s: (-scores[s], s))[:k])
        chosen[row, : len(best)] = torch.tensor(best, dtype=torch.long)
    return chosen


class Best:
    """The best blocks of each query while tiles of scores go by; tiles come in rising order of blocks.

    Args:
        visible_Q: how many blocks, counted from the first, each query may see.
        k: how many it reads at most.
        dtype: of the scores.
    """

    def __init__(self, visible_Q: Tensor, k: int, dtype: torch.dtype):
        self.visible_Q1 = visible_Q.unsqueeze(-1)
        self.k = k
        self.exact = dtype == torch.float64  # float32 bits and a block number fit into one integer
        rows = len(visible_Q)
        self._keys = torch.full((rows, k), _LOWEST)
        self._scores = torch.full((rows, k), float("-inf"), dtype=dtype)
        self._blocks = torch.full((rows, k), -1)

    def add(self, scores_QN: Tensor, first: int) -> None:
        """Scores of blocks first .. first + N - 1."""
        if len(scores_QN) == 1 and first >= self.k and not self.exact:
            self._add_few(scores_QN[0, : int(self.visible_Q1) - first], first)
            return
        blocks = torch.arange(first, first + scores_QN.shape[1])
        hidden = blocks >= self.visible_Q1
        if self.exact:
            scores = torch.cat([self._scores, scores_QN.masked_fill(hidden, float("-inf"))], dim=1)
            numbers = torch.cat([self._blocks, blocks.masked_fill(hidden, -1)], dim=1)
            # stable: of equal scores the lower block, which comes first, stays first
            self._scores, order = scores.sort(dim=1, descending=True, stable=True)
            self._scores, self._blocks = self._scores[:, : self.k], numbers.gather(1, order[:, : self.k])
            return
        keys = torch.cat([self._keys, _ranks(scores_QN, blocks).masked_fill_(hidden, _LOWEST)], dim=1)
        self._keys = keys.topk(self.k, dim=1, sorted=False).values

    def _add_few(self, scores_N: Tensor, first: int) -> None:
        """A later tile of a single query: only what beats the last of the best can matter, and that is little."""
        last = _scores_of((self._keys.min() >> 32).to(torch.int32).view(1))
        better = (scores_N > last).nonzero().flatten()
        if len(better):
            keys = torch.cat([self._keys, _ranks(scores_N[better].unsqueeze(0), first + better)], dim=1)
            self._keys = keys.topk(self.k, dim=1, sorted=False).values

    def blocks(self) -> Tensor:
        """Numbers of the chosen blocks in rising order, [Q, k], -1 in unused places."""
        if self.exact:
            unused = self._blocks < 0
            numbers = self._blocks
        else:
            unused = self._keys == _LOWEST
            numbers = _BLOCK - (self._keys & _BLOCK)
        numbers = numbers.masked_fill(unused, _BLOCK).sort(dim=1).values
        return numbers.masked_fill(numbers == _BLOCK, -1)


def _ranks(scores_QN: Tensor, blocks: Tensor) -> Tensor:
    """Integers in the order of the scores, and of falling block numbers among equal ones."""
    bits = (scores_QN + 0.0).view(torch.int32)  # + 0.0: minus zero ties with zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (_BLOCK - blocks)


def _scores_of(ordered: Tensor) -> Tensor:
    """The floats whose order `_ranks` took."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def choose(
    q_GSIJ: Tensor,
    weights_GSI: Tensor,
    visible_GS: Tensor,
    k: int,
    read: Callable[[int, int], Tensor],
    total: int,
) -> Tensor:
    """The blocks that each query reads.

    Args:
        q_GSIJ, weights_GSI: S index queries of each of G sequences and their head weights.
        visible_GS: how many blocks each query may see.
        k: how many it reads at most.
        read: index keys [G, stop - first, J] of blocks first .. stop - 1; a multiple of 64 of them.
        total: blocks that the last query sees.
    Returns:
        blocks_GSK in rising order, -1 in unused places.
    """
    G, S = visible_GS.shape
    parts = [slice(a, a + QUERIES) for a in range(0, S, QUERIES)]
    best = [Best(visible_GS[:, part].flatten(), k, q_GSIJ.dtype) for part in parts]
    most = [int(visible_GS[:, part].max()) for part in parts]
    tile = LONG_TILE if G == 1 and S <= FEW else TILE
    # the last few blocks apart: the tiles before them are read where they lie
    whole = total // 64 * 64
    borders = [*range(0, whole, tile), whole]
    if total > whole:
        borders.append(whole + 64)
    for first, stop in itertools.pairwise(borders):
        keys_GNJ = read(first, stop)
        for part, seen, ranking in zip(parts, most, best, strict=True):
            if seen > first:
                near = keys_GNJ[:, : -(-(min(seen, stop) - first) // 64) * 64]
                ranking.add(index_scores(q_GSIJ[:, part], weights_GSI[:, part], near).flatten(0, 1), first)
    chosen = [ranking.blocks().unflatten(0, (G, -1)) for ranking in best]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)


def choose_rows(
    module: ModuleType,
    q_TIJ: Tensor,
    weights_TI: Tensor,
    visible_Q: Tensor,
    firsts: Tensor,
    tables: Tensor,
    keys: Tensor,
    per_page: int,
    k: int,
) -> Tensor:
    """The same by the native kernels, for the queries of several sequences.

    Args:
        module: the native kernels.
        q_TIJ, weights_TI: index queries and head weights, float32; rows behind the last query are not read.
        visible_Q: how many blocks each query may see; who sees k or fewer gets all.
        firsts: [G + 1] queries firsts[g] .. firsts[g + 1] - 1 belong to sequence g.
        tables: [G, P] pages of each sequence; block b lies in row 1 + page * per_page + b % per_page of the keys.
        keys: float32 [rows, J], or packed bytes.
        k: how many blocks a query reads at most.
    Returns:
        blocks_QK in rising order, -1 in unused places.
    """
    blocks = torch.empty((len(visible_Q), k), dtype=torch.long)
    module.index_topk(q_TIJ, weights_TI, visible_Q, firsts, tables, keys, per_page, blocks)
    return blocks
