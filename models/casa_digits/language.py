"""Stage 2: teaches the whole conversation, on images encoded beforehand by the frozen tower."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from tqdm import tqdm

from casa_digits.augment import make_bank
from casa_digits.conversations import Conversation, Writer
from casa_digits.data import DigitSamples
from casa_digits.frames import FramePool, fill_pool
from casa_digits.progress import ProgressFile
from casa_digits.schedule import cosine_rate
from casa_digits.windowed import build_batch, loss_of
from casa_engine.modeling_casa import CasaForConditionalGeneration

KINDS = ("chat", "memory", "stream", "recall", "form", "tools")
KIND_SHARES = (0.18, 0.12, 0.3, 0.14, 0.14, 0.12)
ROWS_DRAWN = {"chat": 160, "memory": 80, "stream": 32, "recall": 40, "form": 80, "tools": 48}
STREAM_TOKENS = (120, 240, 400, 680)
STREAM_TOKEN_SHARES = (0.5, 0.32, 0.13, 0.05)
BATCH_TOKENS = 1600
STEPS_PER_POOL = 500


def draw_batches(rng: np.random.Generator, writer: Writer, pool: FramePool) -> Iterator[list[Conversation]]:
    """Batches without end. Rows are drawn in plenty and sorted, so that those of a batch have similar lengths."""
    while True:
        kind = str(rng.choice(KINDS, p=KIND_SHARES))
        if kind in ("stream", "recall"):
            lengths = rng.choice(STREAM_TOKENS, ROWS_DRAWN[kind], p=STREAM_TOKEN_SHARES)
            rows = [writer.stream(pool, int(length), text_only=kind == "recall") for length in lengths]
        else:
            rows = [getattr(writer, kind)(pool) for _ in range(ROWS_DRAWN[kind])]
        yield from _split(sorted(rows, key=lambda row: len(row.ids)))


def _split(rows: list[Conversation]) -> Iterator[list[Conversation]]:
    """Cuts rows of ascending length into batches of at most `BATCH_TOKENS`, padding included."""
    while rows:
        count = 1
        while count < len(rows) and (count + 1) * len(rows[count].ids) <= BATCH_TOKENS:
            count += 1
        yield rows[:count]
        rows = rows[count:]


def teach_language(
    model: CasaForConditionalGeneration,
    writer: Writer,
    rng: np.random.Generator,
    samples: DigitSamples,
    num_steps: int,
    num_families: int = 400,
    peak_rate: float = 2e-3,
    save: Callable[[], None] | None = None,
    progress_file: ProgressFile | None = None,
) -> None:
    """Trains everything but the vision tower; goes on where an earlier run was ended, if that left its progress.

    Args:
        model: What is trained; its tower stays as it is.
        writer: Writes the conversations.
        rng: Source of the randomness of images, conversations and batches; the writer's own.
        samples: The digits to draw.
        num_steps: Optimiser steps; the learning rate falls in a cosine over them.
        num_families: Size of the pool of encoded images, in families of eight.
        peak_rate: Highest learning rate.
        save: Called now and then, so that a usable model exists early.
        progress_file: Where the progress is kept; a run that goes on ends with the same weights as one without a break.

    Mutates:
        model: its weights.
    """
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, num_steps))
    first = progress_file.restore(model, optimizer, schedule, rng) if progress_file else 0
    progress = tqdm(range(first, num_steps), desc="language", mininterval=5.0, initial=first, total=num_steps)
    recent: deque[float] = deque(maxlen=200)
    for step in progress:
        if step % STEPS_PER_POOL == 0:
            if step > first and progress_file is not None:
                progress_file.keep(step, model, optimizer, schedule, rng)
            if step > first and save is not None:
                save()
            pool = fill_pool(rng, model.model.visual, make_bank(rng, samples, 10), num_families)
            batches = draw_batches(rng, writer, pool)
        loss = loss_of(model, build_batch(model, next(batches), pool))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(recent):.4f}")
