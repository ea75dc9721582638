"""`casa serve FOLDER` on an original answers, with the tokens of the model that it was made of."""

import pytest
import torch

from casa_engine.checkpoints import load_model, load_processor
from image_files import data_url, encoded, plain
from originals import original_model, scrambled_names, write_original
from serving_process import casa_serve

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
PROMPT = "What is this?"


def test_an_original_of_scrambled_names_is_served_in_place(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names, source = scrambled_names(6), original_model("helium", image_norm=True)
    folder = write_original(source, "helium", tmp_path / "original", names)
    lines = [f"{names(name)} -> {name}" for name in source.state_dict()]
    (folder / "casa.map").write_text("\n".join(lines))
    picture = plain()
    with casa_serve(
        tmp_path / "log", folder, "--dtype", "float32", "--enforce-eager", "--max-model-len", 512
    ) as server:
        image = {"type": "image_url", "image_url": {"url": data_url(encoded(picture))}}
        content = [image, {"type": "text", "text": PROMPT}]
        answer = server.client().chat.completions.create(
            model=str(folder),
            messages=[{"role": "user", "content": content}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
        )
    model, processor = load_model(folder, torch.float32), load_processor(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[picture], text=text)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    stops = {1, 257}
    kept = [token for token in expected.tolist() if token not in stops]
    assert answer.choices[0].message.content == processor.tokenizer.decode(kept, skip_special_tokens=True)
    assert answer.usage.completion_tokens == len(expected)
    assert not (folder / "executed").exists()
