"""The captioner's rules as two Triton kernels, one program a row: penalty and stop bias, then banned n-grams.

Both read the token that was sampled last on the device and update the row's state with it; nothing comes to the host.
What is said of exactness in `numpy_rules.py` holds here as well: float64 counts, divisions that round to nearest, no
fused multiply and add.
"""

import torch
import triton
import triton.language as tl

from casa_engine.live.caption_logits import MAX_LOG_PENALTY, MAX_STOP_IDS, MIN_COUNT
from casa_vllm.caption_rules import tensors as columns
from casa_vllm.caption_rules.tensors import PAGE, RING, RuleTensors

# Remembered tokens, and places of the window, that a program handles at once.
BLOCK = 1024
WINDOW_BLOCK = 64

_NUM_IDS = tl.constexpr(columns.NUM_IDS)
_NUM_RECENT = tl.constexpr(columns.NUM_RECENT)
_NGRAM_SIZE = tl.constexpr(columns.NGRAM_SIZE)
_NGRAM_WINDOW = tl.constexpr(columns.NGRAM_WINDOW)
_NUM_STOPS = tl.constexpr(columns.NUM_STOPS)
_NUM_SIZES = tl.constexpr(columns.NUM_STOPS + 1)
_DECAY = tl.constexpr(columns.DECAY)
_LOG_PENALTY = tl.constexpr(columns.LOG_PENALTY)
_CLAMP = tl.constexpr(columns.CLAMP)
_STOP_BIAS = tl.constexpr(columns.STOP_BIAS)
_NUM_NUMBERS = tl.constexpr(columns.STOP_BIAS + 1)
_MAX_STOP_IDS = tl.constexpr(MAX_STOP_IDS)
_MIN_COUNT = tl.constexpr(MIN_COUNT)
_MAX_LOG_PENALTY = tl.constexpr(MAX_LOG_PENALTY)

# Of each step: a kernel made for one value of them would be compiled again for the next, inside a request.
VARYING = ("logits_ptr", "rows_ptr", "new_ids_ptr", "num_logits", "logits_stride", "page_table_stride")


