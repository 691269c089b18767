"""The report and the card: whatever a model said is text, and the prompt is what the user said."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from builders import random_record, topk_of, write_cache
from conftest import TINY_TOKENIZER
from transformers import AutoTokenizer

from bakery.config import Recipe
from bakery.records import Example, Record, ids_array
from bakery.reports.artifacts import read_samples, write_artifacts
from bakery.reports.model_card import model_card, run_facts
from bakery.reports.page import write_page
from bakery.reports.plots import loss_curve
from bakery.reports.samples import Sample, answer_length, chosen, prompt_text, side_by_side
from bakery.reports.table import measure_rows, print_run
from bakery.shards.reader import CacheReader

EVIL = "<script>alert('x')</script> & <img src=x onerror=alert(1)> \"quoted\""
MEASURES = {
    "before": {"kl": 2.0, "perplexity": 20.0, "top1_agreement": 0.25},
    "after": {"kl": 0.5, "perplexity": 5.0, "top1_agreement": 0.75},
}
METRICS = {
    "heldout": MEASURES | {"rows": 3, "targets": 1234},
    "train": {"steps": 7, "rows": 4321, "loss": 1.0},
    "seconds": {"load": 1.0, "before": 1.0, "train": 61.4, "after": 1.0},
}
LOG = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval_loss": 1.5},
    {"train_loss": 1.5, "step": 2},
]
ANSWERS = [Sample(prompt=f"why? {EVIL}", teacher=f"t {EVIL}", before=f"b {EVIL}", after=f"a {EVIL}")]


class Seen(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def page(tmp_path, **changed):
    loss_curve(LOG, "forward_kl", tmp_path / "loss.png")
    settings = {"title": "run", "metrics": METRICS, "samples": ANSWERS, "facts": {"loss": "forward_kl on tail_bucket"}}
    write_page(tmp_path / "report.html", curve=tmp_path / "loss.png", **(settings | changed))
    return (tmp_path / "report.html").read_text()


def seen(html):
    parser = Seen()
    parser.feed(html)
    return parser


def test_what_a_model_said_is_escaped(tmp_path):
    html = page(tmp_path, title=EVIL, facts={f"student {EVIL}": EVIL})
    assert "<script>" not in html
    parser = seen(html)
    assert [attrs.get("src", "")[:22] for tag, attrs in parser.tags if tag == "img"] == ["data:image/png;base64,"]
    assert not any("onerror" in attrs for _, attrs in parser.tags)
    for cell in (f"why? {EVIL}", f"t {EVIL}", f"b {EVIL}", f"a {EVIL}"):
        assert cell in parser.texts


def test_the_page_holds_its_picture_and_its_numbers(tmp_path):
    html = page(tmp_path)
    [picture] = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert base64.b64decode(picture) == (tmp_path / "loss.png").read_bytes()
    texts = seen(html).texts
    for number in ("2.000", "0.500", "-75%", "25.0%", "75.0%", "+50.0 points"):
        assert number in texts
    assert any("4,321 rows in 61 s" in text for text in texts)
    assert any("3 rows, 1,234 targets" in text for text in texts)


def test_a_run_without_held_out_rows_says_so(tmp_path):
    html = page(tmp_path, metrics=METRICS | {"heldout": {}}, samples=[])
    assert "validation_fraction" in html
    assert not any("nan" in text.lower() for text in seen(html).texts)


def test_changes_are_relative_but_for_agreement():
    assert [row[1:] for row in measure_rows(MEASURES)] == [
        ("2.000", "0.500", "-75%"),
        ("20.000", "5.000", "-75%"),
        ("25.0%", "75.0%", "+50.0 points"),
    ]
    nothing = {when: {"kl": 0.0, "perplexity": 1.0, "top1_agreement": 1.0} for when in ("before", "after")}
    assert measure_rows(nothing)[0][1:] == ("0.000", "0.000", "–")


def test_a_terminal_shows_square_brackets_as_they_are(capsys):
    """rich would read [bold] as markup and stop at [/nonsense]."""
    print_run(METRICS, [Sample("p", "[bold]x[/nonsense]", "b", "a")])
    assert "[bold]x" in capsys.readouterr().out


def test_artifacts_can_be_read_back(tmp_path):
    samples = [Sample("ß", "日本", "\u2028", EVIL)]
    write_artifacts(tmp_path, card="# card", facts={}, metrics=METRICS, samples=samples, log=LOG, loss="forward_kl")
    assert read_samples(tmp_path) == samples
    assert (tmp_path / "README.md").read_text() == "# card"


def test_the_curve_draws_what_was_logged(tmp_path):
    from matplotlib.image import imread

    loss_curve(LOG, "forward_kl", tmp_path / "some.png")
    loss_curve([], "forward_kl", tmp_path / "none.png")
    some, none = (imread(tmp_path / name)[..., :3] for name in ("some.png", "none.png"))
    colourful = [np.ptp(picture, axis=2).max() for picture in (some, none)]
    assert colourful[0] > 0.3 > colourful[1]


# -- the card --------------------------------------------------------------------------------------------------------


def card_of(tmp_path, student=None, loss=None, weights=(1.0,), metrics=METRICS):
    paths = [write_cache(tmp_path / f"c{i}", {"train": [random_record(f"r{i}")]}) for i in range(len(weights))]
    recipe = Recipe.model_validate(
        {"student": {"model_name_or_path": "my/student"} | (student or {}), "loss": loss or {}}
    )
    facts = run_facts(recipe, [(CacheReader(path), w) for path, w in zip(paths, weights, strict=True)])
    return facts, model_card(recipe, facts, metrics)


def test_the_card_of_an_adapter(tmp_path):
    facts, card = card_of(tmp_path)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("my/student", "peft")
    assert facts["trained"] == "LoRA, rank 16, on all-linear"
    assert facts["cache"] == f"{tmp_path / 'c0'}, top-8, 6 targets"
    assert facts["teacher of cache"] == f"made-up (made, float32, {'0' * 16})"
    assert all(f"| {name} | {value} |" in card for name, value in facts.items())
    assert "| KL(teacher ‖ student), nats a token | 2.000 | 0.500 | -75% |" in card
    assert "On 3 held-out rows" in card


@pytest.mark.parametrize(
    ("loss", "said", "unsaid"),
    [
        ({}, "forward_kl on tail_bucket, temperature 1.0", ["beta", "alpha", "cross"]),
        ({"divergence": "jsd", "beta": 0.25}, "jsd on tail_bucket, temperature 1.0, beta 0.25", ["alpha"]),
        ({"divergence": "skew_kl", "alpha": 0.3, "temperature": 2.0}, "temperature 2.0, alpha 0.3", ["beta"]),
        ({"cross_entropy_weight": 0.5, "support": "truncated"}, "plus 0.5 × cross-entropy", ["alpha", "beta"]),
    ],
)
def test_the_card_says_the_options_that_count(loss, said, unsaid, tmp_path):
    facts, _ = card_of(tmp_path, loss=loss)
    assert said in facts["loss"]
    assert not [word for word in unsaid if word in facts["loss"]]


def test_the_card_of_a_whole_smaller_model_from_two_caches(tmp_path):
    facts, card = card_of(tmp_path, {"lora": None, "drop_layers": [1, 4]}, weights=(2.0, 0.5))
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert facts["student"] == "my/student, without layers [1, 4]"
    assert facts["trained"] == "all weights"
    assert facts["cache 1"].endswith("weight 2.0")
    assert facts["cache 2"].endswith("weight 0.5")


def test_the_card_of_a_run_without_held_out_rows(tmp_path):
    _, card = card_of(tmp_path, metrics=METRICS | {"heldout": {}})
    assert "held-out" not in card


# -- prompts, read back from ids -------------------------------------------------------------------------------------

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(TINY_TOKENIZER)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.chat_template = LLAMA_3
    path = tmp_path_factory.mktemp("tokenizers") / "llama3"
    tokenizer.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def record(context, response=(65, 66)):
    response = ids_array(response)
    topk = topk_of(np.zeros((len(response), 300)), response, 2)
    return Record(
        Example("x", ids_array(context), ids_array([1]), response, np.ones(len(response), bool)), topk, "teacher"
    )


def chat(tokenizer, *messages):
    roles = [("system", "user", "assistant")[i] for i in (0, 1, 2, 1)]
    turns = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False) if text is not None]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return record(ids)


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "llama_3"])
@pytest.mark.parametrize(
    "messages",
    [(None, "What is rye?"), ("Be brief.", "What is rye?"), ("Be brief.", "Hi!", "Hello!", "What is rye?")],
    ids=["user", "system", "turns"],
)
def test_a_prompt_is_what_the_user_said_last(kind, messages, request):
    tokenizer = request.getfixturevalue(kind)
    assert prompt_text(tokenizer, chat(tokenizer, *messages)) == "What is rye?"


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "llama_3"])
def test_a_prompt_of_several_lines(kind, request):
    tokenizer = request.getfixturevalue(kind)
    assert prompt_text(tokenizer, chat(tokenizer, None, "One.\n\nTwo: user\n3")) == "One.\n\nTwo: user\n3"


def test_a_plain_context_is_its_text(tiny_tokenizer):
    assert prompt_text(tiny_tokenizer, record(tiny_tokenizer.encode("Rye is a"))) == "Rye is a"


def test_a_plain_context_behind_a_begin_token(tiny_tokenizer):
    assert prompt_text(tiny_tokenizer, record([257, *tiny_tokenizer.encode("Rye is a")])) == "Rye is a"


# -- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_the_first_prompts_once_each():
    rows = [record([i, i]) for i in (7, 7, 8, 9, 10)]
    assert [r.example.student_context[0] for r in chosen(rows)] == [7, 8, 9]
    assert chosen([]) == []


def test_there_is_room_for_as_much_as_the_teacher_said():
    assert answer_length([record([1], range(20)), record([1], range(5))], 50) == 28
    assert answer_length([record([1], [7] * 500)], 50) == 96
    assert answer_length([record([1], [])], 50) == 50
    assert answer_length([], 500) == 96


def test_answers_stand_beside_the_teachers(tiny_tokenizer):
    rows = [record([257, 72, 105], [104, 111, 258])]
    [sample] = side_by_side(rows, ["old"], ["new"], tiny_tokenizer)
    assert (sample.prompt, sample.teacher, sample.before, sample.after) == (
        tiny_tokenizer.decode([72, 105]),
        tiny_tokenizer.decode([104, 111]),
        "old",
        "new",
    )
