"""Two tokenizers are the same when they give every token the same id; nothing else counts."""

import copy
import json

import pytest
from tokenizers import AddedToken
from transformers import AutoConfig

from bakery.errors import RecipeError
from bakery.prompts.tokenizers import load_tokenizer, template_sha, tokenizer_fingerprint, vocabulary_size

TINY = "a20b5585176fea73fc17ad4e18408f03c58cb829a7efa5622b1f2e122c8486b1"


def test_the_fingerprint_is_the_same_for_ever_and_after_a_round_trip(tiny_tokenizer, tmp_path):
    assert tokenizer_fingerprint(tiny_tokenizer) == TINY
    tiny_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == TINY


def test_another_vocabulary_has_another_fingerprint(tiny_tokenizer, smollm2):
    grown = copy.deepcopy(tiny_tokenizer)
    grown.add_tokens([AddedToken("<think>")])
    assert (vocabulary_size(tiny_tokenizer), vocabulary_size(grown)) == (259, 260)
    assert len({TINY, *(tokenizer_fingerprint(t) for t in (grown, load_tokenizer(str(smollm2))))}) == 3


def test_two_tokens_that_change_places_change_the_fingerprint(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tree["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    swapped = load_tokenizer(str(tmp_path))
    assert swapped.encode("A") == tiny_tokenizer.encode("B")
    assert tokenizer_fingerprint(swapped) != TINY


def test_a_padded_embedding_is_no_other_vocabulary(tiny_model):
    assert AutoConfig.from_pretrained(tiny_model).vocab_size == 264
    beside_the_model = load_tokenizer(str(tiny_model))
    assert tokenizer_fingerprint(beside_the_model) == TINY
    assert vocabulary_size(beside_the_model) == 259


def test_a_template_has_its_own_sha(tiny_tokenizer):
    other, none = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    other.chat_template += "{# #}"
    none.chat_template = None
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(none) == TINY
    assert len({template_sha(t) for t in (tiny_tokenizer, other, none)}) == 3


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(RecipeError, match=f"{tmp_path} holds no tokenizer"):
        load_tokenizer(str(tmp_path))