@triton.jit
def _scale(logits_ptr, ids, counts, mask, strength, clamp, num_logits):
    """Multiply negative logits of `ids` by their factor, divide others."""
    penalties = tl.minimum(counts, clamp) * strength
    penalties = tl.minimum(tl.maximum(penalties, -_MAX_LOG_PENALTY), _MAX_LOG_PENALTY)
    factors = tl.exp(penalties).to(tl.float32)
    mask = mask & (ids >= 0) & (ids < num_logits)
    chosen = tl.load(logits_ptr + ids, mask=mask, other=0.0).to(tl.float32)
    changed = tl.where(chosen < 0, chosen * factors, tl.div_rn(chosen, factors))
    tl.store(logits_ptr + ids, changed.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _penalty_kernel(
    logits_ptr, rows_ptr, new_ids_ptr, page_table_ptr, ids_ptr, counts_ptr, sizes_ptr, numbers_ptr, stop_ids_ptr,
    num_logits, logits_stride, page_table_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the new token, apply the repetition penalty, then the stop bias."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    if row < 0:
        return
    logits_ptr += index * logits_stride
    page_table_ptr += row * page_table_stride
    sizes_ptr += row * _NUM_SIZES
    numbers_ptr += row * _NUM_NUMBERS
    stops = tl.arange(0, _MAX_STOP_IDS)
    stop_mask = stops < tl.load(sizes_ptr + _NUM_STOPS)
    stop_ids = tl.load(stop_ids_ptr + row * _MAX_STOP_IDS + stops, mask=stop_mask, other=-1)

    strength = tl.load(numbers_ptr + _LOG_PENALTY)
    if strength != 0:
        clamp = tl.load(numbers_ptr + _CLAMP)
        # Written here and not in the expression, where it would be a float32 first.
        min_count = tl.full((), _MIN_COUNT, tl.float64)
        token = tl.load(new_ids_ptr + index).to(tl.int32)
        decay = tl.load(numbers_ptr + _DECAY)
        decay = tl.where(token >= 0, decay, 1.0)
        is_counted = (token >= 0) & (tl.max((stop_ids == token).to(tl.int32), 0) == 0)
        num_ids = tl.load(sizes_ptr + _NUM_IDS)
        num_found = 0
        for start in range(0, num_ids, BLOCK):
            entries = start + tl.arange(0, BLOCK)
            mask = entries < num_ids
            places = tl.load(page_table_ptr + entries // PAGE, mask=mask, other=0).to(tl.int64) * PAGE + entries % PAGE
            ids = tl.load(ids_ptr + places, mask=mask, other=-1)
            counts = tl.load(counts_ptr + places, mask=mask, other=0.0) * decay
            counts = tl.where(counts > min_count, counts, 0.0)
            is_said = (ids == token) & is_counted
            counts = tl.where(is_said, counts + 1.0, counts)
            num_found += tl.sum(is_said.to(tl.int32), 0)
            tl.store(counts_ptr + places, counts, mask=mask)
            _scale(logits_ptr, ids, counts, mask, strength, clamp, num_logits)
        if is_counted & (num_found == 0):
            place = tl.load(page_table_ptr + num_ids // PAGE).to(tl.int64) * PAGE + num_ids % PAGE
            # Every thread has read the number of tokens before one writes it.
            tl.debug_barrier()
            tl.store(ids_ptr + place, token)
            tl.store(counts_ptr + place, tl.full((), 1.0, tl.float64))
            tl.store(sizes_ptr + _NUM_IDS, num_ids + 1)
            # As one lane of a vector: a single load and store, not one by every thread.
            lane = tl.arange(0, 32)
            first = tl.zeros([32], tl.int32) + token
            _scale(logits_ptr, first, tl.full([32], 1.0, tl.float64), lane == 0, strength, clamp, num_logits)

    bias = tl.load(numbers_ptr + _STOP_BIAS)
    if bias != 1:
        mask = stop_mask & (stop_ids >= 0) & (stop_ids < num_logits)
        chosen = tl.load(logits_ptr + stop_ids, mask=mask, other=0.0).to(tl.float32)
        biases = tl.zeros_like(chosen) + bias.to(tl.float32)
        changed = tl.where(chosen < 0, tl.div_rn(chosen, biases), chosen * biases)
        tl.store(logits_ptr + stop_ids, changed.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _ngram_kernel(
    logits_ptr, rows_ptr, new_ids_ptr, recent_ptr, sizes_ptr, stop_ids_ptr, num_logits, logits_stride,
    RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the new token, ban what would complete an n-gram of the window a second time."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    if row < 0:
        return
    logits_ptr += index * logits_stride
    recent_ptr += row * RING
    sizes_ptr += row * _NUM_SIZES
    stop_ids_ptr += row * _MAX_STOP_IDS
    size = tl.load(sizes_ptr + _NGRAM_SIZE)
    if size == 0:
        return
    num_recent = tl.load(sizes_ptr + _NUM_RECENT)
    num_stops = tl.load(sizes_ptr + _NUM_STOPS)
    token = tl.load(new_ids_ptr + index).to(tl.int32)
    # Every thread has read what one writes, and reads what one has written.
    tl.debug_barrier()
    if token >= 0:
        tl.store(recent_ptr + num_recent % RING, token)
        num_recent += 1
        tl.store(sizes_ptr + _NUM_RECENT, num_recent)
    tl.debug_barrier()
    length = tl.minimum(num_recent, tl.load(sizes_ptr + _NGRAM_WINDOW))
    # Where the first n-gram of the window ends; later than the last token if the window is shorter than n.
    for start in range(num_recent - length + size - 1, num_recent, BLOCK):
        ends = start + tl.arange(0, BLOCK)
        is_banned = ends < num_recent
        for distance in range(1, size):
            before = tl.load(recent_ptr + (ends - distance) % RING, mask=is_banned, other=-1)
            is_banned = is_banned & (before == tl.load(recent_ptr + (num_recent - distance) % RING))
        ids = tl.load(recent_ptr + ends % RING, mask=is_banned, other=-1)
        for stop in range(0, num_stops):
            is_banned = is_banned & (ids != tl.load(stop_ids_ptr + stop))
        is_banned = is_banned & (ids >= 0) & (ids < num_logits)
        minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + ids, minus_infinity, mask=is_banned)


def triton_apply_rules(logits: torch.Tensor, rows: torch.Tensor, new_ids: torch.Tensor, tensors: RuleTensors) -> None:
    """See `CaptionTable.apply`."""
    assert logits.stride(1) == 1
    grid, num_logits = (len(rows),), logits.shape[1]
    _penalty_kernel[grid](
        logits, rows, new_ids, tensors.page_table, tensors.ids, tensors.counts, tensors.sizes, tensors.numbers,
        tensors.stop_ids, num_logits, logits.stride(0), tensors.page_table.stride(0),
        PAGE=PAGE, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _ngram_kernel[grid](
        logits, rows, new_ids, tensors.recent, tensors.sizes, tensors.stop_ids, num_logits, logits.stride(0),
        RING=RING, BLOCK=WINDOW_BLOCK, num_warps=1,
    )  # fmt: skip
