"""Small sets in the formats of the published ones, with images of digits: for the tests of `casa eval`."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from casa_digits.data import draw_image, load_samples
from image_files import encoded

# Files of a download of each set from the hub, and their columns beside the image. Other columns are there, too.
FILES = {
    "chartqa": "chartqa/data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet",
    "docvqa": "DocVQA/DocVQA/validation-00000-of-00006.parquet",
    "infographic_vqa": "DocVQA/InfographicVQA/validation-00000-of-00002.parquet",
    "ocrbench": "ocrbench/data/test-00000-of-00001.parquet",
    "textvqa": "textvqa/data/validation-00000-of-00003.parquet",
    "realworldqa": "RealWorldQA/data/test-00000-of-00002.parquet",
    "ai2d": "ai2d/data/test-00000-of-00001.parquet",
    "gqa": "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
    "mme": "MME/data/test-00000-of-00004-a25dbe3b44c4fda6.parquet",
}
GQA_IMAGES = "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
QUESTION = "Read the digits."


def digit_image(seed):
    """Return a PNG of digits that the embedded model has not learnt."""
    drawn = draw_image(np.random.default_rng([20_13, seed]), load_samples(held_out=True))
    return encoded(drawn.to_pil())


def image_cell(data, name="image.png"):
    """Return an image as the hub's Parquet files hold it."""
    return {"bytes": data, "path": name}


def rows_of(task, answers):
    """Return rows of a task's set, about different images, which these are the right answers to (texts)."""
    rows = []
    for number, answer in enumerate(answers):
        row = {"image": image_cell(digit_image(number)), "question": QUESTION}
        fields = {
            "chartqa": {"answer": answer, "type": ("human_test", "augmented_test")[number % 2]},
            "docvqa": {"answers": [answer, "nothing of it"], "questionId": str(number)},
            "infographic_vqa": {"answers": [answer], "questionId": str(number)},
            "ocrbench": {"answer": [answer], "dataset": "IIIT5K", "question_type": "Regular Text Recognition"},
            "textvqa": {"answers": [answer] * 10, "question_id": number},
            "realworldqa": {"answer": answer, "image_path": "x.webp"},
            "ai2d": {"answer": "1", "options": ["none", answer]},
            "gqa": {"answer": answer, "imageId": f"n{number}", "id": str(number)},
            "mme": {"answer": answer, "category": "OCR", "question_id": f"OCR/{number // 2:04}.png"},
        }[task]
        rows.append(row | fields)
    return rows


def write_set(folder, task, rows):
    """Write rows as a download of the set has them; return the file."""
    path = Path(folder) / FILES[task]
    if task == "gqa":
        images = {row["imageId"]: row["image"] for row in rows}
        table = [{"id": name, "image": image} for name, image in images.items()]
        write_parquet(Path(folder) / GQA_IMAGES, table)
        rows = [{name: value for name, value in row.items() if name != "image"} for row in rows]
    write_parquet(path, rows)
    return path


def write_parquet(path, rows):
    """Write a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path, rows):
    """Write a JSONL file, whose images are files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        (path.parent / f"{number}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps(row | {"image": f"{number}.png"}))
    path.write_text("\n".join(lines) + "\n")


def read_report(prefix):
    """Return the report of a run."""
    return json.loads(Path(f"{prefix}.json").read_text())
