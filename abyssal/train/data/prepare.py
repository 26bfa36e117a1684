"""From packages to what the trainer reads: corpus, tokenizer, token files, SFT examples.

OUT/corpus/            corpora.build
OUT/tokenizer.json     bpe, trained on prose, code and generated text, so that JSON and tool names are short too
OUT/{prose,code}.bin   token files, and *.held_out.bin to measure bits per byte on
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from abyssal.train.data.bpe import VOCABULARY, load_tokenizer, save_tokenizer, tokenised, train_bpe
from abyssal.train.data.corpora import DEFAULT, KINDS, Source, build, read_corpus
from abyssal.train.data.example import Example
from abyssal.train.data.mixture import Mixture
from abyssal.train.data.token_file import digest_of, write_token_file

CODE_DOCUMENTS = 400  # that merges are learnt from; more code would take the place of English
EXAMPLES = 3000  # that merges are learnt from


def prepare(
    out: Path | str,
    sources: Iterable[Source] = DEFAULT,
    *,
    packages: Path | None = None,
    evaluation: Mapping[str, Iterable[str]] | None = None,
    vocab_size: int = VOCABULARY,
    examples: int = EXAMPLES,
) -> dict[str, Any]:
    """Build everything that pre-training reads into a folder.

    Args:
        out: the folder; made if needed.
        sources: of the corpus.
        packages: where Debian packages were unpacked (`corpora.fetch`).
        evaluation: texts of the items of every evaluation set, for the contamination check.
        vocab_size: of the tokenizer.
        examples: generated conversations that the tokenizer also learns from.
    Returns:
        `corpus`: the corpus's manifest; `files`: the manifests of the token files by name.
    Raises:
        DataError: a package is not here, or the text is too small for the vocabulary.
        SaveError: the file system refused.
    """
    out = Path(out)
    manifest = build(out / "corpus", sources, packages=packages, evaluation=evaluation)
    save_tokenizer(train_bpe(_texts(out / "corpus", examples), vocab_size), out)
    tokenizer, digest = load_tokenizer(out)
    files = {}
    for kind in KINDS:
        for held_out in (False, True):
            name = f"{kind}.held_out" if held_out else kind
            texts = list(read_corpus(out / "corpus", kind, held_out=held_out))
            rows = [
                row for row in manifest["sources"] if row["kind"] == kind and (row["part"] == "held_out") is held_out
            ]
            files[name] = write_token_file(
                out / f"{name}.bin",
                tokenised(tokenizer, texts),
                vocab_size=vocab_size,
                tokenizer_sha256=digest,
                manifest={
                    "source": [row["source"] for row in rows],
                    "licence": sorted({row["licence"] for row in rows}),
                    "sha256": digest_of(texts),
                    "bytes": sum(len(text.encode()) for text in texts),
                },
            )
    return {"corpus": manifest, "files": files}


def plain_text(example: Example) -> str:
    """What an example says, without the marks of the prompt format: for the tokenizer to learn from."""
    parts = [json.dumps(tool["function"], ensure_ascii=False) for tool in example.tools]
    for message in example.messages:
        parts += [message.get("reasoning_content", ""), message["content"]]
        for call in message.get("tool_calls", []):
            parts.append(f'name="{call["function"]["name"]}" string="true" string="false"')
            parts += [f'name="{key}">{value}' for key, value in json.loads(call["function"]["arguments"]).items()]
    return "\n".join(filter(None, parts))


def _texts(corpus: Path, examples: int) -> Iterator[str]:
    yield from read_corpus(corpus, "prose")
    yield from islice(read_corpus(corpus, "code"), CODE_DOCUMENTS)
    # lengths by words: there is no tokenizer yet
    yield from map(plain_text, Mixture(lambda text: len(text.split())).examples(examples))
