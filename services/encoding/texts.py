"""From texts to the tokens a text tower takes: CLIP's own byte-pair encoding, token for token that of open_clip.

open_clip reads a text to its end before it cuts it, and takes time in the square of a word's length. Here a text is
read as far as the context holds, and its words are merged in n log n (`services.encoding.merges`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.encoding.clip import ClipConfig
from services.encoding.merges import merge
from services.encoding.trimmed_open_clip import open_clip
from services.errors import InvalidInput, TextTooLong

# Bounds of the BPE cache, whose words come from callers: words that it holds, and bytes of one, at most.
MAX_REMEMBERED_WORDS = 50_000
MAX_REMEMBERED_BYTES = 100

# Bytes of one word; merging one of so many takes about 0.15 s.
MAX_WORD = 65_536

# These would be read as the tokens themselves, and the end token says where the tower reads its result.
SPECIAL = re.compile(r"<(start|end)_of_text>", re.IGNORECASE)

# Characters that are read of a text whose beginning holds fewer tokens than the context; at worst that takes 0.2 s.
FURTHER = 16_384
# Characters that may look otherwise where a text is cut: the longest entity, or letters that ftfy repairs together.
_UNSURE = 64
# What comes before the first word and is nothing to read, however much it is.
_BLANKS = " \t\r\n"


@dataclass(frozen=True)
class TextLimits:
    """What a text may be.

    Attributes
    ----------
    max_characters : int
        Of one text that may not be cut. Of one that may so many are read, and `FURTHER` where these hold fewer tokens
        than the context.
    """

    max_characters: int = 8_192


DEFAULT_TEXT_LIMITS = TextLimits()


class Tokenizer:
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
        self._remembered: dict[str, list[int]] = {}
        self._tokenizer = open_clip.SimpleTokenizer(context_length=config.context_length, **options)

    def tokenize(
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
        """Return the tokens of one text, start and end included, unpadded; see `tokenize`."""
        limit, room = self.limits.max_characters, self.context_length - 2
        if len(text) <= limit:
            words = self._words(text, room + 1)
        elif not truncate:
            raise TextTooLong(f"{len(text)} characters; at most {limit} are read")
        else:
            text = text.lstrip(_BLANKS)
            words = self._words(text[:limit], room, cut=len(text) > limit)
            if len(words) < room and len(text) > limit:
                further = max(limit, FURTHER)
                words = self._words(text[:further], room, cut=len(text) > further)
                if len(words) < room and len(text) > further:
                    raise TextTooLong(
                        f"the first {further} characters do not fill the context; no more of {len(text)} are read"
                    )
        if len(words) > room and not truncate:
            raise TextTooLong(f"more tokens than the {self.context_length} that the context holds")
        return [self._tokenizer.sot_token_id, *words[:room], self._tokenizer.eot_token_id]

    def _words(self, text: str, wanted: int, cut: bool = False) -> list[int]:
        """Return the tokens of the words, stopping soon after `wanted`: the rest is not worth the time.

        Of a text that was `cut` only the words that would be the same in the whole one are read.
        """
        tokenizer = self._tokenizer
        plain = SPECIAL.sub(r"< \1_of_text>", tokenizer.clean_fn(text))
        end = len(plain) - _UNSURE if cut else len(plain)
        tokens: list[int] = []
        for match in tokenizer.pat.finditer(plain):
            if match.end() > end or len(tokens) >= wanted:
                break
            tokens += self._word(match.group())
        return tokens

    def _word(self, word: str) -> list[int]:
        tokenizer, data = self._tokenizer, word.encode()
        if len(data) > MAX_WORD:
            raise TextTooLong(f"a word of {len(data)} bytes; at most {MAX_WORD} are read")
        known = self._remembered.get(word)
        if known is not None:
            return known
        symbols = [tokenizer.byte_encoder[byte] for byte in data]
        symbols[-1] += "</w>"
        tokens = [tokenizer.encoder[piece] for piece in merge(symbols, tokenizer.bpe_ranks)]
        if len(data) <= MAX_REMEMBERED_BYTES:
            if len(self._remembered) >= MAX_REMEMBERED_WORDS:
                self._remembered = {}
            self._remembered[word] = tokens
        return tokens
