"""Windows: the only definition of which key a cross-attention query sees.

An image has an *insertion point* K: it comes after K tokens of the text stream, so that token K is the first to see it.
Images with the same insertion point share one window. Token t belongs to the window of the latest K <= t:

    text      t0 t1 | t2 t3 t4 | t5 t6         | = an image, K = 2 and K = 5
    window     none |  image 1 |  image 2
    CA        t3 sees image 1;      t0 and t1 see nothing and get exactly zero
    CA_t+v    t3 sees image 1, t2 and t3;      t1 sees t0 and t1 (a window of text only)

Eager attention, the vLLM plugin and the exported graphs all consume these plans. Pure NumPy, without any runner.

Source: paper Eq. 2 (CA), Eq. 4 (CA_t+v) and A.2 (consecutive images share a window).
"""

from dataclasses import dataclass

import numpy as np

from casa_engine.errors import InputError


@dataclass(frozen=True)
class WindowPlan:
    """For each of T text tokens: its window's first text token and its window's images.

    Attributes:
        starts: int64 (T,). Index in the text stream of the first token of the token's window (0 before any image).
        first_images: int64 (T,). Index of the first image of the window; equal to `end_images` where there is none.
        end_images: int64 (T,). One past the last image of the window.
    """

    starts: np.ndarray
    first_images: np.ndarray
    end_images: np.ndarray

    @property
    def has_image(self) -> np.ndarray:
        """Bool (T,): whether the token's window holds an image."""
        return self.end_images > self.first_images


def check_insertion_points(insertion_points: np.ndarray) -> None:
    """Raise InputError unless the points are non-negative and ascending."""
    points = np.asarray(insertion_points)
    if points.size and (points.min() < 0 or (np.diff(points) < 0).any()):
        raise InputError(f"insertion points are {points.tolist()}; expected ascending numbers from 0.")


def plan_windows(positions: np.ndarray, insertion_points: np.ndarray) -> WindowPlan:
    """Find the window of each token.

    Args:
        positions: int (T,). Indexes of the tokens in the text stream.
        insertion_points: int (M,), ascending. Text-stream index of the first token after each image.

    Returns:
        The plan, one entry a token; image indexes count along `insertion_points`.
    """
    points = np.asarray(insertion_points, dtype=np.int64)
    end_images = np.searchsorted(points, positions, side="right").astype(np.int64)
    starts = np.concatenate(([0], points))[end_images]
    first_images = np.where(end_images > 0, np.searchsorted(points, starts, side="left"), 0).astype(np.int64)
    return WindowPlan(starts, first_images, end_images)


def last_window(num_tokens: int, insertion_points: np.ndarray) -> tuple[int, int, int]:
    """Return the window of token `num_tokens`, the next one of the stream: (start, first image, end image)."""
    plan = plan_windows(np.array([num_tokens]), insertion_points)
    return int(plan.starts[0]), int(plan.first_images[0]), int(plan.end_images[0])


def split_image_markers(token_ids: list[int], image_token_id: int) -> tuple[list[int], list[int]]:
    """Remove the image markers from a prompt.

    Args:
        token_ids: A prompt with one marker per image.
        image_token_id: The marker.

    Returns:
        The text stream without markers, and each image's insertion point in it.
    """
    stream: list[int] = []
    insertion_points: list[int] = []
    for token_id in token_ids:
        if token_id == image_token_id:
            insertion_points.append(len(stream))
        else:
            stream.append(token_id)
    return stream, insertion_points
