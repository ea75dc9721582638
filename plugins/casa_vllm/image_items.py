"""The one door by which pixels come in, and the cache of what was made of them.

    a guarded file, or a program's pixels -> ImageParser -> content key -> ImageItemCache -> with every request

The key of an image is a digest of its content. A client's UUID is never a key: it points to one, for that client
only (`casa_engine.image_owner`), and to the latest that was sent under it.

vLLM keeps two caches, this side's a guess at what the engine's holds: items that it believes sent are not sent again.
A request that is refused after it was rendered, or one with more images than fit, makes the guess wrong. Here items
are always sent. They are bytes and not floats (`casa_engine.image_patches`), so that this is cheap, and there is
nothing to agree on.
"""

import hashlib
import threading
from typing import Any

from PIL import Image
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.utils.cache import LRUCache

from casa_engine.errors import InputError
from casa_engine.image_preparation import EncodedImage, as_image
from casa_vllm import compat

# Names are digests: about 250 bytes each, with what they point to.
MAX_NAMES = 65_536


class ImageParser(MultiModalDataParser):
    """Takes pixels, and files that a guard let through; everything else is refused, whichever path it came by."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        """Returns guarded files as they are, pixels as images in RGB, and None for images known by name.

        Raises:
            InputError: Something is neither.
        """
        if data is None:
            return None
        items = list(data) if isinstance(data, (list, tuple)) or getattr(data, "ndim", 0) == 4 else [data]
        return ImageProcessorItems([self._admitted(item) for item in items])

    @staticmethod
    def _admitted(item: Any) -> EncodedImage | Image.Image | None:
        if item is None or isinstance(item, EncodedImage):
            return item
        # vLLM's own connector decodes images itself, under `vllm serve`.
        return as_image(item.media if isinstance(item, MediaWithBytes) else item)

    def _get_subparsers(self) -> dict[str, Any]:
        return {"image": self._parse_image_data}


def content_key(image: EncodedImage | Image.Image, model_id: str) -> str:
    """Returns the name of an image's content: of a file's bytes, or of an image's size and pixels."""
    if isinstance(image, EncodedImage):
        kind, content = "file", image.data
    else:
        kind, content = f"RGB {image.width}x{image.height}", image.tobytes()
    digest = hashlib.sha256(f"{kind} {model_id}\n".encode())
    digest.update(content)
    return digest.hexdigest()


class ImageItemCache(MultiModalProcessorOnlyCache):
    """Processed images by content key, least recently used ones dropped; and the names that clients gave.

    Its interface for vLLM is the base class's, which the renderer asks for statistics and to clear it.
    """

    def __init__(self, model_config: Any) -> None:
        super().__init__(model_config)
        self._names: LRUCache[str, str] = LRUCache(MAX_NAMES)
        # One thread renders, but vLLM clears the cache from others.
        self._lock = threading.Lock()

    def get(self, key: str) -> MultiModalKwargsItem | None:
        """Returns a processed image, or None; counts as its latest use."""
        with self._lock:
            kept = self._cache.get(key)
        return None if kept is None else kept.item

    def put(self, key: str, item: MultiModalKwargsItem) -> None:
        """Keeps a processed image, if the cache is at all large enough for it."""
        with self._lock:
            self.cache_if_fits(self._cache, key, compat.cache_item(item))

    def name(self, name: str, key: str) -> None:
        """Lets a client's name point to a content key, and no longer to another."""
        with self._lock:
            self._names[name] = key

    def key_of(self, name: str) -> str | None:
        """Returns the content key that a name points to."""
        with self._lock:
            return self._names.get(name)

    def clear_cache(self) -> None:
        """Forgets everything."""
        with self._lock:
            super().clear_cache()
            self._names.clear()


def unknown_name(index: int) -> InputError:
    """Returns the error for an image that was given by a name alone that nobody knows here, or no longer."""
    return InputError(
        f"Cache miss for image {index}: it is given by its uuid alone, and this client has sent no image under it, or "
        "that has been dropped since. Send the image with its uuid once more."
    )
