"""`CasaStream`: frame by frame the same tokens as one growing prompt through `generate`."""

import pytest
import torch

from casa_engine.streaming import CasaStream
from tiny_presets import TINY_PRESETS


@pytest.mark.parametrize("fusion", ["ca", "ca_tv"])
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_frames_equal_one_growing_prompt(tiny, images, preset: str, fusion: str) -> None:
    model = tiny(preset, fusion=fusion)
    pixels, grids = images
    patches = pixels.split(grids.prod(-1).tolist())
    stream = CasaStream(model, stop_token_ids=[1])
    points = []
    for frame in range(4):
        text = [5, 6, 7, 8] if frame == 0 else [9, 10]
        points.append(len(stream.token_ids) + 1)
        stream.feed(text, patches[frame], grids[frame : frame + 1], [1])
        prompt = torch.tensor([stream.token_ids])
        new = stream.generate(4)
        expected = model.generate(
            input_ids=prompt,
            pixel_values=torch.cat(patches[: frame + 1]),
            image_grid_thw=grids[: frame + 1],
            insertion_points=torch.tensor([points]),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        assert new == [token for token in expected if token != 1]
        assert stream.token_ids[prompt.shape[1] :] == expected


def test_stop_token_is_recorded_and_not_returned(tiny) -> None:
    model = tiny("tiny-qwen", fusion="ca_tv")
    stream = CasaStream(model, stop_token_ids=[])
    stream.feed([5, 6, 7])
    first = stream.generate(1)[0]
    again = CasaStream(model, stop_token_ids=[first])
    again.feed([5, 6, 7])
    assert again.generate(8) == []
    assert again.token_ids == [5, 6, 7, first]
