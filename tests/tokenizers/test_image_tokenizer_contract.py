"""What all tokenizers of images have in common: bad input is refused in one line, and training ends with tokens of unit scale."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from vargen.condition import TextFeatures
from vargen.errors import VargenError
from vargen.model import VisualTokenizer
from vargen.noise import Noise
from vargen.tokenizers.flextok import FlexTok
from vargen.tokenizers.kl import KLTokenizer
from vargen.tokenizers.mingtok import MingTok
from vargen.tokenizers.textok import TexTok
from vargen.tokenizers.titok import TiTok
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN
from vargen.tokenizers.vq import VQTokenizer

PLAIN = {"image_size": 16, "patch_size": 4, "num_tokens": 3, "channels": 2}
TEXTOK = {**PLAIN, "dim": 16, "depth": 1, "heads": 2, "text_dim": 6, "text_length": 5}
TITOK = {**PLAIN, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16, "decoder_depth": 1,
         "decoder_heads": 2, "codebook_size": 8}  # fmt: skip
TEXT = {"text_dim": 6, "text_length": 5}
FLEXTOK = {"sample_size": 16, "patch_size": 4, "num_registers": 3, "levels": [4, 3], "encoder_dim": 16, "encoder_depth": 1,
           "decoder_dim": 16, "decoder_depth": 1, "head_dim": 8}  # fmt: skip
MINGTOK = {"image_size": 16, "patch_size": 8, "latent_channels": 4, "encoder_dim": 64, "encoder_depth": 1, "semantic_dim": 64,
           "semantic_depth": 1, "pixel_patch_size": 4, "pixel_dim": 64, "pixel_depth": 1}  # fmt: skip
CONV = {"latent_channels": 4, "norm_groups": 4}

TOKENIZERS: dict[str, Callable[[], VisualTokenizer]] = {
    "flextok": lambda: FlexTok(**FLEXTOK),
    "textok": lambda: TexTok(**TEXTOK),
    "textok-plain": lambda: TexTok(**TEXTOK, encoder_text=False, decoder_text=False),
    "textok-variational": lambda: TexTok(**TEXTOK, variational=True),
    "mingtok": lambda: MingTok(**MINGTOK),
    "titok-vq": lambda: TiTok(**TITOK),
    "titok-kl": lambda: TiTok(**{**TITOK, "codebook_size": None}),
    "tatitok-vq": lambda: TiTok(**TITOK, **TEXT),
    "tatitok-kl": lambda: TiTok(**{**TITOK, **TEXT, "codebook_size": None}),
    "titok-vqgan": lambda: MaskGITVQGAN(image_size=16, widths=[8, 8, 16], num_blocks=1, codebook_size=8, **CONV),
    "kl16": lambda: KLTokenizer(sample_size=16, widths=[8, 8, 16], encoder_blocks=1, decoder_blocks=1, **CONV),
    "llamagen-vq": lambda: VQTokenizer(
        sample_size=16, encoder_widths=[8, 8], decoder_widths=[8, 8], encoder_blocks=1, decoder_blocks=1, attention_levels=[],
        codebook_size=8, codebook_dim=4, **CONV
    ),
}  # fmt: skip


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> VisualTokenizer:
    torch.manual_seed(0)
    return TOKENIZERS[request.param]().eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(1)) * 2 - 1


def caption(batch: int = 2, length: int = 4, width: int = 6) -> TextFeatures:
    features = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(2))
    return TextFeatures(features, torch.ones(batch, length, dtype=torch.bool))


def text_of(tokenizer: VisualTokenizer) -> TextFeatures | None:
    return caption() if tokenizer.takes_text else None


def refused(match: str, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(VargenError, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad, match",
    [
        (pixels(2, 3, 15, 16), "15x16|15, 16"),
        (pixels(2, 3, 16, 17), "16x17|16, 17"),
        (torch.zeros(2, 3, 0, 16), "0x16|0, 16"),
        (pixels(2, 1, 16, 16), r"expected \(B, 3, H, W\)"),
        (pixels(3, 16, 16), r"expected \(B, 3, H, W\)"),
        (pixels(2, 3, 4, 16, 16), r"expected \(B, 3, H, W\)"),
        (pixels() * float("nan"), "NaN"),
        (pixels() / 0, "infinity"),
        (torch.full((2, 3, 16, 16), 200, dtype=torch.uint8), "uint8.*-1, 1"),
    ],
    ids=["height", "width", "empty", "channels", "unbatched", "video", "nan", "infinity", "bytes"],
)
def test_bad_pixels(tokenizer, bad, match):
    for call in (tokenizer.encode, tokenizer):
        refused(match, call, bad, text_of(tokenizer))


def test_text_is_given_exactly_where_it_is_taken(tokenizer):
    tokens = tokenizer.encode(pixels(), text_of(tokenizer))
    for call, first in ((tokenizer.encode, pixels()), (tokenizer, pixels()), (tokenizer.decode, tokens)):
        if not tokenizer.takes_text:
            refused("takes no text", call, first, caption())
            continue
        refused("needs captions", call, first)
        refused("3 captions for 2 samples", call, first, caption(batch=3))
        refused("at most 5 tokens", call, first, caption(length=6))
        refused("of width 6", call, first, caption(width=7))


def test_bad_tokens(tokenizer):
    space, text = tokenizer.space, text_of(tokenizer)
    tokens = tokenizer.encode(pixels(), text)
    bad = {"one axis too few": tokens[:, 0], "one axis too many": tokens[..., None]}
    if len(space.shape) == 1:
        bad["more tokens than there are"] = torch.cat([tokens, tokens], dim=1)
    if space.discrete:
        bad |= {"no id": tokens + space.codebook_size, "negative": tokens - space.codebook_size, "floats": tokens.float()}
    else:
        bad |= {"other channels": torch.cat([tokens, tokens], dim=-1), "nan": tokens * float("nan")}
    for tensor in bad.values():
        refused("expected|NaN|n in 1", tokenizer.decode, tensor, text)


def test_calibrated_tokens_have_unit_scale(tokenizer, tmp_path):
    if tokenizer.space.discrete:
        before = tokenizer.config_dict()
        tokenizer.calibrate([tokenizer.encode(pixels(), text_of(tokenizer))])
        assert tokenizer.config_dict() == before
        return
    for _ in range(2):  # the second time changes nothing
        noise = Noise(0, 2)
        tokenizer.calibrate(tokenizer.encode(p, text_of(tokenizer), noise) for p in (pixels(), pixels().flip(3)))
    tokens = torch.cat([tokenizer.encode(p, text_of(tokenizer), noise) for p in (pixels(), pixels().flip(3))])
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-4)
    assert float(tokens.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.space == tokenizer.space
    with pytest.raises(VargenError, match="calibration needs tokens that differ"):
        tokenizer.calibrate([])


@pytest.mark.parametrize(
    "name, height, width",
    [(name, *size) for name, size in product(["mingtok", "kl16", "llamagen-vq", "titok-vqgan"], [(16, 8), (24, 32)])],
)
def test_any_size_that_the_architecture_divides(name, height, width):
    tokenizer = TOKENIZERS[name]().eval()
    images = pixels(1, 3, height, width)
    output = tokenizer(images)
    assert output.reconstruction.shape == images.shape
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
