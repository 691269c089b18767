"""A server's answer is data: whatever is in it, and however much, it is a row of the cache or a TeacherError."""

import json
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from mutations import TREE_SPOILS, spoil_tree
from stub_server import Stub, serving

from bakery.config import SamplingConfig, TeacherConfig
from bakery.errors import TeacherError
from bakery.records import Example, ids_array
from bakery.teachers import bounded
from bakery.teachers.asking import answer_batch
from bakery.teachers.fake import FakeTeacher
from bakery.teachers.openai_client import Client
from bakery.teachers.opening import open_teacher
from bakery.teachers.probing import reached

SAMPLING = SamplingConfig(max_new_tokens=6, seed=3)
RESPONSES = [ids_array([65, 66, 67]), ids_array([68])]
SCORED = [Example(f"s{i}", ids_array([1, 2, 3]), ids_array([1, 2, 3]), r, r > 0) for i, r in enumerate(RESPONSES)]
EMPTY = np.zeros(0, bool)
WRITTEN = [Example("w", ids_array([1, 2, 3]), ids_array([1, 2, 3]), ids_array([]), EMPTY)]
TALK = {"w": [{"role": "user", "content": "Rye?"}]}


def config(url, **api):
    settings = {"base_url": url, "model": "stub", "timeout": 2.0, "max_retries": 0} | api
    return TeacherConfig(backend="openai", model_name_or_path="data/golden-tokenizer", top_k=8, api=settings)


# -- answers of another form -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stub(tiny_tokenizer):
    fake = FakeTeacher(TeacherConfig(backend="fake", model_name_or_path="x"), tiny_tokenizer)
    with serving(Stub(fake, tiny_tokenizer)) as server:
        yield server


@pytest.fixture(scope="module", params=["score", "generate", "chat"])
def asked(request, stub, tiny_tokenizer):
    """An opened teacher as `ask()`, which gives its answers."""
    kind = request.param
    settings = config(stub.url, endpoint="chat" if kind == "chat" else "completions")
    examples, sampling = (SCORED, None) if kind == "score" else (WRITTEN, SAMPLING)
    with closing(open_teacher(settings, tiny_tokenizer).open()) as teacher:
        yield lambda: answer_batch(teacher, examples, settings, sampling, TALK)


@contextmanager
def answering(stub, change):
    """The stub's next answers, changed."""
    answer = stub.answer
    stub.answer = lambda path, body: (200, change(answer(path, body)[1]))
    try:
        yield
    finally:
        del stub.answer


@given(spoils=TREE_SPOILS)
def test_a_spoilt_answer_is_a_record_or_a_teacher_error(asked, stub, spoils):
    with answering(stub, lambda tree: spoil_tree(tree, spoils)):
        try:
            answers = asked()
        except TeacherError as error:
            answers = [error]
    for answer in answers:
        if isinstance(answer, TeacherError):
            assert str(answer).isprintable()
            assert len(str(answer)) < 1_000
        else:
            answer.check(259, 8)
            assert len(answer.example.response) <= 6


@pytest.mark.parametrize("models", [{"data": 3}, {}, {"data": [3]}, {"data": [{"id": "stub", "meta": [1]}]}])
def test_a_spoilt_list_of_models(stub, models):
    with (
        answering(stub, lambda tree: models),
        closing(Client(config(stub.url).api)) as client,
        pytest.raises(TeacherError, match="has a form that is not known"),
    ):
        reached(client)


def replace_ids(tree, token, other):
    text = json.dumps(tree).replace(f'"token_id:{token}"', f'"token_id:{other}"')
    return json.loads(text)


@pytest.mark.parametrize(("other", "says"), [(2**40, "out of bounds"), (300, "vocabulary of 259"), (-1, "vocabulary")])
def test_an_id_outside_the_vocabulary(stub, tiny_tokenizer, other, says):
    settings = config(stub.url)
    with closing(open_teacher(settings, tiny_tokenizer).open()) as teacher:
        [whole] = answer_batch(teacher, WRITTEN, settings, SAMPLING)
        first = int(whole.example.response[0])
        with answering(stub, lambda tree: replace_ids(tree, first, other)):
            try:
                [answer] = answer_batch(teacher, WRITTEN, settings, SAMPLING)
            except TeacherError as error:
                answer = error
    assert isinstance(answer, TeacherError)
    assert says in str(answer)


def test_a_response_longer_than_was_asked_for(stub, tiny_tokenizer):
    settings = config(stub.url)
    with closing(open_teacher(settings, tiny_tokenizer).open()) as teacher:
        short = SamplingConfig(max_new_tokens=2, seed=3)
        ask = stub.answer

        def answer_at_length(path, body):
            return ask(path, {**body, "max_tokens": 6})

        stub.answer = answer_at_length
        try:
            with pytest.raises(TeacherError, match="a response of 6 tokens where 2 were asked for at most"):
                answer_batch(teacher, WRITTEN, settings, short)
        finally:
            del stub.answer


def test_a_message_that_would_take_over_the_terminal(stub, tiny_tokenizer):
    settings = config(stub.url)
    with closing(open_teacher(settings, tiny_tokenizer).open()) as teacher:
        stub.answer = lambda path, body: (400, {"error": {"message": "\x1b[2J\x1b]0;owned\x07" + "no\n" * 999}})
        try:
            with pytest.raises(TeacherError) as error:
                answer_batch(teacher, SCORED, settings, None)
        finally:
            del stub.answer
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


# -- answers of another size -------------------------------------------------------------------------------------------


class Endless(ThreadingHTTPServer):
    """Answers every request with `head`, then `part` for ever, `pause` seconds apart."""

    daemon_threads = True

    def __init__(self, part, pause=0.0, status=200, headers=None):
        super().__init__(("127.0.0.1", 0), EndlessHandler)
        self.part, self.pause, self.status, self.headers = part, pause, status, headers or {}
        self.closing = threading.Event()
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class EndlessHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        for name, value in {"Content-Type": "application/json", **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            while not self.server.closing.wait(self.server.pause):
                self.wfile.write(self.server.part)
                self.server.sent += len(self.server.part)
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


@contextmanager
def endless(*args, **kwargs):
    with serving(Endless(*args, **kwargs)) as server, closing(Client(config(server.url, timeout=0.5).api)) as client:
        yield server, client
        server.closing.set()


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_endless_answer_is_read_to_its_bound(monkeypatch, status):
    monkeypatch.setattr(bounded, "MOST_BYTES", 1 << 20)
    with endless(b" " * 65536, status=status) as (server, client):
        with pytest.raises(TeacherError, match="an answer of more than 1,048,576 bytes"):
            client.complete(prompt=[[1]])
        assert server.sent < 32 << 20  # what sockets hold on the way is not read


def test_an_answer_that_never_ends_though_it_is_never_silent():
    with endless(b" ", pause=0.1) as (_, client), pytest.raises(TeacherError, match="is at completions for 1 s"):
        client.complete(prompt=[[1]])


def test_a_packed_answer_is_not_unpacked():
    with (
        endless(b"\0" * 1024, headers={"Content-Encoding": "gzip"}) as (_, client),
        pytest.raises(TeacherError, match=r"the server packs its answer \(gzip\)"),
    ):
        client.complete(prompt=[[1]])


def test_a_deeply_nested_answer():
    deep = b"[" * 100_000
    with (
        endless(deep, headers={"Content-Length": str(len(deep))}) as (_, client),
        pytest.raises(TeacherError, match="a body that is no JSON"),
    ):
        client.complete(prompt=[[1]])
