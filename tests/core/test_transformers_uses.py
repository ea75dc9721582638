"""What users of transformers do with a model, tried on ours: the rows of the table in docs/transformers.md."""

import copy
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorWithFlattening,
    TextIteratorStreamer,
)

from casa_engine.cache import CasaCache
from casa_engine.checkpoints import load_model, write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, prepare, user

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CHATS = [
    [user(picture(56, 84), "What is this?")],
    [user("Look", picture(84, 56), "again, at the end of a longer question")],
]


@pytest.fixture(scope="module", params=["ca", "ca_tv", "insertion"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(preset_config("tiny-qwen", fusion=request.param), folder)
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture
def own_model(folder):
    """A model that a test may change."""
    return AutoModelForCausalLM.from_pretrained(folder)


def padded_right(batch: dict) -> dict:
    """The same prompts, padded on the other side."""
    order = (1 - batch["attention_mask"]).sort(dim=1, stable=True).indices
    return dict(batch) | {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def embedded(model, batch: dict) -> dict:
    """The same call with embeddings in place of ids."""
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}


# Generation


@pytest.mark.parametrize("assistant", ["prompt lookup", "model", "another model"])
def test_assisted_generation(parts, monkeypatch, assistant: str) -> None:
    """Guessed tokens are taken back where they were wrong: the same tokens as without guesses."""
    model, processor = parts
    cropped, crop = [], CasaCache.crop
    monkeypatch.setattr(CasaCache, "crop", lambda self, count: (cropped.append(count), crop(self, count)))
    inputs = prepare(processor, [user(picture(56, 84), "abcabcabc")])
    other = load_model(model.config.name_or_path)
    if assistant == "another model":
        with torch.no_grad():
            for parameter in other.lm_head.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    options = {"prompt_lookup_num_tokens": 3} if assistant == "prompt lookup" else {"assistant_model": other}
    expected = model.generate(**inputs, max_new_tokens=24, **GREEDY)
    assert torch.equal(model.generate(**inputs, max_new_tokens=24, **GREEDY, **options), expected)
    assert cropped and (assistant == "model" or any(cropped)), "nothing was taken back: the test would show nothing"


def test_assisted_generation_over_a_conversation(parts) -> None:
    """The second turn, with a further image, over the cache that guesses of the first one have left."""
    model, processor = parts
    turns = [user(picture(56, 84), "abcabc"), {"role": "assistant", "content": "?"}, user(picture(28, 56), "abc?")]
    cache, options = model.new_cache(), {"prompt_lookup_num_tokens": 3, **GREEDY}
    first = prepare(processor, turns[:1])
    answer = model.generate(**first, past_key_values=cache, max_new_tokens=8, **options)
    fresh = model.new_cache()
    assert torch.equal(answer, model.generate(**first, past_key_values=fresh, max_new_tokens=8, **GREEDY))
    assert cache.row_ids(0) == fresh.row_ids(0)
    again = dict(prepare(processor, turns[2:]))
    ids = torch.cat([answer, again["input_ids"]], dim=1)
    images = {name: torch.cat([first[name], again[name]]) for name in ("pixel_values", "image_grid_thw")}
    if "insertion_points" in first:
        images["insertion_points"] = torch.cat(
            [first["insertion_points"], again["insertion_points"] + answer.shape[1]], 1
        )
    expected = model.generate(ids, **images, max_new_tokens=8, **GREEDY)
    for guess in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        over = copy.deepcopy(cache)
        found = model.generate(ids, **images, past_key_values=over, max_new_tokens=8, **GREEDY, **guess)
        assert torch.equal(found, expected)
    new = ids[:, cache.get_seq_length() :]
    own = {name: again[name] for name in images}
    if "insertion_points" in own:
        own["insertion_points"] = own["insertion_points"] + 1  # the answer's last token is new, too
    found = model.generate(
        new, **own, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8, **options
    )
    assert torch.equal(found[:, new.shape[1] :], expected[:, ids.shape[1] :])


def test_an_assistant_behind_an_image_at_the_end_is_refused(parts) -> None:
    """Before anything is generated: it would go back in front of the image where its guesses are wrong."""
    model, processor = parts
    inputs = dict(processor(text="abcabcabc<|image_pad|>", images=picture(56, 84)))
    assistant, calls = load_model(model.config.name_or_path), []
    hook = assistant.register_forward_pre_hook(lambda *arguments: calls.append(1))
    with pytest.raises(InputError, match="the prompt ends with an image, and assistant_model"):
        model.generate(**inputs, max_new_tokens=8, **GREEDY, assistant_model=assistant)
    hook.remove()
    assert not calls
    expected = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **GREEDY, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 0, "top_p": 0.01}, {"top_k": 0, "min_p": 0.9}], ids=str)
