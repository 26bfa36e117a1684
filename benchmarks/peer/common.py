"""What a side of `peers.py` does in its own process: answer, be timed, and print a JSON line for each result.

Needs NumPy alone, so that it runs under any peer's interpreter.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

THREADS = 2
CHECKED = 300  # tokens of the prompt after which log-probabilities are compared: two HCA blocks and more
LOOK_S = 0.05
LONGEST = 64  # tokens of an answer, at most


class Side(Protocol):
    """One engine with the release loaded."""

    about: dict[str, Any]

    def logprobs(self, prompt: list[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token behind a prompt, [V]."""

    def answer(self, prompt: list[int], count: int) -> Iterator[int]:
        """The likeliest tokens behind a prompt, one at a time, each as soon as it is known."""


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Log-probabilities of one row of logits."""
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def prompt(length: int, vocabulary: int) -> list[int]:
    """Random tokens, the same in every process; the first ids are left out, some engines give them a meaning."""
    return np.random.default_rng(1).integers(16, vocabulary, length).tolist()


class Peak(threading.Thread):
    """The most memory that this process has held since `begin`, in bytes, looked at often.

    Pages of mapped files are left out: the system may drop them.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def begin(self) -> None:
        """Forget what was."""
        self.most = 0

    def run(self) -> None:
        """Look."""
        while True:
            with open("/proc/self/status", encoding="ascii") as file:
                held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
            self.most = max(self.most, held)
            time.sleep(LOOK_S)


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def run(make: Callable[[Path, int], Side]) -> None:
    """Load, check, time.

    Args:
        make: opens a release folder, or what was converted from it, for contexts of so many tokens.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", required=True)
    parser.add_argument("--decoded", type=int, required=True)
    parser.add_argument("--logprobs", type=Path, required=True, help="where the log-probabilities are written")
    args = parser.parse_args()
    peak = Peak()
    begin = time.perf_counter()
    side = make(args.model, max(args.contexts) + LONGEST)
    load = time.perf_counter() - begin
    np.save(args.logprobs, side.logprobs(prompt(CHECKED, args.vocabulary)))
    for _ in side.answer(prompt(CHECKED, args.vocabulary), 4):  # warm
        pass
    _tell(about=side.about, load_s=load, load_peak_bytes=peak.most)
    for context in args.contexts:
        peak.begin()
        tokens = prompt(context, args.vocabulary)
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in side.answer(tokens, args.decoded + 1)]
        gaps = np.diff(times)
        _tell(
            context=context,
            prefill_tokens_per_s=context / gaps[0],
            decode_tokens_per_s=1 / float(np.median(gaps[1:])),
            peak_bytes=peak.most,
        )
