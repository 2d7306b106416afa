from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from actstore.errors import ModelError
from actstore.models import LanguageModel, load
from actstore.models.text import TextCodec
from tests.toys import ARCHITECTURES, TEXT, toy_model

UNUSUAL = "  The keys é 😀\tto\nthe WAR—naïve 東京 " + "z" * 3


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_encoding_equals_transformers(toy: LanguageModel) -> None:
    """Ids and offsets are those of the tokenizer without special tokens."""
    for text in (UNUSUAL, TEXT, "a", ""):
        golden = toy.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        encoded = toy.encode(text)
        assert encoded.ids.tolist() == golden["input_ids"]
        offsets = list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True))
        assert offsets == [tuple(pair) for pair in golden["offset_mapping"]]
        assert {array.dtype for array in vars(encoded).values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_offsets_are_code_points(toy: LanguageModel) -> None:
    """A word behind an emoji is cut out of the text by its offsets as they are."""
    text = "😀😀é The"
    encoded = toy.encode(text)
    assert text[encoded.starts[-1] : encoded.ends[-1]] == "The"


@pytest.mark.parametrize("toy", ARCHITECTURES, indirect=True)
def test_a_batch_equals_one_by_one(toy: LanguageModel) -> None:
    """Encoding together changes nothing."""
    texts = ["the war", "", UNUSUAL, TEXT]
    for together, text in zip(toy.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(together.ids, toy.encode(text).ids)
        np.testing.assert_array_equal(together.starts, toy.encode(text).starts)
    assert toy.encode_batch([]) == []


def test_nothing_is_truncated_and_nothing_is_said(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Settings of the user's tokenizer neither cut a text nor are changed by encoding one."""
    module, tokenizer = toy_model("bert")
    tokenizer.model_max_length = 64
    tokenizer("the war", truncation=True, max_length=3, padding="max_length")
    before = tokenizer.backend_tokenizer.to_str()
    model = load(module, tokenizer)
    assert len(model.encode(TEXT).ids) > 64
    assert tokenizer.backend_tokenizer.to_str() == before
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("toy", "prefix", "suffix"),
    [("bert", ["[CLS]"], ["[SEP]"]), ("gpt2", [], []), ("llama", ["<s>"], [])],
    indirect=["toy"],
)
def test_special_tokens_around_a_text(
    toy: LanguageModel, prefix: list[str], suffix: list[str]
) -> None:
    """Prefix, tokens and suffix together are what the tokenizer makes of a text."""
    assert toy.tokenizer.convert_ids_to_tokens(toy.prefix_ids) == prefix
    assert toy.tokenizer.convert_ids_to_tokens(toy.suffix_ids) == suffix
    ids = [*toy.prefix_ids, *toy.encode(TEXT).ids.tolist(), *toy.suffix_ids]
    assert ids == toy.tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("toy", ["bert"], indirect=True)
def test_an_unknown_word_is_content(toy: LanguageModel) -> None:
    """[UNK] stands for a word of the text, so it is not special; [MASK] is."""
    special = {toy.tokenizer.convert_ids_to_tokens(id) for id in toy.special_ids}
    assert special == {"[PAD]", "[CLS]", "[SEP]", "[MASK]"}
    assert toy.tokenizer.unk_token_id in toy.encode("東京").ids


def test_an_unknown_token_that_no_text_produces_is_special() -> None:
    """Byte-level models name some control token "unknown"; it stays special."""
    module, tokenizer = toy_model("llama")
    tokenizer.unk_token = "</s>"
    tokenizer.eos_token = None
    assert load(module, tokenizer).special_ids == {0, 1}


@pytest.mark.parametrize("toy", ["gpt2"], indirect=True)
def test_a_tokenizer_without_padding_pads_with_its_end(toy: LanguageModel) -> None:
    """GPT-2 has no padding token; its end of text serves."""
    assert toy.tokenizer.pad_token_id is None
    assert toy.pad_id == toy.tokenizer.eos_token_id


@pytest.mark.parametrize("toy", ["gpt2", "llama"], indirect=True)
def test_vocabulary_texts_join_to_the_text(toy: LanguageModel) -> None:
    """Byte-level tokens show their real white space, so ASCII text is their concatenation."""
    ids, texts, pieces = toy.vocabulary()
    assert ids == list(range(toy.n_embeddings))
    assert len(texts) == len(pieces) == len(ids)
    assert "".join(texts[id] for id in toy.encode(TEXT).ids) == TEXT
    assert texts[pieces.index("Ġare")] == " are"


@pytest.mark.parametrize("toy", ["gpt2"], indirect=True)
def test_bytes_that_are_no_text_are_shown_as_bytes(toy: LanguageModel) -> None:
    """Half a character keeps its identity as an escape, and added tokens their name."""
    _, texts, pieces = toy.vocabulary()
    euro = [texts[id] for id in toy.encode("€").ids]
    assert euro == ["\\xe2", "\\x82", "\\xac"]
    assert texts[0] == pieces[0] == "<|endoftext|>"


@pytest.mark.parametrize("toy", ["bert"], indirect=True)
def test_wordpiece_keeps_its_marks(toy: LanguageModel) -> None:
    """A continuation is told from a word by its ##."""
    _, texts, _ = toy.vocabulary()
    assert [texts[id] for id in toy.encode("working").ids] == ["work", "##ing"]


def test_sentencepiece_marks_and_byte_pieces() -> None:
    """Llama 2's kind of pieces show a space for ▁ and a character or escape for a byte."""
    pieces = ["<unk>", "<s>", "▁war", "war", "<0x0A>", "<0xE2>"]
    backend = Tokenizer(
        models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert codec.vocabulary(7)[1] == ["<unk>", "<s>", " war", "war", "\n", "\\xe2", ""]
    backend.decoder = decoders.Metaspace()
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert codec.vocabulary(4)[1] == ["<unk>", "<s>", " war", "war"]


def test_rows_of_the_embedding_beyond_the_tokenizer_are_empty() -> None:
    """An embedding rounded up has ids that no token uses."""
    module, tokenizer = toy_model("gpt2", vocab=384)
    ids, texts, _ = load(module, tokenizer).vocabulary()
    assert len(ids) == 384
    assert set(texts[len(tokenizer) :]) == {""}


def test_a_tokenizer_without_offsets_is_refused() -> None:
    """A slow tokenizer cannot say where a token is in its text."""

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow, which gives no character offsets.*tokenizer="):
        load(toy_model("bert")[0], Slow())


def test_the_fingerprint_is_of_the_tokenizer_not_of_its_settings() -> None:
    """Truncation and padding do not count, another token does."""
    module, tokenizer = toy_model("bert")
    first = load(module, tokenizer).tokenizer_fingerprint
    tokenizer("the war", truncation=True, max_length=3, padding="max_length")
    assert load(module, tokenizer).tokenizer_fingerprint == first
    tokenizer.add_tokens(["cabinets"])
    model = load(toy_model("bert", vocab=200)[0], tokenizer)
    assert model.tokenizer_fingerprint != first
