"""Output of hostile programs, made harmless to look at.

A terminal obeys escape sequences, a browser obeys markup, and both obey controls that turn the direction of text.
Whatever a sandbox wrote is shown, and none of it is obeyed.
"""

from __future__ import annotations

import html
import unicodedata

_KEEP = "\n\t"
# marks of direction, invisible joiners and separators: what is seen would not be what is there
_INVISIBLE = frozenset({"Cf", "Zl", "Zp", "Cs", "Co", "Cn"})


def harmless(data: bytes | str) -> str:
    """Text in which every control stands as a visible sign: ESC as a picture, directions as <U+202E>."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    return "".join(_sign(letter) for letter in text.replace("\r\n", "\n"))


def harmless_html(data: bytes | str) -> str:
    """The same for a page."""
    return html.escape(harmless(data), quote=True)


def _sign(letter: str) -> str:
    code = ord(letter)
    if letter in _KEEP or (32 <= code < 127):
        return letter
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "\u2421"
    if code < 160 or unicodedata.category(letter) in _INVISIBLE:
        return f"<U+{code:04X}>"
    return letter
