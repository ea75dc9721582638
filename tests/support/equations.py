"""The paper's equations, one token at a time, in float64 NumPy, with absolute positions.

Nothing is shared with `casa_engine`: windows, rotary positions, masks and heads are written out again, the slow and
obvious way. Source: arXiv 2512.19535, Eq. 1-2 (CA), Eq. 4 (CA_t+v), appendix D (shared weights, replacing layers).
"""

import numpy as np

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def rotate(x: np.ndarray, position: tuple[int, int, int], config) -> np.ndarray:
    """Rotate every head of x (H, D): frequency f turns by the position on the axis that owns it."""
    half = x.shape[-1] // 2
    theta = config.text_config.rope_parameters["rope_theta"]
    sections = config.mrope_section or [half, 0, 0]
    axis = [a for a, count in enumerate(sections) for _ in range(count)]
    out = np.empty_like(x)
    for f in range(half):
        angle = position[axis[f]] * theta ** (-2.0 * f / (2 * half))
        a, b = x[:, f], x[:, half + f]
        out[:, f] = a * np.cos(angle) - b * np.sin(angle)
        out[:, half + f] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attend(query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    """One query (H, D) over keys and values (Hkv, D); nothing to see gives zero."""
    num_heads, size = query.shape
    if not keys:
        return np.zeros(num_heads * size)
    group = num_heads // keys[0].shape[0]
    out = np.empty((num_heads, size))
    for head in range(num_heads):
        scores = np.array([query[head] @ key[head // group] for key in keys]) / np.sqrt(size)
        weight = np.exp(scores - scores.max())
        weight /= weight.sum()
        out[head] = sum(w * value[head // group] for w, value in zip(weight, values, strict=True))
    return out.reshape(-1)


def heads(x: np.ndarray, weights: Weights, name: str, part: str, config) -> np.ndarray:
    """Queries, keys or values (`part` q, k or v): (T, heads, D). Qwen3 norms each head of queries and keys."""
    projected = linear(x, weights, f"{name}.{part}_proj")
    projected = projected.reshape(len(x), projected.shape[1] // config.head_dim, config.head_dim)
    if config.text_config.model_type == "qwen3" and part != "v":
        return rms_norm(projected, weights[f"{name}.{part}_norm.weight"], config.text_config.rms_norm_eps)
    return projected


def mlp(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    gate = linear(x, weights, f"{name}.gate_proj")
    return linear(gate / (1 + np.exp(-gate)) * linear(x, weights, f"{name}.up_proj"), weights, f"{name}.down_proj")


def self_attention(h: np.ndarray, weights: Weights, name: str, positions, config) -> np.ndarray:
    query, key, value = (heads(h, weights, name, part, config) for part in "qkv")
    query = [rotate(query[t], positions[t], config) for t in range(len(h))]
    key = [rotate(key[t], positions[t], config) for t in range(len(h))]
    out = [attend(query[t], key[: t + 1], list(value[: t + 1])) for t in range(len(h))]
    return linear(np.stack(out), weights, f"{name}.o_proj")


def cross_attention(h, images, points, grids, weights: Weights, name: str, config) -> np.ndarray:
    """CA and CA_t+v. `images`: (N, C) normed tokens of each image; `points`: its K; `grids`: its (rows, columns)."""
    query, text_key, text_value = (heads(h, weights, name, part, config) for part in "qkv")
    turn = config.fusion == "ca_tv"
    out = np.zeros((len(h), config.text_config.hidden_size))
    for t in range(len(h)):
        before = [k for k in points if k <= t]
        latest = before[-1] if before else None
        keys, values = [], []
        for image, k, (rows, columns) in zip(images, points, grids, strict=True):
            if k != latest:
                continue
            image_key = heads(image, weights, name, "k", config)
            image_value = heads(image, weights, name, "v", config)
            place = k + config.image_position_offset
            for n in range(len(image)):
                row, column = divmod(n, columns)
                grid = config.image_rope == "grid"
                position = (place, place + row * grid, place + column * grid)
                keys.append(rotate(image_key[n], position, config) if turn else image_key[n])
                values.append(image_value[n])
            assert rows * columns == len(image)
        if turn:
            for i in range(0 if latest is None else latest, t + 1):
                keys.append(rotate(text_key[i], (i, i, i), config))
                values.append(text_value[i])
        if keys:
            one = attend(rotate(query[t], (t, t, t), config) if turn else query[t], keys, values)
            out[t] = linear(one, weights, f"{name}.o_proj")
    return out


def insertion_positions(ids, grids, config) -> list[tuple[int, int, int]]:
    """Qwen2.5-VL's positions of a stream with image tokens; plain counting without M-RoPE."""
    if config.mrope_section is None:
        return [(t, t, t) for t in range(len(ids))]
    positions, following, t, image = [], 0, 0, 0
    while t < len(ids):
        if ids[t] != config.image_token_id:
            positions.append((following, following, following))
            following, t = following + 1, t + 1
            continue
        rows, columns = grids[image]
        positions += [(following, following + r, following + c) for r in range(rows) for c in range(columns)]
        following, t, image = following + max(rows, columns), t + rows * columns, image + 1
    return positions


def logits(ids, image_tokens, points, grids, weights: Weights, config) -> np.ndarray:
    """Logits (T, vocabulary) of one stream.

    `image_tokens`: (N, C) vision output of each image; `points`: insertion points; `grids`: (rows, columns) after
    merging. For insertion the stream holds the image tokens and `points` is not used.
    """
    text, name = config.text_config, "model.language_model"
    x = weights[f"{name}.embed_tokens.weight"][ids].copy()
    if config.fusion == "insertion":
        if len(image_tokens):
            x[np.array(ids) == config.image_token_id] = np.concatenate(image_tokens)
        positions = insertion_positions(ids, grids, config)
    else:
        positions = [(t, t, t) for t in range(len(ids))]
    for layer in range(text.num_hidden_layers):
        prefix = f"{name}.layers.{layer}"
        norm = weights[f"{prefix}.input_layernorm.weight"]
        listed = config.fusion != "insertion" and (config.ca_layers is None or layer in config.ca_layers)
        h = rms_norm(x, norm, text.rms_norm_eps)
        added = np.zeros_like(x)
        if not (listed and config.ca_placement == "replace"):
            added = added + self_attention(h, weights, f"{prefix}.self_attn", positions, config)
        if listed:
            project = f"{prefix}.{'cross_attn' if config.ca_weights == 'own' else 'self_attn'}"
            normed = [
                rms_norm(image, norm, text.rms_norm_eps) if config.normalize_image_tokens else image
                for image in image_tokens
            ]
            added = added + cross_attention(h, normed, points, grids, weights, project, config)
        x = x + added
        after = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], text.rms_norm_eps)
        x = x + mlp(after, weights, f"{prefix}.mlp")
    x = rms_norm(x, weights[f"{name}.norm.weight"], text.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights[f"{name}.embed_tokens.weight"]).T
