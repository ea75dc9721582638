"""Stages 2 to 6: teach the whole conversation, on images encoded beforehand by the frozen tower."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from casa_digits.augment import make_bank
from casa_digits.conversations import NOTE_CLASSES, NOTES, Conversation, Writer
from casa_digits.data import DigitSamples
from casa_digits.frames import fill_pool
from casa_digits.lessons import Course, draw_batches
from casa_digits.progress import ProgressFile
from casa_digits.schedule import cosine_rate
from casa_digits.windowed import build_batch, loss_of
from casa_engine.modeling_casa import CasaForConditionalGeneration


def teach_language(
    model: CasaForConditionalGeneration,
    writer: Writer,
    samples: DigitSamples,
    course: Course,
    num_steps: int,
    num_families: int = 400,
    save: Callable[[], None] | None = None,
    progress_file: ProgressFile | None = None,
) -> None:
    """Train everything but the vision tower; go on where an earlier run was ended, if that left its progress.

    Args:
        model: What is trained; its tower stays as it is.
        writer: Writes the conversations; images and batches are drawn with its source of randomness.
        samples: The digits to draw.
        course: What is taught.
        num_steps: Optimiser steps; the learning rate falls in a cosine over them.
        num_families: Size of the pool of encoded images, in families of eight.
        save: Called now and then, so that a usable model exists early.
        progress_file: Where the progress is kept; a run that goes on ends with the same weights as one without a break.

    Mutates:
        model: its weights.
    """
    rng = writer.rng
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    note_head = None
    if course.note_layer is not None:
        # It only serves the training, and starts at zero: nothing is drawn for it.
        note_head = nn.utils.skip_init(nn.Linear, model.config.text_config.hidden_size, NOTES * NOTE_CLASSES)
        nn.init.zeros_(note_head.weight)
        nn.init.zeros_(note_head.bias)
        parameters += note_head.parameters()
    trained = nn.ModuleList([model] if note_head is None else [model, note_head])
    optimizer = torch.optim.AdamW(parameters, lr=course.peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_rate(step, num_steps))
    first = progress_file.restore(course.name, trained, optimizer, schedule, rng) if progress_file else 0
    progress = tqdm(range(first, num_steps), desc=course.name, mininterval=5.0, initial=first, total=num_steps)
    recent: deque[float] = deque(maxlen=200)
    batches: Iterator[list[Conversation]] = iter(())
    for step in progress:
        if step % course.steps_per_pool == 0:
            if step > first and progress_file is not None:
                progress_file.keep(course.name, step, trained, optimizer, schedule, rng)
            if step > first and save is not None:
                save()
            pool = fill_pool(rng, model.model.visual, make_bank(rng, samples, 10), num_families)
            batches = iter(())
        batch = next(batches, None)
        if batch is None:
            batches = draw_batches(rng, writer, pool, course, course.lesson(step / num_steps))
            batch = next(batches)
        loss = loss_of(model, build_batch(model, batch, pool), note_head, course.note_layer or 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(recent):.4f}")
