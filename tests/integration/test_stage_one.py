"""Prompts -> fake teacher -> cache: what is asked for, what is not asked for again, and what is refused."""

import logging
from math import exp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import write_jsonl
from caches_by_hand import bits, files, trust

from bakery.cache import cache_teacher
from bakery.config import Recipe
from bakery.errors import CacheError, DataError, OutputError, RecipeError, TeacherError
from bakery.estimate import estimate
from bakery.prompts.tokenizers import load_tokenizer
from bakery.shards.reader import CacheReader
from bakery.shards.validate import validate
from bakery.teachers.fake import FakeTeacher

TINY = "data/golden-tokenizer"


def talk(n: int) -> dict:
    answer = "It is " + "so " * (n % 7) + f"{n}."
    return {"messages": [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def recipe(tmp_path):
    """A recipe over chats of the given numbers, with sections changed."""

    def recipe(numbers=range(12), rows=None, **sections) -> Recipe:
        write_jsonl(tmp_path / "p.jsonl", rows if rows is not None else [talk(n) for n in numbers])
        tree = {
            "teacher": {"backend": "fake", "model_name_or_path": TINY, "top_k": 6},
            "prompts": {"path": str(tmp_path / "p.jsonl"), "prefix": {"text": "Bake."}},
            "cache": {"out": str(tmp_path / "cache"), "rows_per_shard": 5, "logprob_step": 0},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return Recipe.model_validate(tree)

    return recipe


@pytest.fixture
def asked(monkeypatch):
    """The teacher contexts that were asked about, call by call."""
    calls = []

    def counting(real):
        def method(self, contexts, *args):
            answers = real(self, contexts, *args)
            calls.append([c.tolist() for c in contexts])
            return answers

        return method

    for name in ("score", "generate"):
        monkeypatch.setattr(FakeTeacher, name, counting(getattr(FakeTeacher, name)))
    return calls


def contents(out) -> dict[str, list]:
    reader = CacheReader(out)
    return {split: [bits(r) for r in reader.records(split)] for split in reader.splits}


def shards(out) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if name.startswith("data/")}


def questions(out) -> list[str]:
    """The user's words of each row, in order."""
    tokenizer = load_tokenizer(TINY)
    records = [r for split in CacheReader(out).splits for r in CacheReader(out).records(split)]
    return [tokenizer.decode(r.example.student_context).split("user\n")[1].split("<")[0] for r in records]


# -- what it will cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numbers", "sizes"), [(range(30), [8]), (range(3), [3])])
def test_a_dry_run_asks_for_eight_rows_and_keeps_nothing(recipe, asked, tmp_path, numbers, sizes):
    priced = recipe(numbers, teacher={"price_per_million": {"input": 2.0}})
    estimated = estimate(priced)
    assert [len(call) for call in asked] == sizes
    assert not (tmp_path / "cache").exists()
    reader = CacheReader(cache_teacher(priced))
    records = list(reader.records())
    tokens = sum(len(r.example.teacher_context) + len(r.example.response) for r in records)
    assert estimated.examples == len(records)
    assert estimated.targets == sum(r.example.targets for r in records)
    assert estimated.money == pytest.approx(tokens * 2.0 / 1e6)
    if len(numbers) == 3:  # all of it is the sample
        captured = 1 - np.exp(np.concatenate([r.topk.tail_logprob for r in records])).mean()
        assert [(at.k, at.captured_mass) for at in estimated.at_k] == [(6, pytest.approx(captured, rel=1e-5))]


def test_a_dry_run_asks_in_calls_of_the_size_that_a_real_one_has(recipe, asked):
    estimate(recipe(range(30), teacher={"tokens_per_batch": 150}))
    assert [len(call) for call in asked] == [2, 2, 2, 2]


# -- what a cache holds ------------------------------------------------------------------------------------------------


def test_row_n_predicts_target_n(recipe):
    out = cache_teacher(recipe(range(3)))
    assert validate(out) == []
    logits_after = FakeTeacher(recipe().teacher, load_tokenizer(TINY))._fresh_logits
    for record in CacheReader(out).records():
        example, row = record.example, 0
        text = example.teacher_context.tolist() + example.response.tolist()
        for at in range(len(example.teacher_context), len(text)):
            if not example.is_target[at - len(example.teacher_context)]:
                continue
            # the made-up teacher looks two tokens back: at the two before the target, never at the target itself
            logits = logits_after(text[at - 2], text[at - 1])
            p = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-p)[:6]
            assert record.topk.ids[6 * row : 6 * row + 6].tolist() == best.tolist()
            assert np.exp(record.topk.logprobs[6 * row : 6 * row + 6]) == pytest.approx(p[best], rel=1e-5)
            assert exp(record.topk.tail_logprob[row]) == pytest.approx(1 - p[best].sum(), rel=1e-4)
            assert exp(record.topk.token_logprob[row]) == pytest.approx(p[text[at]], rel=1e-5)
            row += 1
        assert row == len(record.topk) == example.targets > 0


def test_rows_stand_in_the_order_of_the_prompts(recipe):
    numbers = [5, 11, 0, 7, 3, 2, 9]
    out = cache_teacher(recipe(numbers))
    assert questions(out) == [f"Is it {n}?" for n in numbers]
    assert [entry.rows for entry in CacheReader(out).manifest.splits["train"]] == [5, 2]
    assert {r.origin for r in CacheReader(out).records()} == {"dataset"}


@pytest.mark.parametrize("sampling", [{}, {"sampling": {"max_new_tokens": 7, "n": 2}}])
def test_shards_do_not_depend_on_the_size_of_batches(recipe, tmp_path, asked, sampling):
    made, sizes = [], []
    for tokens in (1, 100, 100_000):
        cache = {"out": str(tmp_path / f"cache{tokens}"), "logprob_step": 1 / 64, "temperatures": [2.0]}
        made.append(shards(cache_teacher(recipe(teacher={"tokens_per_batch": tokens}, cache=cache, **sampling))))
        sizes.append(max(len(call) for call in asked))
        asked.clear()
    assert made[0] == made[1] == made[2]
    assert (sizes[0], sizes[2]) == (1, 5)


def test_top_mass_keeps_the_shortest_head(recipe, tmp_path):
    full = CacheReader(cache_teacher(recipe(teacher={"top_k": 40}, cache={"out": str(tmp_path / "full")})))
    short = CacheReader(cache_teacher(recipe(teacher={"top_k": 40, "top_mass": 0.8})))
    assert validate(short.path) == []
    sizes = []
    for whole, head in zip(full.records(), short.records(), strict=True):
        ends = np.cumsum(head.topk.support_size)
        for row, (p, logp) in enumerate(
            zip(
                np.exp(whole.topk.logprobs.astype(float)).reshape(-1, 40),
                whole.topk.logprobs.reshape(-1, 40),
                strict=True,
            )
        ):
            size = int(np.searchsorted(np.cumsum(p), 0.8)) + 1 if p.sum() >= 0.8 else 40
            assert head.topk.support_size[row] == size
            assert head.topk.logprobs[ends[row] - size : ends[row]].tolist() == logp[:size].tolist()
            assert exp(head.topk.tail_logprob[row]) == pytest.approx(1 - p[:size].sum(), abs=1e-6)
            sizes.append(size)
    assert min(sizes) < 10 < max(sizes)


# -- answers that the teacher writes -----------------------------------------------------------------------------------

WRITE = {"temperature": 1.0, "max_new_tokens": 7, "seed": 3}


def test_what_the_teacher_writes_is_stored_as_its_own_ids(recipe, monkeypatch):
    """Bytes at random are hardly ever text, so that decoding them and tokenising again would not give them back."""
    written, real = [], FakeTeacher.generate
    monkeypatch.setattr(FakeTeacher, "generate", lambda *args: written.extend(real(*args)) or written[-len(args[1]) :])
    out = cache_teacher(recipe(sampling=WRITE, teacher={"tokens_per_batch": 1}, cache={"rows_per_shard": 1}))
    records = list(CacheReader(out).records())
    assert [r.example.response.tolist() for r in records] == [response.tolist() for response, _ in written]
    assert [r.topk.logprobs.tolist() for r in records] == [topk.logprobs.tolist() for _, topk in written]
    assert all(r.example.is_target.all() and r.origin == "teacher" for r in records)
    tokenizer = load_tokenizer(TINY)
    again = [tokenizer.encode(tokenizer.decode(r.example.response), add_special_tokens=False) for r in records]
    assert again != [r.example.response.tolist() for r in records]


def test_n_answers_to_each_prompt_on_one_side_of_the_split(recipe, asked):
    out = cache_teacher(recipe(range(20), sampling=WRITE | {"n": 3}, prompts={"validation_fraction": 0.3}))
    reader = CacheReader(out)
    assert sum(len(call) for call in asked) == 60
    contexts = {split: [tuple(r.example.student_context) for r in reader.records(split)] for split in reader.splits}
    assert len(contexts["train"]) + len(contexts["validation"]) == 60
    assert min(len(rows) for rows in contexts.values()) >= 3
    assert not set(contexts["train"]) & set(contexts["validation"])
    for rows in contexts.values():
        assert all(rows.count(row) == 3 for row in rows)
    answers = {(tuple(r.example.student_context), tuple(r.example.response)) for r in reader.records("train")}
    assert len(answers) == len(contexts["train"])  # each of the three is another one


def test_another_seed_gives_other_answers_and_the_same_seed_the_same(recipe, tmp_path):
    def written(name, **changes):
        out = cache_teacher(recipe(sampling=WRITE | changes, cache={"out": str(tmp_path / name)}))
        return [r.example.response.tolist() for r in CacheReader(out).records()]

    first = written("a")
    assert written("b") == first
    assert written("c", seed=4) != first
    assert all(len(response) <= 7 for response in first)


# -- what is asked for once --------------------------------------------------------------------------------------------


def test_a_complete_cache_asks_for_nothing(recipe, asked):
    out = cache_teacher(recipe())
    assert sum(len(call) for call in asked) == 12
    before, _ = files(out), asked.clear()
    assert cache_teacher(recipe()) == out
    assert asked == []
    assert files(out) == before
    cache_teacher(recipe(teacher={"tokens_per_batch": 7}))  # no part of what the rows are
    assert asked == []


def test_a_row_that_stands_twice_is_asked_for_once(recipe, asked, caplog):
    with caplog.at_level(logging.WARNING, logger="bakery"):
        out = cache_teacher(recipe([1, 2, 1, 3, 2, 1]))
    assert questions(out) == ["Is it 1?", "Is it 2?", "Is it 3?"]
    assert sum(len(call) for call in asked) == 3
    assert "3 rows repeat another row" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher": {"top_k": 7}}, r"k: 6 there, 7 here"),
        ({"teacher": {"top_mass": 0.5}}, r"top_mass: None there, 0.5 here"),
        ({"prompts": {"validation_fraction": 0.25}}, r"validation_fraction: 0.0 there, 0.25 here"),
        ({"prompts": {"prefix": {"text": "Fry."}}}, r"prefix_sha: '\w{64}' there, '\w{64}' here"),
        ({"cache": {"logprob_step": 0.5}}, r"logprob_step: 0.0 there, 0.5 here"),
        ({"cache": {"rows_per_shard": 6}}, r"rows_per_shard: 5 there, 6 here"),
        ({"cache": {"temperatures": [2.0]}}, r"temperatures: \[\] there, \[2.0\] here"),
        ({"sampling": {"n": 2}}, r"sampling.n: None there, 2 here"),
        ({"prompts": {"student_retained_turns": 1}}, r"turns_sha: None there, '\w{64}' here"),
        ({"prompts": {"target_roles": ["user"]}}, r"turns_sha: None there, '\w{64}' here"),
        ({"prompts": {"target_content_pattern": "so"}}, r"turns_sha: None there, '\w{64}' here"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_key_and_both_values(recipe, asked, change, says):
    out = cache_teacher(recipe())
    before, _ = files(out), asked.clear()
    for extend in (False, True):
        with pytest.raises(CacheError, match=rf"another recipe \(.*({says}).*pass another --out"):
            cache_teacher(recipe(**change), extend=extend)
    assert asked == []
    assert files(out) == before


# -- more prompts ------------------------------------------------------------------------------------------------------

GROWN = [20, 0, 1, 2, 3, 4, 5, 21, 6, 7, 8, 9, 10, 11, 22, 23, 24, 25]  # 0 to 11 and seven new ones


def test_new_prompts_need_extend(recipe, asked):
    cache_teacher(recipe())
    asked.clear()
    with pytest.raises(CacheError, match=r"prompts_sha: .*pass --extend to ask for the new prompts only"):
        cache_teacher(recipe(GROWN))
    assert asked == []


def test_extend_asks_for_the_new_prompts_only_and_leaves_the_old_shards(recipe, asked):
    out = cache_teacher(recipe())
    before, _ = shards(out), asked.clear()
    assert cache_teacher(recipe(GROWN), extend=True) == out
    assert sum(len(call) for call in asked) == 6
    after = shards(out)
    assert {name: after[name] for name in before} == before
    assert questions(out) == [f"Is it {n}?" for n in [*range(12), 20, 21, 22, 23, 24, 25]]
    assert [entry.rows for entry in CacheReader(out).manifest.splits["train"]] == [5, 5, 2, 5, 1]
    assert validate(out) == []
    # and it is complete: neither the grown prompts nor --extend ask for anything again
    before, _ = files(out), asked.clear()
    cache_teacher(recipe(GROWN))
    cache_teacher(recipe(GROWN), extend=True)
    assert asked == []
    assert files(out) == before


def test_an_extension_can_be_extended(recipe, asked):
    out = cache_teacher(recipe(range(4)))
    for end in (9, 11):
        cache_teacher(recipe(range(end)), extend=True)
    assert sum(len(call) for call in asked) == 11
    assert questions(out) == [f"Is it {n}?" for n in range(11)]
    assert validate(out) == []


def test_extend_on_nothing_begins_and_without_new_prompts_adds_nothing(recipe, asked):
    out = cache_teacher(recipe(range(7)), extend=True)
    before, _ = shards(out), asked.clear()
    cache_teacher(recipe(range(6, -1, -1)), extend=True)  # the same ones in another order
    assert asked == []
    assert shards(out) == before


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing"])
def test_a_damaged_shard_is_not_extended(recipe, asked, harm):
    out = cache_teacher(recipe(range(7)))
    shard = sorted((out / "data").glob("*.parquet"))[0]
    whole = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-40] if harm == "cut" else whole[:-30] + bytes([whole[-30] ^ 255]) + whole[-29:])
    asked.clear()
    with pytest.raises(CacheError, match=shard.name):
        cache_teacher(recipe(range(12)), extend=True)
    assert asked == []


