"""Which prefixes are shared, in numbers by hand; and that a model goes on behind a kept one as if it had run it."""

import gc
import logging
import weakref
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import ids_array
from bakery.teachers.opening import open_teacher
from bakery.teachers.shared_prefix import FEWEST, SHORTEST, SharedPrefixes

K = 8
# Measured on these models: 7e-6 at most.
SAME = 3e-5


def ids(*parts):
    return ids_array(np.concatenate([np.atleast_1d(part) for part in parts]))


LONG = np.arange(100) % 50  # a prefix of 100 tokens
OTHER = 200 - np.arange(90)


# -- which prefix ------------------------------------------------------------------------------------------------------


def test_a_group_shares_all_that_its_contexts_have_in_common():
    assert (SHORTEST, FEWEST) == (64, 8)
    behind = [ids(LONG, 7, n) for n in range(8)]
    others = [ids(OTHER, n, n) for n in range(9)]
    alone = [ids(LONG[1:], 7, n) for n in range(7)]  # one too few
    short = [ids(LONG[:64], n) for n in range(3)] + [ids(LONG[:63], n) for n in range(20)]
    shared = SharedPrefixes([*behind, *others, *alone])
    assert shared.of(behind[0]).tolist() == [*LONG, 7]
    assert shared.of(*behind).tolist() == [*LONG, 7]
    assert shared.of(*others).tolist() == OTHER.tolist()
    assert [shared.of(context).tolist() for context in alone + short[3:]] == [[]] * 27
    assert shared.of(behind[0], others[0]).tolist() == []
    assert not SharedPrefixes(alone + short)


def test_a_token_of_each_context_is_left_to_be_run():
    contexts = [ids(LONG)] * 8
    assert SharedPrefixes(contexts).of(*contexts).tolist() == LONG[:99].tolist()
    assert not SharedPrefixes([ids(LONG[:64])] * 8)


def test_a_context_that_only_begins_alike_has_no_part_in_it():
    shared = SharedPrefixes([ids(LONG, n) for n in range(8)])
    assert shared.of(ids(LONG[:80], 255, 255)).tolist() == []
    assert shared.of(ids(LONG)).tolist() == []  # nothing would be left


def test_the_order_of_the_contexts_does_not_matter():
    contexts = [ids(LONG, n % 2, n) for n in range(10)]
    prefixes = {SharedPrefixes(contexts[i:] + contexts[:i]).of(contexts[3]).tobytes() for i in range(10)}
    assert prefixes == {ids(LONG).tobytes()}


def test_batches_by_hand():
    """100 tokens that are lent count as 12.5; copied ones, and those of a prefix of their own, count in full."""
    contexts = [ids(LONG, n) for n in range(8)] + [ids(200, 201)]
    lengths = [110, 120, 110, 110, 110, 110, 110, 110, 90]
    shared = SharedPrefixes(contexts)
    # Cost 33 and 23: 33 * 3 = 99; then 23 * 4 = 92.
    assert shared.batches(contexts, lengths, 100, lent=True) == [[1, 0, 2], [3, 4, 5, 6], [7], [8]]
    assert shared.batches(contexts, lengths, 240, lent=False) == [[1, 0], [2, 3], [4, 5], [6, 7], [8]]


# -- what it is worth: the same numbers --------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 258,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
WINDOW = 24  # far shorter than the prefix
KEEPS = {
    "llama": LlamaConfig(**SIZES),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2, every other layer sliding": Gemma2Config(**SIZES, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt2, learned positions": GPT2Config(
        vocab_size=264, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=257, eos_token_id=258
    ),
}
DOES_NOT = {
    "recurrent layers": Qwen3NextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "rotations that follow the length": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


def made(config, path, tokenizer, **settings):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    config = TeacherConfig(model_name_or_path=str(path), dtype="float32", device="cpu", **settings)
    return open_teacher(config, tokenizer, (2.0,)).open()


def questions(rows=9, prefix=LONG):
    """Rows of unequal length on both sides; the first context ends one token behind the prefix."""
    rng = np.random.default_rng(0)
    contexts = [ids(prefix, n, rng.integers(0, 256, 7 * n % 13)) for n in range(rows)]
    responses = [ids_array(rng.integers(0, 256, 3 + 5 * n % 11)) for n in range(rows)]
    return contexts, responses, [np.ones(len(r), bool) for r in responses]


def plan(teacher, contexts, responses=None):
    room = [12] * len(contexts) if responses is None else [len(r) for r in responses]
    lengths = [len(context) + n for context, n in zip(contexts, room, strict=True)]
    return teacher.plan(contexts, lengths, "generate" if responses is None else "score")


def distance(one, other):
    names = ("logprobs", "tail_logprob", "token_logprob", "log_norm")
    return max(float(np.abs(getattr(one, name) - getattr(other, name)).max()) for name in names)


def run_tokens(teacher, seen):
    """Counts the tokens that go through the decoder, padding too."""
    teacher.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )


