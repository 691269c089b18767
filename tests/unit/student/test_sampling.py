"""The student's own responses against a loop without batch, padding or cache."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bakery.config import SamplingConfig
from bakery.generation import end_ids
from bakery.records import ids_array
from bakery.student.sampling import sample_responses

END = 258
TOKENS = 259  # the tiny model's output has five rows more
CONTEXTS = [ids_array(range(30, 30 + n)) for n in (2, 9, 5)]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=10)
WARM = SamplingConfig(temperature=1.0, max_new_tokens=10)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()


def greedy_by_hand(model, context, length, ends):
    """One forward over everything for each token, alone."""
    ids = context.tolist()
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :TOKENS].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(context) :]


def sampled(model, sampling, seeds=(1, 2, 3), contexts=CONTEXTS, ends=(END,)):
    return [r.tolist() for r in sample_responses(model, contexts, sampling, list(ends), TOKENS, list(seeds))]


def test_greedy_is_the_argmax_whatever_stands_beside_it_in_the_batch(model):
    assert sampled(model, GREEDY) == [greedy_by_hand(model, context, 10, {END}) for context in CONTEXTS]


def test_the_head_reads_one_block_of_rows(model):
    """Of B rows that are slices of longer ones torch makes B products, with as many copies of the head's weight."""
    blocks = []
    model.lm_head.register_forward_hook(lambda _head, args, _logits: blocks.append(args[0].is_contiguous()))
    sampled(model, GREEDY)
    assert blocks == [True] * len(blocks) != []


def test_a_response_goes_through_its_end_and_no_further(model):
    free = greedy_by_hand(model, CONTEXTS[0], 10, set())
    end = free[3]
    [response] = sampled(model, GREEDY, [1], CONTEXTS[:1], [END, end])
    assert response == free[: free.index(end) + 1]


def test_padding_of_the_vocabulary_is_never_sampled(model):
    with torch.no_grad():
        model.lm_head.weight[TOKENS:] = 3 * model.lm_head.weight[:5]
    for seed in range(5):
        assert max(max(response) for response in sampled(model, WARM, [seed] * 3)) < TOKENS


def test_the_seed_decides_and_torchs_own_randomness_stays(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once = sampled(model, WARM)
    assert torch.equal(torch.rand(3), expected)
    assert sampled(model, WARM) == once
    assert sampled(model, WARM, (4, 5, 6)) != once
    assert model.training


def test_samples_follow_the_models_distribution(model):
    """400 first tokens from one context: their counts against softmax, by χ² over some 20 buckets."""
    context = CONTEXTS[1]
    with torch.no_grad():
        p = model.eval()(input_ids=torch.tensor([context.tolist()])).logits[0, -1, :TOKENS].double().softmax(-1).numpy()
    one = SamplingConfig(temperature=1.0, max_new_tokens=1)
    drawn = np.concatenate(sample_responses(model, [context] * 400, one, [END], TOKENS, list(range(400))))
    order = np.argsort(-p)
    buckets = np.minimum(np.searchsorted(np.cumsum(p[order]), np.linspace(0.05, 0.95, 19)), TOKENS - 1)
    bucket_of = np.empty(TOKENS, int)
    bucket_of[order] = np.searchsorted(buckets, np.arange(TOKENS), side="left")
    expected = 400 * np.bincount(bucket_of, p, minlength=20)
    counts = np.bincount(bucket_of[drawn], minlength=20)
    kept = expected > 0
    assert (
        float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 55
    )  # χ² of 19 degrees passes 55 once in 40,000


def test_the_key_value_cache_is_on_under_gradient_checkpointing(model):
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # what the Trainer does with it
    lengths = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    plain = sampled(model, GREEDY)
    handle.remove()
    assert lengths[0] == 9
    assert set(lengths[1:]) == {1}
    model.gradient_checkpointing_disable()
    assert plain == sampled(model, GREEDY)


def test_settings_of_the_models_own_do_not_leak_in(model):
    plain = sampled(model, GREEDY)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [plain[0][0]]
    assert sampled(model, GREEDY) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_end_ids_are_the_models_and_the_tokenizers(model, tiny_tokenizer):
    model.generation_config.eos_token_id = [3, 5]
    assert end_ids(model, tiny_tokenizer.eos_token_id) == [3, 5, tiny_tokenizer.eos_token_id]
