"""The Hugging Face teacher against a naive loop, and with and without a prefix that is run once (docs/benchmarks.md).

.venv/bin/python benchmarks/teacher_scoring.py [--device cuda] [--only prefix] [--rounds 1]

SmolLM2-135M in float32, K = 64, on text of the standard library. In each round every way has its turn, so that ratios
hold on a busy machine; medians of the rounds. On a CPU seconds are the process's own, of one thread for the model: time
that is spent while another call runs the model counts as well.
"""

import argparse
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scratch_cache import scratch_cache

from bakery.batching import padded
from bakery.config import SamplingConfig, TeacherConfig
from bakery.prompts.tokenizers import load_tokenizer
from bakery.records import Example, Ids, Record, ids_array, predicting_positions
from bakery.teachers.asking import answer_batch, ask_all, plan_calls
from bakery.teachers.distributions import largest
from bakery.teachers.hf import HFTeacher
from bakery.teachers.shared_prefix import SharedPrefixes

MODEL = Path(__file__).parents[1] / "models/smollm2-135m-instruct"
K = 64
ROWS, NAIVE_ROWS = 48, 8  # sequences scored; of them in a batch of the naive loop
PREFIX, BEHIND, ANSWER, WRITTEN = 2000, 20, 60, 32  # tokens
PREFIX_ROWS = 16
Times = dict[str, list[float]]


class Clock:
    """Seconds by name: on a CPU the process's own; on a GPU the wall's, once the device is done."""

    def __init__(self, device: str) -> None:
        self.now, self.times = self._on_gpu if device == "cuda" else time.process_time, {}

    def timed(self, name: str, work):
        start = self.now()
        result = work()
        self.times.setdefault(name, []).append(self.now() - start)
        return result

    @staticmethod
    def _on_gpu() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, name: str) -> float:
        return median(self.times[name])

    def ratio(self, name: str, other: str) -> float:
        """Median of the ratios within each round."""
        return median(a / b for a, b in zip(self.times[name], self.times[other], strict=True))


def example(number: int, context: Ids, response: Ids) -> Example:
    return Example(str(number), context, context, response, np.ones(len(response), bool))


def mixed(text: Ids) -> list[Example]:
    """Lengths as chat data has them: many short, few long."""
    rng, examples, at = np.random.default_rng(0), [], 0
    for number in range(ROWS):
        context = int(rng.integers(16, 80))
        response = int(np.clip(rng.lognormal(4.4, 0.8), 16, 400))
        examples.append(example(number, text[at : at + context], text[at + context : at + context + response]))
        at += context + response
    return examples


def behind_a_prefix(text: Ids, number: int, answered: bool) -> list[Example]:
    """Rows of nearly equal length behind a stretch of the text that is another for each `number`."""
    prefix, rows = text[number * PREFIX :][:PREFIX], text[-PREFIX_ROWS * (BEHIND + ANSWER) :].reshape(PREFIX_ROWS, -1)
    contexts = [np.concatenate([prefix, row[: BEHIND - i % 5]]) for i, row in enumerate(rows)]
    ends = [BEHIND + (ANSWER - i % 7) * answered for i in range(PREFIX_ROWS)]
    return [example(i, contexts[i], row[BEHIND : ends[i]]) for i, row in enumerate(rows)]


# -- scoring -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive(model, examples: list[Example]) -> list[tuple]:
    """Batches in order of arrival, logits and their log-softmax at every position, torch.topk."""
    answers = []
    for at in range(0, len(examples), NAIVE_ROWS):
        batch = examples[at : at + NAIVE_ROWS]
        ids, mask = padded([np.concatenate([e.teacher_context, e.response]) for e in batch])
        ids, mask = (torch.as_tensor(array, device=model.device) for array in (ids, mask))
        logp_BTV = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        top = logp_BTV.topk(K)
        for row, e in enumerate(batch):
            where = torch.as_tensor(predicting_positions(len(e.teacher_context), e.is_target))
            labels = torch.as_tensor(e.response).long()
            token = logp_BTV[row, where, labels].cpu().numpy()
            answers.append((top.indices[row, where].cpu().numpy(), top.values[row, where].cpu().numpy(), token))
    return answers


def scored_into_a_cache(teacher: HFTeacher, config: TeacherConfig, examples: list[Example]) -> list[Record]:
    """As stage one does it: planned, asked, checked, written down and published."""
    records = []
    with scratch_cache(examples, K, teacher.vocab_size) as (writer, window):
        ask = partial(answer_batch, teacher, config=config, sampling=None)
        for pairs in ask_all(ask, plan_calls(teacher, examples, None), teacher.calls_in_flight):
            records += [answer for _, answer in pairs]
            writer.add([answer for _, answer in pairs])
        writer.publish(window, ["train"] * len(examples))
    return records


class Inside:
    """Time in the model's decoder and head: CUDA events, or the calling thread's own seconds; nothing waits for it."""

    def __init__(self, teacher: HFTeacher) -> None:
        self.on_gpu, self.marks = teacher.model.device.type == "cuda", []
        self.hooks = []
        for module in (teacher.model.get_decoder(), teacher.head.linear):
            self.hooks.append(module.register_forward_pre_hook(lambda *_: self._mark()))
            self.hooks.append(module.register_forward_hook(lambda *_: self._mark()))

    def _mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.thread_time())

    def seconds(self) -> float:
        for hook in self.hooks:
            hook.remove()
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(start.elapsed_time(end) / 1e3 if self.on_gpu else end - start for start, end in pairs)


