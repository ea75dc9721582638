"""A conversation that grows: the eager model's streaming interface.

State is one explicit object. Each turn or video frame feeds new tokens and images, then generates; the end token that
was really emitted is recorded once, as the published captioner does (`docs/live.md`), so that the text KV holds
exactly what was generated. Live sessions in the engine are compared with this, token for token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.token_ids import list_token_ids

# Changes logits (1, V) in place or returns new ones, given all ids of the conversation so far.
LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]


class CasaStream:
    """One conversation with a model, fed piece by piece.

    Args:
        model: The eager model, or one with its interface (`casa_export` runs exported graphs behind it).
        stop_token_ids: Ids that end a generation; the model's generation config where none are given.

    Attributes:
        token_ids: Every id in the text KV so far, in order.
    """

    def __init__(self, model: CasaForConditionalGeneration, stop_token_ids: Sequence[int] | None = None) -> None:
        self.model = model
        stop = model.generation_config.eos_token_id if stop_token_ids is None else stop_token_ids
        self.stop_token_ids = set(list_token_ids(stop))
        self.cache = model.new_cache()
        self.token_ids: list[int] = []
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def feed(
        self,
        token_ids: Sequence[int],
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        insertion_points: Sequence[int] = (),
    ) -> None:
        """Add text and images to the conversation.

        Args:
            token_ids: T new ids.
            pixel_values: (P, 1176). Patches of the new images, if any.
            image_grid_thw: int64 (I, 3).
            insertion_points: For each image the index in `token_ids` of the first token after it (T: at the end).
        """
        images = {}
        if image_grid_thw is not None and len(image_grid_thw):
            images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
            if self.model.config.is_cross_attention:
                images["insertion_points"] = torch.tensor([list(insertion_points)])
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self.model.device)
        output = self.model(ids, past_key_values=self.cache, logits_to_keep=1, **images)
        self.token_ids += token_ids
        self._logits = output.logits[:, -1].float()

    @torch.inference_mode()
    def generate(self, max_new_tokens: int, logits_processors: Sequence[LogitsProcessor] = ()) -> list[int]:
        """Generate greedily until a stop token, which is recorded but not returned.

        Args:
            max_new_tokens: At most so many, the stop token included.
            logits_processors: Applied in order to the logits (1, V) before each choice.

        Returns:
            The new ids. All are in the text KV, as is the stop token if one came.
        """
        new: list[int] = []
        for _ in range(max_new_tokens):
            logits = self._logits
            for process in logits_processors:
                logits = process(self.token_ids, logits)
            token = int(logits.argmax(dim=-1))
            self.feed([token])
            if token in self.stop_token_ids:
                break
            new.append(token)
        return new
