"""Text that is shown while its tokens are still being generated."""

from collections.abc import Iterable
from typing import SupportsIndex

import tokenizers

from jaxinfer.errors import InputError


class Detokenizer:
    """Turns ids that arrive a few at a time into text, so that the pieces add up to the decoding of all the ids.

    Each step decodes a short window: the tokens of the last piece, as context for the spaces between tokens, and the
    tokens after it. Text is held back while a later token could still change it: in the middle of a UTF-8 sequence,
    and in a run of byte tokens, which `tokenizers` judges valid or not as a whole.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool = True):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special else set()
        self._bytes = _byte_ids(backend)
        self._context: list[int] = []  # tokens whose text is out
        self._context_text = ""
        self._held: list[int] = []  # tokens whose text is not
        self._look_at = 0  # how many tokens must be held before the next look

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Take the next ids and return the text that is now final, possibly empty. InputError for an impossible id."""
        self._held.extend(i for i in map(int, ids) if self._has_text(i))
        end = len(self._held)
        while end and self._held[end - 1] in self._bytes:
            end -= 1
        if end < self._look_at:
            return ""
        for cut in range(end, max(end - 4, 0), -1):  # an unfinished character is three bytes at most
            text = self._decode(self._context + self._held[:cut])
            if not text.endswith("\ufffd") and len(text) > len(self._context_text):
                piece = text[len(self._context_text) :]
                self._context, self._held = self._held[:cut], self._held[cut:]
                self._context_text = self._decode(self._context)
                self._look_at = 0
                return piece
        # Output that is no text at all (bytes that never form a character) would be decoded again at every step:
        # look less and less often, so that the cost stays linear.
        self._look_at = 2 * end if end > 16 else 0
        return ""

    def flush(self) -> str:
        """Return the rest, once no more ids will come; the object is then ready for another text."""
        piece = self._decode(self._context + self._held)[len(self._context_text) :]
        self._context, self._context_text, self._held, self._look_at = [], "", [], 0
        return piece

    def _has_text(self, i: int) -> bool:
        if not 0 <= i < 2**32:
            raise InputError(f"token id {i} is not between 0 and {self._backend.get_vocab_size() - 1}")
        return i not in self._skipped and self._backend.id_to_token(i) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _byte_ids(backend: tokenizers.Tokenizer) -> set[int]:
    """Return the ids of the byte tokens <0x00> .. <0xFF>, where the decoder turns such tokens into bytes."""
    if "ByteFallback" not in repr(backend.decoder):
        return set()
    ids = (backend.token_to_id(spelling % byte) for byte in range(256) for spelling in ("<0x%02X>", "<0x%02x>"))
    return {i for i in ids if i is not None}
