import pytest
import torch
from safetensors.torch import save_file

from vargen.cli.convert import convert
from vargen.condition import TextFeatures
from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.official.seed import load
from vargen.sample.reconstruct import reconstruct
from vargen.tokenizers.seed.captions import BEGIN, UNKNOWN, CaptionIds, clean_caption
from vargen.tokenizers.seed.embedder import SeedEmbedder
from vargen.tokenizers.seed.qformer import QFormer
from vargen.tokenizers.seed.tokenizer import SeedTokenizer
from vargen.tokenizers.seed.unclip_training import UnCLIP
from vargen.tokenizers.seed.vit import VisionEncoder

SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "vision_dim": 16,
    "vision_depth": 1,
    "vision_heads": 2,
    "vision_mlp": 24,
    "num_queries": 5,
    "dim": 12,
    "depth": 3,
    "heads": 2,
    "mlp_hidden": 20,
}
WORDS = ["blue", "circle", "red", "square"]
CAPTIONS = ["A red circle.", "a blue square"]


def make(**options):
    torch.manual_seed(0)
    sizes = {**SIZES, "codebook_size": 32, "code_dim": 4, "decoder_depth": 1, "decoder_heads": 2, "embedding_dim": 6}
    return SeedTokenizer(**{**sizes, **options}).eval()


def embedder(**options):
    torch.manual_seed(0)
    return SeedEmbedder(**{**SIZES, "words": WORDS, "max_text": 8, "feature_dim": 6, "freeze_vision": False, **options}).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_released_size():
    with torch.device("meta"):
        model = SeedTokenizer.from_preset("seed-2")
        reverse = SeedTokenizer.from_preset("seed-1")
    # the keys of the image encoder have a bias here that cancels
    keys = 39 * 1408 / 1e6
    assert millions(model.vision) - keys == pytest.approx(985.9, abs=0.05)
    assert millions(model.qformer) == pytest.approx(105.1, abs=0.1)
    assert millions(model.to_code) == pytest.approx(0.615, abs=0.001)
    assert millions(model.from_code) == pytest.approx(0.026, abs=0.001)
    assert millions(model.causal_decoder) == millions(model.image_decoder) == pytest.approx(28.4, abs=0.05)
    assert millions(model.image_head) == pytest.approx(0.233 + 1.050, abs=0.001)
    assert millions(model) - keys == pytest.approx(1150.0, abs=0.05)
    assert model.space.token_shape == (32,)
    assert reverse.image_head.qformer.queries.shape == (77, 768)


def test_causal_embeddings_look_back_only(pixels):
    model = make()
    before = model.causal_embeddings(pixels)
    with torch.no_grad():
        # not a constant, which the embedding norm would take away
        model.qformer.queries[3:] += torch.linspace(-1, 1, 12).square()
    after = model.causal_embeddings(pixels)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_both_ways_without_causality(pixels):
    model = make(causal=False)
    before = model.causal_embeddings(pixels)
    with torch.no_grad():
        model.qformer.queries[4] += torch.linspace(-1, 1, 12).square()
    assert not torch.allclose(before[:, 0], model.causal_embeddings(pixels)[:, 0])


def test_other_image_sizes_interpolate_positions():
    model = make()
    assert model.encode(torch.zeros(1, 3, 24, 16)).shape == (1, 5)
    vision = VisionEncoder(16, 8, 16, 1, 2, 24)
    assert vision(torch.zeros(1, 3, 24, 16)).shape == (1, 7, 16)


@pytest.mark.parametrize("head, tokens, shape", [("mlp", 1, (2, 6)), ("qformer", 1, (2, 6)), ("qformer", 7, (2, 7, 6))])
def test_ids_become_embeddings(pixels, head, tokens, shape):
    model = make(head=head, embedding_tokens=tokens)
    ids = model.encode(pixels)
    assert ids.shape == (2, 5)
    assert model.embed(ids).shape == shape
    assert model(pixels).features["image_teacher"].shape == (2, tokens, 6)