def test_the_split_of_a_prompt_stays_when_others_come(recipe, tmp_path):
    """Old prompts keep their side, and new ones get the side that they would have had from the start."""
    split = {"validation_fraction": 0.4}
    out = cache_teacher(recipe(range(12), prompts=split))
    old = contents(out)
    assert min(map(len, old.values())) >= 2
    cache_teacher(recipe(range(30), prompts=split), extend=True)
    at_once = cache_teacher(recipe(range(30), prompts=split, cache={"out": str(tmp_path / "at once")}))
    for name, rows in contents(out).items():
        assert rows[: len(old[name])] == old[name]
        assert rows == contents(at_once)[name]


def test_plain_text_is_split_by_the_text_though_every_row_begins_alike(recipe):
    rows = [{"text": f"Loaf {n}"} for n in range(30)]
    reader = CacheReader(cache_teacher(recipe(rows=rows, prompts={"validation_fraction": 0.4})))
    assert {r.example.student_context.tolist()[0] for r in reader.records("train")} == {ord("L") - 33}
    assert reader.rows("train") + reader.rows("validation") == 30
    assert reader.rows("validation") >= 5


@pytest.mark.parametrize(
    ("rows", "prompts"),
    [
        ([talk(n) for n in range(30)], {"target_roles": ["user"]}),
        ([{"messages": [{"role": "system", "content": "S"}, *talk(n)["messages"]]} for n in range(30)],
         {"target_roles": ["user", "assistant"]}),
        ([{"text": f"Loaf {n}"} for n in range(30)], {"student_retained_turns": 1}),
    ],
    ids=["the user's turns", "all turns but the instructions", "text behind a prefix"],
)  # fmt: skip
def test_rows_of_which_the_student_reads_nothing_first_are_split_by_their_response(recipe, rows, prompts):
    reader = CacheReader(cache_teacher(recipe(rows=rows, prompts={"validation_fraction": 0.4, **prompts})))
    contexts = {r.example.student_context.tobytes() for split in reader.splits for r in reader.records(split)}
    assert len(contexts) == (1 if "target_roles" in prompts else len({row["text"][0] for row in rows}))
    assert reader.rows("train") + reader.rows("validation") == 30
    assert 5 <= reader.rows("validation") <= 25


