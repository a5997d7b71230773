"""Text files as editors and shells write them: UTF-8, UTF-8 with a byte order mark, UTF-16.

Windows editors put a byte order mark before UTF-8; PowerShell 5 writes `> file` as UTF-16.
"""

from __future__ import annotations

import codecs

ENCODINGS = (  # first bytes, codec that drops them; the longer mark first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Return a file's text without its byte order mark, lines ended by newlines.

    Raises UnicodeDecodeError if `errors` is strict.
    """
    encoding = next((name for mark, name in ENCODINGS if content.startswith(mark)), None)
    text = content.decode(encoding or _unmarked(content), errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unmarked(content: bytes) -> str:
    """Return the codec of text without a mark: every other byte of plain UTF-16 is zero."""
    even, odd = content[:512:2], content[1:512:2]
    for zeros, letters, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if len(zeros) > 1 and zeros.count(0) > len(zeros) // 2 and 0 not in letters:
            return name
    return "utf-8"
