"""One pass against piece by piece, a row of a batch against the row alone, and what the cache keeps."""

import pytest
import torch

from casa_engine.cache import CasaCache
from casa_engine.errors import InputError
from casa_engine.image_inputs import pad_insertion_points
from snapshots import snapshot
from tiny_presets import TINY_PRESETS

IDS = torch.randint(3, 300, (1, 14), generator=torch.Generator().manual_seed(3))
MODELS = [
    (preset, fields)
    for preset in TINY_PRESETS
    for fields in (
        {"fusion": "ca"},
        {"fusion": "ca_tv"},
        {"fusion": "ca_tv", "ca_weights": "shared"},
        {"fusion": "ca_tv", "ca_placement": "replace", "ca_layers": [0]},
    )
]


def feed(model, cache, ids, embeds=(), grids=(), points=()) -> torch.Tensor:
    given = {}
    if len(points):
        given = {
            "image_embeds": torch.cat(list(embeds)),
            "image_grid_thw": torch.stack(list(grids)),
            "insertion_points": torch.tensor([points]),
        }
    with torch.no_grad():
        return model(ids, past_key_values=cache, **given).logits


@pytest.mark.parametrize(("preset", "fields"), MODELS)
def test_piece_by_piece_equals_one_pass(tiny, images, preset: str, fields: dict) -> None:
    """Frame by frame and token by token: images at the start, inside, at the end of a piece, and adjacent."""
    model = tiny(preset, **fields)
    pixels, grids = images
    with torch.no_grad():
        embeds = model.model.encode_images(pixels, grids).split((grids.prod(-1) // 4).tolist())
    whole = feed(model, CasaCache(model.config), IDS, embeds, grids, [3, 6, 6, 10])
    cache = CasaCache(model.config)
    pieces = [feed(model, cache, IDS[:, :3], embeds[:1], grids[:1], [3])]
    pieces += [feed(model, cache, IDS[:, t : t + 1]) for t in range(3, 6)]
    pieces += [feed(model, cache, IDS[:, 6:12], embeds[1:], grids[1:], [0, 0, 4])]
    pieces += [feed(model, cache, IDS[:, t : t + 1]) for t in range(12, 14)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=2e-5)


def test_only_the_last_window_is_kept(tiny, images) -> None:
    model = tiny("tiny-qwen", fusion="ca_tv")
    pixels, grids = images
    with torch.no_grad():
        embeds = model.model.encode_images(pixels, grids).split((grids.prod(-1) // 4).tolist())
    cache = CasaCache(model.config)
    for frame in range(12):
        feed(model, cache, IDS[:, :2], embeds[frame % 4 : frame % 4 + 1], grids[frame % 4 : frame % 4 + 1], [0])
        assert cache.window_keys[0].shape[2] == len(embeds[frame % 4])
        assert cache.get_seq_length() == 2 * (frame + 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("preset", "fields"), MODELS)
def test_row_of_a_batch_equals_the_row_alone(tiny, images, preset: str, fields: dict, side: str) -> None:
    """Rows of unequal length, with two images, one image and none; then one decode step of all."""
    model = tiny(preset, **fields)
    pixels, grids = images
    with torch.no_grad():
        embeds = model.model.encode_images(pixels, grids).split((grids.prod(-1) // 4).tolist())
    rows = [(IDS[0, :11], [2, 7], [0, 1]), (IDS[0, 3:8], [1], [2]), (IDS[0, 5:14], [], [])]
    length = max(len(ids) for ids, _, _ in rows)
    batch, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for row, (ids, _, _) in enumerate(rows):
        start = length - len(ids) if side == "left" else 0
        batch[row, start : start + len(ids)], mask[row, start : start + len(ids)] = ids, 1
    with torch.no_grad():
        cache = CasaCache(model.config)
        together = model(
            batch,
            image_embeds=torch.cat(embeds[:3]),
            image_grid_thw=grids[:3],
            insertion_points=pad_insertion_points([own for _, own, _ in rows]),
            attention_mask=mask,
            past_key_values=cache,
        ).logits
        step = model(torch.full((3, 1), 42), past_key_values=cache).logits
    for row, (ids, own, which) in enumerate(rows):
        alone = CasaCache(model.config)
        expected = feed(model, alone, ids[None], [embeds[i] for i in which], [grids[i] for i in which], own)
        start = length - len(ids) if side == "left" else 0
        torch.testing.assert_close(together[row, start : start + len(ids)], expected[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(step[row], feed(model, alone, torch.tensor([[42]]))[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_insertion_piece_by_piece(tiny, images, preset: str) -> None:
    model = tiny(preset, fusion="insertion")
    image = model.config.image_token_id
    pixels, grids = images
    ids = torch.tensor([[5, 6, *[image] * 6, 7, *[image] * 6, *[image] * 5, 8, 9]])
    with torch.no_grad():
        whole = model(ids, pixel_values=pixels[:68], image_grid_thw=grids[:3]).logits
        cache = CasaCache(model.config)
        pieces = [
            model(ids[:, :8], pixel_values=pixels[:24], image_grid_thw=grids[:1], past_key_values=cache).logits,
            model(ids[:, 8:9], past_key_values=cache).logits,
            model(ids[:, 9:], pixel_values=pixels[24:68], image_grid_thw=grids[1:3], past_key_values=cache).logits,
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("fusion", ["ca", "ca_tv", "insertion"])
@pytest.mark.parametrize("count", [-3, 9])
def test_crop(tiny, images, fusion: str, count: int) -> None:
    """Text that was taken back was never there, in rows of unequal length; an image cannot be taken back."""
    model = tiny("tiny-qwen", fusion=fusion)
    pixels, grids = images[0][:48], images[1][:2]
    image = [model.config.image_token_id] * 6 if fusion == "insertion" else []
    rows = [[5, 6, *image, 7], [8, *image, 9, 10, 11, 12][: 4 + len(image)]]
    length = max(map(len, rows))
    given = {"pixel_values": pixels, "image_grid_thw": grids}
    if fusion != "insertion":
        given["insertion_points"] = torch.tensor([[2], [1]])
    ids, mask = (torch.zeros(2, length, dtype=torch.long) for _ in range(2))
    for row, own in enumerate(rows):
        ids[row, length - len(own) :], mask[row, length - len(own) :] = torch.tensor(own), 1
    cache, expected = CasaCache(model.config), CasaCache(model.config)
    with torch.no_grad():
        for each in (cache, expected):
            model(ids, attention_mask=mask, **given, past_key_values=each)
        model(torch.tensor([[20, 21, 22], [23, 24, 25]]), past_key_values=cache)
        cache.crop(count if count < 0 else length)
        assert snapshot(cache) == snapshot(expected)
        cache.crop(0)
        cache.crop(length + 5)
        assert snapshot(cache) == snapshot(expected)
        for wrong in (-3, 1, -length - 1):
            with pytest.raises(InputError, match=r"row 0 cannot be cropped to|are to be taken back"):
                cache.crop(wrong)
            assert snapshot(cache) == snapshot(expected)
        step = torch.tensor([[30], [31]])
        assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=expected).logits)
