"""Text encoders: shapes, padding, what is loaded and refused, and that the word encoder learns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tokenizers import Tokenizer, models, pre_tokenizers
from vargen.data.shapes import Shapes, ShapesVideo
from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.text import CLIPTextEncoder, T5TextEncoder, TextEncoder, WordEncoder, clean_caption, load_text_encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "star"]


def _tokenizer(path, eos=True):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)


@pytest.fixture
def t5_folder(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=1)
    T5EncoderModel(config).save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3,
        pad_token_id=0, bos_token_id=3, eos_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    return tmp_path


def test_t5_pads_with_zeros_and_ignores_the_rest_of_the_batch(t5_folder):
    encoder = T5TextEncoder.from_pretrained(t5_folder, max_length=9)
    assert isinstance(encoder, TextEncoder)
    both = encoder.encode(["a red circle", "a star"])
    assert both.features.shape == (2, 9, 12)
    assert both.mask.sum(1).tolist() == [3, 2]
    assert (both.features[~both.mask] == 0).all()
    alone = encoder.encode(["a star"])
    assert torch.allclose(both.features[1], alone.features[0], atol=1e-6)
    left = both.left_padded(9)
    assert torch.equal(left.features[1, -2:], both.features[1, :2])
    assert not both.features.requires_grad


def test_t5_features_are_those_of_transformers(t5_folder):
    encoder = T5TextEncoder.from_pretrained(t5_folder, max_length=5)
    model = T5EncoderModel.from_pretrained(t5_folder)
    expected = model(input_ids=torch.tensor([[3, 4, 6]])).last_hidden_state
    assert torch.allclose(encoder.encode(["A RED  circle"]).features[0, :3], expected[0], atol=1e-5)


def test_t5_round_trip_keeps_the_length(t5_folder, tmp_path):
    encoder = T5TextEncoder.from_pretrained(t5_folder, max_length=7)
    encoder.save_pretrained(tmp_path / "saved")
    again = load_text_encoder(tmp_path / "saved")
    assert isinstance(again, T5TextEncoder)
    assert again.max_length == 7
    assert torch.equal(again.encode(["a star"]).features, encoder.encode(["a star"]).features)
    assert T5TextEncoder.from_pretrained(t5_folder).max_length == 120


def test_clip_gives_all_positions(clip_folder):
    encoder = load_text_encoder(clip_folder)
    assert isinstance(encoder, CLIPTextEncoder)
    out = encoder.encode(["a red star", ""])
    assert out.features.shape == (2, 77, 12)
    assert out.mask.all()
    assert encoder.dim == 12


@pytest.mark.parametrize("encoder", [T5TextEncoder, CLIPTextEncoder])
def test_missing_models_are_one_line_errors(encoder, tmp_path):
    with pytest.raises(CheckpointError, match="cannot load") as caught:
        encoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        load_text_encoder(tmp_path)


def test_word_encoder_is_small_and_knows_its_captions():
    captions = [Shapes(size=16).scene(i)[1] for i in range(300)] + [ShapesVideo(size=16).scenes(i)[1] for i in range(100)]
    encoder = WordEncoder.from_captions(captions)
    assert encoder.num_parameters_ < 100_000
    ids, mask = encoder.tokenize(captions)
    assert not (ids == encoder.UNKNOWN).any()
    assert ids.shape == mask.shape == (400, encoder.max_length)
    assert isinstance(encoder, TextEncoder)
    assert encoder.encode(captions[:3]).features.shape[-1] == encoder.dim


def test_words_unknown_and_none():
    encoder = WordEncoder(["a", "red", "star"], dim=8, max_length=4, heads=2)
    ids, mask = encoder.tokenize(["A red, STAR!", "a zebra", "", "a a a a a a"])
    assert ids.tolist() == [[1, 3, 4, 5], [1, 3, 2, 0], [1, 0, 0, 0], [1, 3, 3, 3]]
    assert mask.sum(1).tolist() == [4, 3, 1, 4]


def test_word_features_do_not_depend_on_the_rest_of_the_batch():
    encoder = WordEncoder(["a", "red", "star"], dim=64, max_length=12, heads=4).eval()
    short = encoder.encode(["a", "a"]).features[0]
    long = encoder.encode(["a", "a red star a red star"]).features[0]
    assert torch.equal(long, short)
    assert (long[2:] == 0).all()


def test_word_encoder_round_trip_and_training(tmp_path):
    torch.manual_seed(0)
    encoder = WordEncoder(["blue", "red"], dim=8, max_length=4, heads=2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    target = torch.tensor([1.0, -1.0])
    for _ in range(40):
        loss = (encoder.encode(["red", "blue"]).features[:, 1, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    encoder.save_pretrained(tmp_path)
    again = load_text_encoder(tmp_path)
    assert torch.equal(again.encode(["red"]).features, encoder.encode(["red"]).features)


@pytest.mark.parametrize("words", [[], ["Red"], ["red", "red"], ["two words"]])
def test_bad_vocabularies(words):
    with pytest.raises(ConfigError, match="distinct lower-case words"):
        WordEncoder(words)


@pytest.mark.parametrize("texts", ["one string", [], [None]])
def test_bad_texts(texts):
    with pytest.raises(VargenError, match="list of strings"):
        WordEncoder(["a"]).encode(texts)


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("A Large RED circle at the top left.", "a large red circle at the top left."),
        ("see https://example.org/a?b=c now", "see now"),
        ("photo from www.example.com here", "photo from here"),
        ("a <b>bold</b> cat", "a bold cat"),
        ("a cat by @someone", "a cat by"),
        ("猫 a cat", "a cat"),
        ("“quoted” — text", '"quoted" - text'),
        ("one-two_three-four_five", "one two three four five"),
        ("IMG_0001.jpg a dog", "a dog"),
        ("a dog (2)[3]", "a dog 2 3"),
        ("salt &amp; pepper", "salt ; pepper"),
        ('"a whole quote"', "a whole quote"),
        ("a,b", "a, b"),
        ("photo 1920x1080 free download", "photo"),
        ("a%20red+car", "a red car"),
        ("", ""),
    ],
)
def test_caption_cleaning(text, cleaned):
    assert clean_caption(text) == cleaned


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_cleaning_never_fails_and_lowers(text):
    cleaned = clean_caption(text)
    assert cleaned == cleaned.strip()
    assert "http" not in clean_caption(f"{cleaned} http://x.y")
