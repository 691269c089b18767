"""Requests to an OpenAI-compatible server: many in flight, retried, checked for who answered. JSON in, JSON out."""

import asyncio
import json
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from bakery.config import ApiConfig
from bakery.errors import RecipeError, TeacherError
from bakery.teachers.bounded import bound
from bakery.teachers.wire import quoted, refuse_other_forms

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
T = TypeVar("T")


class Client:
    """The official async client on an event loop of its own, to be called from any thread.

    429, 5xx, timeouts and resets are retried by it, with jitter and Retry-After; a body that is no JSON is asked for
    again. What fails for good is a TeacherError without a word of the key.
    """

    def __init__(self, config: ApiConfig) -> None:
        self.config = config
        host = urlsplit(config.base_url).hostname or ""
        key = os.environ.get(config.key_env)
        if key is None and host not in LOOPBACK:
            raise RecipeError(f"teacher.api.key_env: the environment has no {config.key_env}, which {host} needs")
        # A proxy from the environment must not reroute a server on this machine.
        http = openai.DefaultAsyncHttpxClient(
            trust_env=host not in LOOPBACK,
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [bound]},
        )
        # A server that sends a byte now and then is never silent for `timeout`, and never done.
        self._patience = 2 * config.timeout * (config.max_retries + 1)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            timeout=config.timeout,
            max_retries=config.max_retries,
            http_client=http,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="openai", daemon=True).start()
        self._room = asyncio.Semaphore(config.in_flight)

    def close(self) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    @refuse_other_forms()
    def models(self) -> list[dict[str, Any]]:
        """What the server says it serves."""
        return [{**model} for model in self._run(self._answer("models", None))["data"]]

    @refuse_other_forms()
    def complete(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of a completion, in the order of the prompts."""
        return self._run(self._complete(body))

    @refuse_other_forms()
    def complete_all(self, bodies: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        async def together() -> list[list[dict[str, Any]]]:
            return await asyncio.gather(*(self._complete(body) for body in bodies))

        return self._run(together())

    @refuse_other_forms()
    def chat(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The one choice of a chat completion, and what it counted."""
        tree = self._run(self._answer("chat/completions", {"model": self.config.model, **body}))
        self._check_model(tree)
        if len(tree.get("choices") or []) != 1:
            raise TeacherError(f"one conversation was sent, {len(tree.get('choices') or [])} answers came")
        return tree["choices"][0], tree.get("usage") or {}

    def _check_model(self, tree: dict[str, Any]) -> None:
        if tree.get("model") != self.config.model:
            raise TeacherError(f"asked for model {self.config.model}, {quoted(tree.get('model'))} answered")

    async def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        tree = await self._answer("completions", {"model": self.config.model, **body})
        self._check_model(tree)
        choices = sorted(tree.get("choices") or [], key=lambda choice: choice.get("index", 0))
        if len(choices) != len(body["prompt"]):
            raise TeacherError(f"{len(body['prompt'])} prompts were sent, {len(choices)} answers came")
        return choices

    async def _answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async with self._room:
            for attempt in range(self.config.max_retries + 1):
                try:
                    async with asyncio.timeout(self._patience):
                        text = await self._ask(path, body)
                    tree = json.loads(text)
                    if isinstance(tree, dict):
                        return tree
                    reason = f"a {type(tree).__name__} where an object belongs"
                except (ValueError, RecursionError) as error:
                    reason = f"a body that is no JSON: {error}"
                except TimeoutError:
                    raise TeacherError(f"{self.config.base_url} is at {path} for {self._patience:.0f} s") from None
                except openai.APIStatusError as error:
                    raise TeacherError(f"HTTP {error.status_code} from {path}: {_message(error)}") from None
                except openai.APIConnectionError as error:
                    cause = error.__cause__ or error
                    if isinstance(cause, TeacherError):
                        raise cause from None
                    raise TeacherError(
                        f"{self.config.base_url} did not answer {path} in {self.config.max_retries + 1} tries: "
                        f"{type(cause).__name__}"
                    ) from None
                await asyncio.sleep(min(0.1 * 2**attempt, 5))
        raise TeacherError(f"{self.config.base_url} answered {path} with {reason}")

    async def _ask(self, path: str, body: dict[str, Any] | None) -> str:
        if body is None:
            response: Any = await self._client.models.with_raw_response.list()
        elif path == "completions":
            given = dict(body)
            model, prompt = given.pop("model"), given.pop("prompt")
            create = self._client.completions.with_raw_response.create
            response = await create(model=model, prompt=prompt, extra_body=given)
        else:
            given = dict(body)
            model, messages = given.pop("model"), given.pop("messages")
            create_chat = self._client.chat.completions.with_raw_response.create
            response = await create_chat(model=model, messages=messages, extra_body=given)
        return response.http_response.text

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error") if isinstance(body.get("error"), dict) else body
    return quoted((inner.get("message") if isinstance(inner, dict) else None) or error.message)
