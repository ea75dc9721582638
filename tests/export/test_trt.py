"""TensorRT without a GPU: real builds with TensorRT-RTX, the engine cache, and everything a runner refuses."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch

from casa_engine.errors import InputError
from casa_export import trt_builder
from casa_export.errors import ExportError, ManifestError, RunnerError
from casa_export.manifest import read_manifest
from casa_export.trt_builder import build_engine, build_engines
from casa_export.trt_manifest import FOLDER_NAME, read_engine_manifest
from casa_export.trt_package import load_tensorrt
from casa_export.trt_profiles import build_profiles
from casa_export.trt_runner import load_trt_model
from exports import KINDS, embedded_export, export

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'casa-engine[trt]'")


@pytest.fixture(scope="module")
def with_engines(tmp_path_factory):
    """A copy of an export, which other tests share, with its engines; each is built once."""

    @functools.cache
    def copy_of(exported):
        folder = shutil.copytree(exported, tmp_path_factory.mktemp("engines") / "export")
        build_engines(folder, "tensorrt_rtx", ("8.9",))
        return folder

    return copy_of


@pytest.mark.parametrize(("backbone", "fusion"), KINDS)
def test_builds_engines_of_every_kind(backbone, fusion, with_engines):
    check_build(with_engines(export(backbone, fusion)))


def test_builds_engines_of_the_embedded_model(with_engines):
    check_build(with_engines(embedded_export()))


def check_build(folder):
    built = build_engines(folder, "tensorrt_rtx", ("8.9",))
    assert read_engine_manifest(folder / FOLDER_NAME) == built
    assert (built.package, built.version, built.compute_capabilities) == ("tensorrt_rtx", trt.__version__, ("8.9",))
    assert list(built.engines) == ["vision", "image_kv", "decoder"]
    assert [profile.name for profile in built.engines["decoder"].profiles] == ["prefill", "decode"]
    for engine in built.engines.values():
        assert (folder / FOLDER_NAME / engine.file).stat().st_size > 10_000


def test_profiles_reach_down_to_empty_caches():
    manifest = read_manifest(export("qwen", "ca_tv"))
    prefill, decode = build_profiles(manifest, "decoder")
    assert prefill.shapes["past_key.0"][0] == (1, 1, 0, 32) and prefill.shapes["past_key.0"][2] == (3, 1, 160, 32)
    assert prefill.shapes["image_key.0"][0][2] == 0 and prefill.shapes["input_ids"][2] == (3, 48)
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (3, 1))
    (vision,) = build_profiles(manifest, "vision")
    assert vision.shapes["pixel_values"] == ((4, 1176), (256, 1176), (256, 1176))


def test_shape_out_of_profile():
    _, decode = build_profiles(read_manifest(export("qwen", "ca_tv")), "decoder")
    decode.check("decoder", "input_ids", (3, 1))
    with pytest.raises(InputError, match=r"input_ids of graph decoder has shape \(3, 2\); profile 'decode'.*\(3, 1\)"):
        decode.check("decoder", "input_ids", (3, 2))


@pytest.fixture
def built(with_engines, tmp_path):
    """A copy of an export with its engines."""
    return shutil.copytree(with_engines(export("qwen", "ca_tv")), tmp_path / "export")


def test_engines_are_kept_until_something_changes(built, monkeypatch):
    builds = []
    original = trt_builder.build_engine
    monkeypatch.setattr(trt_builder, "build_engine", lambda *a: (builds.append(a[1].name), original(*a))[1])
    build_engines(built, "tensorrt_rtx", ("8.9",))
    assert builds == []
    (built / FOLDER_NAME / "image_kv.engine").write_bytes(b"damaged")
    build_engines(built, "tensorrt_rtx", ("8.9",))
    assert builds == ["image_kv.onnx"]


def test_shared_engine_cache(built, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.rmtree(built / FOLDER_NAME)
    monkeypatch.setattr(trt_builder, "build_engine", lambda *a: a[1].name.encode())
    first = build_engines(built, "tensorrt_rtx", ("8.9",), cache)
    shutil.rmtree(built / FOLDER_NAME)
    monkeypatch.setattr(trt_builder, "build_engine", lambda *a: pytest.fail("built again"))
    assert build_engines(built, "tensorrt_rtx", ("8.9",), cache) == first


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"x"]
)
def test_damaged_entry_of_the_cache_is_built_anew(built, tmp_path, monkeypatch, damage):
    cache, builds = tmp_path / "cache", []
    shutil.rmtree(built / FOLDER_NAME)
    monkeypatch.setattr(trt_builder, "build_engine", lambda *a: (builds.append(a[1].name), a[1].name.encode())[1])
    first = build_engines(built, "tensorrt_rtx", ("8.9",), cache)
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    shutil.rmtree(built / FOLDER_NAME)
    assert build_engines(built, "tensorrt_rtx", ("8.9",), cache) == first
    assert len(builds) == 6 and len(list(cache.iterdir())) == 3
    shutil.rmtree(built / FOLDER_NAME)
    build_engines(built, "tensorrt_rtx", ("8.9",), cache)
    assert len(builds) == 6, "the cache is whole again"


def test_failed_build_leaves_the_engines(built, monkeypatch):
    before = {path.name: path.read_bytes() for path in (built / FOLDER_NAME).iterdir()}
    (built / FOLDER_NAME / "vision.engine").write_bytes(b"damaged")
    monkeypatch.setattr(trt_builder, "build_engine", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_engines(built, "tensorrt_rtx", ("8.9",))
    after = {path.name: path.read_bytes() for path in (built / FOLDER_NAME).iterdir()}
    assert after == before | {"vision.engine": b"damaged"}


def test_unknown_compute_capability(built):
    with pytest.raises(RunnerError, match=r"'9.0'; tensorrt_rtx .* builds for 7.5, 8.0"):
        build_engines(built, "tensorrt_rtx", ("9.0",))


def test_graph_that_tensorrt_cannot_read(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"cannot read bad\.onnx"):
        build_engine(load_tensorrt("tensorrt_rtx"), tmp_path / "bad.onnx", [], [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_for_a_runner(built):
    with pytest.raises(RunnerError, match=r"need an NVIDIA GPU.*Run the ONNX graphs instead"):
        load_trt_model(built)


def test_engines_of_another_version_or_gpu(built):
    engines = read_engine_manifest(built / FOLDER_NAME)
    engines.check_runtime(trt.__version__, "8.9")
    with pytest.raises(RunnerError, match=r"built with tensorrt_rtx .*; 1.0.0 is installed"):
        engines.check_runtime("1.0.0", "8.9")
    with pytest.raises(RunnerError, match=r"compute capability 8.9; this GPU has 9.0. Build them again"):
        engines.check_runtime(trt.__version__, "9.0")
    everywhere = dataclasses.replace(engines, compute_capabilities=())
    everywhere.check_runtime(trt.__version__, "9.0")


def test_damaged_engine(built):
    engines = read_engine_manifest(built / FOLDER_NAME)
    (built / FOLDER_NAME / "decoder.engine").write_bytes(b"short")
    with pytest.raises(ManifestError, match=r"decoder\.engine is missing or damaged"):
        engines.check_file(built / FOLDER_NAME, "decoder")


def test_broken_engine_manifest(built):
    (built / FOLDER_NAME / "engines.json").write_text(json.dumps({"package": "tensorrt"}))
    with pytest.raises(ManifestError, match="Build the engines again"):
        read_engine_manifest(built / FOLDER_NAME)
