"""`windows.py` against the rule written as a loop."""

import numpy as np
import pytest

from casa_engine.errors import InputError
from casa_engine.windows import check_insertion_points, last_window, plan_windows, split_image_markers

pytestmark = pytest.mark.unit


def brute_force(position: int, points: list[int]) -> tuple[int, list[int]]:
    """Start of the token's window and the images in it, one token at a time."""
    latest = None
    for point in points:
        if point <= position:
            latest = point
    if latest is None:
        return 0, []
    return latest, [image for image, point in enumerate(points) if point == latest]


@pytest.mark.parametrize(
    "points",
    [[], [0], [10], [3], [3, 3], [0, 4, 4, 5], [2, 3, 9, 9, 9], [11], [0, 0]],
    ids=["no image", "first", "last", "inside", "adjacent", "one-token window", "three adjacent", "past", "two first"],
)
def test_plan_equals_brute_force(points: list[int]) -> None:
    plan = plan_windows(np.arange(10), np.array(points))
    for token in range(10):
        start, images = brute_force(token, points)
        assert plan.starts[token] == start
        assert list(range(plan.first_images[token], plan.end_images[token])) == images
        assert plan.has_image[token] == bool(images)


def test_random_plans_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = np.sort(rng.integers(0, 30, rng.integers(0, 8)))
        positions = rng.permutation(30)[:12]
        plan = plan_windows(positions, points)
        for index, token in enumerate(positions):
            start, images = brute_force(token, points.tolist())
            assert plan.starts[index] == start
            assert list(range(plan.first_images[index], plan.end_images[index])) == images


def test_last_window_is_that_of_the_next_token() -> None:
    assert last_window(5, np.array([2, 5, 5])) == (5, 1, 3)
    assert last_window(4, np.array([2, 5, 5])) == (2, 0, 1)
    assert last_window(1, np.array([2])) == (0, 0, 0)


def test_markers_leave_the_stream() -> None:
    assert split_image_markers([9, 1, 9, 9, 2], 9) == ([1, 2], [0, 1, 1])
    assert split_image_markers([1, 2, 9], 9) == ([1, 2], [2])
    assert split_image_markers([1, 2], 9) == ([1, 2], [])


@pytest.mark.parametrize("points", [[3, 2], [-1]])
def test_points_that_do_not_ascend_are_refused(points: list[int]) -> None:
    with pytest.raises(InputError, match="ascending"):
        check_insertion_points(np.array(points))
