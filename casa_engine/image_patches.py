"""A resized picture in bytes, and what the vision encoder takes: normalised, cut and doubled where the encoder is.

    image -> resized: uint8 (height, width, 3) -> cache, other process -> patches: float (P, 3 * T * S) -> encoder

S is a patch's number of pixels. The encoder takes T equal copies of a still image (a video would have T frames), in
floating point: eight times the bytes, none of which need be kept or sent. The values are the image processor's own.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from casa_engine.errors import InputError

LEVELS = 256
CHANNELS = 3


def resized_pixels(image_processor: Any, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize one image as the image processor does.

    Args:
        image_processor: A Qwen2-VL image processor.
        image: In RGB.

    Returns:
        uint8 (P, 3 * S): the levels of the resized picture, row by row, channels last, in as many equal parts as it has
        patches (a part is no patch; see `PatchValues`). And int64 (3,), its grid (t, h, w) in patches.

    Raises:
        InputError: The processor does not resize, and the image's sides do not fit.
    """
    side, factor = image_processor.patch_size, image_processor.patch_size * image_processor.merge_size
    if image_processor.do_resize:
        pixels = _resized(image_processor, image, factor)
    elif image.width % factor or image.height % factor:
        raise InputError(
            f"an image is {image.width}x{image.height} px, and this checkpoint's image processor does not resize "
            f"(do_resize); expected sides that are multiples of {factor}: resize it first."
        )
    else:
        pixels = torch.from_numpy(np.array(image))
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.view(height * width, -1), torch.tensor([1, height, width])


def _resized(image_processor: Any, image: Image.Image, factor: int) -> torch.Tensor:
    """Return uint8 (height, width, 3), with sides that are multiples of `factor`."""
    size = image_processor.size
    if image_processor.backend == "pil":
        # What the processor calls, without its conversions from and to arrays, which take longer than the rest.
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        height, width = smart_resize(image.height, image.width, factor, **limits)
        return torch.from_numpy(np.array(image.resize((width, height), image_processor.resample)))
    channels_first = image_processor.process_image(image, do_convert_rgb=False)
    resized = image_processor.resize(channels_first, size, image_processor.resample, factor=factor)
    return torch.as_tensor(resized).permute(1, 2, 0).contiguous()


class PatchValues:
    """What the image processor makes of each level of each channel, as a table that it has filled in itself.

    Args:
        image_processor: A Qwen2-VL image processor.
    """

    def __init__(self, image_processor: Any) -> None:
        self._copies = image_processor.temporal_patch_size
        self._patch_size, self._merge_size = image_processor.patch_size, image_processor.merge_size
        side = self._patch_size * self._merge_size
        side *= -(-int(LEVELS**0.5) // side)
        ramp = np.resize(np.arange(LEVELS, dtype=np.uint8), (side, side))
        options = {"images": [Image.fromarray(ramp).convert("RGB")], "do_resize": False, "return_tensors": "pt"}
        levels = image_processor(**options, do_rescale=False, do_normalize=False)["pixel_values"].long()
        values = image_processor(**options)["pixel_values"]
        # Of all channels in one row, so that a picture is one look-up.
        self._table = torch.zeros(CHANNELS * LEVELS, dtype=torch.float32)
        for channel, (of_levels, of_values) in enumerate(
            zip(levels.chunk(CHANNELS, dim=1), values.chunk(CHANNELS, dim=1), strict=True)
        ):
            self._table[channel * LEVELS + of_levels.flatten()] = of_values.flatten()
        self._in_use = self._table  # of the latest call's device and type
        self._channel_starts = torch.arange(0, CHANNELS * LEVELS, LEVELS, dtype=torch.int32).view(CHANNELS, 1, 1)

    def __call__(self, pixels: torch.Tensor, grids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalise and cut pictures into patches, on the device where they are.

        Args:
            pixels: uint8 (sum of P, 3 * S) of I pictures; see `resized_pixels`.
            grids: int64 (I, 3), on the CPU.
            dtype: Of the result: the float32 values of the image processor, cast.

        Returns:
            (sum of P, 3 * T * S), in the processor's order: patches that are merged stand together.
        """
        if (self._in_use.device, self._in_use.dtype) != (pixels.device, dtype):
            self._in_use = self._table.to(pixels.device, dtype)
            self._channel_starts = self._channel_starts.to(pixels.device)
        entries = torch.empty(pixels.shape, dtype=torch.int32, device=pixels.device)
        start = 0
        for _, height, width in grids.tolist():
            end = start + height * width
            self._write_entries(pixels[start:end], entries[start:end], height, width)
            start = end
        values = self._in_use.index_select(0, entries.view(-1)).view(len(pixels), CHANNELS, 1, -1)
        return values.expand(-1, -1, self._copies, -1).flatten(1)

    def _write_entries(self, pixels: torch.Tensor, entries: torch.Tensor, height: int, width: int) -> None:
        """Write the table's entries of one picture of (height, width) patches, in the order of its patches."""
        side, merge = self._patch_size, self._merge_size
        rows, columns = height // merge, width // merge
        picture = pixels.view(rows, merge, side, columns, merge, side, CHANNELS).permute(0, 3, 1, 4, 6, 2, 5)
        torch.add(picture, self._channel_starts, out=entries.view(picture.shape))
