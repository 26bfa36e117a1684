"""Token ids of text, and text of token ids as they arrive (encoding.md 1).

User text can never forge a special token: it is encoded with special tokens off, and only pieces that the
template marks as special may become one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from abyssal.base.errors import CheckpointError, TokenError

SHORT = 4096  # characters
REPLACEMENT = "\ufffd"


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in plain)
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text, or one special token."""

    text: str
    special: bool = False


class Tokenizer:
    """A release's tokenizer.json.

    Args:
        folder: the release.
    Attributes:
        vocab_size: number of ids that have a text.
        lengths: characters of the ids that streams have met: without special tokens' texts, and with.
    Raises:
        CheckpointError: the file is missing or no tokenizer.
    """

    def __init__(self, folder: Path | str):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: copy tokenizer.json of the release there")
        try:
            layout = json.loads(path.read_text(encoding="utf-8"))
            # releases flag the role tokens "special": false, and those would be recognised inside plain text
            for token in layout["added_tokens"]:
                token["special"] = True
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(layout))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer ({error}): fetch it again") from None
        self._tokenizer.encode_special_tokens = True  # special strings in text are text
        self._special = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        self._special_ids = frozenset(self._special.values())
        self.lengths: tuple[dict[int, int], dict[int, int]] = {}, {}
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def special(self, text: str) -> int:
        """The id of a special token.

        Raises:
            TokenError: the tokenizer has none of this text.
        """
        try:
            return self._special[text]
        except KeyError:
            raise TokenError(f"no special token {text!r} here: take tokenizer.json of a V4 release") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; strings that look like special tokens stay text.

        Raises:
            TokenError: the text has a lone surrogate, which no encoding can hold.
        """
        try:
            if len(text) <= SHORT:
                return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
            # `encode` keeps all other threads of Python waiting, for a second and more with a long text
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenError(f"the text is not valid Unicode ({error}): remove lone surrogates") from None

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a prompt; only pieces marked special become special tokens."""
        ids: list[int] = []
        for piece in pieces:
            if piece.special:
                ids.append(self.special(piece.text))
            else:
                ids.extend(self.encode(piece.text))
        return ids

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            TokenError: an id has no text.
        """
        size = self.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise TokenError(f"token id {token} is outside the vocabulary: use 0..{size - 1}")
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; those of a character may be spread over several ids.

        Raises:
            TokenError: an id has no text.
        """
        text = self._tokenizer.id_to_token(token)
        if text is None:
            raise TokenError(f"token id {token} is outside the vocabulary: use 0..{self.vocab_size - 1}")
        if token in self._special_ids:
            return str(text).encode()
        return bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else str(text).encode()

    def stream(self, *, keep_special: bool = False) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self, keep_special)


class TextStream:
    """Gives text as soon as its characters are whole; all parts together equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, keep_special: bool):
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._lengths = tokenizer.lengths[keep_special]
        self._ids: list[int] = []  # ids since the last text that ended in a whole character
        self._given = 0

    def add(self, token: int) -> str:
        """The text that this id completes, perhaps none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, keep_special=self._keep_special)
        if text.endswith(REPLACEMENT):
            # the last character may be unfinished; all before it are certain
            certain = max(self._given, len(text) - 1)
            new, self._given = text[self._given : certain], certain
            return new
        new = text[self._given :]
        # one id of context stays, because some tokenizers treat the first id of a text differently
        self._ids = [token]
        given = self._lengths.get(token)
        if given is None:
            given = self._lengths[token] = len(self._tokenizer.decode(self._ids, keep_special=self._keep_special))
        self._given = given
        return new

    def finish(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._ids, keep_special=self._keep_special)[self._given :]
        self._ids, self._given = [], 0
        return text
