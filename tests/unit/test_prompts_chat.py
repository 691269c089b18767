"""Rows -> token ids and masks. The tiny tokenizer has one id a byte, so the expected ids are the text itself."""

import copy
import re

import numpy as np
import pytest

from bakery.errors import DataError
from bakery.prompts.chat import Renderer
from bakery.prompts.reading import Row
from bakery.prompts.tokenizers import load_tokenizer

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
BYTES = {"\n": 198, " ": 220} | {chr(byte): byte - 33 for byte in range(33, 127)}

A, B = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
C, D = {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
BAKE = {"role": "system", "content": "Bake"}


def ids(text: str) -> list[int]:
    pieces = re.split(r"(<\|.*?\|>)", text)
    return [i for piece in pieces for i in ([SPECIAL[piece]] if piece in SPECIAL else [BYTES[c] for c in piece])]


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ASK = "<|im_start|>assistant\n"


@pytest.fixture
def render(tiny_tokenizer):
    def render(data, prefix=(), generate=False, template=...):
        tokenizer = tiny_tokenizer
        if template is not ...:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = template
        return Renderer(tokenizer, list(prefix), generate).render(Row("p.jsonl:7", data))

    return render


def targets(rendered) -> list[int]:
    return rendered.response[rendered.is_target].tolist()


# -- conversations -----------------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_a_target_through_its_end_of_turn_token(render):
    rendered = render({"messages": [A, B, C, D]})
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    # 0 b, 1 end, 2 newline, 3 start, 4–7 user, 8 newline, 9 c, 10 end, 11 newline, 12 start, 13–21 assistant, …
    assert rendered.response.tolist() == ids("b<|im_end|>\n" + turn("user", "c") + ASK + "d<|im_end|>\n")
    assert np.flatnonzero(rendered.is_target).tolist() == [0, 1, 23, 24]
    assert targets(rendered) == ids("b<|im_end|>d<|im_end|>")


EAT = {"role": "system", "content": "Eat"}


@pytest.mark.parametrize("prefix", [[], [BAKE]])
def test_neighbouring_system_messages_amid_a_conversation_move_no_target(render, prefix):
    rendered = render({"messages": [A, B, BAKE, EAT, C, D]}, prefix)
    between = turn("system", "Bake\n\nEat") + turn("user", "c") + ASK
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert rendered.response.tolist() == ids("b<|im_end|>\n" + between + "d<|im_end|>\n")
    assert targets(rendered) == ids("b<|im_end|>d<|im_end|>")


def test_a_row_that_ends_with_the_user_has_what_comes_before_as_targets(render):
    rendered = render({"messages": [A, B, C]})
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert rendered.response.tolist() == ids("b<|im_end|>\n")
    assert rendered.is_target.tolist() == [True, True, False]


def test_white_space_in_an_answer_is_a_target(render):
    rendered = render({"messages": [A, {**B, "content": " b\n"}]})
    assert targets(rendered) == ids(" b\n<|im_end|>")


def test_the_prefix_is_read_by_the_teacher_alone(render):
    rendered = render({"messages": [A, B, C, D]}, prefix=[BAKE])
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake") + turn("user", "a") + ASK)
    assert rendered.response.tolist() == render({"messages": [A, B, C, D]}).response.tolist()


def test_without_a_prefix_both_sides_read_the_same(render):
    rendered = render({"messages": [BAKE, A, B]})
    assert rendered.student_context.tolist() == ids(turn("system", "Bake") + turn("user", "a") + ASK)
    assert rendered.teacher_context.tolist() == rendered.student_context.tolist()


def test_a_rows_own_prefix_comes_after_the_recipes_and_system_messages_are_joined(render):
    own = [
        {"role": "system", "content": "Rye"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    rendered = render({"messages": [A, B], "prefix_messages": own}, prefix=[BAKE])
    assert rendered.teacher_context.tolist() == ids(
        turn("system", "Bake\n\nRye") + turn("user", "x") + turn("assistant", "y") + turn("user", "a") + ASK
    )
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert targets(rendered) == ids("b<|im_end|>")  # the assistant turn of the prefix is none


def test_the_prefix_joins_the_system_message_of_the_row(render):
    row = {"messages": [{"role": "system", "content": "Hush"}, A, B]}
    rendered = render(row, prefix=[BAKE])
    assert rendered.student_context.tolist() == ids(turn("system", "Hush") + turn("user", "a") + ASK)
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake\n\nHush") + turn("user", "a") + ASK)
    assert row["messages"][0]["content"] == "Hush"  # the row itself is left alone


# -- the teacher writes ------------------------------------------------------------------------------------------------


def test_generate_drops_the_last_answer_and_keeps_the_history(render):
    asked = ids(turn("user", "a") + turn("assistant", "b") + turn("user", "c") + ASK)
    for messages in ([A, B, C, D], [A, B, C]):
        rendered = render({"messages": messages}, prefix=[BAKE], generate=True)
        assert rendered.student_context.tolist() == asked
        assert rendered.teacher_context.tolist() == ids(turn("system", "Bake")) + asked
        assert (len(rendered.response), len(rendered.is_target)) == (0, 0)


def test_generate_drops_the_response_of_a_prompt(render):
    for data in ({"prompt": "a", "response": "b"}, {"prompt": "a"}, {"prompt": [A], "response": "b"}):
        rendered = render(data, generate=True)
        assert rendered.teacher_context.tolist() == ids(turn("user", "a") + ASK)
        assert len(rendered.response) == 0


def test_generate_with_nothing_but_an_answer_is_refused(render):
    with pytest.raises(DataError, match=r"p.jsonl:7"):
        render({"messages": [B]}, generate=True)


# -- prompts and plain text --------------------------------------------------------------------------------------------


def test_a_prompt_is_a_user_turn(render):
    rendered = render({"prompt": "a", "response": "b"}, prefix=[BAKE])
    assert rendered.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake") + turn("user", "a") + ASK)
    assert rendered.response.tolist() == ids("b<|im_end|>\n")
    assert rendered.is_target.tolist() == [True, True, False]


def test_a_prompt_of_messages_keeps_its_history(render):
    rendered = render({"prompt": [BAKE, A], "response": "b"})
    assert rendered.student_context.tolist() == ids(turn("system", "Bake") + turn("user", "a") + ASK)
    assert targets(rendered) == ids("b<|im_end|>")


def test_a_prompt_without_a_template_is_plain_and_its_response_ends(render):
    rendered = render({"prompt": "a", "response": "b"}, prefix=[BAKE], template=None)
    assert rendered.student_context.tolist() == ids("a")
    assert rendered.teacher_context.tolist() == ids("Bake\n\na")
    assert rendered.response.tolist() == ids("b<|im_end|>")
    assert rendered.is_target.tolist() == [True, True]


@pytest.mark.parametrize("template", [None, ...])
def test_of_plain_text_all_but_the_first_token_is_a_target(render, template):
    rendered = render({"text": "rye bread"}, prefix=[BAKE], template=template)
    assert rendered.student_context.tolist() == ids("r")
    assert rendered.teacher_context.tolist() == ids("Bake\n\nr")
    assert rendered.response.tolist() == ids("ye bread")
    assert rendered.is_target.all()


def test_generate_goes_on_from_plain_text(render):
    rendered = render({"text": "rye"}, prefix=[BAKE], generate=True)
    assert rendered.student_context.tolist() == ids("rye")
    assert rendered.teacher_context.tolist() == ids("Bake\n\nrye")
    assert len(rendered.response) == 0


def test_a_beginning_of_text_stands_once_and_in_front(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    rendered = Renderer(tokenizer, [BAKE], generate=False).render(Row("x", {"text": "rye"}))
    assert rendered.student_context.tolist() == ids("<|endoftext|>")
    assert rendered.teacher_context.tolist() == ids("<|endoftext|>Bake\n\n")
    assert rendered.response.tolist() == ids("rye")
    # a chat template writes its own special tokens
    chat = Renderer(tokenizer, [BAKE], generate=False).render(Row("x", {"messages": [A, B]}))
    assert chat.student_context.tolist() == ids(turn("user", "a") + ASK)
    assert chat.response.tolist() == ids("b<|im_end|>\n")


# -- rows that are refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{"messages": [A]}, {"prompt": "a"}, {"messages": [BAKE, A]}, {"text": "a"}])
def test_a_row_without_a_target_is_named(render, data):
    with pytest.raises(DataError, match=r"p.jsonl:7: no token is a target.*`sampling:`"):
        render(data)


@pytest.mark.parametrize("data", [{"messages": [A, B]}, {"prompt": [A], "response": "b"}])
def test_messages_without_a_template_are_named(render, data):
    with pytest.raises(DataError, match=r"p.jsonl:7: chat messages, but the tokenizer has no chat template"):
        render(data, template=None)


def test_what_a_template_refuses_is_named(render):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"p.jsonl:7: the chat template refuses the conversation: roles must alternate"):
        render({"messages": [A, B]}, template=template)


WITHOUT_OLD_THOUGHTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_rewrites_history_is_refused(render):
    thought = {"role": "assistant", "content": "hm</think>b"}
    with pytest.raises(DataError, match=r"p.jsonl:7: the chat template rewrites assistant turn 1 once later turns"):
        render({"messages": [A, thought, C, D]}, template=WITHOUT_OLD_THOUGHTS)
    assert targets(render({"messages": [A, thought]}, template=WITHOUT_OLD_THOUGHTS)) == ids("hm</think>b<|im_end|>")
    # where the teacher writes, only the context is rendered, as the template would have it
    asked = render({"messages": [A, thought, C, D]}, generate=True, template=WITHOUT_OLD_THOUGHTS).student_context
    assert asked.tolist() == ids(turn("user", "a") + turn("assistant", "b") + turn("user", "c") + ASK)


NUMBERED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ loop.index }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ messages|length + 1 }}{% endif %}"""


def test_a_template_that_renders_the_response_otherwise_behind_the_prefix_is_refused(render):
    assert targets(render({"messages": [A, B, C, D]}, template=NUMBERED)) == ids("b<|im_end|>d<|im_end|>")
    with pytest.raises(DataError, match=r"p.jsonl:7: the chat template renders the response differently behind"):
        render({"messages": [A, B, C, D]}, prefix=[BAKE], template=NUMBERED)


# -- defects of the first design, one test each ------------------------------------------------------------------------


def test_defect_5_a_row_that_ends_in_an_assistant_turn_is_used(render):
    assert targets(render({"messages": [A, B]})) == ids("b<|im_end|>")
    assert render({"messages": [A, B]}, generate=True).teacher_context.tolist() == ids(turn("user", "a") + ASK)


def test_defect_6_history_and_the_rows_own_prefix_are_kept_when_the_teacher_writes(render):
    row = {"messages": [A, B, C], "prefix_messages": [{"role": "system", "content": "Rye"}]}
    history = turn("user", "a") + turn("assistant", "b") + turn("user", "c") + ASK
    rendered = render(row, prefix=[BAKE], generate=True)
    assert rendered.teacher_context.tolist() == ids(turn("system", "Bake\n\nRye") + history)
    assert rendered.student_context.tolist() == ids(history)


def test_defect_8_the_response_is_tokenised_once_and_on_its_own(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    tokenizer.chat_template = None
    rendered = Renderer(tokenizer, [BAKE], generate=False).render(
        Row("x", {"prompt": "The town is New Yo", "response": "rk"})
    )
    plain = tokenizer("rk", add_special_tokens=False)["input_ids"]
    assert rendered.response.tolist() == [*plain, tokenizer.eos_token_id]
    both = [*rendered.student_context.tolist(), *plain]
    assert tokenizer.decode(both) == "The town is New York"
    assert tokenizer("The town is New York")["input_ids"] != both  # decoding and tokenising would move the cut


def test_defect_12_the_end_of_a_turn_is_a_target_though_it_is_the_padding_token(render, tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == 258
    assert targets(render({"messages": [A, B, C, D]})).count(258) == 2
    assert render({"prompt": "a", "response": "b"}, template=None).is_target.tolist() == [True, True]


# -- a real model's tokenizer ------------------------------------------------------------------------------------------

TALKS = [
    [A, B],
    [BAKE, A, B, C, D],
    [
        {"role": "user", "content": "How long do I knead 500 g of rye?\n\nAnd at 27°C?"},
        {"role": "assistant", "content": "Ten minutes.\n```\nknead(500)\n```\n"},
        {"role": "user", "content": "  Danke, größer!  "},
        {"role": "assistant", "content": "Bitte 🍞 and don't forget: 12,345 folds…"},
        {"role": "user", "content": "Bye"},
    ],
]
# The template of SmolLM2 with transformers' own marks around what the assistant says.
TAGGED = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}"""


