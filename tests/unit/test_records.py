"""What flows checks itself: the shift, the masses and every defect of a top-k, with numbers worked out by hand."""

import os
import subprocess
import sys
from math import inf, log, nan

import numpy as np
import pytest

from bakery.errors import DataError, TeacherError
from bakery.records import Example, Record, TopK, content_id, ids_array, predicting_positions, topk_problem


def example(student=(1,), teacher=(1, 2), response=(3, 4), is_target=(True, True)) -> Example:
    return Example("e1", *(ids_array(x) for x in (student, teacher, response)), np.array(is_target, dtype=bool))


def supports(*rows: dict[int, float], tail=0.125, token=0.25) -> TopK:
    """Each row maps an id to its probability."""
    return TopK(
        ids_array([i for row in rows for i in row]),
        np.array([log(p) for row in rows for p in row.values()], np.float32),
        ids_array([len(row) for row in rows]),
        np.full(len(rows), log(tail) if tail else -inf, np.float32),
        np.full(len(rows), log(token), np.float32),
    )


GOOD = {7: 0.5, 3: 0.25, 9: 0.125}


def test_the_output_before_a_target_predicts_it():
    # positions 0 1 2 | 3 4 5 6 hold context | response; targets stand at 3, 5 and 6
    assert predicting_positions(3, np.array([True, False, True, True])).tolist() == [2, 4, 5]
    assert predicting_positions(1, np.array([True])).tolist() == [0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"is_target": (True,)}, "e1: 2 response tokens but 1 target flags"),
        ({"student": ()}, "e1: an empty context"),
        ({"teacher": ()}, "e1: an empty context"),
        ({"is_target": (False, False)}, "e1: no token of the response is a target"),
    ],
)
def test_an_example_checks_itself(wrong, says):
    with pytest.raises(DataError, match=says):
        example(**wrong)


def test_an_example_that_is_yet_to_be_answered():
    asked = example(response=(), is_target=())
    assert asked.targets == 0
    answered = asked.answered(ids_array([5, 6, 7]))
    assert (answered.id, answered.targets, answered.response.tolist()) == ("e1", 3, [5, 6, 7])
    assert answered.teacher_context.tolist() == [1, 2]


def test_a_topk_checks_its_lengths():
    good = supports(GOOD, {1: 0.875})
    parts = [good.ids, good.logprobs, good.support_size, good.tail_logprob, good.token_logprob]
    for at, says in [
        (0, "3 ids and 4 log-probs for supports of 4"),
        (1, "4 ids and 3 log-probs for supports of 4"),
        (2, "4 ids and 4 log-probs for supports of 3"),
        (3, "2 supports, 1 tails, 2 tokens"),
        (4, "2 supports, 2 tails, 1 tokens"),
    ]:
        with pytest.raises(TeacherError, match=says):
            TopK(*(part[:-1] if i == at else part for i, part in enumerate(parts)))


def test_rows_of_a_ragged_topk():
    topk = supports({7: 0.5, 3: 0.25}, {1: 0.875}, {2: 0.5, 4: 0.25, 8: 0.125})
    assert topk.row_of_entry().tolist() == [0, 0, 1, 2, 2, 2]
    assert topk.sum_over_support(np.exp(topk.logprobs.astype(float))) == pytest.approx([0.75, 0.875, 0.875])


def test_from_rows_lays_rectangles_end_to_end():
    topk = TopK.from_rows([[5, 6], [7, 8]], [[-1, -2], [-3, -4]], [-0.5, -0.6], [-1, -9], [[0.1], [0.2]])
    assert topk.ids.tolist() == [5, 6, 7, 8]
    assert topk.logprobs.tolist() == [-1, -2, -3, -4]
    assert topk.support_size.tolist() == [2, 2]
    assert topk.log_norm.tolist() == [[np.float32(0.1)], [np.float32(0.2)]]


def test_keep_mass_takes_the_shortest_head_and_moves_the_rest_to_the_tail():
    kept = supports(GOOD, {1: 0.875}).keep_mass(0.7)  # .5 < .7 ≤ .5 + .25
    assert kept.ids.tolist() == [7, 3, 1]
    assert kept.support_size.tolist() == [2, 1]
    assert np.exp(kept.logprobs) == pytest.approx([0.5, 0.25, 0.875])
    # log(e^log .125 + e^log .125) = log .25, and the second tail to the bit
    assert kept.tail_logprob[0] == pytest.approx(log(0.25), abs=1e-6)
    assert kept.tail_logprob[1] == np.float32(log(0.125))
    assert kept.token_logprob.tolist() == [np.float32(log(0.25))] * 2


def test_keep_mass_keeps_one_entry_at_least_and_all_where_they_do_not_reach():
    assert supports(GOOD).keep_mass(1e-9).ids.tolist() == [7]
    everything = supports(GOOD).keep_mass(0.99)
    assert everything.ids.tolist() == [7, 3, 9]
    assert everything.tail_logprob[0] == np.float32(log(0.125))


