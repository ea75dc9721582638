"""A tokenizer for checkpoints that have none: every byte one token, and the ChatML marks.

Random checkpoints of the published sizes need some tokenizer, and no published vocabulary may be shipped. The 256 byte
tokens have ids 2 to 257, special tokens the ids of the model's configuration.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AddedToken, PreTrainedTokenizerFast

from casa_engine.configuration import CasaConfig
from casa_engine.token_ids import list_token_ids

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE, IMAGE_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
FIRST_BYTE_ID = 2


def chat_template() -> str:
    """The ChatML template of casa-engine's own checkpoints (Jinja)."""
    return Path(__file__).with_name("chat_template.jinja").read_text()


def byte_tokenizer(config: CasaConfig) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer whose special tokens have the ids that the configuration names.

    Args:
        config: Gives the vocabulary's size and the ids of end, image and image delimiters.

    Returns:
        A fast tokenizer; `<|im_end|>` has the first configured end id (1 where none is configured).
    """
    end = next(iter(list_token_ids(config.text_config.eos_token_id)), 1)
    special = {TURN_END: end, IMAGE: config.image_token_id}
    for token, ids in ((IMAGE_START, config.pre_image_tokens), (IMAGE_END, config.post_image_tokens)):
        if ids:
            special[token] = ids[0]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: FIRST_BYTE_ID + index for index, symbol in enumerate(symbols)}
    free = (token_id for token_id in range(FIRST_BYTE_ID + len(symbols), config.text_config.vocab_size))
    taken = set(special.values())
    for token in (END_OF_TEXT, TURN_START, IMAGE_START, IMAGE_END):
        if token not in special:
            special[token] = next(token_id for token_id in free if token_id not in taken)
    tokenizer = Tokenizer(BPE(vocab=vocab | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=config.text_config.max_position_embeddings,
    )