def test_sampling_where_the_image_token_is_the_likeliest(parts, options: dict) -> None:
    """With `insertion` it is never written: the next likeliest is. Elsewhere it is a token as any other."""
    model, processor = parts
    image_token = model.config.image_token_id

    def favour(module, arguments, logits):
        return logits.index_fill(-1, torch.tensor([image_token]), 1e4)

    hook = model.lm_head.register_forward_hook(favour)
    try:
        inputs = prepare(processor, CHATS[0])
        expected = model.generate(**inputs, max_new_tokens=4, **GREEDY)
        sharp = {"do_sample": True, "temperature": 1e-3}
        found = model.generate(**inputs, max_new_tokens=4, **GREEDY | sharp | options)
    finally:
        hook.remove()
    answer = found[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found, expected)
    assert (answer == image_token).any() == model.config.is_cross_attention


def test_stop_strings(parts) -> None:
    """Generation ends with the token that completes the words."""
    model, processor = parts
    inputs, tokenizer = prepare(processor, CHATS[0]), processor.tokenizer
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    others = [token for token in range(model.config.text_config.vocab_size) if token not in letters]
    options = {"max_new_tokens": 12, **GREEDY, "suppress_tokens": others}
    length = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, **options)
    stop = tokenizer.decode(whole[0, length + 3 : length + 5])
    first = tokenizer.decode(whole[0, length:]).index(stop) + len(stop)
    found = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert first < 12 and torch.equal(found, whole[:, : length + first])


def test_streamer(parts) -> None:
    model, processor = parts
    inputs = prepare(processor, CHATS[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = model.generate(**inputs, max_new_tokens=6, **GREEDY, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_scores_logits_and_hidden_states_of_generation(parts) -> None:
    model, processor = parts
    inputs = prepare(processor, CHATS)
    outputs = model.generate(
        **inputs,
        max_new_tokens=3,
        **GREEDY,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    num_layers = model.config.text_config.num_hidden_layers
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == 3
    assert all(len(step) == num_layers + 1 for step in outputs.hidden_states)
    assert [step[-1].shape[1] for step in outputs.hidden_states] == [inputs["input_ids"].shape[1], 1, 1]
    for step, logits in zip(outputs.hidden_states, outputs.logits, strict=True):
        torch.testing.assert_close(model.lm_head(step[-1][:, -1]), logits)


# The forward call


def test_hidden_states(parts) -> None:
    """The embeddings, then each layer's, the last one behind the norm: what transformers' own models give."""
    model, processor = parts
    inputs, layers = prepare(processor, CHATS), []
    for layer in model.model.language_model.layers:
        layers.append(layer.register_forward_hook(lambda module, arguments, output: seen.append(output)))
    seen: list[torch.Tensor] = []
    try:
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True)
            plain = model(**inputs)
    finally:
        for hook in layers:
            hook.remove()
    states = outputs.hidden_states
    assert len(states) == len(layers) + 1 and plain.hidden_states is None
    if not model.config.is_cross_attention:
        assert states[0].shape == states[1].shape
    else:
        assert torch.equal(states[0], model.get_input_embeddings()(inputs["input_ids"]))
    assert all(torch.equal(*pair) for pair in zip(states[1:-1], seen[: len(layers) - 1], strict=True))
    assert torch.equal(model.lm_head(states[-1]), outputs.logits) and torch.equal(outputs.logits, plain.logits)


def test_no_more_hidden_states_are_held_than_asked_for(parts) -> None:
    """When the last norm runs, what the first layers gave is gone, unless it is to be returned."""
    model, processor = parts
    inputs, text = prepare(processor, CHATS[0]), model.model.language_model
    outputs: list[weakref.ref] = []
    held: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda module, arguments, output: outputs.append(weakref.ref(output)))
        for layer in text.layers
    ]
    hooks.append(
        text.norm.register_forward_pre_hook(
            lambda *arguments: held.append(sum(output() is not None for output in outputs))
        )
    )
    try:
        with torch.no_grad():
            for asked in (False, True):
                outputs.clear()
                model(**inputs, output_hidden_states=asked)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(text.layers) > 1 and held == [1, len(text.layers)]


def test_outputs_as_a_tuple(parts) -> None:
    model, processor = parts
    inputs = prepare(processor, CHATS[0])
    with torch.no_grad():
        loss, logits = model(**inputs, labels=inputs["input_ids"], return_dict=False)
        assert torch.equal(logits, model(**inputs).logits) and loss.ndim == 0


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_inputs_embeds(parts, side: str) -> None:
    """Logits, loss, answers and beams of embeddings are those of the ids."""
    model, processor = parts
    batch = prepare(processor, CHATS[0] if side == "none" else CHATS)
    batch = padded_right(batch) if side == "right" else batch
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    embeddings = embedded(model, batch)
    with torch.no_grad():
        expected, found = model(**batch, labels=labels), model(**embeddings, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    length = batch["input_ids"].shape[1]
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        answers = model.generate(**batch, max_new_tokens=5, **GREEDY, **options)[:, length:]
        assert torch.equal(model.generate(**embeddings, max_new_tokens=5, **GREEDY, **options), answers)


def test_inputs_embeds_are_refused_where_they_mean_nothing(parts) -> None:
    model, processor = parts
    inputs = dict(prepare(processor, CHATS[0]))
    embeddings = embedded(model, inputs)
    for call in (model, model.generate):
        with pytest.raises(InputError, match="both input_ids and inputs_embeds"):
            call(**inputs, inputs_embeds=embeddings["inputs_embeds"])
        with pytest.raises(InputError, match="inputs_embeds has shape"):
            call(**embeddings | {"inputs_embeds": embeddings["inputs_embeds"][..., 1:]})
        with pytest.raises(InputError, match="inputs_embeds has values that are NaN"):
            call(**embeddings | {"inputs_embeds": embeddings["inputs_embeds"] * float("nan")})
    if "insertion_points" in inputs:
        without = {name: value for name, value in embeddings.items() if name != "attention_mask"}
        for call in (model, model.generate):
            with pytest.raises(InputError, match=r"no attention_mask; expected the mask .* virtual tokens"):
                call(**without)
    with pytest.raises(InputError, match="inputs_embeds without a cache"):
        model.generate(**embeddings, use_cache=False, **GREEDY)
    cache = model.new_cache()
    model.generate(**embeddings, past_key_values=cache, max_new_tokens=2, **GREEDY)
    with pytest.raises(InputError, match="inputs_embeds over a cache"):
        model.generate(**embeddings, past_key_values=cache, **GREEDY)
    with pytest.raises(InputError, match="does not continue its cached conversation"):
        model.generate(**inputs, past_key_values=cache, **GREEDY)


def test_attention_weights_are_refused(parts) -> None:
    model, processor = parts
    inputs = prepare(processor, CHATS[0])
    for call in (model, model.generate):
        with pytest.raises((InputError, ValueError), match=r"output_attentions|attention weights"):
            call(**inputs, output_attentions=True, **({} if call is model else {"return_dict_in_generate": True}))


def test_unknown_arguments_are_refused(parts) -> None:
    model, processor = parts
    inputs = prepare(processor, CHATS[0])
    with pytest.raises(InputError, match="got pixel_value, which is no argument"):
        model(**inputs, pixel_value=1)
    with pytest.raises(ValueError, match="pixel_value"):
        model.generate(**inputs, pixel_value=1)
    for name, value in (("is_causal", False), ("cu_seq_lens_q", torch.tensor([0, 3]))):
        with pytest.raises(InputError, match=f"got {name}: "):
            model(**inputs, **{name: value})
    with pytest.raises(InputError, match="logits_to_keep is 1 with labels"):
        model(**inputs, labels=inputs["input_ids"], logits_to_keep=1)


def test_packed_texts_are_refused(parts) -> None:
    """`DataCollatorWithFlattening` puts several texts into one row, which would see each other."""
    model, _ = parts
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    with pytest.raises(InputError, match="packed into a row"):
        model(**DataCollatorWithFlattening()(features))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=torch.arange(4)[None]).logits, model(ids).logits)


