# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "torch==2.7.0", "torchvision==0.22.0", "transformers==4.51.3", "einops>=0.8.1", "numpy<2.3", "pillow", "accelerate",
# ]
# ///
"""Writes what a published checkpoint answers with its own code, for `casa checkpoint verify`.

    uv run scripts/reference_outputs.py FOLDER reference.npz

THIS RUNS THE CHECKPOINT'S PYTHON. That is why it is a program of its own, in an environment of its own (the versions
above are those of the models' public scripts), and no part of the engine, which never does. Run it where that code may
run: without a network, without what it should not read.

How the model is called is taken from the public scripts: `model(input_ids, attention_mask, pixel_values=[...],
image_embeds_insertion_points=[...]).logits`. Nobody here could run it on a published checkpoint.
"""

import argparse
import json

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

NUM_IDS, NUM_GREEDY, GRID, POINT = 24, 8, (8, 8), 5
PATCH_VALUES = 588  # 14 x 14 pixels of three colours
TEXT = (
    "The lighthouse stood at the end of the pier, and every evening its keeper climbed the stairs to light the lamp. "
    "When the fog came in from the sea, ships could hear the bell from far away, long before they saw the light."
)


def main() -> None:
    """Run every case and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output", help="reference.npz")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    config = AutoConfig.from_pretrained(options.folder, trust_remote_code=True)
    config.torch_dtype = dtype
    if hasattr(config, "vision_config") and not isinstance(config.vision_config, dict):
        config.vision_config.torch_dtype = dtype  # the remote code builds the vision encoder in float32 without it
    model = AutoModel.from_pretrained(options.folder, config=config, torch_dtype=dtype, trust_remote_code=True)
    model = model.to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder, trust_remote_code=True)
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    generator = np.random.default_rng(0)
    ids = generator.integers(0, max(text), NUM_IDS).tolist()
    pixels = generator.standard_normal((*GRID, PATCH_VALUES)).astype(np.float32)
    arrays = {"pixels": pixels, "text": np.array(text)}
    for name, case_ids, image in (("text", text, None), ("random", ids, None), ("image", ids, pixels)):
        logits = run(model, case_ids, image, options.device, dtype)
        arrays |= {f"{name}.ids": np.array(case_ids), f"{name}.logits": logits}
        arrays[f"{name}.greedy"] = np.array(greedy(model, case_ids, image, options.device, dtype))
    about = {"dtype": options.dtype, "point": POINT, "bos": tokenizer.bos_token_id, "torch": torch.__version__}
    np.savez(options.output, about=np.array(json.dumps(about)), **arrays)
    print(f"{options.output}: 3 cases.")


@torch.no_grad()
def run(model, ids: list, pixels: "np.ndarray | None", device: str, dtype: torch.dtype) -> np.ndarray:
    """Return the logits of a text, float32 (T, vocabulary)."""
    images = {}
    if pixels is not None:
        points = [torch.tensor([POINT], device=device)]
        image = torch.from_numpy(pixels).to(device, dtype)
        images = {"pixel_values": [image], "image_embeds_insertion_points": points}
    for reset in ("reset_ca_streaming_states", "reset_casa_streaming_states"):
        getattr(model, reset, lambda: None)()
    input_ids = torch.tensor([ids], device=device)
    output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids).float(), use_cache=False, **images)
    return output.logits[0].float().cpu().numpy()


def greedy(model, ids: list, pixels: "np.ndarray | None", device: str, dtype: torch.dtype) -> list:
    """Return the next tokens, each of a forward pass over all of the text: without any cache that could be wrong."""
    tokens = list(ids)
    for _ in range(NUM_GREEDY):
        tokens.append(int(run(model, tokens, pixels, device, dtype)[-1].argmax()))
    return tokens[len(ids) :]


if __name__ == "__main__":
    main()
