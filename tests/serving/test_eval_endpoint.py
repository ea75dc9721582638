"""`casa eval` against a real server, for all nine tasks; an error of one sample ends no run."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from casa_eval.cli import main
from casa_eval.tasks import TASKS
from eval_sets import digit_image, image_cell, read_report, rows_of, write_jsonl, write_set
from image_files import data_url, encoded

pytestmark = pytest.mark.vllm
NUM_SAMPLES = 4
REFUSED = 2


def noise():
    """Return an image whose PNG is larger than the server takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (896, 896, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


@pytest.fixture(scope="module")
def answers(client):
    """What the server answers to a prompt about an image, asked by OpenAI's own client."""

    def said(prompt, image):
        png = BytesIO()
        Image.open(BytesIO(image)).convert("RGB").save(png, "PNG")
        content = [
            {"type": "image_url", "image_url": {"url": data_url(png.getvalue())}},
            {"type": "text", "text": prompt},
        ]
        messages = [{"role": "user", "content": content}]
        model = client.models.list().data[0].id
        done = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=128)
        return done.choices[0].message.content

    return said


def evaluate(server, folder, *arguments):
    """Run the command; return its status."""
    given = ["--url", server.url, "--data", str(folder), "--output", str(folder / "out"), "--concurrency", "3"]
    return main([*arguments, *given])


def test_all_tasks_score_what_the_server_says(server, answers, tmp_path, capsys):
    for task in TASKS:
        rows = rows_of(task, ["yes"] * NUM_SAMPLES)
        write_set(tmp_path, task, rows)
    assert evaluate(server, tmp_path, "all") == 0
    report = read_report(tmp_path / "out")
    assert report["complete"]
    assert report["model"] == "casa-tiny-digits"
    assert report["settings"]["image_size"] == 896
    assert list(report["tasks"]) == list(TASKS)
    assert [(sample["task"], sample["id"]) for sample in report["samples"]] == [
        (task, number) for task in TASKS for number in range(NUM_SAMPLES)
    ]
    for sample in report["samples"]:
        assert sample["answer"] == answers(sample["prompt"], digit_image(sample["id"]))
    assert len({sample["answer"] for sample in report["samples"]}) > 1
    assert {figures["samples"] for figures in report["tasks"].values()} == {NUM_SAMPLES}
    shown = capsys.readouterr().out
    for task in TASKS.values():
        assert f"| {task.title} | {task.metric} | {NUM_SAMPLES} | 0 |" in shown
    assert "| CASA-Helium1-VL-2B | 77.6 |" in shown


def test_right_answers_are_right_and_wrong_ones_wrong(server, answers, tmp_path):
    """Of four samples, two have what the server says as their answer."""
    prompt = TASKS["chartqa"].prompt({"question": "Read the digits."})
    said = [answers(prompt, digit_image(number)) for number in range(NUM_SAMPLES)]
    assert all(said)
    write_set(tmp_path, "chartqa", rows_of("chartqa", [said[0], "-7", said[2], "-7"]))
    assert evaluate(server, tmp_path, "chartqa") == 0
    figures = read_report(tmp_path / "out")["tasks"]["chartqa"]
    assert figures["score"] == 50
    assert figures["groups"] == {"human_test": 100, "augmented_test": 0}


def test_one_refused_sample_is_named_and_asked_again_on_resume(server, tmp_path, capsys):
    rows = rows_of("gqa", ["1"] * NUM_SAMPLES)
    rows[REFUSED]["image"] = image_cell(noise())
    write_jsonl(tmp_path / "gqa" / "testdev.jsonl", rows)
    assert evaluate(server, tmp_path, "gqa") == 1
    out, err = capsys.readouterr()
    assert "samples without an answer: gqa 1" in err
    assert "| GQA | exact match | 4 | 1 |" in out
    report = read_report(tmp_path / "out")
    assert report["complete"]
    (failed,) = [sample for sample in report["samples"] if "error" in sample]
    assert failed["id"] == REFUSED
    assert "refuses a request" in failed["error"]
    assert "The image file is too large" in failed["error"]
    # The same command again writes over nothing, and going on asks the one sample alone.
    assert evaluate(server, tmp_path, "gqa") == 1
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "gqa" / f"{REFUSED}.png").write_bytes(digit_image(REFUSED))
    answered = [sample for sample in report["samples"] if "error" not in sample]
    assert evaluate(server, tmp_path, "gqa", "--resume") == 0
    again = read_report(tmp_path / "out")
    assert again["tasks"]["gqa"]["failed"] == 0
    assert [sample for sample in again["samples"] if sample["id"] != REFUSED] == answered
    assert len(again["samples"]) == NUM_SAMPLES
    lines = (tmp_path / "out.samples.jsonl").read_text().splitlines()
    assert len(lines) == 1 + NUM_SAMPLES
    assert json.loads(lines[-1])["id"] == REFUSED


def test_a_server_that_has_no_such_model_ends_the_run(server, tmp_path, capsys):
    write_set(tmp_path, "mme", rows_of("mme", ("yes", "no")))
    assert evaluate(server, tmp_path, "mme", "--served-model", "other") == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "refuses a request" in sentence
    assert not list(tmp_path.glob("out*"))


def test_nobody_at_the_address(tmp_path, capsys):
    write_set(tmp_path, "mme", rows_of("mme", ("yes", "no")))
    given = ["--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["mme", "--url", "http://127.0.0.1:9", *given]) == 1
    assert "does not answer as an OpenAI-compatible server does" in capsys.readouterr().err
    assert main(["mme", "--url", "nowhere", *given]) == 1
    assert "is not the address of a server" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