# Training


def gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(own_model, parts, reentrant: bool) -> None:
    """Every gradient, that of the vision encoder too, is as without, and the layers are run again."""
    inputs = dict(prepare(parts[1], CHATS))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    own_model.train()
    expected, calls = gradients(own_model, inputs), []
    layer = own_model.model.language_model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *arguments: calls.append(1))
    own_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(own_model, inputs | {"use_cache": True})
    assert len(calls) == 2 and found.keys() == expected.keys()
    assert any(name.startswith("model.visual") for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    with pytest.raises(InputError, match="got a cache while gradient checkpointing"):
        own_model(torch.tensor([[5, 6]]), past_key_values=own_model.new_cache())
    own_model.generate(**prepare(parts[1], CHATS), max_new_tokens=2, **GREEDY)


def test_the_loss_of_a_part_of_a_batch(parts) -> None:
    """With gradient accumulation Trainer says of how many tokens the mean is: parts add up to the whole."""
    model, processor = parts
    whole = dict(prepare(processor, CHATS))
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    num_items = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        expected = model(**whole, labels=labels).loss
        assert torch.allclose(model(**whole, labels=labels, num_items_in_batch=num_items).loss, expected)
        assert torch.allclose(model(**whole, labels=labels, num_items_in_batch=2 * num_items).loss, expected / 2)


def test_new_tokens_in_the_vocabulary(own_model, parts, tmp_path) -> None:
    size = own_model.config.text_config.vocab_size
    own_model.resize_token_embeddings(size + 8)
    inputs = dict(prepare(parts[1], CHATS[0]))
    with torch.no_grad():
        before = own_model(**inputs).logits
    assert before.shape[-1] == size + 8
    own_model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(**inputs).logits, before)
