"""Ask a running server about an image, and print the answer while it is written.

casa serve                                  # in another terminal
python examples/chat_with_image.py          # or: ... my.jpg --question "What is this?"
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI

DIGITS = Path(__file__).parent / "digits.png"


def image_part(path: Path) -> dict:
    """Return an image file as a part of a message: the file itself, in a data URL."""
    kind = mimetypes.guess_type(path)[0]
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def main() -> None:
    """Ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path, nargs="?", default=DIGITS)
    parser.add_argument("--question", default="Read the digits.")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    options = parser.parse_args()

    client = OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    content = [image_part(options.image), {"type": "text", "text": options.question}]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], temperature=0, stream=True
    )
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
