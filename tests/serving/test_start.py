"""`casa-serve` says in one sentence why it cannot start, and starts without images if told to."""

import json
import shutil
import subprocess
import sys

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_serving import cli, engine_defaults
from casa_serving.engine_defaults import embedded_checkpoint
from image_files import data_url, encoded, plain
from serving_process import CASA_SERVE, casa_serve


@pytest.fixture
def broken(random_checkpoint, tmp_path):
    """Return a copy of the good checkpoint whose tensors have passed through a function."""

    def copy(change):
        folder = tmp_path / "broken"
        shutil.copytree(random_checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


NAME = "model.language_model.layers.1.mlp.down_proj.weight"


def refused(capsys, *arguments):
    """Run casa-serve's main in this process, which must refuse; return what it says."""
    status = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert status == 1
    assert said.startswith("casa-serve: ")
    assert said.count("\n") == 1
    return said


def test_a_missing_tensor(capsys, broken):
    said = refused(capsys, broken(lambda weights: weights.pop(NAME)))
    assert f"missing {NAME}" in said


def test_an_extra_tensor(capsys, broken):
    said = refused(capsys, broken(lambda weights: weights.update(surprise=torch.zeros(2))))
    assert "unexpected surprise (2,)" in said


def test_a_misshapen_tensor(capsys, broken):
    said = refused(capsys, broken(lambda weights: weights.update({NAME: torch.zeros(3, 5)})))
    assert f"{NAME} has shape (3, 5), expected (64, 128)" in said


def test_a_damaged_weights_file(capsys, broken):
    folder = broken(lambda weights: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "not a readable safetensors file" in refused(capsys, folder)


def test_no_weights(capsys, broken):
    folder = broken(lambda weights: None)
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors file" in refused(capsys, folder)


def test_another_kind_of_model(capsys, broken):
    folder = broken(lambda weights: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model_type 'llama'" in refused(capsys, folder)


def test_not_a_folder(capsys, random_checkpoint):
    assert "is a file" in refused(capsys, random_checkpoint / "config.json")
    assert "does not exist" in refused(capsys, "kyutai/CASA-Helium1-VL-2B")
    assert "no config.json" in refused(capsys, random_checkpoint.parent)


def test_limits_that_make_no_sense(capsys, random_checkpoint):
    assert "--max-image-pixels must be" in refused(capsys, random_checkpoint, "--max-image-pixels", 0)
    said = refused(capsys, random_checkpoint, "--media-io-kwargs", '{"image": {"image_mode": "L"}}')
    assert "--help=CASA" in said


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--live-max-sessions", -1, "must be a whole number of at least 0"),
        ("--live-idle-timeout", "nan", "must be seconds"),
        ("--max-request-bytes", 0, "must be a whole number of at least 1"),
        ("--port", 99999, "must be a number from 0 to 65535"),
        ("--port", -1, "must be a number from 0 to 65535"),
    ],
)
def test_values_that_make_no_sense(capsys, random_checkpoint, option, value, said):
    assert f"{option} {said}" in refused(capsys, random_checkpoint, f"{option}={value}")


def test_servers_without_the_guard_are_refused(capsys, random_checkpoint, monkeypatch):
    assert "know nothing of the guard" in refused(capsys, random_checkpoint, "--grpc")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "know nothing of the guard" in refused(capsys, random_checkpoint)


def test_the_command_itself_exits_with_the_sentence(tmp_path):
    run = subprocess.run([CASA_SERVE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "has no config.json" in run.stderr.splitlines()[-1]


# Whoever asks CUDA before vLLM has said how makes it unusable in the engine's process, on every GPU.
ASKED = """
import os, sys, torch
from casa_serving import cli

def ask(*_):
    assert os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1", "CUDA was asked"
    return 0

torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch._C._cuda_getDeviceCount = ask
print(cli.parse(sys.argv[1:])[0].model_tag)
"""


@pytest.mark.parametrize("named", [True, False])
def test_cuda_is_not_asked_before_vllm_is_there(random_checkpoint, named):
    arguments = [str(random_checkpoint)] if named else []
    command = [sys.executable, "-c", ASKED, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(random_checkpoint if named else embedded_checkpoint())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], None),
        (["./model"], "./model"),
        (["./model", "--port", "9000"], "./model"),
        (["--served-model-name", "digits"], None),
        (["--port", "9000"], None),
        (["--port", "9000", "./model"], "./model"),
        (["--model", "./model"], "./model"),
    ],
)
def test_which_checkpoint_is_named(argv, named):
    assert cli.named_checkpoint(argv) == named