class Killed(BaseException):
    pass


@pytest.fixture
def dying(monkeypatch):
    """Lets the teacher answer `calls` more times."""

    def dying(calls: int):
        real = FakeTeacher.score
        left = iter(range(calls))

        def score(*args):
            if next(left, None) is None:
                raise Killed
            return real(*args)

        monkeypatch.setattr(FakeTeacher, "score", score)
        return lambda: monkeypatch.setattr(FakeTeacher, "score", real)

    return dying


def test_an_extension_that_got_no_answer_leaves_the_cache_complete(recipe, asked, dying):
    out = cache_teacher(recipe())
    before, revive = files(out), dying(0)
    with pytest.raises(Killed):
        cache_teacher(recipe(GROWN), extend=True)
    revive()
    asked.clear()
    cache_teacher(recipe())
    assert asked == []
    assert files(out) == before


@pytest.mark.parametrize("calls", [2, 4, 6])
def test_a_killed_extension_goes_on(recipe, asked, dying, calls):
    one_by_one = {"tokens_per_batch": 1}
    out = cache_teacher(recipe(teacher=one_by_one))
    before, old = contents(out), shards(out)
    revive = dying(calls)
    numbers = [*range(12), *range(20, 27)]
    with pytest.raises(Killed):
        cache_teacher(recipe(numbers, teacher=one_by_one), extend=True)
    revive()
    assert contents(out) == before  # readers still have the old cache, whole
    with pytest.raises(CacheError, match="pass --extend"):
        cache_teacher(recipe(teacher=one_by_one))
    asked.clear()
    cache_teacher(recipe(numbers, teacher=one_by_one), extend=True)
    assert 7 - calls <= len(asked) <= 7 - calls + 1  # an answer may have been under way
    assert {name: shards(out)[name] for name in old} == old
    assert questions(out) == [f"Is it {n}?" for n in numbers]
    assert validate(out) == []


