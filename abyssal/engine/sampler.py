"""Choose the next token from logits.

A choice depends on the logits, the seed and the place of the token in its answer, and on nothing else: the
noise of each place is drawn from a counter-based generator. So an answer is the same whatever is computed
beside it, and a draft can be checked by drawing again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import InputError
from abyssal.kernels.draw import Floats, Ids, draw

# between sums and logarithms in another order, or of another library, of values that float64 holds to 1e-16
DOUBT = 1e-9
FEW = 1024  # tokens that are sorted whole
BINS, BINS_OF_E = 2048, 16.0  # of logits below the largest; so many for each unit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together have this probability.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        min_p: drop tokens whose probability is below this share of the largest one.
        presence_penalty: subtracted from the logit of every token that the answer has.
        frequency_penalty: subtracted once for each time that the answer has the token.
        repetition_penalty: logits of tokens in prompt or answer are divided by this, or multiplied if negative.
        logit_bias: added to logits, by token id.
        seed: equal seeds give equal tokens; None draws a new one.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature is {self.temperature}: use 0 to 100")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: use more than 0, at most 1")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: use 0 (all) or more")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}: use 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} is {getattr(self, name)}: use -2 to 2")
        if not 0 < self.repetition_penalty <= 10:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}: use more than 0, at most 10")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InputError("a logit bias is beyond -100 to 100: bring it inside")


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: how.
        choice: number of the answer; each has noise of its own.
    """

    def __init__(self, sampling: Sampling, choice: int = 0):
        self.sampling = sampling
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._choice = choice

    def draw(
        self,
        logits_V: Floats,
        place: int,
        prompt: Sequence[int] = (),
        answer: Sequence[int] = (),
        allowed_V: NDArray[np.bool_] | None = None,
    ) -> int:
        """The token at `place` of the answer.

        Args:
            logits_V: of the model, finite.
            prompt, answer: tokens so far, for penalties.
            allowed_V: what the grammar allows, or None for everything.
        """
        logits = self.adjusted(logits_V, prompt, answer)
        if allowed_V is not None:
            logits = np.where(allowed_V, logits, -np.inf)
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        logits /= s.temperature
        return draw(logits, kept(logits, s.top_k, s.top_p, s.min_p), self._seed, self._choice, place)

    def adjusted(self, logits_V: Floats, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
        """Logits after bias and penalties."""
        s = self.sampling
        logits = np.array(logits_V, np.float64)
        if s.repetition_penalty != 1:
            seen = np.unique(np.asarray([*prompt, *answer], np.int64))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and len(answer):
            ids, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
        for token, bias in s.logit_bias.items():
            logits[token] += bias
        return logits


def truncated(logits_V: Floats, top_k: int, top_p: float, min_p: float) -> Floats:
    """Logits with minus infinity for the tokens that are cut off; see `kept`."""
    ids = kept(logits_V, top_k, top_p, min_p)
    if ids is None:
        return logits_V
    cut = np.full_like(logits_V, -np.inf)
    cut[ids] = logits_V[ids]
    return cut


def kept(logits_V: Floats, top_k: int, top_p: float, min_p: float) -> Ids | None:
    """Tokens that are not cut off, in rising order, or None for all of them; the likeliest always stays.

    Each rule looks at what the one before has left: top-k, then top-p, then min-p. Equal logits at the border
    of top-k all stay; of equal ones at the border of top-p, those with the lower ids.
    """
    ids: Ids | None = None
    values = logits_V
    if 0 < top_k < len(logits_V):
        ids = np.flatnonzero(logits_V >= np.partition(logits_V, -top_k)[-top_k])
        values = logits_V[ids]
    if top_p < 1:
        stay = _nucleus(values, top_p)
        ids, values = stay if ids is None else ids[stay], values[stay]
    if min_p > 0:
        stay = np.flatnonzero(values >= values.max() + np.log(min_p))
        ids = stay if ids is None else ids[stay]
    return ids


def _nucleus(logits: Floats, top_p: float) -> Ids:
    """Places of the likeliest values that together have this probability, in rising order."""
    if len(logits) > FEW and (found := _nucleus_by_bins(logits, top_p)) is not None:
        return found
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order] - logits[order[0]])
    shares = weights / weights.sum()
    stay = np.cumsum(shares) - shares < top_p  # the token that crosses the border stays
    stay[0] = True
    return np.sort(order[stay])


def _nucleus_by_bins(logits: Floats, top_p: float) -> Ids | None:
    """The same without sorting more than the bin in which the border lies.

    Shares are then added in another order than by definition: None where that could decide.
    """
    below = logits.max() - logits
    weights = np.exp(-below)
    bins = np.minimum(below * BINS_OF_E, BINS - 1).astype(np.intp)
    sums = np.cumsum(np.bincount(bins, weights, BINS))
    total = sums[-1]
    border = int(np.searchsorted(sums, top_p * total))
    inside = np.flatnonzero(bins == border)
    order = inside[np.argsort(-logits[inside], kind="stable")]
    shares = weights[order] / total
    before = np.cumsum(shares) - shares + (sums[border - 1] / total if border else 0)
    if min(np.abs(before - top_p).min(), abs(sums[border] / total - top_p)) < DOUBT:
        return None
    stay = bins < border
    stay[order[before < top_p]] = True
    return np.flatnonzero(stay)
