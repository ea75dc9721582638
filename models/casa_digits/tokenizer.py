"""A small byte-level BPE tokenizer: every text has a spelling, the model's own phrases a short one.

Each digit is one token, with and without the space before it. The special tokens are those of ChatML and of Qwen's
image template; they are spelled the same as in the published models.
"""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from casa_digits.phrases import vocabulary_text
from casa_engine.tokenization import END_OF_TEXT, IMAGE, IMAGE_END, IMAGE_START, TURN_END, TURN_START

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE]
WORDS = r"\n| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer from merges learned on the phrases; the same result on every run.

    Args:
        max_length: Longest text the model takes, in tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
