"""Many users talk to a cluster at once; each one's requests stay on the replica that has its images.

casa serve --ray deploy/cluster.yaml        # in another terminal; or any address of a cluster
python examples/cluster_sessions.py --users 8
"""

import argparse
import asyncio
from pathlib import Path

from chat_with_image import image_part
from openai import AsyncOpenAI

DIGITS = Path(__file__).parent / "digits.png"
QUESTIONS = ("Read the digits.", "How many digits are there?")


async def talk(client: AsyncOpenAI, model: str, user: str) -> None:
    """Ask both questions about one image, and print which replica answered each."""
    messages, lines = [], []
    for number, question in enumerate(QUESTIONS):
        parts = [image_part(DIGITS)] if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        response = await client.chat.completions.with_raw_response.create(
            model=model,
            messages=messages,
            temperature=0,
            # One conversation, one replica: its pages are there already.
            extra_headers={"x-session-id": user},
        )
        answer = response.parse().choices[0].message.content
        messages.append({"role": "assistant", "content": answer})
        session, replica = response.headers["x-casa-session"], response.headers["x-casa-replica"]
        lines.append(f"{question} {answer} ({session}, on {replica})")
    print(f"{user}: {'; '.join(lines)}")


async def main() -> None:
    """Let the users talk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    options = parser.parse_args()
    client = AsyncOpenAI(base_url=options.base_url, api_key="none")
    model = (await client.models.list()).data[0].id
    await asyncio.gather(*(talk(client, model, f"user-{number}") for number in range(options.users)))


if __name__ == "__main__":
    asyncio.run(main())
