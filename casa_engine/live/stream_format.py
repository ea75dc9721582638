r"""How a checkpoint spells a stream: the one assistant turn that never ends, and questions within it.

    <|im_start|>user\nINSTRUCTION<|im_end|>\n<|im_start|>assistant\n          opening, by the chat template
    <|vision_start|>[frame]<|vision_end|>CAPTION<|im_end|>                    a frame
    \n<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n           a question, after the stop token
    ANSWER<|im_end|><|vision_start|>[frame] ...                               its answer; frames go on at once

A frame whose image is gone is its delimiters and its caption: what a restart from text reads.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from casa_engine.checkpoints import load_processor, read_config
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError, InputError
from casa_engine.live.settings import LiveSettings
from casa_engine.processing_casa import CasaProcessor
from casa_engine.token_ids import list_token_ids

# Stands for an assistant's words where the chat template is asked what follows them.
ANYTHING = "@@"


class StreamFormat:
    """Words to ids and back, for live sessions of one checkpoint.

    Args:
        processor: Tokenizer and chat template.
        config: Gives the image delimiters.
        stop_ids: Ids that end a caption; the first is recorded where none was ever emitted.
    """

    def __init__(self, processor: CasaProcessor, config: CasaConfig, stop_ids: Sequence[int]) -> None:
        if not stop_ids:
            raise CheckpointError("the checkpoint names no stop token: set eos_token_id in generation_config.json.")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.stop_ids = tuple(stop_ids)
        self.before_image = tuple(config.pre_image_tokens or ())
        self.after_image = tuple(config.post_image_tokens or ())
        self.image_token_id = processor.image_token_id
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        self._special |= {self.image_token_id, *self.before_image, *self.after_image}

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "StreamFormat":
        """Read processor, configuration and generation config."""
        config = read_config(folder)
        stop = config.text_config.eos_token_id
        if (Path(folder) / "generation_config.json").is_file():
            stop = GenerationConfig.from_pretrained(folder).eos_token_id
        return cls(load_processor(folder), config, list_token_ids(stop))

    def opening(self, settings: LiveSettings) -> list[int]:
        """System prompt, instruction and the beginning of the assistant's turn."""
        messages = [{"role": "user", "content": self._checked("instruction", settings.instruction)}]
        if settings.system is not None:
            messages.insert(0, {"role": "system", "content": self._checked("system", settings.system)})
        return self._spell(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def question(self, question: str) -> list[int]:
        """What stands between the stop token before a question and its answer."""
        messages = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": ANYTHING},
            {"role": "user", "content": self._checked("question", question)},
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = self._spell(text.partition(ANYTHING)[2])
        return ids[1:] if ids and ids[0] in self.stop_ids else ids

    def words(self, name: str, text: str) -> list[int]:
        """Ids of plain words; `name` says in an error what they are."""
        return self._spell(self._checked(name, text))

    def text(self, token_ids: Sequence[int]) -> str:
        """Words of ids, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _checked(self, name: str, text: str) -> str:
        """Raise InputError where a text would be read as more than words."""
        found = self._special.intersection(self._spell(text))
        if found:
            tokens = sorted(self.tokenizer.convert_ids_to_tokens(sorted(found)))
            raise InputError(f"{name} contains the special tokens {tokens}; expected plain words: leave them out.")
        return text

    def _spell(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
