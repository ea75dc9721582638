"""Asks a server for structured answers through five Python SDKs: how often do they end with the right values?

    python images.py images
    python -m venv sdks && sdks/bin/pip install -r requirements.txt
    casa-serve &
    sdks/bin/python clients.py http://127.0.0.1:8000/v1 images [WAY ...]

Each way asks about every image, in an environment of its own without casa-engine. instructor needs another openai than
the rest: requirements_instructor.txt, for the ways `openai_*` and `instructor_*`. Vercel's SDK is in vercel.mjs.
"""

import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

MODEL, KEY = "casa-tiny-digits", "none"
QUESTION, TOOL_QUESTION = "Read the digits.", "Report the digits."


class Reading(BaseModel):
    """What an image shows."""

    digits: list[int]
    count: int


class Picture:
    """An image and what it shows, by its file's name."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.url = "data:image/png;base64," + base64.b64encode(self.data).decode()
        digits = [int(digit) for digit in path.stem.split("-")[1].split("_")]
        self.reading = Reading(digits=digits, count=len(digits))

    def messages(self, question: str = QUESTION) -> list[dict[str, Any]]:
        """Return the conversation of OpenAI's protocol that asks about it."""
        parts = [{"type": "image_url", "image_url": {"url": self.url}}, {"type": "text", "text": question}]
        return [{"role": "user", "content": parts}]


def openai_parse(url: str, picture: Picture) -> Any:
    """openai: `chat.completions.parse` with a Pydantic model."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=KEY)
    answer = client.chat.completions.parse(
        model=MODEL, messages=picture.messages(), response_format=Reading, temperature=0
    )
    return answer.choices[0].message.parsed


def openai_responses(url: str, picture: Picture) -> Any:
    """openai: `responses.parse` with a Pydantic model."""
    from openai import OpenAI

    parts = [{"type": "input_image", "image_url": picture.url}, {"type": "input_text", "text": QUESTION}]
    return (
        OpenAI(base_url=url, api_key=KEY)
        .responses.parse(model=MODEL, input=[{"role": "user", "content": parts}], text_format=Reading, temperature=0)
        .output_parsed
    )


def instructor_tools(url: str, picture: Picture) -> Any:
    """instructor: its default, a forced tool."""
    return _instructor(url, picture)


def instructor_json_schema(url: str, picture: Picture) -> Any:
    """instructor: a JSON schema."""
    import instructor

    return _instructor(url, picture, mode=instructor.Mode.JSON_SCHEMA)


def _instructor(url: str, picture: Picture, **options: Any) -> Any:
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=url, api_key=KEY), **options)
    return client.chat.completions.create(
        model=MODEL, messages=picture.messages(), response_model=Reading, temperature=0, max_retries=0
    )


def pydantic_ai(url: str, picture: Picture) -> Any:
    """pydantic-ai: its default, an output tool."""
    return _agent(url, picture, Reading)


def pydantic_ai_list(url: str, picture: Picture) -> Any:
    """pydantic-ai: a bare list."""
    digits = _agent(url, picture, list[int])
    return Reading(digits=digits, count=len(digits))


def pydantic_ai_native(url: str, picture: Picture) -> Any:
    """pydantic-ai: a JSON schema."""
    from pydantic_ai import NativeOutput

    return _agent(url, picture, NativeOutput(Reading))


def _agent(url: str, picture: Picture, output: Any) -> Any:
    from pydantic_ai import Agent, BinaryContent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    agent = Agent(model, output_type=output, model_settings={"temperature": 0}, retries=0)
    return agent.run_sync([BinaryContent(picture.data, media_type="image/png"), QUESTION]).output


def langchain(url: str, picture: Picture) -> Any:
    """LangChain: `with_structured_output`, a JSON schema."""
    return _langchain(url).with_structured_output(Reading).invoke(picture.messages())


def langchain_tools(url: str, picture: Picture) -> Any:
    """LangChain: `with_structured_output` by a tool."""
    return _langchain(url).with_structured_output(Reading, method="function_calling").invoke(picture.messages())


def langchain_agent(url: str, picture: Picture) -> Any:
    """LangChain: a tool of the user's, its result, and the closing answer."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def report(digits: list[int]) -> str:
        """Takes the digits."""
        return "ok"

    model = _langchain(url).bind_tools([report])
    asked = HumanMessage(picture.messages(TOOL_QUESTION)[0]["content"])
    call = model.invoke([asked])
    (used,) = call.tool_calls
    end = model.invoke([asked, call, ToolMessage("ok", tool_call_id=used["id"])])
    if end.content.split() != [str(digit) for digit in used["args"]["digits"]]:
        return end.content
    return Reading(digits=used["args"]["digits"], count=len(used["args"]["digits"]))


def _langchain(url: str) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url, api_key=KEY, model=MODEL, temperature=0)


def llamaindex(url: str, picture: Picture) -> Any:
    """LlamaIndex: `as_structured_llm`."""
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL, api_base=url, api_key=KEY, is_chat_model=True, is_function_calling_model=True, temperature=0
    )
    blocks = [ImageBlock(image=picture.data, image_mimetype="image/png"), TextBlock(text=QUESTION)]
    return model.as_structured_llm(Reading).chat([ChatMessage(role="user", blocks=blocks)]).raw


WAYS: tuple[Callable[[str, Picture], Any], ...] = (
    openai_parse,
    openai_responses,
    instructor_tools,
    instructor_json_schema,
    pydantic_ai,
    pydantic_ai_list,
    pydantic_ai_native,
    langchain,
    langchain_tools,
    langchain_agent,
    llamaindex,
)


def main() -> None:
    """Ask in every way, or in those that are named; print how many answers are right, and what else came."""
    url, folder, *names = sys.argv[1:]
    pictures = [Picture(path) for path in sorted(Path(folder).glob("*.png"))]
    if not pictures:
        sys.exit(f"The folder {folder!r} has no images; `python images.py {folder}` writes them.")
    ways = {way.__name__: way for way in WAYS}
    if unknown := set(names) - ways.keys():
        sys.exit(f"There is no way {sorted(unknown)}; there are {list(ways)}.")
    for way in (ways[name] for name in names or ways):
        right, others = 0, []
        for picture in pictures:
            try:
                got = way(url, picture)
            except Exception as error:  # noqa: BLE001 (whatever an SDK raises is its answer)
                got = f"{type(error).__name__}: {str(error)[:200]}"
            values = got.model_dump() if isinstance(got, BaseModel) else got  # instructor returns a class of its own
            is_right = values == picture.reading.model_dump()
            right += is_right
            others += [] if is_right else [f"{got!r} instead of {picture.reading!r}"]
        print(f"{way.__name__:24} {right} of {len(pictures)}", *others, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