def test_a_killed_run_goes_on_without_extend_and_asks_for_the_rest_only(recipe, asked, dying, tmp_path):
    one_by_one = {"tokens_per_batch": 1}
    revive = dying(8)
    with pytest.raises(Killed):
        cache_teacher(recipe(teacher=one_by_one))
    revive()
    with pytest.raises(CacheError, match="prompts_sha"):
        cache_teacher(recipe(range(13), teacher=one_by_one))
    asked.clear()
    out = cache_teacher(recipe(teacher=one_by_one))
    assert 4 <= len(asked) <= 5
    whole = cache_teacher(recipe(teacher=one_by_one, cache={"out": str(tmp_path / "whole")}))
    assert shards(out) == shards(whole)


def test_an_unfinished_cache_can_be_freed_of_a_prompt(recipe, asked, dying):
    """A prompt that never gets an answer strands nothing: leave it out, and what was answered is kept."""
    one_by_one = {"tokens_per_batch": 1}
    revive = dying(8)
    with pytest.raises(Killed):
        cache_teacher(recipe(teacher=one_by_one))
    revive()
    asked.clear()
    out = cache_teacher(recipe(range(11), teacher=one_by_one), extend=True)
    assert 3 <= len(asked) <= 4
    assert questions(out) == [f"Is it {n}?" for n in range(11)]
    assert validate(out) == []


