"""All generators together: example number n of a mixture, whatever was asked before.

Any example can be made alone, from its number, so a data cursor is one number and workers need no order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from abyssal.base.errors import DataError
from abyssal.train.data import copying, retrieval
from abyssal.train.data.arithmetic import Arithmetic
from abyssal.train.data.conversation import Chat
from abyssal.train.data.copying import Copying
from abyssal.train.data.example import MODES, Example, Passage, ThinkingMode
from abyssal.train.data.pools import Split, seeded
from abyssal.train.data.retrieval import Retrieval
from abyssal.train.data.tool_use import ToolUse

DOMAINS = ("retrieval", "copying", "tool_use", "arithmetic", "conversation")
T = TypeVar("T")
PASSAGE_DOMAINS = ("retrieval", "copying")


@dataclass(frozen=True)
class Mixture:
    """A stream of examples, and one of passages.

    Args:
        count: tokens of a text, by the model's tokenizer.
        weights: share of each domain of `DOMAINS`; they need not add up to one.
        split: training or held out.
        seed: another seed gives other examples.
        lengths: of retrieval examples in tokens; what is copied has a quarter as many words at most, and but for pairs
            no more than 60.
        questions: of retrieval examples, both ends included.
        filler: sentences of prose for retrieval.
        kinds: of retrieval and copying, see `KINDS` and `PASSAGES` there; all of a generator where none of its own is
            named.
        rounds: how often a retrieval example asks each of its questions.
        requests: of a conversation with tools at least, both ends included.
        offered: tools of such a conversation, both ends included.
        modes: thinking modes to choose from.
    Raises:
        DataError: an unknown domain, a negative weight, or none above zero.
    """

    count: Callable[[str], int]
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(DOMAINS, 1.0))
    split: Split = "train"
    seed: int = 0
    lengths: tuple[int, int] = (256, 2048)
    questions: tuple[int, int] = (1, 4)
    filler: Sequence[str] = field(default=(), repr=False)
    kinds: Sequence[str] = ()
    rounds: int = 1
    requests: tuple[int, int] = (1, 1)
    offered: tuple[int, int] = (1, 6)
    modes: Sequence[ThinkingMode] = MODES

    def __post_init__(self) -> None:
        if unknown := set(self.weights) - set(DOMAINS):
            raise DataError(f"no generator makes {', '.join(sorted(unknown))}: use {', '.join(DOMAINS)}")
        if unknown := set(self.kinds) - {*retrieval.KINDS, *copying.KINDS, *copying.PASSAGES}:
            raise DataError(f"neither retrieval nor copying has the kind {', '.join(sorted(unknown))}")
        if not self.modes or set(self.modes) - set(MODES):
            raise DataError(f"modes is {list(self.modes)}: choose from {', '.join(MODES)}")
        if min(self.weights.values(), default=0) < 0 or sum(self.weights.values()) <= 0:
            raise DataError("the weights of a mixture must not be negative, and one must be above zero")

    def example(self, index: int) -> Example:
        """Example number `index`; its id says how to make it again."""
        rng = seeded("mixture", self.split, index, self.seed)
        domain = self._domain(rng, DOMAINS)
        return replace(self._makers[domain].generate(rng), id=f"{domain}/{self.split}/{self.seed}/{index}")

    def passage(self, index: int) -> Passage:
        """Passage number `index`, of retrieval or copying.

        Raises:
            DataError: the mixture has neither.
        """
        rng = seeded("passages", self.split, index, self.seed)
        maker = self._makers[self._domain(rng, PASSAGE_DOMAINS)]
        assert isinstance(maker, Retrieval | Copying)  # as PASSAGE_DOMAINS says
        return maker.passage(rng)

    def examples(self, count: int, start: int = 0) -> Iterator[Example]:
        """So many examples from number `start` on."""
        return (self.example(index) for index in range(start, start + count))

    @cached_property
    def _makers(self) -> dict[str, Retrieval | Copying | ToolUse | Arithmetic | Chat]:
        def of(known: Sequence[T]) -> Sequence[T]:
            return [kind for kind in known if kind in self.kinds] or known

        return {
            "retrieval": Retrieval(
                self.count,
                self.split,
                of(retrieval.KINDS),
                lengths=self.lengths,
                questions=self.questions,
                modes=self.modes,
                filler=self.filler,
                rounds=self.rounds,
            ),
            "copying": Copying(
                self.split,
                of(copying.KINDS),
                of(copying.PASSAGES),
                longest=min(copying.LONGEST, self.lengths[1] // 4),
                far=self.lengths[1] // 4,
                modes=self.modes,
            ),
            "tool_use": ToolUse(self.split, self.offered, self.modes, self.requests),
            "arithmetic": Arithmetic(self.split, modes=self.modes),
            "conversation": Chat(self.split, modes=self.modes),
        }

    def _domain(self, rng: np.random.Generator, among: Sequence[str]) -> str:
        weights = np.array([self.weights.get(domain, 0.0) for domain in among])
        if weights.sum() <= 0:
            raise DataError(f"the mixture has nothing of {', '.join(among)}: give one a weight")
        return among[int(rng.choice(len(among), p=weights / weights.sum()))]
