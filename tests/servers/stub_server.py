"""An OpenAI-compatible server over the fake teacher, on a real socket of 127.0.0.1, speaking vLLM's dialect exactly as
recorded from vLLM 0.32: quick enough for `make test`. The real servers are in tests/contract (make test-servers)."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bakery.config import SamplingConfig

MAX_LOGPROBS = 20
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # transformers' table, not bakery's


class Stub(ThreadingHTTPServer):
    """`requests` is every completion body it was sent; `keys` every Authorization header."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, teacher, tokenizer, model="stub"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.teacher, self.tokenizer, self.model = teacher, tokenizer, model
        self.requests, self.keys, self.lock = [], set(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, path, body):
        """(status, object) to a request."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.model, "object": "model", "max_model_len": 1024}]}
        if body["model"] != self.model:
            return 404, _error(f"The model `{body['model']}` does not exist.", 404)
        for kind, name in (("prompt", "prompt_logprobs"), ("sample", "logprobs")):
            if (k := body.get(name) or 0) > MAX_LOGPROBS:
                message = f"Requested {kind} logprobs of {k}, which is greater than max allowed: {MAX_LOGPROBS}"
                return 400, _error(message, 400)
        if path == "/v1/chat/completions":
            return 200, self._chat(body)
        with self.lock:
            self.requests.append(body)
            choices = [{"index": i, **self._choice(prompt, body)} for i, prompt in enumerate(body["prompt"])]
        return 200, {"object": "text_completion", "model": self.model, "choices": choices[::-1]}  # any order

    def _choice(self, prompt, body):
        prompt = np.array(prompt, np.int32)
        if body.get("echo"):
            named = [self._named(prompt, t, body["logprobs"]) for t in range(len(prompt))]
            return {"logprobs": _named_lists(prompt, named)}
        if body.get("prompt_logprobs"):
            return {"prompt_logprobs": [self._ranked(prompt, t, body["prompt_logprobs"]) for t in range(len(prompt))]}
        sampling = SamplingConfig(
            temperature=body["temperature"], top_p=body.get("top_p", 1), max_new_tokens=body["max_tokens"]
        )
        [(response, _)] = self.teacher.generate([prompt], sampling, 4, [body["seed"]])
        sequence = np.concatenate([prompt, response])
        named = [self._named(sequence, len(prompt) + t, body["logprobs"]) for t in range(len(response))]
        return {"logprobs": _named_lists(response, named)}

    def _chat(self, body):
        """Named by text and bytes, as hosted servers do; the template is the tokenizer's own."""
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        prompt = np.array(self.tokenizer.encode(text), np.int32)
        sampling = SamplingConfig(
            temperature=body["temperature"], top_p=body["top_p"], max_new_tokens=body["max_tokens"]
        )
        with self.lock:
            [(response, _)] = self.teacher.generate([prompt], sampling, 4, [body["seed"]])
            sequence = np.concatenate([prompt, response])
            content = []
            for t in range(len(prompt), len(sequence)):
                row = self._row(sequence, t, body["top_logprobs"])
                entries = [{**self.name(i), "logprob": logprob} for i, logprob in row.items()]
                content.append({**entries[0], "top_logprobs": entries[: body["top_logprobs"]]})  # cut, as vLLM does
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(response)}
        return {"model": self.model, "choices": [{"index": 0, "logprobs": {"content": content}}], "usage": usage}

    def name(self, token):
        if token >= 256:
            return {"token": self.tokenizer.convert_ids_to_tokens(token), "bytes": []}
        data = BYTES[self.tokenizer.convert_ids_to_tokens(token)]
        return {"token": bytes([data]).decode(errors="replace"), "bytes": [data]}

    def _row(self, sequence, t, k):
        """Token t's distribution: the actual token first, then the k best."""
        if t == 0:
            return None
        logits = self.teacher._after(sequence[:t])
        logprobs = logits - np.logaddexp.reduce(logits)
        order = [int(sequence[t]), *np.argsort(-logprobs, kind="stable")[:k].tolist()]
        return {i: float(np.float32(logprobs[i])) for i in dict.fromkeys(order)}

    def _ranked(self, sequence, t, k):
        row = self._row(sequence, t, k)
        return row and {str(i): {"logprob": logprob, "rank": 1, "decoded_token": "?"} for i, logprob in row.items()}

    def _named(self, sequence, t, k):
        row = self._row(sequence, t, k)
        return row and {f"token_id:{i}": logprob for i, logprob in row.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._reply(None)

    def do_POST(self):
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body):
        self.server.keys.add(self.headers.get("Authorization"))
        status, tree = self.server.answer(self.path, body)
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def _named_lists(tokens, named):
    ids = [f"token_id:{t}" for t in tokens.tolist()]
    own = [row and row[token] for row, token in zip(named, ids, strict=True)]
    return {"tokens": ids, "token_logprobs": own, "top_logprobs": named, "text_offset": [0] * len(ids)}


def _error(message, code):
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
