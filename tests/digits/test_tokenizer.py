"""Any text can be spelled, the model's own phrases shortly; training spells as the processor does."""

import pytest
from transformers import AutoTokenizer

from casa_digits.phrases import COUNT, FIRST, READ, SYSTEM, WATCH
from casa_digits.tokenizer import SPECIAL_TOKENS, build_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4096)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 7 1",
        " leading",
        "trailing ",
        "two  spaces\n\n\tand\r\nlines",
        "Füße 世界 😀\u200d🔬",
        "\x00\x7f",
        "a" * 500,
    ],
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_is_one_token_with_and_without_a_space(tokenizer, digit):
    assert len(tokenizer(str(digit))["input_ids"]) == 1
    assert len(tokenizer(f" {digit}")["input_ids"]) == 1
    assert len(tokenizer(f"{digit} {digit}")["input_ids"]) == 2
    assert len(tokenizer(f"{digit}{digit}")["input_ids"]) == 2


@pytest.mark.parametrize("text", [*READ, *COUNT, *FIRST, *SYSTEM, *WATCH])
def test_phrases_are_short(tokenizer, text):
    assert len(tokenizer(text)["input_ids"]) <= 2 * len(text.split()) + 3


def test_special_tokens_are_single_and_first(tokenizer):
    assert tokenizer("".join(SPECIAL_TOKENS))["input_ids"] == list(range(len(SPECIAL_TOKENS)))


def test_files_load_as_an_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nRead the digits.<|im_end|>\n 3 é"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token == "<|im_end|>"
