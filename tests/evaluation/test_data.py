"""Local data: the published formats, what is not one, and images that cannot be shown."""

import json
from io import BytesIO

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from casa_engine.errors import InputError
from casa_eval import data
from casa_eval.cli import main
from casa_eval.data import DataSet
from casa_eval.images import UNIT_PX, decode, scaled_down
from casa_eval.runner import Protocol, open_questions
from casa_eval.sample_log import SampleLog
from casa_eval.tasks import TASKS, ai2d_references
from eval_sets import FILES, GQA_IMAGES, digit_image, image_cell, rows_of, write_jsonl, write_parquet, write_set
from image_files import encoded, png_bomb

pytestmark = pytest.mark.unit
ANSWERS = ("yes", "no", "yes", "no", "no")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with all nine sets."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_set(folder, task, rows_of(task, ANSWERS))
    return folder


@pytest.fixture
def log(tmp_path):
    """An empty log."""
    opened = SampleLog(tmp_path / "log.samples.jsonl", {})
    yield opened
    opened.close()


def questions(dataset, log):
    """Questions of a set, read to its end."""
    with dataset.opened():
        return list(open_questions(dataset, Protocol(), log))


def refused(folder, *words, capsys, task="mme"):
    """Run the command on data that it must refuse before it asks anybody; return its one sentence."""
    capsys.readouterr()
    output = folder.parent / "out"
    assert main([task, "--url", "http://127.0.0.1:9", "--data", str(folder), "--output", str(output)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("casa-eval: ")
    assert [word for word in words if word not in said] == [], said
    assert not list(folder.parent.glob("out*"))
    return said


@pytest.mark.parametrize("task", TASKS)
def test_the_published_format_is_read(task, published, log):
    asked = questions(DataSet(TASKS[task], published, is_alone=False), log)
    assert [request.key[0]["id"] for request in asked] == list(range(5))
    for number, request in enumerate(asked):
        (message,) = request.messages
        image, text = message["content"]
        expected = Image.open(BytesIO(digit_image(number))).convert("RGB")
        assert np.array_equal(np.asarray(image["image"]), np.asarray(expected))
        assert text["text"] == request.key[0]["prompt"]
        assert request.max_new_tokens == 128
    references = [request.key[0]["references"][0] for request in asked]
    assert references == (["B"] * 5 if task == "ai2d" else list(ANSWERS))
    assert not len(log)


@pytest.mark.parametrize("task", ["chartqa", "textvqa", "mme", "gqa"])
def test_jsonl_is_the_same_rows(task, tmp_path, log):
    rows = rows_of(task, ANSWERS)
    write_jsonl(tmp_path / task / f"{TASKS[task].split}.jsonl", rows)
    asked = questions(DataSet(TASKS[task], tmp_path, is_alone=False), log)
    assert [request.key[0]["id"] for request in asked] == list(range(5))
    assert len({np.asarray(request.messages[0]["content"][0]["image"]).tobytes() for request in asked}) == 5


def test_the_folder_of_the_set_itself_will_do_for_one_task(published):
    assert DataSet(TASKS["mme"], published / "MME", is_alone=True).paths
    assert DataSet(TASKS["docvqa"], published / "DocVQA", is_alone=True).paths
    assert DataSet(TASKS["infographic_vqa"], published / "DocVQA", is_alone=True).paths
    with pytest.raises(InputError, match="no test"):
        DataSet(TASKS["mme"], published / "MME", is_alone=False)


def test_two_sets_of_one_download_are_not_taken_for_each_other(tmp_path, capsys):
    write_set(tmp_path, "docvqa", rows_of("docvqa", ANSWERS))
    assert DataSet(TASKS["docvqa"], tmp_path, is_alone=True).paths
    refused(tmp_path, "InfographicVQA/validation*.parquet", capsys=capsys, task="infographic_vqa")
    # Their columns are those of a set that is not there, too.
    refused(tmp_path, "no validation*.parquet", capsys=capsys, task="textvqa")
    # Nor where the files lie in the folder that both are named by.
    write_parquet(tmp_path / "two" / "DocVQA" / "validation.parquet", rows_of("docvqa", ANSWERS))
    refused(tmp_path / "two", "InfographicVQA/", capsys=capsys, task="infographic_vqa")


def test_several_files_are_one_split_in_their_order(tmp_path, log):
    rows = rows_of("mme", ANSWERS)
    for number in range(3):
        write_parquet(tmp_path / "mme" / f"test-0000{number}-of-00003.parquet", rows[2 * number : 2 * number + 2])
    write_parquet(tmp_path / "mme" / "testdev-00000.parquet", rows)
    write_parquet(tmp_path / "mme" / ".cache" / "test-00009.parquet", rows)
    asked = questions(DataSet(TASKS["mme"], tmp_path, is_alone=False), log)
    assert [request.key[0]["references"] for request in asked] == [[answer] for answer in ANSWERS]


def test_a_set_is_not_held_in_memory(tmp_path, monkeypatch):
    """Rows are read a few at a time: of a file in one group of rows, the first is there before the last is read."""
    rows = rows_of("mme", ANSWERS[:2]) * 100
    path = write_set(tmp_path, "mme", rows)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    sizes = []

    def batches(file, batch_size, **options):
        for batch in original(file, batch_size, **options):
            sizes.append(batch.num_rows)
            yield batch

    original = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", batches)
    samples = DataSet(TASKS["mme"], tmp_path, is_alone=True).samples()
    next(samples)
    assert sizes == [data.BATCH_ROWS]


def test_data_that_is_none(tmp_path, capsys):
    refused(tmp_path / "nowhere", "is no folder", capsys=capsys)
    empty = tmp_path / "data"
    empty.mkdir()
    refused(empty, "there is no test*.parquet and no test*.jsonl", "lmms-lab/MME", capsys=capsys)
    (empty / "test.parquet").write_bytes(b"PAR1 but not really")
    refused(empty, "test.parquet is no Parquet file, or damaged", capsys=capsys)
    whole = write_set(tmp_path / "whole", "mme", rows_of("mme", ANSWERS)).read_bytes()
    (empty / "test.parquet").write_bytes(whole[: len(whole) // 2])
    refused(empty, "test.parquet is no Parquet file, or damaged", capsys=capsys)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_named(kind, tmp_path, capsys):
    rows = [{name: cell for name, cell in row.items() if name != "category"} for row in rows_of("mme", ANSWERS)]
    write = write_parquet if kind == "parquet" else write_jsonl
    write(tmp_path / "data" / f"test.{kind}", rows)
    refused(tmp_path / "data", f"test.{kind} lacks category; it has the columns", "question_id", capsys=capsys)


def test_lines_that_are_no_rows(tmp_path, capsys, monkeypatch):
    path = tmp_path / "data" / "test.jsonl"
    path.parent.mkdir()
    for line, words in (("{", "line 1 is no JSON"), ("[1]", "line 1 is list"), ("[" * 100_000, "line 1 is no JSON")):
        path.write_text(line)
        refused(path.parent, words, capsys=capsys)
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 100)
    path.write_text(json.dumps({"question": "x" * 100}))
    refused(path.parent, "line 1 has more than 100 bytes", capsys=capsys)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_empty_set_is_said(kind, tmp_path, log):
    path = tmp_path / "data" / f"test.{kind}"
    path.parent.mkdir()
    if kind == "jsonl":
        path.write_text("\n\n")
    else:
        table = pyarrow.Table.from_pylist(rows_of("mme", ANSWERS[:1]))
        pyarrow.parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(InputError, match="holds no sample of mme"):
        questions(DataSet(TASKS["mme"], path.parent, is_alone=True), log)


def test_a_bad_row_is_a_sample_without_an_answer(tmp_path, log):
    bad = {
        1: ({"image": image_cell(b"not an image")}, "neither JPEG, PNG nor WebP"),
        2: ({"image": image_cell(digit_image(0)[:200])}, "damaged or cut off"),
        3: ({"image": image_cell(b"")}, "The image is empty"),
        4: ({"image": {"bytes": None, "path": "gone.png"}}, "'gone.png' cannot be read"),
        5: ({"image": {"bytes": None, "path": "../../secret.png"}}, "expected a path inside"),
        6: ({"image": None}, "image is NoneType"),
        7: ({"image": image_cell(png_bomb(30_000, 3_000))}, "too many pixels"),
        8: ({"answer": "perhaps"}, "answer is 'perhaps'; expected yes or no"),
        9: ({"question": None}, "question is NoneType; expected a text"),
        10: ({"question": "x" * 10_001}, "question has 10,001 characters"),
    }
    rows = rows_of("mme", ["yes"] * 12)
    for number, (cells, _) in bad.items():
        rows[number] |= cells
    write_set(tmp_path, "mme", rows)
    (tmp_path.parent / "secret.png").write_bytes(digit_image(0))
    asked = questions(DataSet(TASKS["mme"], tmp_path, is_alone=True), log)
    assert [request.key[0]["id"] for request in asked] == [0, 11]
    records = {record["id"]: record["error"] for record in log.records("mme")}
    assert records.keys() == bad.keys()
    for number, (_, words) in bad.items():
        assert words in records[number]


def test_an_image_file_that_is_too_large_is_not_read(tmp_path, log):
    write_jsonl(tmp_path / "mme" / "test.jsonl", rows_of("mme", ("yes", "no")))
    with (tmp_path / "mme" / "1.png").open("r+b") as file:
        file.truncate(2**40)  # sparse
    asked = questions(DataSet(TASKS["mme"], tmp_path, is_alone=False), log)
    assert [request.key[0]["id"] for request in asked] == [0]
    (record,) = log.records("mme")
    assert "The image file is too large" in record["error"]


def test_gqa_without_its_images(published, tmp_path, log, capsys):
    rows = rows_of("gqa", ANSWERS)
    write_set(tmp_path, "gqa", rows)
    table = [{"id": row["imageId"], "image": row["image"]} for row in rows[1:]] + [{"id": "n0", "image": None}]
    write_parquet(tmp_path / GQA_IMAGES, table)
    asked = questions(DataSet(TASKS["gqa"], tmp_path, is_alone=False), log)
    assert [request.key[0]["id"] for request in asked] == [1, 2, 3, 4]
    (record,) = log.records("gqa")
    assert "no image 'n0' in the table of images" in record["error"]
    (tmp_path / GQA_IMAGES).unlink()
    refused(tmp_path, "testdev_balanced_images/testdev*.parquet", capsys=capsys, task="gqa")


def test_texts_that_cannot_be_sent_or_counted():
    with pytest.raises(InputError, match="question holds half of a surrogate pair"):
        TASKS["mme"].read_fields({"question": "\ud800 what?", "answer": "yes", "category": "a", "question_id": "1"})
    fields = {"options": ["a", "b"], "answer": "9" * 5_000}
    with pytest.raises(InputError, match="expected the number of one of 2 choices"):
        ai2d_references(fields)


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (897, 896), (20_000, 110), (110, 20_000)])
def test_large_images_are_scaled_down_and_keep_their_shape(size):
    shown = scaled_down(Image.new("RGB", size), 896)
    assert shown.width * shown.height <= 896**2 or min(shown.size) == UNIT_PX
    assert not shown.width % UNIT_PX
    assert not shown.height % UNIT_PX
    if min(size) > 800:
        assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.05)


@pytest.mark.parametrize("size", [(896, 896), (100, 75), (1000, 800), (1, 1)])
def test_other_images_stay_as_they_are(size):
    image = Image.new("RGB", size, "red")
    assert scaled_down(image, 896) is image
    assert decode(encoded(image), 896).size == size


def test_every_file_is_where_its_set_has_it():
    assert FILES.keys() == TASKS.keys()
    for task in TASKS.values():
        assert FILES[task.name].rpartition("/")[2].startswith(f"{task.split}-")
