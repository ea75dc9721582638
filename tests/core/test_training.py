"""Training as users of transformers know it: Trainer and a collator, PEFT's adapters, to a checkpoint that serves."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments

from casa_engine.checkpoints import load_model, save_checkpoint, write_random_checkpoint
from casa_engine.errors import InputError
from casa_engine.presets import preset_config
from chats import picture, user

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Prompts of unequal length, with one picture, two and none.
MESSAGES = [
    [user(picture(56, 84), "What is this?"), {"role": "assistant", "content": "a"}],
    [user("Look", picture(84, 56), "and", picture(28, 28)), {"role": "assistant", "content": "bb"}],
    [user("No picture, but a longer question"), {"role": "assistant", "content": "c"}],
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}


class Collator:
    """As docs/transformers.md shows it, and as TRL's for vision-language models is written."""

    def __init__(self, processor, side: str) -> None:
        self.processor, self.side = processor, side

    def __call__(self, examples: list[list[dict]]) -> dict[str, torch.Tensor]:
        images = [
            [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
            for messages in map(_in_parts, examples)
        ]
        batch = self.processor(
            text=self.processor.apply_chat_template(examples),
            images=images,
            padding=True,
            padding_side=self.side,
            pad_to_multiple_of=8,
            truncation=False,
            max_length=None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}


def _in_parts(messages: list[dict]) -> list[dict]:
    return [message for message in messages if not isinstance(message["content"], str)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(preset_config("tiny-qwen", fusion="ca_tv"), folder)
    return folder


@pytest.fixture
def model(folder):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def trainer(model, processor, folder: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **({"per_device_train_batch_size": 3, "max_steps": 4, "save_steps": 2} | options),
    )
    examples = [messages for _ in range(8) for messages in MESSAGES]
    return Trainer(model, arguments, Collator(processor, "right"), examples, processing_class=processor)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collator_pads_on_either_side(model, processor, side: str) -> None:
    """Each example's logits are those that it has alone; lengths are multiples of 8."""
    batch = Collator(processor, side)(MESSAGES)
    assert batch["input_ids"].shape[1] % 8 == 0 and batch["insertion_points"].tolist()[2] == [-1, -1]
    assert batch["attention_mask"][:, 0 if side == "right" else -1].all()
    with torch.no_grad():
        together = model.eval()(**batch)
        for row, messages in enumerate(MESSAGES):
            alone = model(**Collator(processor, side)([messages])).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(
                together.logits[row, real], alone[-int(real.sum()) :] if side == "left" else alone[: int(real.sum())]
            )


def test_what_a_processor_cannot_do_for_a_collator(processor) -> None:
    for options, words in (
        ({"truncation": True}, "prompts are not cut"),
        ({"max_length": 8}, "prompts are not cut"),
        ({"padding": "max_length"}, "padding 'max_length'"),
        ({"padding_side": "both"}, "padding_side is 'both'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; expected a whole number from 1"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of is -8"),
        ({"pad_to_multiple_of": 8.0}, "pad_to_multiple_of is 8.0"),
    ):
        with pytest.raises(InputError, match=words):
            processor(text=["Hello"], **options)


def test_trainer(model, processor, tmp_path) -> None:
    """The loss falls, a run goes on from its checkpoint, and the folder is one that this engine loads."""
    run = trainer(model, processor, tmp_path, gradient_checkpointing=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert run.model_accepts_loss_kwargs
    resumed = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), processor, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-1] == pytest.approx(losses(run)[-1], rel=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(folder, processor, tmp_path) -> None:
    """Examples have unequally many tokens: a mean of means would be another loss."""
    found = []
    for name, options in (
        ("whole", {"per_device_train_batch_size": 3}),
        ("parts", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    ):
        own = AutoModelForCausalLM.from_pretrained(folder)
        run = trainer(own, processor, tmp_path / name, max_steps=1, save_strategy="no", optim="sgd", **options)
        run.get_train_dataloader = lambda run=run: torch.utils.data.DataLoader(
            MESSAGES, batch_size=run.args.per_device_train_batch_size, collate_fn=run.data_collator
        )
        run.train()
        found.append(own.lm_head.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def train_step(model, batch: dict) -> float:
    """One step on the parameters that are trained; returns the loss before it."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_lora(model, processor, folder, tmp_path, checkpointing: bool) -> None:
    """PEFT's usual recipe: train, save, load, generate, merge, and a checkpoint that is complete."""
    batch = Collator(processor, "right")(MESSAGES)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **LORA)).train()
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable()
    before = train_step(adapted, batch)
    assert train_step(adapted, batch) < before
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        assert torch.equal(adapted(inputs_embeds=embeddings, **rest, output_hidden_states=True).logits, expected)
    prompts = {name: value for name, value in batch.items() if name != "labels"}
    tokens = adapted.generate(**prompts, **GREEDY)
    beams = adapted.generate(**prompts, **GREEDY, num_beams=2, num_return_sequences=2)
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected)
    assert torch.equal(loaded.generate(**prompts, **GREEDY), tokens)
    merged = loaded.merge_and_unload()
    save_checkpoint(merged, processor, tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.generate(**prompts, **GREEDY), tokens)
    assert torch.equal(again.generate(**prompts, **GREEDY, num_beams=2, num_return_sequences=2), beams)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(model, processor, kind) -> None:
    """They would stand before the text, whose images have places counted without them."""
    batch = Collator(processor, "right")(MESSAGES)
    config = kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    if kind is PrefixTuningConfig:
        config.token_dim, config.num_layers, config.num_attention_heads = 16, 2, 2
    for inputs in (batch, {name: value for name, value in batch.items() if name != "attention_mask"}):
        with pytest.raises(InputError, match=r"virtual tokens .* would move the text away from its images"):
            get_peft_model(model, config)(**inputs)
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        # Prefix tuning gives its own cache: beside that of transformers 5.24, in its place before.
        with pytest.raises(InputError, match=r"virtual tokens .* would move"):
            get_peft_model(model, config).generate(**prompt, **GREEDY)