@pytest.fixture(scope="module", params=KEEPS)
def teacher(request, tmp_path_factory, tiny_tokenizer):
    return made(KEEPS[request.param], tmp_path_factory.mktemp("keeps") / "model", tiny_tokenizer)


def test_scored_behind_a_kept_prefix(teacher):
    asked = questions()
    plan(teacher, [])
    plain = teacher.score(*asked, K)
    assert len(plan(teacher, *asked[:2])) == 1
    assert teacher.keeps
    for ours, theirs in zip(teacher.score(*asked, K), plain, strict=True):
        assert distance(ours, theirs) < SAME
    [alone] = teacher.score(*([side[4]] for side in asked), K)
    assert distance(alone, plain[4]) < SAME


@pytest.mark.parametrize("longest", [[], [ids(LONG, [9] * 130)]], ids=["alike", "one far longer"])
def test_written_behind_a_kept_prefix(teacher, longest):
    """Rows are padded at the left: beside one that is longer by more than the prefix, others have none of it kept."""
    contexts = [*questions()[0], *longest]
    sampling, seeds = SamplingConfig(temperature=0.8, top_p=0.9, max_new_tokens=12), list(range(len(contexts)))
    plan(teacher, [])
    plain = teacher.generate(contexts, sampling, K, seeds)
    plan(teacher, contexts)
    assert len(teacher.shared.of(*contexts)) == 100
    for (response, topk), (same, theirs) in zip(teacher.generate(contexts, sampling, K, seeds), plain, strict=True):
        assert response.tolist() == same.tolist()
        assert distance(topk, theirs) < SAME


def test_what_is_kept_stays_as_it_is(teacher):
    """Written with, scored with, written with: to the bit what it was."""
    asked = questions()
    plan(teacher, *asked[:2])
    prefix = teacher.planned.of(*asked[0])
    before = [(k.clone(), v.clone()) for k, v in teacher.kept._kept(prefix.tobytes())]
    sampling = SamplingConfig(max_new_tokens=9)
    first = teacher.generate(asked[0], sampling, K, list(range(9)))
    scored = teacher.score(*asked, K)
    second = teacher.generate(asked[0], sampling, K, list(range(9)))
    assert [r.tolist() for r, _ in first] == [r.tolist() for r, _ in second]
    assert max(distance(a, b) for (_, a), (_, b) in zip(first, second, strict=True)) == 0
    assert max(distance(a, b) for a, b in zip(scored, teacher.score(*asked, K), strict=True)) == 0
    for pair, kept in zip(before, teacher.kept._kept(prefix.tobytes()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, kept, strict=True))


# -- what it saves -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_model, tiny_tokenizer):
    config = TeacherConfig(model_name_or_path=str(tiny_model), dtype="float32", device="cpu", tokens_per_batch=120)
    return open_teacher(config, tiny_tokenizer, (2.0,)).open()


def test_a_prefix_is_run_once_for_all_batches(tiny):
    contexts, responses, targets = questions(rows=20)
    calls = plan(tiny, contexts, responses)
    assert len(calls) > 4
    assert tiny.keeps
    seen = []
    run_tokens(tiny, seen)
    for call in calls:
        tiny.score(*([side[i] for i in call] for side in (contexts, responses, targets)), K)
    # Of each call a rectangle of what stands behind the 100 tokens, without the last token: it predicts no target.
    behind = [len(c) - 100 + len(r) - 1 for c, r in zip(contexts, responses, strict=True)]
    assert seen == [100, *(len(call) * max(behind[i] for i in call) for call in calls)]


def test_two_prefixes_are_run_once_each(tiny):
    one, other = questions(rows=12), questions(rows=12, prefix=OTHER)
    mixed = [[row for rows in zip(*sides, strict=True) for row in rows] for sides in zip(one, other, strict=True)]
    contexts, responses, targets = mixed
    calls = plan(tiny, contexts, responses)
    assert tiny.keeps
    seen = []
    run_tokens(tiny, seen)
    for call in calls:
        tiny.score(*([side[i] for i in call] for side in (contexts, responses, targets)), K)
    assert (seen.count(100), seen.count(90)) == (1, 1)
    assert len(seen) == len(calls) + 2