@pytest.mark.parametrize("messages", TALKS)
def test_ids_and_mask_are_those_of_transformers(smollm2, messages):
    tokenizer = load_tokenizer(str(smollm2))
    rendered = Renderer(tokenizer, [], generate=False).render(Row("x", {"messages": messages}))
    ours = [*rendered.student_context.tolist(), *rendered.response.tolist()]
    mask = [0] * len(rendered.student_context) + rendered.is_target.astype(int).tolist()
    end = len(mask) - mask[::-1].index(1)
    assert ours[end - 1] == tokenizer.convert_tokens_to_ids("<|im_end|>")

    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ours[:end] == theirs[:end]
    tagged = tokenizer.apply_chat_template(
        messages, chat_template=TAGGED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tagged["input_ids"] == theirs  # the marks changed no token
    assert tagged["assistant_masks"][:end] == mask[:end]
    assert not any(tagged["assistant_masks"][end:])
    assert not any(mask[end:])
    assert sum(mask) > 0


def test_a_prefix_replaces_the_templates_own_system_message_for_the_teacher_alone(smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    rendered = Renderer(tokenizer, [BAKE], generate=False).render(Row("x", {"messages": [A, B]}))
    assert tokenizer.decode(rendered.student_context).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert tokenizer.decode(rendered.teacher_context) == turn("system", "Bake") + turn("user", "a") + ASK
    assert tokenizer.decode(rendered.response) == "b<|im_end|>\n"
