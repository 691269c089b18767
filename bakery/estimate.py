"""The price of stage one before it is paid: a few examples are asked for real, and none of the answers is kept."""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from bakery.cache import prepare
from bakery.config import PriceConfig, Recipe
from bakery.errors import RecipeError, TeacherError
from bakery.records import Record
from bakery.reports.estimate_table import AtK, Estimate
from bakery.shards.grid import Grid
from bakery.shards.parquet import write_parquet
from bakery.shards.schema import to_arrow
from bakery.teachers.asking import answer_batch, ask_all, check_capability, plan_calls

SAMPLE = 8
KS = (8, 16, 32, 64, 128)


def estimate(recipe: Recipe) -> Estimate:
    """Raises what cache_teacher would raise. Asks for at most eight examples, spread over their lengths."""
    stage, config, sampling = prepare(recipe), recipe.section("teacher"), recipe.sampling
    if sampling and sampling.prompts_alone:
        raise RecipeError("sampling.max_new_tokens is 0: the teacher is asked nothing, so there is no price to tell")
    examples = sorted(stage.asked.examples, key=lambda e: len(e.teacher_context) + len(e.response))
    room = sampling.max_new_tokens if sampling else 0
    context = sum(len(e.teacher_context) for e in examples)
    response = sum(len(e.response) + room for e in examples)
    sample = [examples[i] for i in np.unique(np.linspace(0, len(examples) - 1, SAMPLE).astype(int))]
    conversations = stage.asked.conversations
    with closing(stage.teacher.open()) as teacher:
        check_capability(teacher, sampling)
        ask = partial(answer_batch, teacher, config=config, sampling=sampling, conversations=conversations)
        start = time.perf_counter()
        calls = plan_calls(teacher, sample, sampling)
        answers = [answer for pairs in ask_all(ask, calls, teacher.calls_in_flight) for _, answer in pairs]
        seconds = time.perf_counter() - start
    for answer in answers:
        if isinstance(answer, TeacherError):
            raise answer
    records = [answer for answer in answers if isinstance(answer, Record)]
    smaller = [] if config.draws else [k for k in KS if k < config.top_k]  # a cut sample is none
    return Estimate(
        examples=len(examples),
        context_tokens=context,
        targets=sum(e.targets + room for e in examples),
        tokens_per_second=sum(len(record.topk) for record in records) / seconds,
        at_k=[_at(k, records, recipe) for k in sorted({*smaller, config.entries})],
        k=config.entries,
        sampled=config.draws is not None,
        money=None if config.price_per_million is None else _money(config.price_per_million, context, response, room),
    )


def _at(k: int, records: list[Record], recipe: Recipe) -> AtK:
    cache, config = recipe.section("cache"), recipe.section("teacher")
    grid = Grid(*config.logprob_steps(cache.logprob_steps))
    cut = [replace(record, topk=record.topk.keep_entries(k)) for record in records]
    targets = sum(len(record.topk) for record in cut)
    tail = np.concatenate([record.topk.tail_logprob for record in cut]).astype(np.float64)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "sample.parquet"
        write_parquet(pa.Table.from_batches([to_arrow(cut, grid, cache.temperatures)]), path)
        entries = sum(len(record.topk.ids) for record in cut) / targets
        mass = None if config.draws else float(1 - np.exp(tail).mean())
        return AtK(k, entries, mass, path.stat().st_size / targets)


def _money(prices: PriceConfig, context: int, response: int, room: int) -> float:
    """A written response is output; a given one is read, as input."""
    read, written = (context, response) if room else (context + response, 0)
    return (read * prices.input + written * prices.output) / 1e6
