"""Tokens back to ids by the bytes they stand for, exactly or not at all."""

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bakery.errors import TeacherError
from bakery.prompts.token_bytes import BYTE_OF, TokenBytes
from bakery.prompts.tokenizers import load_tokenizer


def test_the_alphabet_is_gpt_2s():
    assert {letter: byte for byte, letter in bytes_to_unicode().items()} == BYTE_OF


def test_every_token_of_a_real_vocabulary_comes_back(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    tokens = TokenBytes(tokenizer)
    for index in [*range(0, 49152, 7), *tokenizer.encode(" Paris, naïve\n\n  🍞")]:
        text = tokenizer.decode([index])
        if "�" not in text and index > 16:
            assert tokens.id_of(text, list(text.encode())) == index, text
    assert tokens.id_of("<|im_end|>", []) == 2


def test_half_a_character_is_known_by_its_bytes(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    pieces = tokenizer.encode("🍞")
    assert len(pieces) > 1
    tokens = TokenBytes(tokenizer)
    data = [[BYTE_OF[letter] for letter in tokenizer.convert_ids_to_tokens(piece)] for piece in pieces]
    assert [tokens.id_of("�", part) for part in data] == pieces


def test_what_is_no_single_token_is_refused(tiny_tokenizer):
    with pytest.raises(TeacherError, match="'bread' is no single token"):
        TokenBytes(tiny_tokenizer).id_of("bread", list(b"bread"))
