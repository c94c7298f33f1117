"""From texts to the tokens a text tower takes: CLIP's own byte-pair encoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.encoding.clip import ClipConfig
from services.encoding.quiet_open_clip import open_clip
from services.errors import InvalidInput, TextTooLong

# The tokenizer remembers every word it has split, for ever; a server that reads strangers' words must forget.
MAX_REMEMBERED_WORDS = 50_000

# Byte-pair encoding takes time in the square of a word's length; no language has words like these.
MAX_WORD = 200
LONG_WORD = re.compile(rf"(\S{{{MAX_WORD}}})(?=\S)")

# These would be read as the tokens themselves, and the end token says where the tower reads its result.
SPECIAL = re.compile(r"<(start|end)_of_text>", re.IGNORECASE)


@dataclass(frozen=True)
class TextLimits:
    """What a text may be.

    Attributes
    ----------
    max_characters : int
        Read of one text. Where truncation is allowed the rest is cut off unread.
    """

    max_characters: int = 8_192


DEFAULT_TEXT_LIMITS = TextLimits()


class Tokeniser:
    """CLIP's tokenizer with a context length, limits and clear errors.

    Parameters
    ----------
    config : ClipConfig
        Of the towers.
    limits : TextLimits
        What is accepted.
    """

    def __init__(self, config: ClipConfig, limits: TextLimits = DEFAULT_TEXT_LIMITS) -> None:
        options = config.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
        self.context_length = config.context_length
        self.limits = limits
        self._tokenizer = open_clip.SimpleTokenizer(context_length=config.context_length, **options)

    def tokenise(
        self,
        texts: Sequence[str],
        truncate: bool = False,
        field_path: Callable[[int], str] = "texts[{}]".format,
    ) -> NDArray[np.int64]:
        """Return tokens, start and end included, padded with zeros.

        Parameters
        ----------
        texts : sequence of str
            Any language; CLIP's vocabulary is English.
        truncate : bool
            Cut texts longer than the context; the end token is kept, as the tower reads its result there.
        field_path : callable
            From an item's number to its path in the request, for the error.

        Returns
        -------
        int64 array, shape (B, context)

        Raises
        ------
        TextTooLong
            Naming every text that does not fit.
        """
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        errors: list[InvalidInput] = []
        for i, text in enumerate(texts):
            try:
                encoded = self.encode(text, truncate)
            except TextTooLong as error:
                errors.append(error.at(field_path(i)))
            else:
                tokens[i, : len(encoded)] = encoded
        if errors:
            raise TextTooLong.gather(errors)
        return tokens

    def encode(self, text: str, truncate: bool = False) -> list[int]:
        """Return the tokens of one text, start and end included, unpadded; see `tokenise`."""
        if len(text) > self.limits.max_characters:
            if not truncate:
                raise TextTooLong(f"{len(text)} characters; at most {self.limits.max_characters} are read")
            text = text[: self.limits.max_characters]
        room = self.context_length - 2
        words = self._words(text, room + 1)
        if len(words) > room and not truncate:
            raise TextTooLong(f"more tokens than the {self.context_length} that the context holds")
        return [self._tokenizer.sot_token_id, *words[:room], self._tokenizer.eot_token_id]

    def _words(self, text: str, wanted: int) -> list[int]:
        """Return the tokens of the words, stopping soon after `wanted`: the rest is not worth the time."""
        tokenizer = self._tokenizer
        if len(tokenizer.cache) > MAX_REMEMBERED_WORDS:
            tokenizer.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
        clean = tokenizer.clean_fn(text)
        plain = LONG_WORD.sub(r"\1 ", SPECIAL.sub(r"< \1_of_text>", clean))
        tokens: list[int] = []
        for match in tokenizer.pat.finditer(plain):
            encoded = "".join(tokenizer.byte_encoder[byte] for byte in match.group().encode())
            tokens += (tokenizer.encoder[piece] for piece in tokenizer.bpe(encoded).split(" "))
            if len(tokens) >= wanted:
                break
        return tokens
