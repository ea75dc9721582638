"""Bytes that a decode step and a frame read: arithmetic from the presets, nothing runs.

    python benchmarks/gpu/step_bytes.py     # prints the tables of docs/benchmarks.md

"At first" (commit c463888) `ca` computed keys and values of text that nothing read, and images computed queries. Keys
and values in the cache are what they were. MB are 10^6 bytes, values are bf16.
"""

from floors import BYTES_PER_VALUE, decode_weights, decode_work
from sizes import FULL, num_image_tokens

from casa_engine.configuration import CasaConfig
from casa_engine.presets import preset_config

MODELS = {"2B `ca`": "CASA-Helium1-VL-2B", "3B `ca_tv`": "CASA-Qwen2_5-VL-3B-LiveCC"}
NUM_SEQS, TEXT_TOKENS = (1, 32, 128), 1024


def projection_bytes(config: CasaConfig, num_heads: int) -> int:
    """Return the bytes of so many heads' rows in the weights of all CA layers."""
    weights = config.text_config.hidden_size * num_heads * config.head_dim
    return weights * len(config.cross_attention_layers) * BYTES_PER_VALUE


def weight_rows(config: CasaConfig) -> dict[str, tuple[int, int]]:
    """Return what is read of weights, at first and now."""
    plain = decode_weights(config, is_plain=True) * BYTES_PER_VALUE
    queries = projection_bytes(config, config.text_config.num_attention_heads)
    keys_values = projection_bytes(config, 2 * config.text_config.num_key_value_heads)
    of_text = keys_values if config.sees_window_text else 0
    now = decode_weights(config) * BYTES_PER_VALUE
    assert now == plain + 2 * queries + of_text
    return {
        "a step: decoder and output layer without CA": (plain, plain),
        "a step: CA's queries and outputs": (2 * queries, 2 * queries),
        "a step: CA's keys and values of text": (keys_values, of_text),
        "a step, in all": (plain + 2 * queries + keys_values, now),
        "a frame: CA's keys and values of the image": (keys_values, keys_values),
        "a frame: CA's queries of the image": (queries, 0),
    }


def megabytes(num_bytes: int) -> str:
    """Return whole MB."""
    return f"{num_bytes / 1e6:,.0f}"


def weight_table() -> list[str]:
    """Return the lines of the table of weights."""
    heads = [f"{model}, {when}" for model in MODELS for when in ("at first", "now")]
    lines = [f"| weights read, MB | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    rows = [weight_rows(preset_config(preset)) for preset in MODELS.values()]
    for label in rows[0]:
        cells = [megabytes(number) for row in rows for number in row[label]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def cache_table() -> list[str]:
    """Return the lines of the table of keys and values in the cache."""
    steps = [f"{num_seqs} sequence{'s' * (num_seqs > 1)}" for num_seqs in NUM_SEQS]
    heads = ["image", "text, self-attention", "text, CA", "image, CA", *steps]
    lines = [
        f"| keys and values read a step, MB | {' | '.join(heads)} |",
        "|---|---:|" + "---:|" * (len(heads) - 1),
    ]
    for model, preset in MODELS.items():
        config = preset_config(preset)
        self_text = decode_work(config, 1, 0, TEXT_TOKENS, is_plain=True).kv_bytes
        all_text = decode_work(config, 1, 0, TEXT_TOKENS).kv_bytes
        for side in FULL.sides:
            tokens = num_image_tokens(config, side)
            image = decode_work(config, 1, tokens, 0).kv_bytes
            sums = [decode_work(config, num_seqs, tokens, TEXT_TOKENS).kv_bytes for num_seqs in NUM_SEQS]
            cells = map(megabytes, (self_text, all_text - self_text, image, *sums))
            lines.append(f"| {model} | {side} px | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*weight_table(), "", *cache_table()]))
