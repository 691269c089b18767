"""Which turns are targets, and how much of the prefix the student reads too: ids by hand, one a byte."""

import pytest
from test_prompts_chat import ASK, BAKE, A, B, C, D, ids, targets, turn

from bakery.config import Recipe
from bakery.errors import DataError, RecipeError
from bakery.prompts.chat import Renderer
from bakery.prompts.examples import build_examples
from bakery.prompts.reading import Row
from bakery.records import TeacherInfo

SHOT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


@pytest.fixture
def render(tiny_tokenizer):
    def render(data, prefix=(), generate=False, **options):
        return Renderer(tiny_tokenizer, list(prefix), generate, **options).render(Row("p.jsonl:7", data))

    return render


def shots():
    return turn("user", "q") + turn("assistant", "r")


@pytest.mark.parametrize(
    ("retained", "kept"),
    [(0, ""), (1, turn("assistant", "r")), (2, shots()), *((n, turn("system", "Bake") + shots()) for n in (3, 9))],
)
def test_the_student_reads_the_last_messages_of_the_prefix(retained, kept, render):
    rendered = render({"messages": [A, B]}, [BAKE, *SHOT], retained=retained)
    assert rendered.student_context.tolist() == ids(kept + turn("user", "a") + ASK)
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake") + shots() + turn("user", "a") + ASK)
    assert rendered.response.tolist() == ids("b<|im_end|>\n")


def test_of_both_prefixes_the_rows_own_stands_last(render):
    rendered = render({"messages": [A, B], "prefix_messages": SHOT}, [BAKE], retained=2)
    assert rendered.student_context.tolist() == ids(shots() + turn("user", "a") + ASK)


def test_a_retained_system_message_is_joined_with_the_rows_own(render):
    own = {"role": "system", "content": "Eat"}
    rendered = render({"messages": [own, A, B]}, [*SHOT, BAKE], retained=1)
    assert rendered.student_context.tolist() == ids(turn("system", "Bake\n\nEat") + turn("user", "a") + ASK)


def test_retained_messages_when_the_teacher_writes(render):
    rendered = render({"prompt": "a"}, [BAKE, *SHOT], generate=True, retained=2)
    assert rendered.student_context.tolist() == ids(shots() + turn("user", "a") + ASK)
    assert rendered.conversation == [BAKE, *SHOT, A]


@pytest.mark.parametrize("form", ["text", "prompt"])
def test_retained_plain_text(form, tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    data = {"text": "abc"} if form == "text" else {"prompt": "ab", "response": "c"}
    rendered = Renderer(tokenizer, [BAKE, {"role": "user", "content": "q"}], False, retained=1).render(Row("p", data))
    shown = 1 if form == "text" else 2
    assert rendered.student_context.tolist() == ids("q\n\n" + "abc"[:shown])
    assert rendered.teacher_context.tolist() == ids("Bake\n\nq\n\n" + "abc"[:shown])


@pytest.mark.parametrize("retained", [0, 1])
def test_a_system_message_as_a_target_cannot_be_joined_with_a_prefix(retained, render):
    own = {"role": "system", "content": "Eat"}
    with pytest.raises(DataError, match=r"p.jsonl:7: .*prefix"):
        render({"messages": [own, A, B]}, [*SHOT, BAKE], retained=retained, roles=("system",))


# -- roles -----------------------------------------------------------------------------------------------------------


def test_users_turns_as_targets_begin_behind_their_header(render):
    rendered = render({"messages": [A, B, C, D]}, roles=("user",))
    assert rendered.student_context.tolist() == ids("<|im_start|>user\n")
    assert targets(rendered) == ids("a<|im_end|>c<|im_end|>")
    assert rendered.response.tolist() == ids(
        "a<|im_end|>\n" + turn("assistant", "b") + "<|im_start|>user\nc<|im_end|>\n"
    )


def test_both_roles_behind_a_prefix(render):
    rendered = render({"messages": [A, B, C, D]}, [BAKE], roles=("user", "assistant"))
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake") + "<|im_start|>user\n")
    assert targets(rendered) == ids("a<|im_end|>b<|im_end|>c<|im_end|>d<|im_end|>")


def test_a_role_that_is_not_there_is_an_error(render):
    with pytest.raises(DataError, match=r"p\.jsonl:7: no token is a target: prompts\.target_roles is .*, the row has"):
        render({"messages": [A, B]}, roles=("tool",))


# -- pattern ---------------------------------------------------------------------------------------------------------

THINKING = {"role": "assistant", "content": "hm\nno"}
ANSWER = {"role": "assistant", "content": "so\nAnswer: 4"}


def test_only_turns_that_match_are_targets_and_the_others_are_read(render):
    rendered = render({"messages": [A, THINKING, C, ANSWER]}, pattern="^Answer:")
    before = turn("user", "a") + turn("assistant", "hm\nno") + turn("user", "c") + ASK
    assert rendered.student_context.tolist() == ids(before)
    assert targets(rendered) == ids("so\nAnswer: 4<|im_end|>")


def test_a_pattern_over_lines_needs_its_flag(render):
    row = {"messages": [A, ANSWER]}
    assert render(row, pattern="so.Answer") is None
    assert targets(render(row, pattern="(?s)so.Answer")) == ids("so\nAnswer: 4<|im_end|>")


def test_rows_without_a_match_are_left_out_and_told(tiny_tokenizer, caplog):
    renderer = Renderer(tiny_tokenizer, [], False, pattern="^Answer:")
    rows = [Row("p:1", {"messages": [A, THINKING]}), Row("p:2", {"messages": [A, ANSWER]})]
    info = TeacherInfo(backend="x", name="x", revision=None, dtype="x", fingerprint="x")
    asked = build_examples(rows, renderer, None, info, None)
    assert list(asked.places.values()) == ["p:2"]
    assert "1 rows hold no turn that matches" in caplog.text
    with pytest.raises(DataError, match="target_content_pattern is found in no turn of 1 rows"):
        build_examples(rows[:1], renderer, None, info, None)


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipe(**prompts):
    return Recipe.model_validate({"prompts": {"path": "x.jsonl", **prompts}, "sampling": {}})


@pytest.mark.parametrize("choice", [{"target_roles": ["user"]}, {"target_content_pattern": "x"}])
def test_choosing_among_turns_that_the_teacher_writes_is_refused(choice):
    with pytest.raises(RecipeError, match=r"target_roles and prompts.target_content_pattern choose among given turns"):
        recipe(**choice)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        recipe(target_content_pattern="(")
