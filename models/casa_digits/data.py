"""Images of handwritten digits: what casa-tiny-digits is trained and judged on.

An image is a grid of 28x28-px cells, 1 to 8 wide and 1 to 4 high. One to four
cells hold one digit each, scaled to 22-28 px, anywhere inside its cell:

    +----+----+----+
    | 3  |    |  7 |    read left to right, then top to bottom: [3, 7, 1]
    +----+----+----+
    |    | 1  |    |
    +----+----+----+

All digits have one colour, the background another; their luminance (Rec. 601
luma of the 0..1 sRGB values, what PIL calls "L") differs by at least 0.4.

The digits are scikit-learn's `load_digits` (1,797 real 8x8 samples). Samples
whose index is a multiple of 5 are held out: training never sees them.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

CELL_PX = 28
MAX_COLUMNS = 8
MAX_ROWS = 4
MAX_DIGITS = 4
DIGIT_SIZES_PX = tuple(range(22, 29))
HOLD_OUT_EVERY = 5
MIN_LUMINANCE_DIFFERENCE = 0.4
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Grid:
    """Size of an image in cells."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= MAX_ROWS and 1 <= self.columns <= MAX_COLUMNS):
            raise ValueError(
                f"grid of {self.rows}x{self.columns} cells; expected 1..{MAX_ROWS} rows and 1..{MAX_COLUMNS} columns"
            )

    @property
    def num_cells(self) -> int:
        """Rows times columns."""
        return self.rows * self.columns

    @property
    def max_digits(self) -> int:
        """Most digits that find a cell of their own."""
        return min(MAX_DIGITS, self.num_cells)


@dataclass(frozen=True)
class DigitSamples:
    """Handwritten digits of one split.

    Attributes:
        images: (S, 8, 8) float32, ink in 0..1.
        labels: (S,) int64.
        indices: (S,) int64, the index of each sample in `load_digits`.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Layout:
    """Where the digits of one image are, in reading order.

    Attributes:
        grid: size in cells.
        cells: (D,) row-major cell numbers, ascending.
        samples: (D,) positions in the `DigitSamples` used.
        sizes: (D,) edge of each digit in px.
        offsets: (D, 2) top and left px inside the cell.
        filters: (D,) names of the upscaling filters.
    """

    grid: Grid
    cells: np.ndarray
    samples: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    filters: tuple[str, ...]


@dataclass(frozen=True)
class Colours:
    """Ink and paper, each (3,) float in 0..1 (sRGB)."""

    ink: np.ndarray
    paper: np.ndarray


@dataclass(frozen=True)
class DigitImage:
    """One rendered image, uint8 (H, W, 3), and the truth about it."""

    pixels: np.ndarray
    digits: tuple[int, ...]
    layout: Layout
    colours: Colours

    @property
    def text(self) -> str:
        """The digits as the model writes them."""
        return " ".join(str(digit) for digit in self.digits)

    def to_pil(self) -> Image.Image:
        """Return the image for a processor or a file."""
        return Image.fromarray(self.pixels)


@lru_cache(maxsize=2)
def load_samples(held_out: bool) -> DigitSamples:
    """Load the held-out samples (index a multiple of 5) or all the others.

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the data, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'casa-engine[digits]'",
            name="sklearn",
        ) from error
    data = load_digits()
    indices = np.arange(len(data.target))
    chosen = (indices % HOLD_OUT_EVERY == 0) == held_out
    images = (data.images[chosen] / 16.0).astype(np.float32)
    return DigitSamples(images, data.target[chosen].astype(np.int64), indices[chosen])


@cache
def upscaling_matrix(size: int, filter_name: str) -> np.ndarray:
    """Return the (size, 8) float32 matrix M for which M @ image @ M.T is PIL's resize of an 8x8 image."""
    rows = [Image.fromarray(row[None]).resize((size, 1), FILTERS[filter_name]) for row in np.eye(8, dtype=np.float32)]
    return np.concatenate([np.asarray(row) for row in rows]).T.copy()


