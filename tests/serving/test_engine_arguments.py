"""A CASA engine gets the same arguments and environment from the command line, `casa-caption` and a cluster."""

import asyncio
import itertools
import os
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from casa_engine.checkpoints import read_config
from casa_engine.live import LiveSettings
from casa_engine.view_folder import is_view
from casa_serving import cli, engine_defaults
from casa_serving.caption.captioners import engine_captioner
from casa_serving.cluster.application import llm_config_of
from casa_serving.cluster.config import parse_config
from casa_serving.engine_defaults import embedded_checkpoint
from casa_serving.live import engine_start, session
from originals import candidate_names, original_model, write_original

CAPTION_PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"
ENGINE_ARGUMENTS = {field.name for field in fields(AsyncEngineArgs)}
# Of the server of the embedded model, which calls tools.
TOOL_ARGUMENTS = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "exclude_tools_when_tool_choice_none": True,
}
# Limits of images, which a server alone has.
IMAGE_LIMITS = "media_io_kwargs"
VARIABLES = (
    "OMP_NUM_THREADS",
    "TORCHDYNAMO_DISABLE",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_NO_USAGE_STATS",
    "VLLM_PLUGINS",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
MODELS = [
    pytest.param(embedded, on_cpu, id=f"{'embedded' if embedded else 'own'}-{'cpu' if on_cpu else 'gpu'}")
    for embedded, on_cpu in itertools.product((True, False), (True, False))
]


class NotStartedError(Exception):
    """Stands for the engine, which is not started."""


@pytest.fixture
def checkpoint(random_checkpoint):
    return lambda embedded: embedded_checkpoint() if embedded else random_checkpoint


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of the variables is set."""
    for name in VARIABLES:
        # Set first, so that what the code sets is removed after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """This process may use eight, two of them for renderers beside a GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def expected_arguments(checkpoint, *, embedded, on_cpu, live, eager=None):
    arguments = {
        "max_model_len": read_config(checkpoint).text_config.max_position_embeddings,
        "limit_mm_per_prompt": {"image": 256, "video": 0},
        "enable_prefix_caching": True,
        "mm_processor_cache_gb": 0.125 if embedded else 1,
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=embedded),
    }
    if embedded:
        arguments |= {"served_model_name": ["casa-tiny-digits"], "dtype": "float32"}
    if eager or (eager is None and embedded and on_cpu):
        arguments["enforce_eager"] = True
    if live and on_cpu:
        arguments["logits_processors"] = [CAPTION_PROCESSOR]
    if not on_cpu:
        arguments |= {"renderer_num_workers": 2, "compilation_config": {"cudagraph_mm_encoder": True}}
    return arguments


def expected_environment(*, embedded, on_cpu, eager):
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_CONNECTOR": "casa_guarded",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if on_cpu and eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if on_cpu and embedded:
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    return variables


def changed(arguments, defaults):
    """Return the engine's arguments that differ from vLLM's own defaults."""
    return {
        name: value
        for name, value in arguments.items()
        if name in ENGINE_ARGUMENTS and name not in ("model", IMAGE_LIMITS) and value != defaults[name]
    }