def test_keep_entries_cuts_each_support_and_moves_the_rest_to_the_tail():
    kept = supports(GOOD, {1: 0.875}).keep_entries(2)
    assert kept.ids.tolist() == [7, 3, 1]
    assert kept.support_size.tolist() == [2, 1]
    assert np.exp(kept.tail_logprob) == pytest.approx([0.25, 0.125], abs=1e-6)  # .125 + .125, and as it was


def test_keep_mass_gives_a_whole_vocabulary_a_tail_only_when_it_drops_something():
    whole = supports({0: 0.5, 1: 0.375, 2: 0.125}, tail=0)
    assert whole.keep_mass(0.8).tail_logprob[0] == pytest.approx(log(0.125), abs=1e-6)
    assert whole.keep_mass(1.0).tail_logprob[0] == -inf


def defect(row=1, **changes) -> TopK:
    """Two good rows, one entry of the second changed."""
    topk = supports(GOOD, {7: 0.5, 2: 0.25, 4: 0.125})
    for name, (at, value) in changes.items():
        array = getattr(topk, name)
        array[at if name.endswith("_logprob") else 3 * row + at] = value
    return topk


@pytest.mark.parametrize(
    ("topk", "row", "says"),
    [
        (defect(logprobs=(1, nan)), 1, "not finite"),
        (defect(logprobs=(2, -inf)), 1, "not finite"),
        (defect(logprobs=(0, 2e-4)), 1, "positive"),
        (defect(row=0, logprobs=(2, -0.1)), 0, "do not descend"),
        (defect(ids=(2, 7)), 1, "duplicate id"),
        (defect(ids=(0, 10)), 1, "outside the vocabulary of 10"),
        (defect(row=0, ids=(0, -1)), 0, "outside the vocabulary of 10"),
        (supports(GOOD, {}, {1: 0.5}), 1, "empty support"),
        (defect(tail_logprob=(1, nan)), 1, "tail"),
        (defect(tail_logprob=(0, 0.5)), 0, "tail"),
        (defect(token_logprob=(1, nan)), 1, "token log-prob"),
        (defect(token_logprob=(0, inf)), 0, "token log-prob"),
        (TopK.from_rows([[1], [2]], [[-1], [-1]], [-1, -1], [-1, -1], [[0.0], [nan]]), 1, "log_norm"),
    ],
)
def test_each_defect_is_named_with_its_row(topk, row, says):
    found = topk_problem(topk, 10)
    assert found is not None
    assert found[0] == row
    assert says in found[1]


def test_what_is_no_defect():
    assert topk_problem(defect(), 10) is None  # id 7 stands in both rows, and .125 is followed by .5 in the next row
    assert topk_problem(defect(logprobs=(0, 5e-5)), 10) is None  # float32 lands a little above log 1
    assert topk_problem(supports({0: 0.5, 1: 0.5}, tail=0), 2) is None  # equal entries, whole vocabulary


def test_a_record_has_one_distribution_a_target():
    with pytest.raises(TeacherError, match="e1: the teacher gave 1 distributions for 2 targets"):
        Record(example(), supports(GOOD), "dataset")


def test_a_record_names_the_example_of_a_bad_answer():
    with pytest.raises(TeacherError, match="e1: the teacher's answer for target 1 has a duplicate id"):
        Record(example(), defect(ids=(2, 7)), "dataset").check(10)


def test_fewer_entries_than_asked_for_are_an_error_and_never_padding():
    record = Record(example(), supports(GOOD, {7: 0.5, 2: 0.25}), "teacher")
    assert record.check(10) is record
    with pytest.raises(TeacherError, match="e1: the teacher's answer for target 1 has 2 entries where 3 were asked"):
        record.check(10, k=3)


def test_no_targets_have_nothing_to_cut():
    empty = TopK.empty()
    for cut in (empty.keep_mass(0.9), empty.keep_entries(3)):
        assert (len(cut), len(cut.ids), len(cut.tail_logprob)) == (0, 0, 0)


KEY = 'content_id("a", 1, ids_array([1, 2, 300]), 0.5)'
HEX = "1b12517721b489d1cd3c6dfe66cf09e7"  # blake2b-128 of each part behind its length in 8 bytes


def test_content_id_is_the_same_for_ever():
    assert content_id("a", 1, ids_array([1, 2, 300]), 0.5) == HEX


def test_content_id_is_the_same_in_another_process():
    code = f"from bakery.records import content_id, ids_array; print({KEY})"
    for seed in ("1", "77"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == HEX


def test_content_id_tells_parts_apart():
    keys = [
        content_id("ab", "c"),
        content_id("a", "bc"),
        content_id("abc"),
        content_id(ids_array([1, 2])),
        content_id(ids_array([1]), ids_array([2])),
    ]
    assert len(set(keys)) == 5
    # the width of the integers does not matter
    assert content_id(np.array([1, 2], np.int64)) == content_id(ids_array([1, 2]))