def test_a_closed_teacher_keeps_nothing_and_can_be_opened_again(tiny):
    contexts, responses, targets = questions(rows=20)

    def ask():
        plan(tiny, contexts, responses)
        return tiny.score(contexts, responses, targets, K)

    before = ask()
    [(keys, _), *_] = tiny.kept._kept(ids(LONG).tobytes())
    held = [weakref.ref(x) for x in (tiny.model, tiny.model.get_decoder(), tiny.head, tiny.kept, keys)]
    del keys
    tiny.close()
    gc.collect()
    assert [x() for x in held] == [None] * len(held)
    tiny.open()
    assert max(distance(a, b) for a, b in zip(before, ask(), strict=True)) == 0
    assert tiny.kept.decoder is tiny.model.get_decoder()


def test_answers_do_not_depend_on_what_was_asked_before(tiny, tiny_model, tiny_tokenizer):
    contexts, responses, targets = questions(rows=20)
    calls = plan(tiny, contexts, responses)

    def ask(teacher, call):
        return teacher.score(*([side[i] for i in call] for side in (contexts, responses, targets)), K)

    in_order = [ask(tiny, call) for call in calls]
    fresh = open_teacher(tiny.config, tiny_tokenizer, (2.0,)).open()
    fresh.score(*questions(rows=3, prefix=OTHER), K)
    plan(fresh, contexts, responses)
    backwards = [ask(fresh, call) for call in calls[::-1]][::-1]
    pairs = [pair for call in zip(in_order, backwards, strict=True) for pair in zip(*call, strict=True)]
    assert max(distance(a, b) for a, b in pairs) == 0
    assert [a.ids.tolist() for a, _ in pairs] == [b.ids.tolist() for _, b in pairs]


# -- where it cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DOES_NOT)
def test_a_model_that_cannot_is_told_once_and_runs_every_row_whole(kind, tmp_path, tiny_tokenizer, caplog):
    teacher = made(DOES_NOT[kind], tmp_path / "model", tiny_tokenizer, tokens_per_batch=300)
    asked = questions()
    plain = teacher.score(*asked, K)
    sampling = SamplingConfig(max_new_tokens=5)
    written = teacher.generate(asked[0], sampling, K, list(range(9)))
    calls = plan(teacher, *asked[:2])
    assert calls == [list(np.concatenate(calls))]  # planned as if the prefix were lent
    seen = []
    run_tokens(teacher, seen)
    with caplog.at_level(logging.WARNING, "bakery"):
        assert max(distance(*pair) for pair in zip(teacher.score(*asked, K), plain, strict=True)) == 0
        assert max(seen) <= 300  # and still no more goes through at a time
        again = teacher.generate(asked[0], sampling, K, list(range(9)))
    assert [r.tolist() for r, _ in again] == [r.tolist() for r, _ in written]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"{type(teacher.model).__name__} cannot go on behind a prefix that was run before"
    ]


def test_nothing_is_said_where_nothing_is_shared(tmp_path, tiny_tokenizer, caplog):
    teacher = made(DOES_NOT["rotations that follow the length"], tmp_path / "model", tiny_tokenizer)
    asked = questions(rows=3)
    plan(teacher, *asked[:2])
    with caplog.at_level(logging.WARNING, "bakery"):
        teacher.score(*asked, K)
    assert caplog.records == []


# -- a real model ------------------------------------------------------------------------------------------------------


def test_smollm2_behind_a_kept_prefix(smollm2):
    """Measured in float32: 4e-5 at most."""
    tokenizer = load_tokenizer(str(smollm2))
    config = TeacherConfig(model_name_or_path=str(smollm2), dtype="float32", device="cpu")
    teacher = open_teacher(config, tokenizer).open()
    text = ids_array(tokenizer.encode(topics["assignment"])[:400])
    contexts = [ids(text[:128], text[300 + 10 * n : 305 + 11 * n]) for n in range(8)]
    asked = contexts[:2], [text[310:320], text[320:335]], [np.ones(10, bool), np.ones(15, bool)]
    sampling = SamplingConfig(temperature=0.7, max_new_tokens=2)
    plain = [*teacher.score(*asked, 64), *(topk for _, topk in teacher.generate(asked[0], sampling, 64, [1, 2]))]
    plan(teacher, contexts)
    assert len(teacher.shared.of(*contexts)) == 128
    behind = [*teacher.score(*asked, 64), *(topk for _, topk in teacher.generate(asked[0], sampling, 64, [1, 2]))]
    assert max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(plain, behind, strict=True)) < 1e-4