def test_a_file_of_options_can_name_the_checkpoint(tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("model: ./model\nmax-image-bytes: 1000\n")
    assert cli.named_checkpoint(["--config", str(options)]) == "./model"
    args = cli.build_parser({}).parse_args(["serve", "--config", str(options)])
    assert args.max_image_bytes == 1000


def test_defaults_give_way_to_the_command_line(random_checkpoint):
    args, variables = cli.parse([str(random_checkpoint), "--max-model-len", "128"])
    assert args.model_tag == str(random_checkpoint)
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables
    assert args.max_model_len == 128
    assert args.limit_mm_per_prompt == {"image": 256, "video": 0}
    assert args.media_io_kwargs["image"]["max_image_pixels"] == 4096 * 4096
    assert args.middleware == list(cli.MIDDLEWARE)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_embedded_model_is_not_compiled_on_a_cpu(monkeypatch, on_cpu):
    monkeypatch.setattr(cli, "runs_on_cpu", lambda: on_cpu)
    assert cli.parse([])[0].enforce_eager is on_cpu
    assert not cli.parse(["--no-enforce-eager"])[0].enforce_eager


def test_usage_has_details_unless_the_operator_says_otherwise(random_checkpoint):
    assert cli.parse([str(random_checkpoint)])[0].enable_prompt_tokens_details
    given = cli.parse([str(random_checkpoint), "--no-enable-prompt-tokens-details"])[0]
    assert not given.enable_prompt_tokens_details


def test_renderers_and_encoder_graphs_beside_a_gpu(monkeypatch, random_checkpoint):
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert [engine_defaults.num_renderers(cores) for cores in (1, 7, 8, 16, 128)] == [1, 1, 2, 4, 4]
    monkeypatch.setattr(engine_defaults.os, "sched_getaffinity", lambda _: set(range(16)))
    args, _ = cli.parse([str(random_checkpoint)])
    assert args.renderer_num_workers == 1
    assert not AsyncEngineArgs.from_cli_args(args).compilation_config.cudagraph_mm_encoder
    monkeypatch.setattr(cli, "runs_on_cpu", lambda: False)
    args, _ = cli.parse([str(random_checkpoint)])
    assert args.renderer_num_workers == 4
    assert AsyncEngineArgs.from_cli_args(args).compilation_config.cudagraph_mm_encoder
    args, _ = cli.parse([str(random_checkpoint), "--language-model-only"])
    assert not AsyncEngineArgs.from_cli_args(args).compilation_config.cudagraph_mm_encoder
    options = ["--renderer-num-workers", "2", "-cc.cudagraph_mm_encoder=false"]
    args, _ = cli.parse([str(random_checkpoint), *options])
    assert args.renderer_num_workers == 2
    assert not AsyncEngineArgs.from_cli_args(args).compilation_config.cudagraph_mm_encoder


@pytest.mark.slow
@pytest.mark.vllm
def test_the_compiled_model_reads_the_same(server, tmp_path):
    """On a GPU, and with a checkpoint of one's own, the model is compiled; here it takes a minute."""
    image = {"type": "image_url", "image_url": {"url": data_url(encoded(plain(84, 84, "olive")))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "Read the digits."}]}]
    options = {"model": "casa-tiny-digits", "messages": messages, "temperature": 0, "max_tokens": 16, "logprobs": True}
    with casa_serve(tmp_path / "log.txt", "--no-enforce-eager") as compiled:
        expected, got = (each.client().chat.completions.create(**options).choices[0] for each in (server, compiled))
    assert got.message.content == expected.message.content
    for one, other in zip(got.logprobs.content, expected.logprobs.content, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.vllm
def test_a_server_that_takes_no_images(random_checkpoint, tmp_path):
    limit = ["--limit-mm-per-prompt", '{"image": 0}', "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    with casa_serve(tmp_path / "log.txt", random_checkpoint, *limit) as server:
        client = server.client()
        model = client.models.list().data[0].id
        image = {"type": "image_url", "image_url": {"url": data_url(encoded(plain()))}}
        text = {"type": "text", "text": "Read."}
        with pytest.raises(openai.BadRequestError, match="At most 0 image"):
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": [text, image]}])
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": [text]}], max_tokens=3
        )
        assert 1 <= answer.usage.completion_tokens <= 3
