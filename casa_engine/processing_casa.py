"""`CasaProcessor`: chat text and images -> token ids, patches and insertion points.

The chat template writes one image marker (`<|image_pad|>`) per image, between the model's pre- and post-image tokens.
For the CA fusions the marker is taken out of the stream and remembered as the image's insertion point; for
`insertion` it is repeated once for each image token. Image sizes follow Qwen2.5-VL's image processor.
"""

from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from casa_engine.errors import InputError
from casa_engine.image_inputs import pad_insertion_points
from casa_engine.image_patches import resized_pixels
from casa_engine.image_preparation import EncodedImage, as_image
from casa_engine.padding import pad_rows
from casa_engine.rope import image_token_counts
from casa_engine.windows import split_image_markers

MAX_ASPECT_RATIO = 200


class CasaProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template of a CASA model.

    Args:
        image_processor: A Qwen2-VL image processor.
        tokenizer: Any fast tokenizer that has the image marker.
        chat_template: Jinja text.
        fusion: The model's fusion (`CasaConfig.fusion`).
        image_token: The marker.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        fusion: str = "ca_tv",
        image_token: str = "<|image_pad|>",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.fusion = fusion
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property
    def max_image_tokens(self) -> int:
        """Image tokens of the largest image that the image processor makes; larger ones are shrunk to it."""
        images = self.image_processor
        return images.size["longest_edge"] // (images.patch_size * images.merge_size) ** 2

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "image_grid_thw",
            "insertion_points",
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        return_tensors: str = "pt",
        add_special_tokens: bool = False,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Prepare B prompts.

        Args:
            images: All images in order: one, a list, or a list for each prompt. Pillow images, or arrays or tensors
                of uint8; never paths or addresses (see `casa_engine.image_preparation`).
            text: One prompt or a list of B, with one marker per image.
            videos: Taken because `apply_chat_template` passes it; only None (frames are images).
            audio: The same.
            return_tensors: Only "pt".
            add_special_tokens: Whether the tokenizer adds its own (templates write them out).
            padding: Prompts of unequal length are always padded; only True, or "longest", its other name.
            padding_side: "left", as generation wants it, or "right".
            pad_to_multiple_of: The padded length is a multiple of it.
            truncation: Only None or False: a cut prompt would lose its images' places.
            max_length: The same: only None.

        Returns:
            input_ids and attention_mask int64 (B, T); with images also pixel_values float32 (P, 1176),
            image_grid_thw int64 (I, 3), images ordered by row, and, for the CA fusions, insertion_points int64 (B, M):
            for each prompt how many of its tokens, padding excluded, precede each of its images; -1 behind
            those of prompts with fewer images. Batches may be put together and padded anew: points stay right.

        Raises:
            InputError: No text; markers and images differ in number, in all or in one prompt; or an image cannot be
                resized.
        """
        if videos is not None or audio is not None:
            raise InputError("got a video or audio; expected text and images only: pass video frames as images.")
        if return_tensors != "pt" or padding not in (True, "longest"):
            raise InputError(
                f"return_tensors is {return_tensors!r}, padding {padding!r}; only 'pt' and True are supported."
            )
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side is {padding_side!r}; expected 'left' or 'right'.")
        if truncation or max_length is not None:
            raise InputError(
                f"truncation is {truncation!r}, max_length {max_length!r}; prompts are not cut, since their images "
                "would lose their places: leave both out, and leave longer examples away."
            )
        if pad_to_multiple_of is not None and not (isinstance(pad_to_multiple_of, int) and pad_to_multiple_of > 0):
            raise InputError(
                f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected a whole number from 1, or None to pad to the "
                "longest prompt."
            )
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError(f"text is {text!r}; expected one prompt or a list of prompts.")
        prompts = [self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"] for prompt in texts]
        num_markers = [ids.count(self.image_token_id) for ids in prompts]
        flat = _flatten(images)
        self.check_counts(sum(num_markers), len(flat))
        if isinstance(images, (list, tuple)) and any(isinstance(of_prompt, (list, tuple)) for of_prompt in images):
            self._check_counts_of_prompts(num_markers, [len(_flatten(of_prompt)) for of_prompt in images])
        vision = self.process_images(flat) if flat else {}
        if self.fusion == "insertion":
            counts = iter(image_token_counts(vision["image_grid_thw"], self.image_processor.merge_size) if flat else ())
            prompts = [self._expand(ids, counts) for ids in prompts]
            return BatchFeature(self._padded(prompts, padding_side, pad_to_multiple_of) | vision)
        split = [split_image_markers(ids, self.image_token_id) for ids in prompts]
        if flat:
            vision["insertion_points"] = pad_insertion_points([points for _, points in split])
        streams = [stream for stream, _ in split]
        return BatchFeature(self._padded(streams, padding_side, pad_to_multiple_of) | vision)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation as transformers does, with images as pixels only.

        Raises:
            InputError: An image is given by its path or address, which transformers would read or fetch.
        """
        _refuse_addresses(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def process_images(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Prepare images and cut them into patches: pixel_values float32 (P, 1176) and image_grid_thw int64 (I, 3).

        Raises:
            InputError: One is no image, or cannot be resized.
        """
        # One at a time: a large picture and its copies are gone before the next one is opened.
        cut = [self.image_processor(images=[self._prepared(image)], return_tensors="pt") for image in images]
        return {name: torch.cat([one[name] for one in cut]) for name in ("pixel_values", "image_grid_thw")}

    def image_bytes(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare and resize one image: uint8 (P, 588) and int64 (3,), for `image_patches.PatchValues`.

        Raises:
            InputError: It is no image, or cannot be resized.
        """
        return resized_pixels(self.image_processor, self._prepared(image))

    @staticmethod
    def _prepared(image: Any) -> Image.Image:
        prepared = image.decode() if isinstance(image, EncodedImage) else as_image(image)
        if max(prepared.size) > MAX_ASPECT_RATIO * min(prepared.size):
            raise InputError(
                f"an image is {prepared.size[0]}x{prepared.size[1]} px; expected sides of a ratio up to "
                f"{MAX_ASPECT_RATIO}: crop or pad it."
            )
        return prepared

    @staticmethod
    def check_counts(num_markers: int, num_images: int) -> None:
        """Raise InputError unless a prompt's image markers and images are equally many."""
        if num_markers != num_images:
            raise InputError(
                f"the prompt has {num_markers} image markers and {num_images} images; expected one marker for each "
                "image. Use a chat template, and do not write the marker in text."
            )

    @staticmethod
    def _check_counts_of_prompts(num_markers: list[int], num_images: list[int]) -> None:
        """Raise InputError unless images given by prompt are as many as each prompt's markers."""
        if num_markers != num_images:
            raise InputError(
                f"the prompts have {num_markers} image markers and {num_images} images; expected a list of images for "
                "each prompt, one image for each of its markers."
            )

    def _expand(self, ids: list[int], counts: Any) -> list[int]:
        return [
            token for token_id in ids for token in [token_id] * (next(counts) if token_id == self.image_token_id else 1)
        ]

    def _padded(self, rows: list[list[int]], side: str, multiple: int | None) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask, int64 (B, T) each."""
        pad_id = self.tokenizer.pad_token_id
        pad_id = pad_id if pad_id is not None else self.tokenizer.eos_token_id or 0
        longest = max(map(len, rows))
        length = longest if multiple is None else -(-longest // multiple) * multiple
        ids, mask = (
            pad_rows(each, fill, left=side == "left", length=length)
            for each, fill in ((rows, pad_id), ([[1] * len(row) for row in rows], 0))
        )
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _refuse_addresses(conversation: Any) -> None:
    """Raise InputError for image parts of messages that hold text in place of pixels."""
    if isinstance(conversation, (list, tuple)):
        for each in conversation:
            _refuse_addresses(each)
    elif isinstance(conversation, dict):
        _refuse_addresses(conversation.get("content"))
        named = [name for name in ("image", "url", "path", "base64") if isinstance(conversation.get(name), str)]
        if conversation.get("type") == "image" and named:
            raise InputError(
                f"an image part has text under {named[0]!r}; expected pixels under 'image': paths and addresses are "
                "not followed, so open the file first."
            )


def _flatten(images: Any) -> list[Any]:
    """Return one flat list of images from None, one image, a list, or a list of lists (None entries dropped)."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for each in images for image in _flatten(each)]
