"""Small conversations with random pictures, as CasaProcessor takes them."""

import numpy as np
from PIL import Image
from transformers import BatchFeature


def picture(width: int, height: int) -> Image.Image:
    """A random picture, always the same for its size."""
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def user(*items: str | Image.Image) -> dict:
    """A user's message of texts and pictures."""
    content = [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item} for item in items
    ]
    return {"role": "user", "content": content}


def prepare(processor, conversation) -> BatchFeature:
    """What the processor makes of a conversation, or of several."""
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
