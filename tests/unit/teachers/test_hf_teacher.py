"""The Hugging Face teacher against transformers itself: full logits, float log-softmax, the right rows."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from bakery.config import SamplingConfig, TeacherConfig
from bakery.heads import Head
from bakery.models import load_causal_lm, weights_fingerprint
from bakery.records import ids_array
from bakery.teachers.opening import open_teacher

K = 12
CONTEXTS = [ids_array([10, 200, 30]), ids_array([7, 8, 9, 10, 11, 12, 13])]
RESPONSES = [ids_array([65, 66, 67, 258, 10, 68, 69, 258]), ids_array([90, 91, 258])]
TARGETS = [np.array([1, 1, 1, 1, 0, 0, 1, 1], bool), np.ones(3, bool)]
TINY = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 258,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
# Each with the trick that its logits go through, strong enough to be seen.
TRICKS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
}


def opened(path, tokenizer, **config):
    settings = {"dtype": "float32", "device": "cpu"} | config
    return open_teacher(TeacherConfig(model_name_or_path=str(path), **settings), tokenizer)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@torch.no_grad()
def reference(model, context, response, target):
    """log p of every id [N,264], each row read where the model stands just before the target."""
    ids = torch.as_tensor(np.concatenate([context, response])).long()
    logp_TV = model(ids[None]).logits[0].float().log_softmax(-1)
    return logp_TV[[len(context) + int(i) - 1 for i in np.flatnonzero(target)]].numpy()


def assert_scores_like(teacher, model):
    for topk, *question in zip(
        teacher.score(CONTEXTS, RESPONSES, TARGETS, K), CONTEXTS, RESPONSES, TARGETS, strict=True
    ):
        logp_NV = reference(model, *question)
        expected = -np.sort(-logp_NV[:, :259])[:, :K]
        np.testing.assert_allclose(topk.logprobs.reshape(-1, K), expected, atol=1e-4)
        ids = topk.ids.reshape(-1, K)
        np.testing.assert_allclose(np.take_along_axis(logp_NV, ids, 1), expected, atol=1e-4)
        np.testing.assert_allclose(topk.token_logprob, logp_NV[range(len(ids)), question[1][question[2]]], atol=1e-4)
        outside = np.ones(logp_NV.shape, bool)
        np.put_along_axis(outside, ids, False, 1)
        np.testing.assert_allclose(np.exp(topk.tail_logprob), (np.exp(logp_NV) * outside).sum(1), atol=1e-5)


def test_defect_1_row_n_predicts_target_n(tiny_model, tiny_tokenizer, plain):
    assert_scores_like(opened(tiny_model, tiny_tokenizer), plain)


def test_defect_1_the_first_target_is_predicted_by_the_last_token_of_the_context(tiny_model, tiny_tokenizer, plain):
    with torch.no_grad():
        expected = plain(torch.tensor([[10, 200, 30]])).logits[0, -1].float().log_softmax(-1)[65]
    [topk] = opened(tiny_model, tiny_tokenizer).score([CONTEXTS[0]], [ids_array([65])], [np.ones(1, bool)], K)
    assert topk.token_logprob[0] == pytest.approx(float(expected), abs=1e-4)


def test_defect_11_padded_rows_are_in_the_tail_and_never_in_the_support(tmp_path, tiny_tokenizer):
    path = save_tiny_model(tmp_path / "padded")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][259:] *= 20  # now the padding is where the mass is
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    teacher = opened(path, tiny_tokenizer, top_k=259)
    assert teacher.vocab_size == 259
    [topk] = teacher.score(CONTEXTS[:1], RESPONSES[:1], TARGETS[:1], 259)
    assert np.sort(topk.ids.reshape(-1, 259)).tolist() == [list(range(259))] * 6
    logp_NV = reference(AutoModelForCausalLM.from_pretrained(path), CONTEXTS[0], RESPONSES[0], TARGETS[0])
    padding = np.exp(logp_NV[:, 259:]).sum(1)
    assert padding.max() > 0.5
    np.testing.assert_allclose(np.exp(topk.tail_logprob), padding, atol=1e-5)


def test_weights_load_when_it_is_opened_and_once(tiny_model, tiny_tokenizer, monkeypatch):
    loads = []
    monkeypatch.setattr(
        "bakery.teachers.hf.load_causal_lm", lambda *a, **kw: loads.append(a) or load_causal_lm(*a, **kw)
    )
    teacher = opened(tiny_model, tiny_tokenizer)
    assert (teacher.info.backend, teacher.max_length, loads) == ("hf", 512, [])
    teacher.open()
    teacher.score(CONTEXTS, RESPONSES, TARGETS, K)
    teacher.score(CONTEXTS, RESPONSES, TARGETS, K)
    assert len(loads) == 1


def test_the_dtype_in_the_info_is_the_one_it_runs_in(tmp_path, tiny_tokenizer):
    path = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "whole")).bfloat16().save_pretrained(path)
    for asked, expected in (("auto", "bfloat16"), ("float32", "float32")):
        teacher = opened(path, tiny_tokenizer, dtype=asked)
        assert teacher.info.dtype == expected
        assert str(teacher.model.dtype) == f"torch.{expected}"


@pytest.fixture(scope="module", params=TRICKS)
def tricky(request, tmp_path_factory):
    kind, config, trick = TRICKS[request.param]
    path = tmp_path_factory.mktemp("tricks") / request.param
    torch.manual_seed(1)
    kind(config(**TINY, **trick)).save_pretrained(path)
    return path


def test_the_head_knows_llama(plain):
    assert Head(plain).agrees_with(plain)


def test_the_head_knows_softcaps_and_scales(tricky, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tricky, dtype=torch.float32).eval()
    head = Head(model)
    assert head.agrees_with(model)
    assert_scores_like(opened(tricky, tiny_tokenizer), model)
    head.softcap = head.scale = head.divisor = None  # without the trick it must not pass for the model's
    assert not head.agrees_with(model)


def test_an_unknown_head_falls_back_to_the_models_own(tiny_model, tiny_tokenizer, plain, monkeypatch, caplog):
    monkeypatch.setattr(Head, "__call__", lambda self, hidden: 2 * self.linear(hidden))
    teacher = opened(tiny_model, tiny_tokenizer)
    with caplog.at_level(logging.WARNING, "bakery"):
        assert_scores_like(teacher, plain)
        assert_scores_like(teacher, plain)
    assert [r.getMessage().split()[0] for r in caplog.records] == ["LlamaForCausalLM"]


def generation_config(path, **values):
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


OPINIONS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.2,
    "suppress_tokens": list(range(0, 256, 2)),
    "begin_suppress_tokens": list(range(0, 256, 2)),
    "min_new_tokens": 15,
    "sequence_bias": [[[65], 50.0]],
    "num_beams": 2,
    "max_time": 0.0,
}


@pytest.fixture(scope="module")
def unopinionated(tiny_model, tiny_tokenizer):
    return written(opened(tiny_model, tiny_tokenizer))


def written(teacher):
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, max_new_tokens=20)
    return [(r.tolist(), t.logprobs.tolist()) for r, t in teacher.generate(CONTEXTS * 3, sampling, K, list(range(6)))]


@pytest.mark.parametrize("opinion", OPINIONS)
def test_the_models_own_generation_config_has_no_say(opinion, tiny_model, tiny_tokenizer, tmp_path, unopinionated):
    path = tmp_path / "opinionated"
    shutil.copytree(tiny_model, path)
    generation_config(path, do_sample=True, **{opinion: OPINIONS[opinion]})
    assert written(opened(path, tiny_tokenizer)) == unopinionated


def test_the_head_reads_one_block_of_rows(tiny_model, tiny_tokenizer):
    teacher, blocks = opened(tiny_model, tiny_tokenizer), []
    teacher.model.lm_head.register_forward_hook(lambda _head, args, _logits: blocks.append(args[0].is_contiguous()))
    written(teacher)
    assert blocks == [True] * len(blocks) != []


def test_every_end_token_of_the_generation_config_ends_a_response(tiny_model, tiny_tokenizer, tmp_path):
    """A chat model often has two, and only one of them is the tokenizer's."""
    path = tmp_path / "ends"
    shutil.copytree(tiny_model, path)
    ends = list(range(0, 64))
    generation_config(path, eos_token_id=ends)
    answers = opened(path, tiny_tokenizer).generate(CONTEXTS * 4, SamplingConfig(max_new_tokens=40), K, list(range(8)))
    lengths = [len(response) for response, _ in answers]
    assert len(set(lengths)) > 1
    assert max(lengths) < 40
    for response, topk in answers:
        assert np.isin(response, [*ends, 258]).tolist() == [False] * (len(response) - 1) + [True]
        assert len(topk) == len(response)


