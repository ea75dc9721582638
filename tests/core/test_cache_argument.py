"""A cache under both of its names: transformers' (`cache` from 5.24 on) and the one before (`past_key_values`)."""

import pytest
import torch

from casa_engine.cache import CasaCache
from casa_engine.cache_argument import CACHE_ARGUMENT
from casa_engine.errors import InputError

IDS = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(4))
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_forward_and_generate_take_both_names(tiny, name: str) -> None:
    model = tiny("tiny-llama")
    whole = model.generate(IDS, **OPTIONS)
    cache = CasaCache(model.config)
    with torch.no_grad():
        output = model(IDS[:, :5], **{name: cache})
    assert output[CACHE_ARGUMENT] is cache and cache.get_seq_length() == 5
    assert torch.equal(model.generate(IDS, **{name: cache}, **OPTIONS), whole)
    assert cache.get_seq_length() == whole.shape[1] - 1


def test_both_names_at_once_are_refused(tiny) -> None:
    model = tiny("tiny-llama")
    both = {"cache": CasaCache(model.config), "past_key_values": CasaCache(model.config)}
    for call in (model, model.generate):
        with pytest.raises(InputError, match="two names of one argument"):
            call(IDS, **both)


def test_generate_returns_the_cache_it_made(tiny) -> None:
    model = tiny("tiny-llama")
    output = model.generate(IDS, return_dict_in_generate=True, **OPTIONS)
    assert isinstance(output[CACHE_ARGUMENT], CasaCache)


def test_without_a_cache_the_same_tokens(tiny) -> None:
    model = tiny("tiny-llama")
    assert torch.equal(model.generate(IDS, use_cache=False, **OPTIONS), model.generate(IDS, **OPTIONS))