def upscale(image: np.ndarray, size: int, filter_name: str) -> np.ndarray:
    """Resize (8, 8) ink to (size, size), clipped to 0..1."""
    matrix = upscaling_matrix(size, filter_name)
    return np.clip(matrix @ image @ matrix.T, 0.0, 1.0)


def draw_grid(rng: np.random.Generator) -> Grid:
    """Draw a grid of any size, all equally likely."""
    return Grid(int(rng.integers(1, MAX_ROWS + 1)), int(rng.integers(1, MAX_COLUMNS + 1)))


def draw_layout(
    rng: np.random.Generator,
    num_samples: int,
    grid: Grid,
    num_digits: int | None = None,
    filters: tuple[str, ...] = ("bilinear", "bicubic"),
) -> Layout:
    """Place 1 to 4 digits (or exactly `num_digits`) in different cells."""
    count = int(rng.integers(1, grid.max_digits + 1)) if num_digits is None else num_digits
    if not 1 <= count <= grid.max_digits:
        raise ValueError(f"{count} digits in a grid of {grid.num_cells} cells; expected 1..{grid.max_digits}")
    sizes = rng.integers(DIGIT_SIZES_PX[0], DIGIT_SIZES_PX[-1] + 1, count)
    return Layout(
        grid=grid,
        cells=np.sort(rng.permutation(grid.num_cells)[:count]),
        samples=rng.integers(0, num_samples, count),
        sizes=sizes,
        offsets=rng.integers(0, CELL_PX + 1 - sizes, (2, count)).T,
        filters=tuple(filters[i] for i in rng.integers(0, len(filters), count)),
    )


def luminance(colour: np.ndarray) -> np.ndarray:
    """Compute Rec. 601 luma, 0..1, of sRGB values (..., 3) in 0..1."""
    return colour @ LUMA_WEIGHTS


def draw_colours(rng: np.random.Generator) -> Colours:
    """Draw two random colours whose luminance differs by at least 0.4."""
    while True:
        ink, paper = rng.integers(0, 256, (2, 3)) / 255.0
        if abs(luminance(ink) - luminance(paper)) >= MIN_LUMINANCE_DIFFERENCE:
            return Colours(ink, paper)


def ink_mask(layout: Layout, glyphs: list[np.ndarray]) -> np.ndarray:
    """Place square glyphs (ink in 0..1) on the canvas; return (H, W) float32."""
    mask = np.zeros((layout.grid.rows * CELL_PX, layout.grid.columns * CELL_PX), np.float32)
    for glyph, cell, size, (top, left) in zip(glyphs, layout.cells, layout.sizes, layout.offsets, strict=True):
        row, column = divmod(int(cell), layout.grid.columns)
        y, x = row * CELL_PX + top, column * CELL_PX + left
        mask[y : y + size, x : x + size] = glyph
    return mask


def paint(mask: np.ndarray, colours: Colours) -> np.ndarray:
    """Mix the colours by (H, W) ink to (H, W, 3) uint8."""
    image = colours.paper + mask[..., None] * (colours.ink - colours.paper)
    return (image * 255.0 + 0.5).astype(np.uint8)


def render(samples: DigitSamples, layout: Layout, colours: Colours) -> DigitImage:
    """Draw one image from its description; no randomness."""
    glyphs = [
        upscale(samples.images[sample], int(size), filter_name)
        for sample, size, filter_name in zip(layout.samples, layout.sizes, layout.filters, strict=True)
    ]
    digits = tuple(int(label) for label in samples.labels[layout.samples])
    return DigitImage(paint(ink_mask(layout, glyphs), colours), digits, layout, colours)


def draw_image(
    rng: np.random.Generator,
    samples: DigitSamples,
    grid: Grid | None = None,
    num_digits: int | None = None,
) -> DigitImage:
    """Draw a random image of the specification above."""
    layout = draw_layout(rng, len(samples), grid or draw_grid(rng), num_digits)
    return render(samples, layout, draw_colours(rng))
