"""`casa-export` on a folder with a good export, an engine and files of others: refused, interrupted, repeated."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from casa_engine.errors import OutputError
from casa_engine.staged_folder import StagedFolder
from casa_export import cli, exporter, trt_builder, trt_package, validation
from casa_export.engine_cache import EngineCache
from casa_export.errors import ExportError, ManifestError
from casa_export.export_folder import owned_files, stage_export
from casa_export.exported_model import ExportedModel
from casa_export.manifest import folder_hash, read_manifest
from casa_export.trt_manifest import Engine, EngineManifest
from casa_export.trt_runner import load_trt_model
from casa_export.validation import Comparison
from exports import LIMITS, checkpoint, export

LIMIT_OPTIONS = [f"--max-{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Every path with its contents, a link with where it leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def source() -> Path:
    return checkpoint("qwen", "ca_tv")


@pytest.fixture
def out(tmp_path) -> Path:
    """An export with engines and files of others."""
    folder = shutil.copytree(export("qwen", "ca_tv"), tmp_path / "work" / "out")
    (folder / "engines").mkdir()
    engines = {}
    manifest = read_manifest(folder)
    for graph in manifest.graphs:
        (folder / f"engines/{graph}.engine").write_text(f"engine of {graph}")
        digest = trt_builder.file_hash(folder / f"engines/{graph}.engine")
        known = trt_builder.graph_hashes(manifest, graph)
        engines[graph] = Engine(f"{graph}.engine", f"key of {graph}", digest, known, ())
    EngineManifest("tensorrt_rtx", "1", ("8.9",), engines).write(folder / "engines")
    (folder / "notes.txt").write_text("mine")
    (folder / "engines" / "timing.cache").write_text("mine too")
    (folder / "results").mkdir()
    (folder / "results" / "run 1.csv").write_text("1,2")
    (tmp_path / "work" / "thesis.tex").write_text("elsewhere")
    (folder / "thesis.tex").symlink_to(tmp_path / "work" / "thesis.tex")
    return folder


FOREIGN = {"notes.txt", "engines/timing.cache", "results/run 1.csv", "thesis.tex"}


def refused(arguments: list, folder: Path, capsys) -> str:
    """Run a command that fails: one sentence, status 1, nothing changed. Return the sentence."""
    before = tree(folder)
    assert cli.main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert tree(folder) == before
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("casa-export: ") and last.endswith(".")
    return last


BAD_OPTIONS = {
    "batch": (["--max-batch=0"], "limit batch is 0"),
    "image": (["--max-image-tokens=0"], "limit image_tokens is 0"),
    "huge": (["--max-image-tokens=1000000000000", "--max-call-image-tokens=5"], "below image_tokens"),
    "prompts": (["--validate-prompts=-1"], "expected a whole number from 0"),
    "text": (["--max-text-tokens=80"], "the validation needs 88"),
    "tiny": (["--max-image-tokens=2"], "the validation needs 6"),
    "window": (["--max-image-tokens=9", "--max-call-image-tokens=9"], "the validation needs 10"),
    "capability": (["--compute-capability", "8.9"], "add --trt"),
    "cache": (["--engine-cache", "cache"], "add --trt"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_written(source, out, name, capsys):
    options, words = BAD_OPTIONS[name]
    assert words in refused([source, out, *options], out.parent, capsys)
    assert words in refused([source, out.parent / "a/new/one", *options], out.parent, capsys)


def test_gpu_that_tensorrt_does_not_know_is_refused_at_once(source, out, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'casa-engine[trt]'")
    options = [source, out, "--trt", "tensorrt_rtx", "--compute-capability"]
    assert "'9.0'" in refused([*options, "9.0"], out.parent, capsys)
    assert "'x'" in refused([*options, "x"], out.parent, capsys)
    cache = out.parent / "thesis.tex" / "cache"
    assert "cannot be made" in refused([*options, "8.9", "--engine-cache", cache], out.parent, capsys)


def test_engines_asked_for_without_a_builder(source, out, capsys, monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'casa-engine[trt]'")
    monkeypatch.setattr(trt, "Builder", lambda logger: None)  # what TensorRT gives where there is no GPU
    assert "has no builder here" in refused([source, out, "--trt", "tensorrt_rtx"], out.parent, capsys)
    for name in trt_package.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    assert "no TensorRT" in refused([source, out, "--trt"], out.parent, capsys)


def test_checkpoint_of_wrong_shapes(source, out, tmp_path, capsys):
    wrong = shutil.copytree(source, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name][:1].clone()}, wrong / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} has shape" in refused([wrong, out], out.parent, capsys)


def test_folders_that_are_not_exports(source, tmp_path, capsys):
    for content in ("{}", "[]", "", "\0", '{"format_version": 1, "files": {"notes.txt": {}}}'):
        folder = tmp_path / "w"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "manifest.json").write_text(content)
        (folder / "notes.txt").write_text("mine")
        assert "did not write" in refused([source, folder], tmp_path, capsys)
        refused([source, folder, "--max-batch", "0"], tmp_path, capsys)


def test_places_that_cannot_be(source, tmp_path, capsys):
    copy = shutil.copytree(source, tmp_path / "outer" / "checkpoint")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(copy)
    for out in (copy, copy / "onnx", copy.parent, tmp_path / "link", tmp_path / "link" / "x"):
        assert "within each other" in refused([copy, out], tmp_path, capsys)
    assert "is a file" in refused([copy, tmp_path / "file"], tmp_path, capsys)
    assert "Not a directory" in refused([copy, tmp_path / "file" / "out"], tmp_path, capsys)
    assert "File name too long" in refused([copy, tmp_path / ("x" * 300)], tmp_path, capsys)


def fail(error: BaseException):
    """Stand in for an operation that meets this error."""

    def operation(*arguments, **options):
        raise error

    return operation


FAULTS = {
    "interrupted": (KeyboardInterrupt(), "interrupted"),
    "full": (OSError(28, "No space left on device", "decoder.onnx"), "No space left on device (decoder.onnx)"),
    "full in Rust": (Exception("No space left on device (os error 28)"), "No space left on device"),
    "full by limit": (OSError(27, "File too large"), "File too large"),
    "differs": (ExportError("the graphs differ."), "the graphs differ"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("where", ["export_graph", "folder_hash"])
def test_failure_in_the_middle(source, out, name, where, capsys, monkeypatch):
    """Each writer of a library is real in benchmarks/export_faults.py; here each of their errors."""
    error, words = FAULTS[name]
    if where == "folder_hash":
        monkeypatch.setattr(exporter, "export_graph", lambda model, spec, path: path.write_text("a graph"))
    monkeypatch.setattr(exporter, where, fail(error))
    assert words in refused([source, out], out.parent, capsys)
    assert words in refused([source, out.parent / "new"], out.parent, capsys)


def test_failed_validation_leaves_the_good_export(source, out, capsys, monkeypatch):
    monkeypatch.setattr(exporter, "export_graph", lambda model, spec, path: path.write_text("a graph"))
    monkeypatch.setattr(validation, "validate", lambda *arguments: [Comparison("decoder", float("nan"), 0)])
    assert "the graphs differ" in refused([source, out], out.parent, capsys)


def test_new_export_takes_its_place(source, out):
    """A real one, over one with engines: files of others stay, the older engines go."""
    old = tree(out)
    assert cli.main([str(source), str(out), "--no-validate", *LIMIT_OPTIONS, "--max-batch=2"]) == 0
    new = tree(out)
    assert {name: new[name] for name in FOREIGN} == {name: old[name] for name in FOREIGN}
    assert not [name for name in new if name.endswith(".engine")] and "engines/engines.json" not in new
    assert ExportedModel.load(out, num_threads=1).limits.batch == 2
    assert {path.name for path in out.parent.iterdir()} == {"out", "thesis.tex"}
    with pytest.raises(ManifestError, match=r"no engines\.json"):
        load_trt_model(out)


def test_engines_of_other_graphs_are_not_loaded(out):
    """As an older casa-export left them: beside graphs that they were not built from."""
    manifest = json.loads((out / "manifest.json").read_text())
    graph = (out / "image_kv.onnx").read_bytes()
    (out / "image_kv.onnx").write_bytes(graph + b"\x72\x00")  # an empty field, which changes nothing but the hash
    known = {"sha256": trt_builder.file_hash(out / "image_kv.onnx"), "size_bytes": len(graph) + 2}
    manifest["files"]["image_kv.onnx"] = known
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="engine of image_kv was not built from the graph"):
        load_trt_model(out)
    content = json.loads((out / "engines/engines.json").read_text())
    for engine in content["engines"].values():
        del engine["graph"]
    (out / "engines/engines.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="Build the engines again"):
        load_trt_model(out)


def test_second_export_at_the_same_time(source, out, capsys):
    with stage_export(source, out, 0):
        before = tree(out)
        assert cli.main([str(source), str(out)]) == 1
        assert "another run is writing" in capsys.readouterr().err and tree(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(files={}), "lists no file of graph vision, image_kv, decoder"),
        (lambda m: m["files"].pop("decoder.onnx"), "lists no file of graph decoder"),
        (lambda m: m.update(graphs={}), "lists no file of graph"),
        (lambda m: m["files"].update({"../thesis.tex": {"sha256": "", "size_bytes": 9}}), "which is not in"),
        (lambda m: m.update(format_version="two"), "is not a manifest"),
        (lambda m: m.update(axes=[]), "lacks or misnames"),
        (lambda m: m["limits"].update(batch=0), "lacks or misnames"),
        (lambda m: m["limits"].update(batch=True), "lacks or misnames"),
        (lambda m: m["limits"].update(batch="4"), "lacks or misnames"),
        (lambda m: m.update(format_version=True), "is not a manifest"),
        (lambda m: m.update(format_version=float("inf")), "is not a manifest"),
        (lambda m: m.update(model=["fp32"]), "lacks or misnames"),
        (lambda m: m["model"].update(dtype=["fp32"]), "lacks or misnames"),
        (lambda m: m.update(source="x", versions=5), "lacks or misnames"),
        (lambda m: m["axes"]["decoder"].update(batch=[1]), "lacks or misnames"),
        (lambda m: m["axes"]["decoder"].update(batch=[1, "4"]), "lacks or misnames"),
        (lambda m: m["graphs"]["decoder"].update(inputs={"name": 5}), "lacks or misnames"),
        (lambda m: m["graphs"]["decoder"]["inputs"][0].update(dtype=5), "lacks or misnames"),
        (lambda m: m["files"]["decoder.onnx"].update(size_bytes="1"), "lacks or misnames"),
        (lambda m: m["files"].update({"/etc/hostname": {"sha256": "", "size_bytes": 9}}), "which is not in"),
        (lambda m: m["files"].update(engines={"sha256": "", "size_bytes": 9}), "is missing"),
    ],
)
def test_manifests_that_do_not_fit(out, change, words):
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=words):
        ExportedModel.load(out)


def test_manifest_that_lists_files_of_others(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["../thesis.tex"] = {"sha256": "", "size_bytes": 9}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "../thesis.tex" in owned_files(out)
    with StagedFolder(out, "manifest.json", owned_files) as staged:
        (staged.path / "manifest.json").write_text("{}")
        staged.commit()
    assert (out.parent / "thesis.tex").read_text() == "elsewhere"


def test_read_only_folder(source, out):
    """As a user who may not write there: root may, so a mount is read-only."""
    work = out.parent
    if subprocess.run(["unshare", "-m", "mount", "--bind", work, work], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    command = f'mount --bind "{work}" "{work}" && mount -o remount,ro,bind "{work}" && "$@"'
    exporting = [sys.executable, "-m", "casa_export.cli", source, out]
    before = tree(work)
    run = subprocess.run(["unshare", "-m", "sh", "-c", command, "sh", *exporting], capture_output=True, text=True)
    assert run.returncode == 1 and tree(work) == before
    assert (
        run.stderr.splitlines()[-1]
        == f"casa-export: {out} is not writable. Change its permissions, or name another folder."
    )
    assert "Traceback" not in run.stderr


def test_needed_space_is_checked_first(source, out):
    with pytest.raises(OutputError, match="Free some space"):
        stage_export(source, out, 10**18).__enter__()


@pytest.mark.parametrize("text", ["5", "null", "[]", "[" * 100_000, "\xff"])
def test_manifest_that_is_none(source, out, text, capsys):
    (out / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match="is not a manifest"):
        read_manifest(out)
    assert "did not write" in refused([source, out], out.parent, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["engines"]["decoder"].update(file=["decoder.engine"]),
        lambda m: m["engines"]["decoder"].update(file=5),
        lambda m: m["engines"]["decoder"].update(file="../notes.txt"),
        lambda m: m["engines"]["decoder"].update(key={}),
        lambda m: m["engines"]["decoder"].update(sha256=None),
        lambda m: m["engines"]["decoder"].update(graph="x"),
        lambda m: m["engines"]["decoder"].update(profiles=[{"name": "x", "shapes": 5}]),
        lambda m: m["engines"].update(decoder=5),
        lambda m: m.update(engines=["decoder"]),
        lambda m: m.update(package=None),
    ],
)
def test_engine_manifest_of_other_types(out, change):
    """Its engines are nobody's then: they stay where they are, and are not loaded."""
    path = out / "engines" / "engines.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="cannot be read"):
        load_trt_model(out)
    before = tree(out)
    with StagedFolder(out, "manifest.json", owned_files) as staged:
        (staged.path / "manifest.json").write_text("{}")
        staged.commit()
    assert tree(out / "engines") == {
        name.removeprefix("engines/"): data for name, data in before.items() if name.startswith("engines/")
    }


