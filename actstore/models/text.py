"""Text and token ids: a tokenizer as capture needs it.

`TextCodec` works on a private copy of the tokenizer's backend with truncation and padding
switched off, so that it neither sees nor changes settings of the user's object, never cuts a
document, and prints no "longer than the maximum" warning.  Offsets are code points of the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from actstore.errors import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = "a"
# A hieroglyph: a letter that no vocabulary has, so it shows what becomes of the unknown.
_RARE = "\U00013000"
# A language of DNA has five letters; an empty tokenizer of transformers at most two tokens.
_FEWEST = 4
# What transformers writes into `model_max_length` where nothing is known starts at 1e30.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text, without special tokens."""

    ids: npt.NDArray[np.int32]
    """Token ids, shape (n_tokens,)."""
    starts: npt.NDArray[np.int32]
    """First code point of each token in the text, shape (n_tokens,)."""
    ends: npt.NDArray[np.int32]
    """Code point behind each token in the text, shape (n_tokens,)."""


class TextCodec:
    """Encodes texts and shows tokens, for one tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer; it is not changed.

    Raises
    ------
    ModelError
        If the tokenizer gives no offsets ("slow"), is empty, or puts special tokens inside a
        text.

    Attributes
    ----------
    prefix_ids, suffix_ids : list of int
        Special tokens that the tokenizer puts before and behind one text.
    special_ids : set of int
        Ids of special tokens.  An unknown token that ordinary text can produce is not among
        them: it stands for a word of the text.
    pad_id : int
        Id to pad with; where the tokenizer has none, its end of text, else 0.
    max_length : int or None
        Longest sequence the tokenizer claims for its model, if it claims one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ModelError(
                f"tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; "
                "expected a fast tokenizer of transformers (tokenizer.is_fast is True). Give "
                "tokenizer= a directory or hub name with a tokenizer.json."
            )
        n_ordinary = len({*backend.get_vocab().values()} - {*tokenizer.all_special_ids})
        if n_ordinary < _FEWEST:
            raise ModelError(
                f"the tokenizer, a {type(tokenizer).__name__}, has {n_ordinary} tokens besides "
                "special ones; expected a vocabulary. transformers makes such an empty one where "
                "its files are missing: give tokenizer= a directory or hub name with a "
                "tokenizer.json."
            )
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.prefix_ids, self.suffix_ids = self._surrounding_ids()
        from_text = self._backend.encode(_RARE, add_special_tokens=False).ids
        self.special_ids = {
            *(id for id in tokenizer.all_special_ids if id not in from_text),
            *self.prefix_ids,
            *self.suffix_ids,
        }
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(int(id) for id in candidates if id is not None)
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_length = int(limit) if limit and limit < _NO_LIMIT else None

    @property
    def n_tokens(self) -> int:
        """One more than the highest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def n_base_tokens(self) -> int:
        """One more than the highest token id, tokens added later not counted."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the backend's JSON without truncation and padding, as hex digits."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of each text, none cut, without special tokens."""
        return [
            Encoded(
                np.asarray(encoding.ids, dtype=np.int32),
                *np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2).T.copy(),
            )
            for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def vocabulary(self, n_tokens: int) -> tuple[list[int], list[str], list[str]]:
        """Return the ids below `n_tokens`, what each stands for in a text, and its piece.

        See `LanguageModel.vocabulary`.
        """
        show = _shower(json.loads(self._backend.to_str())["decoder"])
        added = {
            id: token.content for id, token in self._backend.get_added_tokens_decoder().items()
        }
        pieces = [self._backend.id_to_token(id) or "" for id in range(n_tokens)]
        texts = [added[id] if id in added else show(piece) for id, piece in enumerate(pieces)]
        return list(range(n_tokens)), texts, pieces

    def _surrounding_ids(self) -> tuple[list[int], list[int]]:
        bare = self._backend.encode(_PROBE, add_special_tokens=False).ids
        full = self._backend.encode(_PROBE, add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ModelError(
            f"the tokenizer turns {_PROBE!r} into {full} with special tokens and {bare} without; "
            "expected special tokens only before and behind a text. Give another tokenizer=."
        )


def _shower(decoder: dict[str, Any] | None) -> Any:
    """Return the function that turns one piece into the text it stands for."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    types = {step["type"] for step in steps if step}
    if "ByteLevel" in types:
        return _show_byte_level
    spaces = [step["replacement"] for step in steps if step and step["type"] == "Metaspace"]
    spaces += [
        step["pattern"]["String"]
        for step in steps
        if step
        and step["type"] == "Replace"
        and step["content"] == " "
        and "String" in step["pattern"]
    ]

    def show(piece: str) -> str:
        if "ByteFallback" in types and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)]).decode(errors="backslashreplace")
        for space in spaces:
            piece = piece.replace(space, " ")
        return piece

    return show


def _show_byte_level(piece: str) -> str:
    if any(character not in _BYTE_OF for character in piece):
        return piece
    return bytes(_BYTE_OF[character] for character in piece).decode(errors="backslashreplace")


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: the printable character that stands for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_characters()