def score_mixed(teacher: HFTeacher, config: TeacherConfig, clock: Clock, text: Ids, rounds: int) -> None:
    examples = mixed(text)
    lengths = [len(e.teacher_context) + len(e.response) for e in examples]
    for _ in range(rounds):
        plain = clock.timed("naive", lambda: naive(teacher.model, examples))
        inside = Inside(teacher)
        records = clock.timed("bakery", lambda: scored_into_a_cache(teacher, config, examples))
        clock.times.setdefault("forward", []).append(inside.seconds())
    by_id = {record.example.id: record.topk for record in records}
    pairs = [(by_id[e.id].logprobs, logp.reshape(-1)) for e, (_, logp, _) in zip(examples, plain, strict=True)]
    delta = max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)
    targets = sum(e.targets for e in examples)
    print(f"{ROWS} sequences of {min(lengths)} to {max(lengths)} tokens, {targets} targets; |Δ logprob| ≤ {delta:.1e}")
    print("\n| scoring | s | targets/s | × naive |\n|---|---|---|---|")
    names = {
        "naive": f"naive: {NAIVE_ROWS} rows a batch as they come, log-softmax at every position",
        "bakery": f"bakery, {config.tokens_per_batch} tokens a batch, into a cache",
    }
    for key, name in names.items():
        s = clock.seconds(key)
        print(f"| {name} | {s:.1f} | {targets / s:.0f} | {clock.ratio('naive', key):.2f} |")
    print(f"\nOutside the model's forward: {100 * (1 - clock.ratio('forward', 'bakery')):.1f} % of bakery's time\n")


# -- a shared prefix ---------------------------------------------------------------------------------------------------


def asked(teacher: HFTeacher, config: TeacherConfig, examples: list[Example], sampling, share: bool) -> list[Record]:
    calls = plan_calls(teacher, examples, sampling)
    if not share:
        teacher.planned = SharedPrefixes([])
    answers = [answer for call in calls for answer in answer_batch(teacher, call, config, sampling)]
    return sorted(answers, key=lambda record: int(record.example.id))


def run_once(teacher: HFTeacher, config: TeacherConfig, clock: Clock, text: Ids, rounds: int) -> None:
    tasks = {"score": None, "write": SamplingConfig(temperature=0, max_new_tokens=WRITTEN)}
    deltas = []
    for turn in range(rounds):
        for number, (task, sampling) in enumerate(tasks.items(), turn * len(tasks)):
            ask = partial(asked, teacher, config, behind_a_prefix(text, number, sampling is None), sampling)
            each = clock.timed(f"{task}, each", partial(ask, share=False))
            once = clock.timed(f"{task}, once", partial(ask, share=True))
            for a, b in zip(each, once, strict=True):
                if np.array_equal(a.example.response, b.example.response):
                    deltas.append(float(np.abs(a.topk.logprobs - b.topk.logprobs).max()))
    print(f"{PREFIX_ROWS} rows behind {PREFIX} tokens that they share; |Δ logprob| ≤ {max(deltas):.1e} in the")
    print(f"{len(deltas)} of {2 * rounds * PREFIX_ROWS} rows with the same tokens both ways\n")
    print("| | each row runs the prefix, s | it is run once, s | × |\n|---|---|---|---|")
    for task, size in (("score", ANSWER), ("write", WRITTEN)):
        each, once = (f"{task}, {how}" for how in ("each", "once"))
        name = f"{task} {size} tokens behind {BEHIND} of the row's own"
        print(f"| {name} | {clock.seconds(each):.1f} | {clock.seconds(once):.1f} | {clock.ratio(each, once):.1f} |")


# -- top-k -------------------------------------------------------------------------------------------------------------


def top_k(device: str) -> None:
    print("\n| top-k of 256 rows, columns | k | torch.topk, ms | two levels, ms | × |\n|---|---|---|---|---|")
    for columns in (32_000, 49_152, 151_936, 262_144):
        for k in (20, 64, 128):
            x, clock = torch.randn(256, columns, device=device), Clock(device)
            for _ in range(7):
                clock.timed("one", lambda x=x, k=k: x.topk(k))
                clock.timed("two", lambda x=x, k=k: largest(x, k))
            one, two = (1e3 * clock.seconds(name) for name in ("one", "two"))
            print(f"| {columns:,} | {k} | {one:.1f} | {two:.1f} | {clock.ratio('one', 'two'):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("mixed", "prefix", "top-k"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device, rounds = args.device, args.rounds
    if device == "cpu":
        torch.set_num_threads(1)  # so that the thread that runs the model is all of the model
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(str(MODEL))
    text = ids_array(tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[:200_000]))
    config = TeacherConfig(model_name_or_path=str(MODEL), dtype="float32", device=device, top_k=K)
    teacher = HFTeacher(config, tokenizer).open()
    naive(teacher.model, mixed(text)[:2])  # the first forward is slow everywhere
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{device}, {torch.get_num_threads()} threads, {versions}; {time.strftime('%Y-%m-%d')}; {rounds} rounds\n")
    if args.only in (None, "mixed"):
        score_mixed(teacher, config, Clock(device), text, rounds)
    if args.only in (None, "prefix"):
        run_once(teacher, config.model_copy(update={"tokens_per_batch": 16_384}), Clock(device), text, rounds)
    if args.only in (None, "top-k"):
        top_k(device)


if __name__ == "__main__":
    main()