def test_second_stage_trains_only_what_stands_behind_the_queries(pixels):
    model = make().train()
    out = model(pixels, noise=Noise(0, 2))
    assert out.reconstruction is None
    assert set(out.losses) == {"codebook", "commitment", "causal"}
    # the small weight is the codebook's
    assert out.losses["commitment"].item() == pytest.approx(4 * out.losses["codebook"].item(), rel=1e-4)
    (sum(out.losses.values()) + out.features["image_teacher"].square().mean()).backward()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n in frozen} == {"vision", "qformer"}
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    assert all(p.grad is not None for n, p in model.named_parameters() if n not in frozen)


def test_first_stage_learns_which_caption_belongs_to_which_image(pixels):
    model = embedder(dropout=0.0).train()
    text = model.text_encoder.encode(CAPTIONS)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        loss = model(pixels, text).losses["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = model.eval().scores(pixels, text)
    assert scores["image_to_text"].tolist() == scores["text_to_image"].tolist() == [1.0, 1.0]


def test_vision_is_frozen_but_for_its_last_norm():
    model = embedder(freeze_vision=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("vision.")}
    assert trained == {"vision.norm.weight", "vision.norm.bias"}


def test_second_stage_starts_from_the_first(tmp_path, pixels):
    first = embedder()
    first.save_pretrained(tmp_path)
    second = make(embedder=str(tmp_path))
    assert torch.equal(second.causal_embeddings(pixels), first.encode(pixels))
    assert second.config.embedder is None
    with pytest.raises(CheckpointError, match="embedder"):
        make(embedder=str(tmp_path), dim=24)
    with pytest.raises(CheckpointError, match="no such directory"):
        make(embedder=str(tmp_path / "nowhere"))


def test_captions():
    ids = CaptionIds(WORDS, max_length=6)
    text = ids.encode(["A RED, circle!", "a blue red blue red blue red"])
    assert text.features[0, :, 0].tolist() == [BEGIN, UNKNOWN, 5, 4, 0, 0]
    assert text.mask.sum(1).tolist() == [4, 6]
    assert clean_caption('A "Dog"; (big) #1') == "a dog big 1"
    assert len(clean_caption("word " * 80).split()) == 50


def test_padding_does_not_matter_to_text_features():
    model = embedder()
    short = model.text_encoder.encode(CAPTIONS)
    cut = TextFeatures(short.features[:, :4], short.mask[:, :4])
    assert torch.allclose(model.text_features(short), model.text_features(cut), atol=1e-6)


def test_decoding_needs_a_pixel_decoder(pixels):
    model = make()
    ids = model.encode(pixels)
    assert not model.paints
    with pytest.raises(VargenError, match="UnCLIPDecoder"):
        model.decode(ids)
    asked = {}
    with pytest.raises(TypeError, match="guidance"):
        model.decode(ids, guidance=3.0)

    def paint(embeddings, noise=None, **options):
        asked.update(options, embeddings=embeddings)
        return torch.zeros(len(embeddings), 3, 4, 4)

    model.pixel_decoder = paint
    assert model.paints
    assert model.decode(ids, noise=Noise(0, 2), guidance_scale=3.0, negative_tokens=ids.flip(0)).shape == (2, 3, 4, 4)
    assert torch.equal(asked["embeddings"], model.embed(ids))
    assert torch.equal(asked["negative"], model.embed(ids.flip(0)))
    assert asked["guidance_scale"] == 3.0
    assert set(asked) == {"embeddings", "negative", "guidance_scale"}


def test_errors(pixels):
    model = make()
    with pytest.raises(SpaceError, match="4 tokens"):
        model.embed(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(SpaceError, match="6 tokens"):
        model.embed(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(SpaceError, match=r"0\.\.31"):
        model.embed(torch.full((1, 5), 32))
    with pytest.raises(VargenError, match="multiples of the patch"):
        model.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(VargenError, match="NaN"):
        model.encode(pixels * float("nan"))
    with pytest.raises(VargenError, match="takes no text"):
        model.encode(pixels, text=CaptionIds(WORDS).encode(CAPTIONS))
    with pytest.raises(ConfigError, match="'mlp' with 3"):
        make(embedding_tokens=3)
    first = embedder()
    with pytest.raises(VargenError, match="learns from captions"):
        first(pixels)
    with pytest.raises(VargenError, match=r"0\.\.6"):
        first(pixels, TextFeatures(torch.full((2, 3, 1), 7.0), torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(VargenError, match="2 captions for 1"):
        first(pixels[:1], first.text_encoder.encode(CAPTIONS))
    with pytest.raises(VargenError, match="image embedding"):
        first.decode(torch.zeros(1, 5, 12))
    with pytest.raises(VargenError, match="no text branch"):
        model.qformer.text(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    reader = QFormer(2, 8, 1, 2, 8, 8, vocab_size=5, max_positions=4)
    with pytest.raises(VargenError, match="at most 4"):
        reader.text(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.parametrize("build", [make, embedder])
def test_saving_round_trip(tmp_path, pixels, build):
    model = build()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.encode(pixels), model.encode(pixels))


def official_state(model):
    """The weights of a tokenizer with an MLP head, under the published names."""
    state = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        timm = rest.replace("transformer.", "").replace("attn.out", "attn.proj")
        timm = timm.replace("mlp.up", "mlp.fc1").replace("mlp.down", "mlp.fc2")
        if part == "vision" and rest.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            for name, piece in (("q_bias", q), ("v_bias", v)):
                state[f"visual_encoder.{timm.replace('qkv.bias', name)}"] = piece.clone()
        elif part == "vision":
            names = {"class_token": "visual_encoder.cls_token", "positions": "visual_encoder.pos_embed"}
            names |= {f"patches.proj.{k}": f"visual_encoder.patch_embed.proj.{k}" for k in ("weight", "bias")}
            names |= {f"norm.{k}": f"ln_vision.{k}" for k in ("weight", "bias")}
            lead = {"class_token": (1, 1), "positions": (1,)}.get(rest, ())
            state[names.get(rest, f"visual_encoder.{timm}")] = value.view(*lead, *value.shape).clone()
        elif part == "qformer":
            state |= official_bert(rest, value)
        elif part in ("causal_decoder", "image_decoder"):
            suffix = "" if part == "causal_decoder" else "_image"
            if rest == "positions":
                state[f"pos_embed{suffix}"] = value[None].clone()
            else:
                state[timm.replace("blocks", f"blocks{suffix}")] = value
        elif part in ("to_code", "from_code"):
            name = "encode_task_layer" if part == "to_code" else "decode_task_layer"
            state[f"{name}.{rest.replace('up', '0').replace('down', '2')}"] = value
        elif part == "quantizer":
            state["quantize.embedding.weight"] = value
        else:
            _, index, kind = rest.split(".") if rest.startswith("down") else ("", "", rest.split(".")[1])
            state[f"image_down.{2 * int(index)}.{kind}" if index else f"distill_image_proj.{kind}"] = value
    return state


def official_bert(rest, value):
    if rest == "queries":
        return {"query_tokens": value[None].clone()}
    if rest.startswith("norm."):
        return {f"Qformer.bert.embeddings.LayerNorm.{rest[5:]}": value}
    _, index, inner, kind = (rest.split(".", 2)[0], rest.split(".")[1], *rest.split(".", 2)[2].rsplit(".", 1))
    layer = f"Qformer.bert.encoder.layer.{index}"
    fused = {"attn.qkv": ("attention", ("query", "key", "value")), "cross.kv": ("crossattention", ("key", "value"))}
    if inner in fused:
        block, names = fused[inner]
        return {f"{layer}.{block}.self.{n}.{kind}": p.clone() for n, p in zip(names, value.chunk(len(names)))}
    plain = {
        "attn.out": "attention.output.dense",
        "norm": "attention.output.LayerNorm",
        "cross.q": "crossattention.self.query",
        "cross.out": "crossattention.output.dense",
        "norm_cross": "crossattention.output.LayerNorm",
        "feed.mlp.up": "intermediate_query.dense",
        "feed.mlp.down": "output_query.dense",
        "feed.norm": "output_query.LayerNorm",
    }
    return {f"{layer}.{plain[inner]}.{kind}": value}


HEADS = {"vision_heads": 2, "heads": 2, "decoder_heads": 2}


def test_official_file(tmp_path, pixels):
    model = make(causal=False)
    with torch.no_grad():
        for block in model.vision.transformer.blocks:
            block.attn.qkv.bias[16:32] = 0
    state = official_state(model)
    torch.save(state, tmp_path / "seed_quantizer.pt")
    loaded = load(tmp_path / "seed_quantizer.pt", **HEADS)
    ids = model.encode(pixels)
    assert torch.equal(loaded.encode(pixels), ids)
    assert torch.equal(loaded.embed(ids), model.embed(ids))
    assert load(tmp_path / "seed_quantizer.pt", **HEADS, unclip="owner/unclip").config.unclip == "owner/unclip"


def test_released_files_become_a_tokenizer_that_draws(tmp_path):
    torch.manual_seed(0)
    decoder = UnCLIP(16, embedding_dim=6, vision_dim=16, vision_depth=1, vision_heads=2, vae_widths=[8, 8], unet_widths=[16, 16])
    decoder.pipeline().save_pretrained(tmp_path / "unclip")
    torch.save(official_state(make(causal=False)), tmp_path / "seed_quantizer.pt")
    settings = [f"{name}={value}" for name, value in {**HEADS, "unclip": tmp_path / "unclip"}.items()]
    convert("seed", tmp_path / "seed_quantizer.pt", tmp_path / "seed", settings)
    trips, folder = reconstruct(
        str(tmp_path / "seed"), "shapes", num=2, output=tmp_path / "out", settings={"num_inference_steps": 2, "guidance_scale": 3.0}
    )
    assert trips[0].tokens == 5
    assert trips[0].pixels.shape == (2, 3, 16, 16)
    assert (folder / "reconstruct.png").is_file()
    with pytest.raises(ConfigError, match="num_inference_steps"):
        reconstruct(str(tmp_path / "seed"), "shapes", num=2, output=tmp_path / "new", settings={"num_inference_step": 2})


def test_official_image_encoder_of_its_own(tmp_path, pixels):
    model = make(causal=False)
    state = official_state(model)
    vit = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    rest = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
    torch.save(vit, tmp_path / "eva_vit_g.pth")
    torch.save({"model": rest}, tmp_path / "stage2.pth")
    with pytest.raises(CheckpointError, match=r"eva_vit_g\.pth"):
        load(tmp_path / "stage2.pth")
    loaded = load(tmp_path / "stage2.pth", base=[tmp_path / "eva_vit_g.pth"], **HEADS)
    assert torch.allclose(loaded.causal_embeddings(pixels), model.causal_embeddings(pixels), atol=1e-5)


def test_official_files_that_do_not_fit(tmp_path):
    state = official_state(make())
    file = tmp_path / "seed.safetensors"
    save_file({k: v for k, v in state.items() if "quantize" not in k}, file)
    with pytest.raises(CheckpointError, match="quantize"):
        load(file, **HEADS)
    save_file({k: v for k, v in state.items() if "self.key.bias" not in k}, file)
    with pytest.raises(CheckpointError, match="expected all of"):
        load(file, **HEADS)
    save_file({**state, "surplus.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="unknown keys"):
        load(file, **HEADS)
