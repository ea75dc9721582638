"""Runs conversations on an OpenAI-compatible endpoint; any failure there is an `EndpointError` of one line."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

from casa_digits.forms import Form, schema_of
from casa_digits.runners import MAX_ANSWER_TOKENS, MAX_CALL_TOKENS, Message, content_items, read_json
from casa_engine.errors import CasaError
from casa_engine.server_address import is_server_address

TIMEOUT_S = 120.0
MAX_SHOWN_CHARACTERS = 200


class EndpointError(CasaError):
    """The endpoint cannot be reached, rejects the request, or does not answer in OpenAI's protocol."""


class EndpointRunner:
    """A running server; see `runners.Runner`.

    Args:
        base_url: Such as http://127.0.0.1:8000/v1.
        model: Its name there; None takes the first one served.
        api_key: The server's key, if it has one.

    Raises:
        EndpointError: There is no such server, it rejects the key, or it serves no such model.
        ModuleNotFoundError: OpenAI's client is not installed.
    """

    def __init__(self, base_url: str, model: str | None = None, api_key: str | None = None) -> None:
        from openai import OpenAI

        check_address(base_url)
        self.base_url = base_url
        self.client = OpenAI(base_url=base_url, api_key=api_key or "none", timeout=TIMEOUT_S)
        listed = self._call(self.client.models.with_raw_response.list)
        models = self._find(listed, "data")
        if not isinstance(models, list):
            raise self._no_openai_server(listed)
        served = [self._find(entry, "id") for entry in models]
        if model is not None and model not in served:
            raise EndpointError(
                f"the server at {base_url} serves no model {model!r}, but {served}. Pass one with --model."
            )
        if not served:
            raise EndpointError(f"{base_url} serves no model. Expected one in its list of models.")
        self.model = model or served[0]

    def answer(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """Return the server's answer; see `runners.Runner`."""
        return self._text(messages, MAX_ANSWER_TOKENS, **({"tools": tools} if tools else {}))

    def fill(self, messages: list[Message], form: Form | None) -> Any:
        """Return the server's JSON, with a schema as its grammar or without; see `runners.Runner`."""
        options: dict[str, Any] = {}
        if form is not None:
            schema = {"name": "answer", "strict": True, "schema": schema_of(form)}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return read_json(self._text(messages, MAX_CALL_TOKENS, **options))

    def call(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message | None:
        """Return the server's call of a tool; see `runners.Runner`."""
        message = self._ask(messages, MAX_CALL_TOKENS, tools=tools, tool_choice="auto")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise self._no_openai_server(message)
        if len(calls) != 1 or message["content"]:
            return None
        function = self._find(calls, 0, "function")
        name, arguments = self._find(function, "name"), self._find(function, "arguments")
        if not isinstance(arguments, str):
            raise self._no_openai_server(message)
        read = {"name": name, "arguments": read_json(arguments)}
        called = {"id": calls[0].get("id"), "type": "function", "function": read}
        return {"role": "assistant", "content": None, "tool_calls": [called]}

    def _text(self, messages: list[Message], max_tokens: int, **options: Any) -> str:
        message = self._ask(messages, max_tokens, **options)
        text = message.get("content")
        if text is not None and not isinstance(text, str):
            raise self._no_openai_server(message)
        return text or ""

    def _ask(self, messages: list[Message], max_tokens: int, **options: Any) -> dict[str, Any]:
        """Return the server's message."""
        reply = self._call(
            self.client.chat.completions.with_raw_response.create,
            model=self.model,
            messages=[_message_for_endpoint(message) for message in messages],
            temperature=0.0,
            max_tokens=max_tokens,
            **options,
        )
        self._find(reply, "choices", 0, "message", "content")
        return self._find(reply, "choices", 0, "message")

    def _call(self, request: Callable[..., Any], **arguments: Any) -> Any:
        """Return the body of an answer, read as JSON."""
        import openai

        try:
            text = request(**arguments).text
        except openai.APITimeoutError as error:
            raise EndpointError(f"{self.base_url} gave no answer within {TIMEOUT_S:.0f} s.") from error
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"the connection to {self.base_url} failed ({one_line(error.__cause__ or error)}). Start a server with "
                "`make serve`, or pass the address of one with --base-url, such as http://127.0.0.1:8000/v1."
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointError(
                f"{self.base_url} refuses the key (HTTP {error.status_code}). Pass the server's key with --api-key."
            ) from error
        except openai.NotFoundError as error:
            raise EndpointError(
                f"{self.base_url} has no {error.request.url.path} (HTTP 404: {one_line(error)}). Expected the address "
                "of an OpenAI-compatible server, which usually ends in /v1."
            ) from error
        except openai.APIStatusError as error:
            raise EndpointError(f"{self.base_url} answered with an error: {one_line(error)}.") from error
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise self._no_openai_server(text) from error

    def _find(self, body: Any, *path: str | int) -> Any:
        """Return the value at a path in an answer."""
        found = body
        for key in path:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError) as error:
                raise self._no_openai_server(body) from error
        return found

    def _no_openai_server(self, body: Any) -> EndpointError:
        """Return the error for an answer that is not OpenAI's protocol."""
        return EndpointError(
            f"{self.base_url} is no OpenAI-compatible server, or its answer was cut: got {one_line(body)!r}. Pass the "
            "address of one with --base-url; it usually ends in /v1."
        )


def check_address(base_url: str) -> None:
    """Reject what is not the address of a server.

    Raises:
        EndpointError: It is none.
    """
    if not is_server_address(base_url):
        raise EndpointError(f"{base_url!r} is not an address. Expected one such as http://127.0.0.1:8000/v1.")


def one_line(words: Any) -> str:
    """Return words on one line, and not too many of them."""
    line = " ".join(str(words).split())
    return line if len(line) <= MAX_SHOWN_CHARACTERS else f"{line[:MAX_SHOWN_CHARACTERS]}..."


def _message_for_endpoint(message: Message) -> Message:
    """Return a message as OpenAI's protocol has it."""
    sent = {**message, "content": [_for_endpoint(item) for item in content_items(message)] or None}
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    return sent


def _for_endpoint(item: dict[str, Any]) -> dict[str, Any]:
    """Return a content item as OpenAI's protocol has it."""
    if item["type"] != "image":
        return item
    buffer = BytesIO()
    item["image"].save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
