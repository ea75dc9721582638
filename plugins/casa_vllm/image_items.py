"""The one entry for images, and the cache of processed images.

    a checked file, or a program's pixels -> ImageParser -> content key -> ImageItemCache -> with every request

The key of an image is a digest of its content. A client's UUID is never a key: it maps to one, for that client
only (`casa_engine.image_owner`), and to the latest image sent with it.

vLLM has two caches, of which the one in the server mirrors the engine's: items that are in the mirror are not sent
again. A request that is rejected after it was rendered, or one with more images than fit, makes the two diverge. Here
items are always sent. They are bytes and not floats (`casa_engine.image_patches`), so that this is cheap, and there is
nothing to keep in sync.
"""

import hashlib
import threading
from typing import Any

from PIL import Image
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.utils.cache import CacheInfo, LRUCache

from casa_engine.errors import InputError
from casa_engine.image_preparation import EncodedImage, as_image
from casa_vllm import compat

# Names are digests: about 250 bytes each, with their keys.
MAX_NAMES = 65_536


class ImageParser(MultiModalDataParser):
    """Accepts pixels and checked files; everything else is rejected, on every path."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        """Return checked files unchanged, pixels as images in RGB, and None for images given by name.

        Raises:
            InputError: An item is neither.
        """
        if data is None:
            return None
        items = list(data) if isinstance(data, (list, tuple)) or getattr(data, "ndim", 0) == 4 else [data]
        return ImageProcessorItems([self._checked(item) for item in items])

    @staticmethod
    def _checked(item: Any) -> EncodedImage | Image.Image | None:
        if item is None or isinstance(item, EncodedImage):
            return item
        # vLLM's own connector decodes images itself, under `vllm serve`.
        return as_image(item.media if isinstance(item, MediaWithBytes) else item)

    def _get_subparsers(self) -> dict[str, Any]:
        return {"image": self._parse_image_data}


def content_key(image: EncodedImage | Image.Image, model_id: str) -> str:
    """Return the key of an image's content: of a file's bytes, or of an image's size and pixels."""
    if isinstance(image, EncodedImage):
        kind, content = "file", image.data
    else:
        kind, content = f"RGB {image.width}x{image.height}", image.tobytes()
    digest = hashlib.sha256(f"{kind} {model_id}\n".encode())
    digest.update(content)
    return digest.hexdigest()


class ImageItemCache(MultiModalProcessorOnlyCache):
    """LRU cache of processed images by content key, and the clients' names of images.

    Its interface for vLLM is the base class's, which the renderer uses for statistics and to clear it.
    """

    def __init__(self, model_config: Any) -> None:
        super().__init__(model_config)
        self._names: LRUCache[str, str] = LRUCache(MAX_NAMES)
        # Several threads render, and vLLM clears the cache from others.
        self._lock = threading.Lock()

    def get(self, key: str) -> MultiModalKwargsItem | None:
        """Return a processed image, or None; this counts as its latest use."""
        with self._lock:
            kept = self._cache.get(key)
        return None if kept is None else kept.item

    def put(self, key: str, item: MultiModalKwargsItem) -> None:
        """Store a processed image, if the cache is large enough for it."""
        with self._lock:
            self.cache_if_fits(self._cache, key, compat.cache_item(item))

    def name(self, name: str, key: str) -> None:
        """Map a client's name to a content key, replacing an earlier one."""
        with self._lock:
            self._names[name] = key

    def key_of(self, name: str) -> str | None:
        """Return the content key of a name, or None."""
        with self._lock:
            return self._names.get(name)

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        """Return hits and queries, since the last call with `delta` if so: never less than none.

        vLLM gives them to a counter, which refuses a negative number, and with it ends the server.
        """
        with self._lock:
            return super().make_stats(delta=delta)

    def clear_cache(self) -> None:
        """Clear images and names."""
        with self._lock:
            super().clear_cache()
            self._names.clear()


def unknown_name(index: int) -> InputError:
    """Return the error for an image given by a name alone that is not, or no longer, in the cache."""
    return InputError(
        f"Cache miss for image {index}: it is given by its uuid alone, and this client has sent no image under it, or "
        "that has been dropped since. Send the image with its uuid once more."
    )
