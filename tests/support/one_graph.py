"""Traces the decoder of a preset with torch.compile and prints how it is split. Test support only.

    python one_graph.py PRESET FUSION OWN_OR_SHARED

Prints the number of graphs and of pieces. A process of its own: the other tests of an engine switch compilation off.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch._dynamo.backends.common import aot_autograd
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

from casa_engine.checkpoints import default_processor
from casa_engine.presets import preset_config

NUM_TOKENS = 5


class TracedError(Exception):
    """The graph is known; there is nothing to run it on."""


def main(preset: str, fusion: str, weights: str) -> None:
    import casa_vllm.joint_projections
    import casa_vllm.model
    from casa_vllm.config_hook import SPLITTING_OPS

    casa_vllm.joint_projections.HAS_TRITON = casa_vllm.model.HAS_TRITON = True  # parameters are stacked as on a GPU
    config = preset_config(preset, fusion=fusion, ca_weights=weights)
    config.architectures = ["CasaForConditionalGeneration"]
    graphs: list[torch.fx.GraphModule] = []

    def trace(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        # Also as vLLM's backend gets it, with parameters as inputs, which are views of one tensor.
        return aot_autograd(fw_compiler=stop)(graph, inputs)

    def stop(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        raise TracedError

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        default_processor(config).save_pretrained(folder)
        options = {"load_format": "dummy", "dtype": "float32", "enforce_eager": True, "max_model_len": 256}
        vllm_config = EngineArgs(model=folder, **options).create_engine_config()
        with set_current_vllm_config(vllm_config), torch.no_grad():
            init_distributed_environment(1, 0, f"file://{Path(folder)}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
            model = casa_vllm.model.CasaForConditionalGeneration(vllm_config=vllm_config).model.language_model
            for module in model.modules():
                module.cpu_linear = torch.nn.functional.linear
            positions, ids = torch.arange(NUM_TOKENS), torch.zeros(NUM_TOKENS, dtype=torch.long)
            try:
                torch.compile(model.forward, fullgraph=True, backend=trace)(ids, positions)
            except Exception as error:
                if "TracedError" not in repr(error):
                    raise
    [graph] = graphs
    splitting = [*CompilationConfig._attention_ops, *SPLITTING_OPS]
    _, pieces = split_graph(graph, splitting)
    print("pieces", len(pieces))


if __name__ == "__main__":
    main(*sys.argv[1:])
