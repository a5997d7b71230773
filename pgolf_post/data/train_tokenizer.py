"""Training of a lossless sentencepiece BPE tokenizer.

Identity normalization, no added or removed spaces, byte fallback for every character without a piece, and the newline
as a piece of its own: decoding reproduces any text exactly, so the byte table counts original bytes. The
control ids are the challenge's (pad 0, bos 1, eos 2, unk 3), digits are split as in its tokenizers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

from pgolf_post.data.tokenizer import BOS_ID, SPACE_MARK
from pgolf_post.errors import SettingsError

MAX_SENTENCE_CHARS = 2000
MAX_SENTENCE_BYTES = 4 * MAX_SENTENCE_CHARS
CHARACTER_COVERAGE = 0.999  # of the sample's characters; the rest fall back to bytes
LEAST = 256 + 5  # pieces that every tokenizer has: the bytes; control pieces and the newline
TRAINING_THREADS = 2  # fixed, not a setting: the model file records it, and its sha256 names the tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, sample_bytes: int) -> bytes:
    """Train on the first `sample_bytes` of `texts` and return the .model file's bytes, the same for the same texts.

    Raises SettingsError if the text cannot fill `vocab_size` pieces or its characters do not fit in them.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(_sample(texts, sample_bytes)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from None
    return model.getvalue()


def _sample(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Yield texts until they reach `sample_bytes`; the last one is cut."""
    remaining = sample_bytes
    for text in texts:
        data = text.encode("utf-8")
        yield data[:remaining].decode("utf-8", "ignore")
        remaining -= len(data)
        if remaining <= 0:
            break


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield lines without newline, long ones in pieces, without the characters that sentencepiece reserves."""
    for text in texts:
        for line in text.replace(SPACE_MARK, "").replace("\0", "").split("\n"):
            for start in range(0, len(line), MAX_SENTENCE_CHARS):
                yield line[start : start + MAX_SENTENCE_CHARS]


def _explain(message: str, vocab_size: int) -> SettingsError:
    """Return sentencepiece's error as ours, with the limit that it states."""
    if at_most := re.search(r"<= (\d+)", message):
        limit = int(at_most[1])
        return SettingsError(
            f"vocab_size {vocab_size} is more than this text can fill: at most {limit}", hint=f"--vocab-size {limit}"
        )
    if required := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(required[1])
        return SettingsError(
            f"vocab_size {vocab_size} is too small: 256 bytes, 5 fixed pieces and this text's characters need at least "
            f"{least}",
            hint=f"--vocab-size {least}",
        )
    if vocab_size <= LEAST:
        return SettingsError(f"vocab_size {vocab_size} is too small: 256 bytes and 5 fixed pieces come first")
    return SettingsError(f"sentencepiece could not train a tokenizer of {vocab_size} pieces: {message.strip()}")