def test_two_writers_are_one_too_many(recipe, monkeypatch):
    """The second is told so, and leaves the first in peace."""
    cache_teacher(recipe(range(3)))
    config, refused = recipe(), []
    real = FakeTeacher.score

    def score(self, *args):
        with pytest.raises(OutputError, match="being filled by another process") as error:
            cache_teacher(config)
        refused.append(error)
        return real(self, *args)

    monkeypatch.setattr(FakeTeacher, "score", score)
    assert validate(cache_teacher(config, extend=True)) == []
    assert refused


def test_an_answer_with_too_few_entries_is_lost_and_the_others_are_kept(recipe, asked, monkeypatch):
    real = FakeTeacher.score

    def forgetful(self, contexts, responses, targets, k):
        topks = real(self, contexts, responses, targets, k)
        return [topk.keep_mass(0.2) if len(r) == 16 else topk for topk, r in zip(topks, responses, strict=True)]

    numbers = range(4, 11)  # 7 says "It is 7." and its turn ends: 10 tokens; 9 says "It is so so 9.": 16
    monkeypatch.setattr(FakeTeacher, "score", forgetful)
    with pytest.raises(TeacherError, match=r"1 of 7 examples are unanswered .*entries where 6 were asked for"):
        cache_teacher(recipe(numbers))
    monkeypatch.setattr(FakeTeacher, "score", real)
    asked.clear()
    out = cache_teacher(recipe(numbers))
    assert [len(call) for call in asked] == [1]
    assert questions(out) == [f"Is it {n}?" for n in numbers]


