"""Editing through the pipeline: which tokens are kept, what comes back, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vargen import ECAR, MAR, NAR, XAR, HiMAR, KLTokenizer, LlamaGen, MaskGIT, Noise, VisualARPipeline, VQTokenizer
from vargen.editing import as_masks, as_pictures, known_cells
from vargen.errors import VargenError
from vargen.tokenizers.pyramid import PyramidTokenizer

# ten classes, 4 x 4 tokens of 16 x 16 pixels
STACKS = {f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in (("dim", 16), ("depth", 1), ("heads", 2))}
SMALL = {"dim": 16, "depth": 1, "heads": 2}
MODELS = {
    "mar": (MAR, {**STACKS, "buffer_size": 2, "head_width": 16, "head_depth": 1, "head_steps": "ddim4"}),
    "himar": (
        HiMAR,
        {"pivots": (2, 2), "dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "buffer_size": 2}
        | {"head_width": 16, "head_depth": 1, "head_steps": "ddim4"}
        | {"dense_head_width": 16, "dense_head_depth": 1, "dense_head_heads": 2, "dense_head_steps": "ddim4"},
    ),
    "xar": (
        XAR,
        {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "entity_size": (2, 2), "sampling_steps": 2},
    ),
    "ecar": (ECAR, {**SMALL, "stages": 2, "head_width": 16, "head_depth": 1}),
    "maskgit": (MaskGIT, {**SMALL, "mlp_hidden": 16}),
    "llamagen": (LlamaGen, {**SMALL, "mlp_hidden": 24}),
    "nar": (NAR, {**SMALL, "depth": 3, "mlp_hidden": 24}),
}
MASKED = pytest.mark.parametrize("name", ["mar", "himar", "maskgit"])


def pipeline(name):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    if name in ("maskgit", "llamagen", "nar"):
        shape = {"encoder_widths": [4, 4, 4], "decoder_widths": [4, 4, 4], "encoder_blocks": 1, "decoder_blocks": 1}
        tokenizer = VQTokenizer(
            sample_size=16, **shape, latent_channels=4, codebook_size=16, codebook_dim=4, norm_groups=2, attention_levels=[]
        )
        space = {"codebook_size": 16}
    else:
        shape = {"widths": [4, 4, 4], "encoder_blocks": 1, "decoder_blocks": 1, "encoder_attention_levels": []}
        tokenizer, space = KLTokenizer(sample_size=16, **shape, latent_channels=3, norm_groups=2), {"channels": 3}
    model = kind(grid=(4, 4), num_classes=10, **space, **config).eval()
    if len(model.space.levels) > 1:
        tokenizer = PyramidTokenizer.of(tokenizer, model.space.levels, model.coarse_from)
    return VisualARPipeline(model, tokenizer.eval())


def picture():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def hole(rows=slice(4, 12), columns=slice(5, 11)):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


@MASKED
def test_tokens_outside_the_mask_are_kept_exactly(name):
    pipe, noise = pipeline(name), Noise(3, 2)
    out = pipe(class_labels=[1, 7], image=picture(), mask=hole(), generator=noise, output_type="pt")
    given = pipe.visual_tokenizer.encode(picture().expand(2, -1, -1, -1), noise=noise)
    known = torch.ones(4, 4, dtype=torch.bool)
    known[1:3, 1:3] = False
    finest = (value[:, -16:] if name == "himar" else value.flatten(1, 2) for value in (out.tokens, given))
    drawn, given = (value.unflatten(1, (4, 4)) for value in finest)
    assert torch.equal(drawn[:, known], given[:, known])
    assert not torch.equal(drawn[:, ~known], given[:, ~known])
    other = pipe(class_labels=[1, 7], image=picture(), mask=hole(), generator=Noise(4, 2), output_type="pt")
    assert not torch.equal(out.images, other.images)


def test_pixels_outside_the_mask_can_be_kept_too():
    pipe = pipeline("mar")
    out = pipe(class_labels=[1, 7], image=picture(), mask=hole(), keep_pixels=True, generator=1, output_type="pt")
    outside = (~hole()).expand(2, 3, -1, -1)
    assert torch.equal(out.images[outside], picture().expand(2, -1, -1, -1)[outside])
    painted = pipe(class_labels=[1, 7], image=picture(), mask=hole(), generator=1, output_type="pt").images
    assert torch.equal(out.images[~outside], painted[~outside])


@pytest.mark.parametrize("name", ["llamagen", "nar", "xar"])
def test_fixed_orders_go_on_from_their_first_tokens(name):
    pipe, noise = pipeline(name), Noise(3, 1)
    # the first two rows of tokens, two diagonals, or one cell of xAR: known down to the last pixel of their patches
    mask = torch.ones(4, 4, dtype=torch.bool)
    first = {
        "llamagen": [(0, c) for c in range(4)],
        "nar": [(0, 0), (0, 1), (1, 0)],
        "xar": [(r, c) for r in (0, 1) for c in (0, 1)],
    }
    for row, column in first[name]:
        mask[row, column] = False
    out = pipe(class_labels=[2], image=picture(), mask=mask.repeat_interleave(4, 0).repeat_interleave(4, 1), generator=noise)
    given = pipe.visual_tokenizer.encode(picture(), noise=noise)
    assert torch.equal(out.tokens[:, ~mask], given[:, ~mask])
    with pytest.raises(VargenError, match="masked system such as MAR"):
        pipe(class_labels=[2], image=picture(), mask=hole())


def test_systems_that_cannot_edit_say_so():
    with pytest.raises(VargenError, match="ECAR cannot keep a part of a picture: edit with a masked system"):
        pipeline("ecar")(class_labels=[2], image=picture(), mask=hole())
    one_dimensional = MaskGIT(grid=(8,), codebook_size=16, num_classes=10, dim=16, depth=1, heads=2, mlp_hidden=16)
    from vargen import TiTok

    tokenizer = TiTok(
        image_size=16, patch_size=8, num_tokens=8, codebook_size=16, encoder_dim=16, encoder_depth=1, encoder_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    with pytest.raises(VargenError, match="tokens of TiTok do not stand for patches"):
        VisualARPipeline(one_dimensional, tokenizer)(class_labels=[2], image=picture(), mask=hole())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": picture()}, "both image=... and mask"),
        ({"mask": hole()}, "both image=... and mask"),
        ({"keep_pixels": True}, "keep_pixels without image"),
        ({"image": picture()[..., :12], "mask": hole()}, "image of 16x12 pixels: expected 16x16"),
        ({"image": picture(), "mask": hole()[:8]}, "mask of 8x16 pixels: expected 16x16"),
        ({"image": picture().expand(3, -1, -1, -1), "mask": hole()}, "3 images for 2 samples"),
        ({"image": picture(), "mask": hole().expand(3, -1, -1)}, "3 masks for 2 samples"),
        ({"image": picture(), "mask": torch.zeros(16, 16)}, "the mask is empty"),
        ({"image": picture(), "mask": torch.ones(16, 16)}, "touches every patch of 4x4 pixels"),
        ({"image": picture(), "mask": torch.full((16, 16), float("nan"))}, "mask holds NaN"),
        ({"image": picture() / 0, "mask": hole()}, "image holds NaN"),
        ({"image": "cat.png", "mask": hole()}, "image is a str: expected a PIL image"),
        ({"image": picture(), "mask": 3}, "mask is a int: expected a PIL image"),
        ({"image": picture()[:, :1], "mask": hole()}, r"expected pixels \(B, 3, H, W\)"),
        ({"image": np.zeros((16, 16), np.uint8), "mask": hole()}, r"expected \(B, H, W, 3\)"),
        ({"image": picture(), "mask": torch.zeros(1, 1, 16, 16)}, r"expected \(B, H, W\)"),
        ({"image": [Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))], "mask": hole()}, "pictures of one size"),
    ],
)
def test_bad_pictures_and_masks_are_refused(arguments, message):
    with pytest.raises(VargenError, match=message):
        pipeline("mar")(class_labels=[0, 1], **arguments)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16 - 1), st.sampled_from([(4, 4), (2, 4), (1, 2), (8, 8)]))
def test_a_token_is_known_iff_its_whole_patch_is(seed, grid):
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(seed)) < 0.05
    known = known_cells(mask, grid)
    height, width = 16 // grid[0], 16 // grid[1]
    for index in np.ndindex(2, *grid):
        patch = mask[index[0], index[1] * height : (index[1] + 1) * height, index[2] * width : (index[2] + 1) * width]
        assert bool(known[index]) == (not patch.any())


def test_forms_of_pictures_and_masks():
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    for form in (array, array[None], array / np.float32(255), Image.fromarray(array), [Image.fromarray(array)], pixels, pixels[0]):
        assert torch.allclose(as_pictures(form), pixels, atol=1e-6)
    mask = hole()
    levels = (mask.numpy() * 255).astype(np.uint8)
    for form in (
        mask,
        mask.numpy(),
        mask.float(),
        mask.long(),
        levels,
        Image.fromarray(levels),
        [Image.fromarray(levels)],
        mask[None],
    ):
        assert torch.equal(as_masks(form), mask[None])
