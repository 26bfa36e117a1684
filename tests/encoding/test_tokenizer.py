"""The bundled tokenizer: round trips, forged special tokens, streams, and what transformers makes of the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abyssal
from abyssal.base.errors import CheckpointError, TokenError
from abyssal.encoding.literals import BOS, EOS, SPECIAL_TOKENS, USER
from abyssal.encoding.tokenizer import Piece, Tokenizer

FOLDER = Path(abyssal.__file__).parent / "models" / "nano"
NANO = Tokenizer(FOLDER)
SPECIAL_IDS = {NANO.special(token) for token in SPECIAL_TOKENS}

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# text with literals of the prompt format, whole or cut, in any company
FORGERY = st.lists(
    st.one_of(TEXT, st.sampled_from(SPECIAL_TOKENS), st.sampled_from(SPECIAL_TOKENS).map(lambda t: t[:4]))
)
IDS = st.lists(st.integers(0, NANO.vocab_size - 1), max_size=40)


@pytest.fixture(scope="module")
def as_released(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer with the flags of the official file: only BOS and EOS are "special"."""
    folder = tmp_path_factory.mktemp("released")
    layout = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    for token in layout["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS)
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    return Tokenizer(folder)


def test_special_tokens_have_the_first_ids() -> None:
    assert NANO.vocab_size == 4096
    assert (NANO.special(BOS), NANO.special(EOS)) == (0, 1)
    assert [NANO.special(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@given(TEXT)
def test_any_text_round_trips(text: str) -> None:
    assert NANO.decode(NANO.encode(text)) == text
    assert NANO.decode(NANO.encode(text), keep_special=True) == text


@given(FORGERY)
def test_text_never_becomes_a_special_token(parts: list[str]) -> None:
    text = "".join(parts)
    ids = NANO.encode(text)
    assert not SPECIAL_IDS & set(ids)
    assert NANO.decode(ids) == text


@pytest.mark.parametrize("literal", SPECIAL_TOKENS)
def test_text_forges_nothing_where_the_release_flags_few_tokens(as_released: Tokenizer, literal: str) -> None:
    for text in (literal, f"hello {literal}hello", f"<{literal}tool_calls>", literal * 3):
        ids = as_released.encode(text)
        assert not SPECIAL_IDS & set(ids)
        assert as_released.decode(ids) == text
    assert as_released.encode_pieces([Piece(literal, special=True)]) == [NANO.special(literal)]
    assert as_released.decode([NANO.special(literal)]) == ""


def test_pieces_say_what_is_special() -> None:
    ids = NANO.encode_pieces([Piece(BOS, special=True), Piece(USER, special=True), Piece(USER + "hi")])
    assert ids[:2] == [NANO.special(BOS), NANO.special(USER)]
    assert not SPECIAL_IDS & set(ids[2:])
    assert NANO.decode(ids) == USER + "hi"
    assert NANO.decode(ids, keep_special=True) == BOS + USER + USER + "hi"


def test_digits_are_single_tokens() -> None:
    assert len(NANO.encode("3141592653")) == 10


@settings(max_examples=300)
@given(IDS, st.booleans())
def test_stream_equals_decode(ids: list[int], keep: bool) -> None:
    stream = NANO.stream(keep_special=keep)
    parts = [stream.add(token) for token in ids]
    assert "".join([*parts, stream.finish()]) == NANO.decode(ids, keep_special=keep)


@given(TEXT)
def test_stream_of_whole_text_holds_nothing_back(text: str) -> None:
    stream = NANO.stream()
    parts = [stream.add(token) for token in NANO.encode(text)]
    assert "".join(parts) == text.removesuffix("\ufffd")  # that one could still be an unfinished character
    assert "".join(parts) + stream.finish() == text


def test_stream_gives_a_character_with_its_last_byte() -> None:
    ids = NANO.encode("a🎉")
    assert len(ids) > 2
    stream = NANO.stream()
    assert [stream.add(token) for token in ids] == ["a", *[""] * (len(ids) - 2), "🎉"]
    assert stream.finish() == ""


def test_stream_does_not_wait_on_broken_bytes() -> None:
    broken = NANO.encode("🎉")[0]
    stream = NANO.stream()
    parts = [stream.add(broken) for _ in range(5)]
    assert parts == ["", *["\ufffd"] * 4]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("token", [-1, NANO.vocab_size])
def test_id_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(TokenError, match=str(token)):
        NANO.decode([token])


def test_text_that_no_encoding_can_hold() -> None:
    with pytest.raises(TokenError, match="surrogate"):
        NANO.encode("a\ud800b")


def test_unknown_special_token() -> None:
    with pytest.raises(TokenError, match="im_start"):
        NANO.special("<|im_start|>")


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe", b"[]", b"{}", b'{"added_tokens": []}', b'{"added_tokens": [3]}']
)
def test_folder_without_a_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_transformers_reads_the_same_ids() -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, EOS)
    assert theirs.model_max_length == 1048576
    text = "In the beginning, 1984: naïve cafés\n\n  日本 🎉 don't"
    assert theirs(text)["input_ids"] == NANO.encode(text)
    template = [Piece(BOS, special=True), Piece(USER, special=True), Piece(text)]
    assert theirs("".join(piece.text for piece in template))["input_ids"] == NANO.encode_pieces(template)


def test_imports_no_torch() -> None:
    import subprocess

    code = "import sys, abyssal.encoding.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
