"""Generated documents, made when they are read: number n is the same whenever it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers

from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train.conversations import samples_of
from abyssal.train.data.bpe import tokenised_passage
from abyssal.train.data.echoes import Echoes
from abyssal.train.data.mixture import Mixture
from abyssal.train.data.pairs import Pairs
from abyssal.train.packing import Sample

DOCUMENTS = 1 << 20  # of an epoch


Learn = Literal["all", "answers"]


@dataclass(frozen=True)
class Passages:
    """A mixture's running text.

    Attributes:
        tokenizer: for plain documents, as `data.bpe.load_tokenizer` gives it.
        learn: every token, or only what follows from the text before it.
    """

    mixture: Mixture
    tokenizer: tokenizers.Tokenizer
    learn: Learn = "all"

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, number: int) -> Sample:
        ids, inside = tokenised_passage(self.tokenizer, self.mixture.passage(number))
        return Sample(ids, inside if self.learn == "answers" else None)


@dataclass(frozen=True)
class Conversations:
    """A mixture's conversations in the prompt format.

    A conversation of several sequences (`samples_of`) gives one of them; which one follows from the number.

    Attributes:
        learn: every token, or only what the assistant says.
    """

    mixture: Mixture
    tokenizer: Tokenizer
    learn: Learn = "answers"

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, number: int) -> Sample:
        samples = samples_of(self.mixture.example(number), self.tokenizer)
        sample = samples[number % len(samples)]
        return sample if self.learn == "answers" else Sample(sample.ids)


@dataclass(frozen=True)
class Lookups:
    """Sequences of plain ids, of which only what follows from the ids before is to be learnt."""

    maker: Pairs | Echoes
    seed: int

    def __len__(self) -> int:
        return DOCUMENTS

    def __getitem__(self, number: int) -> Sample:
        return Sample(*self.maker.generate(np.random.default_rng((self.seed, number))))
