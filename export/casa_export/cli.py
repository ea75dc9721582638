"""`casa-export [CHECKPOINT] OUT` exports a model, `casa-export run FOLDER --image I --prompt P` runs one."""

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from casa_engine.checkpoints import load_processor
from casa_engine.command import run_command
from casa_engine.digits import checkpoint_path
from casa_engine.errors import CheckpointError, InputError
from casa_engine.staged_folder import is_within
from casa_export.errors import ExportError
from casa_export.pictures import PictureFile

if TYPE_CHECKING:
    from casa_export.exporter import ExportPlan
    from casa_export.progress import Progress

DTYPE_NAMES = ("fp32", "fp16", "bf16")
LIMIT_OPTIONS = {
    "batch": "conversations in one call",
    "text_tokens": "text tokens of one conversation",
    "call_tokens": "new text tokens in one decoder call",
    "image_tokens": "image tokens of one image",
    "call_image_tokens": "image tokens that one decoder call sees",
}


def export_parser(program: str = "casa-export") -> argparse.ArgumentParser:
    """Return the parser of `casa-export [CHECKPOINT] OUT`; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Export a CASA model to ONNX, and to TensorRT with --trt.",
        epilog=f"{program} run FOLDER --image FILE --prompt TEXT asks an exported model; see {program} run --help.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="checkpoint folder; default: the embedded model")
    parser.add_argument("out", type=Path, help="folder to write; an older export there is replaced, other files stay")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="of weights and caches (default: fp32)")
    parser.add_argument(
        "--validate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the eager model on this CPU and print a table (default: on)",
    )
    parser.add_argument("--validate-prompts", type=int, default=20, metavar="N", help="prompts to answer (default: 20)")
    for name, meaning in LIMIT_OPTIONS.items():
        parser.add_argument(
            f"--max-{name.replace('_', '-')}", type=int, dest=f"limit_{name}", metavar="N", help=meaning
        )
    parser.add_argument(
        "--trt",
        nargs="?",
        const="auto",
        choices=("auto", "tensorrt", "tensorrt_rtx"),
        help="also build TensorRT engines, with this package (default: whichever is installed)",
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="GPUs to build for without having one (TensorRT-RTX), such as 8.9",
    )
    parser.add_argument(
        "--engine-cache", type=Path, metavar="DIR", help="folder of engines to use again, by their inputs"
    )
    return parser


def run_parser(program: str = "casa-export run") -> argparse.ArgumentParser:
    """Return the parser of `casa-export run FOLDER`; `program` is the command's name in messages."""
    parser = argparse.ArgumentParser(prog=program, description="Ask an exported model.")
    parser.add_argument("folder", type=Path, help="what casa-export wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of ONNX Runtime (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: by the model's size (default)")
    parser.add_argument("--trt", action="store_true", help="run the TensorRT engines instead; needs an NVIDIA GPU")
    return parser


def main(arguments: list[str] | None = None, program: str = "casa-export") -> int:
    """Run the command; return the exit status. `program` is its name in messages."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        command, options = run, run_parser(f"{program} run").parse_args(arguments[1:])
    else:
        command, options = export, export_parser(program).parse_intermixed_args(arguments)
    return run_command(program, lambda: _with_extra(command, options))


def _with_extra(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    try:
        command(options)
    except ModuleNotFoundError as error:
        # onnx, onnxruntime and onnxscript come with an extra of their own.
        raise ExportError(f"{error}. Install it: pip install 'casa-engine[export]'.") from error


def export(options: argparse.Namespace) -> None:
    """Export, validate and build engines: all checks first, then beside the folder, which is replaced last."""
    from casa_export.export_folder import stage_export
    from casa_export.exporter import NUM_STEPS, write_export
    from casa_export.graphs import GRAPHS
    from casa_export.progress import Progress
    from casa_export.trt_builder import build_engines

    plan = _check(options)
    progress = Progress(NUM_STEPS + options.validate + (len(GRAPHS) if options.trt else 0))
    with stage_export(plan.source, options.out, plan.weight_bytes) as staged:
        write_export(plan, staged.path, progress)
        if options.validate:
            _validate(plan.source, staged.path, options.validate_prompts, progress)
        if options.trt:
            capabilities = tuple(options.compute_capability)
            built = build_engines(
                staged.path, options.trt, capabilities, options.engine_cache, progress, earlier=staged.target
            )
        staged.commit()
    if options.trt:
        print(f"engines: {built.package} {built.version} in {options.out / 'engines'}")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    seconds = sum(progress.seconds.values())
    print(f"{options.out}: {plan.source.name}, {options.dtype}; {seconds:.0f} s, {peak_gib:.1f} GiB")


def _check(options: argparse.Namespace) -> "ExportPlan":
    """Return what can be checked about an export before it starts."""
    from casa_export.engine_cache import EngineCache
    from casa_export.exporter import plan_export
    from casa_export.trt_builder import engine_targets
    from casa_export.validation import check_limits

    source = options.checkpoint or checkpoint_path()
    if not source.is_dir():
        raise CheckpointError(f"no checkpoint folder {source}. Name one, or none for the embedded model.")
    if options.dtype == "bf16" and options.validate:
        raise ExportError(
            "bf16 graphs cannot be compared here: ONNX Runtime's CPU provider has no bf16 kernels. Add --no-validate, "
            "or export fp32 or fp16."
        )
    if not options.trt and (options.compute_capability or options.engine_cache):
        raise ExportError("--compute-capability and --engine-cache are for TensorRT engines: add --trt.")
    plan = plan_export(source, options.dtype, {name: getattr(options, f"limit_{name}") for name in LIMIT_OPTIONS})
    if options.validate:
        check_limits(plan, options.validate_prompts)
    if options.trt:
        engine_targets(options.trt, tuple(options.compute_capability))
        if options.engine_cache:
            if is_within(options.engine_cache, options.out):
                raise ExportError(
                    f"--engine-cache {options.engine_cache} is in {options.out}. Name a folder elsewhere."
                )
            EngineCache(options.engine_cache)
    return plan


def _validate(source: Path, folder: Path, num_prompts: int, progress: "Progress") -> None:
    from casa_export.validation import check, format_table, validate

    with progress.step("validate against the eager model"):
        comparisons = validate(source, folder, num_prompts)
    print(format_table(comparisons))
    check(comparisons)


def run(options: argparse.Namespace) -> None:
    """Answer one question, token by token."""
    if options.max_new_tokens < 1 or options.threads < 0:
        raise InputError(
            f"--max-new-tokens is {options.max_new_tokens}, --threads {options.threads}; expected at least 1 and 0."
        )
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt is not valid UTF-8 ({error.reason}). Give it in UTF-8.") from error
    content = [{"type": "image", "image": PictureFile(path)} for path in options.image]
    model = _load(options)
    processor = load_processor(options.folder)
    content.append({"type": "text", "text": options.prompt})
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=[item["image"] for item in content[:-1]], text=prompt)
    ids: list[int] = []
    shown = ""
    for step in model.steps(**inputs, max_new_tokens=options.max_new_tokens):
        ids.append(int(step))
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def _load(options: argparse.Namespace):
    if options.trt:
        from casa_export.trt_runner import load_trt_model

        return load_trt_model(options.folder)
    from casa_export.exported_model import ExportedModel

    return ExportedModel.load(options.folder, options.device, options.threads)


if __name__ == "__main__":
    sys.exit(main())