def test_names_that_are_no_text_or_lead_nowhere(source, out, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (b"\xff", b"\xff/deeper", b"loop", b"new/" + b"x" * 250, b"x" * 300):
        refused([source, tmp_path / os.fsdecode(name)], tmp_path, capsys)
    assert "no checkpoint folder" in refused([tmp_path / "loop", out], tmp_path, capsys)


def test_checkpoint_of_a_name_that_is_no_text(source, tmp_path, capsys):
    """Read, or refused in a sentence; a file of such a name in it is hashed like all others."""
    odd = shutil.copytree(source, tmp_path / os.fsdecode(b"model \xff"))
    refused([odd, tmp_path / "new"], tmp_path, capsys)
    plain = shutil.copytree(source, tmp_path / "model")
    before = folder_hash(plain)
    (plain / os.fsdecode(b"\xff.txt")).write_text("mine")
    assert folder_hash(plain) != before


def test_link_to_an_export(source, out, tmp_path):
    """The link stays a link; what it leads to is replaced."""
    (tmp_path / "link").symlink_to(out)
    with stage_export(source, tmp_path / "link", 0) as staged:
        shutil.copytree(export("qwen", "ca_tv"), staged.path, dirs_exist_ok=True)
        staged.commit()
    assert (tmp_path / "link").is_symlink() and os.path.samefile(tmp_path / "link", out)
    assert FOREIGN <= tree(out).keys() and "engines/engines.json" not in tree(out)
    ExportedModel.load(tmp_path / "link")


def test_engine_cache_and_export_are_apart(source, out, capsys, monkeypatch):
    monkeypatch.setattr(trt_builder, "engine_targets", lambda *arguments: None)
    for cache in (out, out / "cache"):
        assert "Name a folder elsewhere" in refused([source, out, "--trt", "--engine-cache", cache], out.parent, capsys)
    refused([source, out, "--trt", "--engine-cache", out.parent / "thesis.tex"], out.parent, capsys)


def test_folder_in_the_place_of_a_cached_engine(tmp_path):
    cache = EngineCache(tmp_path)
    (tmp_path / "key-0123.engine").mkdir()
    assert cache.find("key") is None and (tmp_path / "key-0123.engine").is_dir()