# -- refused before the first question ---------------------------------------------------------------------------------


@pytest.fixture
def refused(asked, tmp_path):
    def refused(recipe, error, says):
        with pytest.raises(error, match=says):
            cache_teacher(recipe)
        assert asked == []
        assert not (tmp_path / "cache/manifest.json").exists()

    return refused


def test_an_answer_of_another_cache_that_is_no_distribution(recipe, tmp_path, asked):
    other = cache_teacher(recipe(range(3), cache={"out": str(tmp_path / "other")}))
    shard = "data/train-00000.parquet"
    table = pq.read_table(other / shard)
    ids = table.column("topk_ids").to_pylist()
    ids[1][7] = ids[1][6]  # the second entry of the second target
    field = table.schema.field("topk_ids")
    table = table.set_column(table.schema.names.index("topk_ids"), field, pa.array(ids, field.type))
    pq.write_table(table, other / shard)
    trust(other, shard)
    asked.clear()
    with pytest.raises(TeacherError, match=r"example \w+: the teacher's answer for target 1 has a duplicate id"):
        cache_teacher(recipe(range(3)), reuse=[other])
    assert asked == []
    assert not (tmp_path / "cache").exists()


def test_a_directory_of_something_else(recipe, refused, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("mine", encoding="utf-8")
    refused(recipe(), OutputError, r"cache holds something else \(thesis.tex\)")
    assert files(tmp_path / "cache") == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(("sampling", "room"), [(None, 28), (WRITE, 7)])
def test_a_conversation_longer_than_the_teacher_takes(recipe, refused, monkeypatch, sampling, room, tmp_path):
    real = FakeTeacher.__init__

    def narrow(self, *args):
        real(self, *args)
        self.max_length = 116

    monkeypatch.setattr(FakeTeacher, "__init__", narrow)
    sections = {"sampling": sampling} if sampling else {}
    context = len("<system\nBake.>\n<user\nIs it 6?>\n<assistant\n")
    answer = len("It is so so so so so so 6.>\n")
    long = {"messages": [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}]}
    assert answer == 28
    assert context + max(answer, 7) < 116
    message = r"p.jsonl:2: 114 tokens of context and {} of response, the teacher takes 116 together"
    assert len("<system\nBake.>\n<user\n" + "x" * 80 + ">\n<assistant\n") == 114
    refused(recipe(rows=[talk(6), long], **sections), DataError, message.format(7 if sampling else 3))


def test_more_entries_than_the_vocabulary_has(recipe, refused):
    refused(recipe(teacher={"top_k": 260}), RecipeError, "teacher.top_k is 260, but .* has a vocabulary of 259 tokens")
    out = cache_teacher(recipe(range(2), teacher={"top_k": 259}))
    assert all(np.isneginf(r.topk.tail_logprob).all() for r in CacheReader(out).records())


def test_a_row_without_an_answer(recipe, refused):
    rows = [talk(1), {"messages": talk(2)["messages"][:1]}]
    refused(recipe(rows=rows), DataError, r"p.jsonl:2: no token is a target")


@pytest.mark.parametrize(
    ("method", "sections", "says"),
    [("score", {}, "score given responses"), ("generate", {"sampling": WRITE}, "write responses")],
)
def test_a_teacher_that_cannot_do_it(recipe, monkeypatch, method, sections, says):
    monkeypatch.delattr(FakeTeacher, method)
    with pytest.raises(RecipeError, match=f"the teacher {TINY} .fake. cannot {says}"):
        cache_teacher(recipe(**sections))


def test_a_recipe_without_a_section(recipe):
    with pytest.raises(RecipeError, match="the recipe has no `prompts:` section"):
        cache_teacher(recipe().model_copy(update={"prompts": None}))
