"""The student writes responses: batched, with its key-value cache, and the ids come back as they were sampled."""

from typing import Any

import torch

from bakery.batching import padded, plan_batches
from bakery.config import SamplingConfig
from bakery.generation import end_ids, generation_config, through_end, writing_with
from bakery.prompts.tokenizers import vocabulary_size
from bakery.records import Ids, content_id
from bakery.student.model import bare

PADDED_TOKENS_AT_A_TIME = 16_384  # contexts and room for responses, whose keys and values are kept together


@torch.no_grad()
def sample_responses(
    model: Any, contexts: list[Ids], sampling: SamplingConfig, end_ids: list[int], vocab_size: int, seeds: list[int]
) -> list[Ids]:
    """A response to each context, through its first end id or `sampling.max_new_tokens` long.

    Ids from `vocab_size` on are padding of the output and never sampled. Equal arguments and weights give equal
    responses; torch's own random state and the model's mode stay as they were.
    """
    inner, room = bare(model), sampling.max_new_tokens
    never = list(range(vocab_size, inner.config.get_text_config().vocab_size)) or None
    config = generation_config(end_ids, sampling, use_cache=True, suppress_tokens=never)
    responses: dict[int, Ids] = {}
    with writing_with(model, inner, config):
        for batch in plan_batches([len(context) + room for context in contexts], PADDED_TOKENS_AT_A_TIME):
            seed = int(content_id(*(seeds[i] for i in batch))[:15], 16)
            written = _written(model, [contexts[i] for i in batch], inner.device, seed)
            responses |= {i: through_end(tokens, end_ids) for i, tokens in zip(batch, written, strict=True)}
    return [responses[i] for i in range(len(contexts))]


def write_answers(model: Any, tokenizer: Any, contexts: list[Ids], max_new_tokens: int) -> list[str]:
    """Greedy answers, as text, for a person to read."""
    greedy = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
    ends = end_ids(bare(model), tokenizer.eos_token_id)
    answers = sample_responses(model, contexts, greedy, ends, vocabulary_size(tokenizer), [0] * len(contexts))
    return [tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip() for answer in answers]


def _written(model: Any, contexts: list[Ids], device: torch.device, seed: int) -> Any:
    """New tokens [B,T] of a batch, with all that stands behind an end."""
    input_ids, mask = (torch.as_tensor(array, device=device) for array in padded(contexts, left=True))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sequences = model.generate(input_ids=input_ids, attention_mask=mask)
    return sequences[:, input_ids.shape[1] :].cpu().numpy()
