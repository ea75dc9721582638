"""Show a model one image after another in one conversation, then ask about the first.

The model sees the latest image alone. Its answer about the first one is text, which stays in its context:
an old image costs no memory.

    casa serve                                  # in another terminal
    python examples/chat_about_images.py
"""

import argparse
from pathlib import Path

from chat_with_image import image_part
from openai import OpenAI

FOLDER = Path(__file__).parent


def main() -> None:
    """Talk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="*", default=[FOLDER / "digits.png", FOLDER / "more_digits.png"])
    parser.add_argument("--question", default="Read the digits.", help="asked about every image")
    parser.add_argument("--last", default="What did you read first?", help="asked at the end")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    options = parser.parse_args()

    client = OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    messages = []

    def ask(*content: dict) -> str:
        messages.append({"role": "user", "content": list(content)})
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        return answer.choices[0].message.content

    for path in options.images:
        print(f"{path.name}: {ask(image_part(path), {'type': 'text', 'text': options.question})}")
    print(f"{options.last} {ask({'type': 'text', 'text': options.last})}")


if __name__ == "__main__":
    main()