def test_generating_leaves_the_callers_random_numbers_alone(tiny_model, tiny_tokenizer):
    teacher = opened(tiny_model, tiny_tokenizer)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teacher.generate(CONTEXTS, SamplingConfig(max_new_tokens=3), K, [1, 2])
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def copied(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_has_the_same_fingerprint(tiny_model, copied):
    assert weights_fingerprint(str(copied)) == weights_fingerprint(str(tiny_model))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_other_tensor_is_another_fingerprint(name, tiny_model, copied):
    tensors = load_file(copied / "model.safetensors")
    tensors[name] += 1e-3
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(str(copied)) != weights_fingerprint(str(tiny_model))


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [("transformers_version", "9.9.9", True), ("_name_or_path", "elsewhere", True), ("rms_norm_eps", 0.5, False)],
)
def test_the_fingerprint_reads_what_matters_of_the_configuration(key, value, same, tiny_model, copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {key: value}))
    assert (weights_fingerprint(str(copied)) == weights_fingerprint(str(tiny_model))) is same


def test_more_entries_than_tokens_are_refused_before_any_weight_is_read(tiny_model, tiny_tokenizer, monkeypatch):
    from bakery.errors import RecipeError

    monkeypatch.setattr("bakery.teachers.hf.load_causal_lm", lambda *a, **kw: pytest.fail("weights were loaded"))
    with pytest.raises(RecipeError, match=r"260.*259"):
        opened(tiny_model, tiny_tokenizer, top_k=260)
