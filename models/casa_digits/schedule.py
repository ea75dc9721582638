"""The learning rate of every stage of training."""

import math

WARM_STEPS = 100
FLOOR = 0.01


def cosine_rate(step: int, num_steps: int) -> float:
    """Return the share of the peak rate: up in a line over 100 steps, then down in half a cosine to 1%."""
    if step < WARM_STEPS:
        return (step + 1) / WARM_STEPS
    done = min(1.0, (step - WARM_STEPS) / max(1, num_steps - WARM_STEPS))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done))
