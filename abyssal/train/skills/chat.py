"""Short chat: the right reply where there is one, and signs of grammar that a program can see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from functools import partial
from typing import Any

from abyssal.encoding.literals import SPECIAL_TOKENS
from abyssal.train.data.conversation import COUNTS, KINDS, Chat
from abyssal.train.data.example import Example
from abyssal.train.data.phrases import PHRASES
from abyssal.train.data.pools import WORDS
from abyssal.train.data.values import table
from abyssal.train.skills.asking import Bench, Reply, ask
from abyssal.train.skills.cases import Case, cases
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row, rate_of, rates

MOST = 256  # tokens of a reply
EXACT = ("talk", "fact", "context", "larger")  # kinds whose reply follows from what was said
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SEEN = 2  # times that a word of the corpus must occur, since misspelt ones stand there too
RUN, LOOP = 4, 3  # so many words in a row, so often, are a loop
SIGNS = ("capital", "full_stop", "no_marks", "no_loop", "known_words", "ended")


def score_chat(bench: Bench, plan: Plan, corpus: Iterable[str] = (), seed: int = 0) -> dict[str, Any]:
    """Rates of right replies by kind, of grammatical ones, and of each sign of grammar.

    Args:
        bench: model and journal.
        plan: how many items of each kind.
        corpus: texts whose words count as known, beside those of the generators.
        seed: another one gives other items.
    """
    items = talks(plan.chat, seed)
    asked = any(bench.journal.get(item.id) is None for item in items)
    known = known_words(corpus) if asked else frozenset()
    rows = bench.rows("chat", items, partial(_judged, bench, known))
    return {
        "by_kind": rates([row for row in rows if row["passed"] is not None], "kind"),
        "grammatical": rates(rows, "kind", what="grammatical"),
        "signs": {sign: rate_of(row["signs"][sign] for row in rows) for sign in SIGNS},
    }


def talks(count: int, seed: int = 0) -> list[Case]:
    """So many conversations of each kind."""
    return cases("chat", Chat("held_out"), KINDS, count, seed)


def known_words(corpus: Iterable[str]) -> frozenset[str]:
    """Words that occur in the corpus more than once, or in what the generators are made of."""
    seen: Counter[str] = Counter()
    for text in corpus:
        seen.update(_words(text))
    made = [path.read_text(encoding="utf-8") for folder in (WORDS, PHRASES) for path in sorted(folder.glob("*.txt"))]
    facts = str(table("facts"))
    return frozenset(word for word, times in seen.items() if times >= SEEN) | _words(" ".join([*made, facts]))


def signs_of(reply: Reply, known: Set[str], before: str) -> dict[str, bool]:
    """What a program can see of grammar.

    Args:
        reply: of the model.
        known: words that exist.
        before: the conversation, whose words may be used too.
    """
    text = reply.content.strip()
    words = WORD.findall(text.lower())
    runs = Counter(tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
    return {
        "capital": text[:1].isupper() or text[:1].isdigit(),
        "full_stop": text.endswith((".", "!", "?")),
        "no_marks": not reply.repairs and not reply.calls and not any(mark in text for mark in SPECIAL_TOKENS),
        "no_loop": max(runs.values(), default=0) < LOOP,
        "known_words": set(words) <= known | _words(before),
        "ended": reply.finish == "stop",
    }


def right(example: Example, reply: Reply) -> bool | None:
    """Whether the reply is the one there is; None for stories, of which there are many."""
    if example.source in EXACT:
        return reply.text == example.meta["targets"][-1]
    if example.source == "members":
        return _right_members(example.messages[-2]["content"], reply.text)
    return None


def _right_members(asked: str, text: str) -> bool:
    """As many different members of the group as were asked for, and no more."""
    group = next(name for name in table("facts")["members"] if name in asked)
    count = next(number for number, word in COUNTS.items() if f"{word} {group}" in asked)
    members = table("facts")["members"][group]
    return sum(bool(re.search(rf"\b{re.escape(member)}\b", text, re.I)) for member in members) == count


async def _judged(bench: Bench, known: Set[str], case: Case) -> Row:
    messages = case.example.messages[:-1]
    reply = await ask(bench.completer, messages, "non-think", MOST)
    signs = signs_of(reply, known, " ".join(message["content"] for message in messages))
    return {
        "kind": case.example.source,
        "passed": right(case.example, reply),
        "grammatical": all(signs.values()),
        "signs": signs,
        "asked": messages[-1]["content"],
        "target": case.example.meta["targets"][-1],
        "reply": reply.to_json(),
    }


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.lower()))
