"""Export a model to ONNX and ask the export: afterwards neither torch nor vLLM runs it, ONNX Runtime does.

`casa export` and `casa export run` do the same from a terminal (docs/export.md).

    python examples/export_and_run.py digits-onnx          # about a minute
"""

import argparse
from pathlib import Path

from PIL import Image

from casa_engine.checkpoints import load_processor
from casa_engine.digits import checkpoint_path
from casa_export.exported_model import ExportedModel
from casa_export.exporter import export_checkpoint

DIGITS = Path(__file__).parent / "digits.png"


def main() -> None:
    """Export and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the export goes")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path(), help="default: the embedded model")
    parser.add_argument("--image", type=Path, default=DIGITS)
    parser.add_argument("--question", default="Read the digits.")
    options = parser.parse_args()

    manifest = export_checkpoint(options.checkpoint, options.folder)
    print("graphs:", ", ".join(manifest.graphs))

    model, processor = ExportedModel.load(options.folder), load_processor(options.folder)
    image = Image.open(options.image).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": options.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=prompt)
    ids = model.generate(**inputs, max_new_tokens=16)
    print(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