def plain_arguments(checkpoint):
    """Return what `vllm serve CHECKPOINT` parses."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return vars(parser.parse_args(["serve", str(checkpoint)]))


def found_environment():
    """Return the variables that are set, and the endpoints that are enabled."""
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return variables, endpoints(variables.pop("VLLM_PLUGINS"))


def endpoints(plugins):
    return {name for name in plugins.split(",") if name in ("casa_http", "casa_live")}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("embedded", "on_cpu"), MODELS)
def test_the_command_line(monkeypatch, checkpoint, embedded, on_cpu, live):
    served = []
    monkeypatch.setattr(cli, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(cli, "serve_in_process", lambda args, early_engine: served.append(args))
    argv = [] if embedded else [str(checkpoint(embedded))]
    cli.run(argv if live else [*argv, "--live-max-sessions", "0"])
    (args,) = served
    assert (args.allowed_origins, args.enable_prompt_tokens_details) == ([], True)
    expected = expected_arguments(checkpoint(embedded), embedded=embedded, on_cpu=on_cpu, live=live)
    plain = plain_arguments(checkpoint(embedded))
    tools = {name: vars(args)[name] for name in TOOL_ARGUMENTS}
    assert tools == (TOOL_ARGUMENTS if embedded else {name: plain[name] for name in TOOL_ARGUMENTS})
    # How a server ends is its own affair.
    expected["shutdown_timeout"] = 8
    assert changed(vars(args), plain) == expected
    variables, enabled = found_environment()
    assert variables == expected_environment(embedded=embedded, on_cpu=on_cpu, eager=embedded)
    assert enabled == ({"casa_http", "casa_live"} if live else {"casa_http"})


async def open_captioner(checkpoint):
    async with engine_captioner(checkpoint, LiveSettings()):
        pass


@pytest.mark.parametrize("is_captioner", [True, False], ids=["casa-caption", "engine"])
@pytest.mark.parametrize(("embedded", "on_cpu"), MODELS)
def test_an_engine_in_this_process(monkeypatch, checkpoint, embedded, on_cpu, is_captioner):
    """`casa-caption` compiles nothing on a CPU, whatever the checkpoint."""
    started, contexts = [], []

    def from_engine_args(arguments, usage_context):
        started.append(arguments)
        contexts.append(usage_context)
        raise NotStartedError

    monkeypatch.setattr(engine_start, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(engine_defaults, "runs_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    start = open_captioner if is_captioner else engine_start.start_engine
    with pytest.raises(NotStartedError):
        asyncio.run(start(checkpoint(embedded)))
    arguments, defaults = (
        {name: getattr(of, name) for name in ENGINE_ARGUMENTS} for of in (*started, AsyncEngineArgs())
    )
    assert arguments["model"] == str(checkpoint(embedded))
    assert contexts == [UsageContext.OPENAI_API_SERVER], "a step would have a quarter of a server's tokens"
    eager = on_cpu and (embedded or is_captioner)
    found = changed(arguments, defaults)
    if not on_cpu:  # vLLM has made an object of it.
        graphs = found["compilation_config"].cudagraph_mm_encoder
        found["compilation_config"] = {"cudagraph_mm_encoder": graphs}
    assert found == expected_arguments(checkpoint(embedded), embedded=embedded, on_cpu=on_cpu, live=True, eager=eager)
    variables, enabled = found_environment()
    assert variables == expected_environment(embedded=embedded, on_cpu=on_cpu, eager=eager)
    assert enabled == {"casa_http"}


def test_an_original_in_place(monkeypatch, tmp_path):
    """`casa-caption` opens its session on the view that its engine has; a cluster names the model by its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_original(original_model("helium"), "helium", tmp_path / "original", candidate_names("helium"))
    started = []

    async def start(checkpoint, **options):
        return SimpleNamespace(shutdown=lambda: None)

    def open_engine(engine, checkpoint):
        started.append(read_config(checkpoint))
        raise NotStartedError

    monkeypatch.setattr(session, "start_engine", start)
    monkeypatch.setattr(session, "LiveEngine", open_engine)
    with pytest.raises(NotStartedError):
        asyncio.run(open_captioner(folder))
    assert started[0].fusion == "ca"
    llm_config = llm_config_of(parse_config({"checkpoint": str(folder)}), on_gpu=False, surge=False)
    assert llm_config.model_loading_config.model_id == "original"
    assert is_view(Path(llm_config.model_loading_config.model_source))


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("embedded", "on_cpu"), MODELS)
def test_a_cluster(checkpoint, embedded, on_cpu, live):
    given = {"live": {"max_sessions": 2 if live else 0}, "engine": {"block_size": 64}, "environment": {"MINE": "1"}}
    config = parse_config(given if embedded else given | {"checkpoint": str(checkpoint(embedded))})
    llm_config = llm_config_of(config, on_gpu=not on_cpu, surge=False)
    expected = expected_arguments(checkpoint(embedded), embedded=embedded, on_cpu=on_cpu, live=live)
    # Ray Serve LLM names the model.
    expected.pop("served_model_name", None)
    expected["structured_outputs_config"] = asdict(expected["structured_outputs_config"])
    arguments = {name: value for name, value in llm_config.engine_kwargs.items() if name != IMAGE_LIMITS}
    assert arguments == {
        **expected,
        **({"enforce_eager": on_cpu} if embedded else {}),
        "allowed_origins": [],
        "enable_prompt_tokens_details": True,
        **(TOOL_ARGUMENTS if embedded else {}),
        "allowed_media_domains": [],
        "block_size": 64,
        "max_num_seqs": 18 if live else 16,
        "tensor_parallel_size": 1,
    }
    assert llm_config.model_loading_config.model_source == str(checkpoint(embedded).resolve())
    variables = dict(llm_config.runtime_env["env_vars"])
    assert endpoints(variables.pop("VLLM_PLUGINS")) == {"casa_http"}
    assert variables == expected_environment(embedded=embedded, on_cpu=on_cpu, eager=embedded) | {"MINE": "1"}


def test_what_the_user_gives_wins(monkeypatch):
    served = []
    monkeypatch.setattr(cli, "runs_on_cpu", lambda: True)
    monkeypatch.setattr(cli, "serve_in_process", lambda args, early_engine: served.append(args))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    cli.run(["--no-enforce-eager", "--max-model-len", "64", "--logits-processors", "mine:Own"])
    (args,) = served
    assert (args.enforce_eager, args.max_model_len) == (False, 64)
    assert args.logits_processors == ["mine:Own", CAPTION_PROCESSOR]
    variables, _ = found_environment()
    assert "TORCHDYNAMO_DISABLE" not in variables
    assert variables["OMP_NUM_THREADS"] == "3"
    # The guard for images is not to be left out.
    assert variables["VLLM_MEDIA_CONNECTOR"] == "casa_guarded"
