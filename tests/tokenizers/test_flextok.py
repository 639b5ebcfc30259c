import json

import pytest
import torch
from safetensors.torch import save_file

from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.flow.flow import shifted_times
from vargen.noise import Noise
from vargen.official.flextok import CHUNKS, load
from vargen.tokenizers.flextok import NESTED, FlexTok, kept_registers, shifted, training_times
from vargen.tokenizers.flextok_nets import registers_last_mask

SMALL = {
    "sample_size": 16,
    "patch_size": 4,
    "num_registers": 6,
    "levels": [4, 3],
    "encoder_dim": 32,
    "encoder_depth": 1,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "head_dim": 8,
}
VAE = {"block_out_channels": [4, 4], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
       "norm_num_groups": 4, "latent_channels": 2}  # fmt: skip


def make(**options):
    torch.manual_seed(0)
    model = FlexTok(**{**SMALL, **options}).eval()
    # gates and output layer start at zero
    for p in model.decoder.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "preset, encoder, decoder", [("d12-d12", 85.4, 172.4), ("d18-d18", 287.3, 578.6), ("d18-d28", 287.3, 2169.7)]
)
def test_released_sizes(preset, encoder, decoder):
    with torch.device("meta"):
        model = FlexTok.from_preset(preset)
    # published counts include the fixed position tables
    tables = [part.patches.positions.numel() / 1e6 for part in (model.encoder, model.decoder)]
    assert millions(model.encoder) + tables[0] == pytest.approx(encoder, abs=0.05)
    assert millions(model.decoder) + tables[1] == pytest.approx(decoder, abs=0.05)
    assert millions(model.front) == pytest.approx(83.82, abs=0.01)
    assert model.space.token_shape == (256,)
    assert model.space.codebook_size == 64000
    assert model.space.ordered


@pytest.mark.parametrize("count", range(1, 7))
def test_any_prefix_decodes(pixels, count):
    model = make()
    ids = model.encode(pixels)
    assert ids.shape == (2, 6)
    painted = model.decode(ids[:, :count], noise=Noise(0, 2), num_inference_steps=2)
    assert painted.shape == pixels.shape
    # tokens beyond the prefix do not matter
    other = torch.where(torch.arange(6) < count, ids, (ids + 1) % 12)
    keep = torch.full((2,), count)
    assert torch.allclose(painted, model.decode(other, noise=Noise(0, 2), num_inference_steps=2, keep=keep), atol=1e-5)


def test_samples_may_keep_different_numbers(pixels):
    model = make()
    ids = model.encode(pixels)
    both = model.decode(ids, noise=Noise(0, 2), num_inference_steps=2, keep=torch.tensor([1, 6]))
    noise = Noise(0, 2)
    first = model.decode(ids[:1, :1], noise=noise.select(slice(0, 1)), num_inference_steps=2)
    second = model.decode(ids[1:], noise=noise.select(slice(1, 2)), num_inference_steps=2)
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-5)


def test_first_registers_do_not_depend_on_later_ones(pixels):
    model = make()
    codes = model.encoder(pixels)
    with torch.no_grad():
        model.encoder.registers[4:] += 1
    changed = model.encoder(pixels)
    assert torch.allclose(codes[:, :4], changed[:, :4], atol=1e-5)
    assert not torch.allclose(codes[:, 4:], changed[:, 4:])


def test_mask_of_the_encoder():
    mask = registers_last_mask(2, 3).int().tolist()
    assert mask == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_guidance_steps_and_noise_are_arguments(pixels):
    model = make()
    ids = model.encode(pixels)

    def paint(seed=0, **options):
        return model.decode(ids, noise=Noise(seed, 2), **{"num_inference_steps": 2, **options})

    assert torch.equal(paint(), paint())
    for changed in ({"seed": 1}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {"normalized_guidance": False}):
        assert not torch.allclose(paint(), paint(**changed))
    plain = {"normalized_guidance": False}
    assert torch.allclose(paint(guidance_scale=lambda t: 3.0, **plain), paint(guidance_scale=3.0, **plain), atol=1e-5)
    assert torch.allclose(paint(guidance_scale=1.0), paint(guidance_scale=lambda t: 1.0, **plain), atol=1e-4)


def test_smaller_images_crop_the_positions(pixels):
    model = make()
    small = pixels[..., :8, :12]
    ids = model.encode(small)
    assert model.decode(ids, size=(8, 12), num_inference_steps=1).shape == small.shape


def test_with_a_vae(pixels):
    model = make(vae=VAE, patch_size=2, scaling_factor=0.5)
    assert torch.equal(model.latents(pixels), 0.5 * model.posterior(pixels).mean)
    assert torch.equal(model.encode(pixels), model.encode(pixels))
    sampled = [model.latents(pixels, Noise(seed, 2)) for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert model.decode(model.encode(pixels), num_inference_steps=1).shape == pixels.shape
    model(pixels, noise=Noise(0, 2)).losses["flow"].backward()
    assert all(p.grad is None for p in model.front.parameters())


def test_training_pass_reaches_the_encoder(pixels):
    model = make(repa_dim=5, repa_hidden=8, condition_dropout=0.0, nested="pow2").train()
    out = model(pixels, noise=Noise(1, 2))
    assert out.reconstruction is None
    assert out.features["repa_teacher"].shape == (2, 4, 4, 5)
    out.losses["flow"].backward()
    assert model.encoder.to_code.weight.grad.abs().sum() > 0
    again = model(pixels, noise=Noise(1, 2))
    assert torch.equal(out.losses["flow"], again.losses["flow"])


def test_training_reduces_the_loss(pixels):
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss = model(pixels, noise=Noise(0, 2).at(step)).losses["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("count", [1, 6, 16])
def test_nested_dropout_laws(count):
    noise = Noise(0, 500)
    kept = {law: set(kept_registers(noise, law, count).tolist()) for law in NESTED}
    powers = {k for k in (1, 2, 4, 8, 16, count) if k <= count}
    assert kept["uniform"] == set(range(1, count + 1))
    assert kept["pow2"] == powers
    assert kept["uniform_pow2"] == powers


@pytest.mark.parametrize("law", ["logit-normal", "uniform", "stratified", "mode"])
def test_training_times_lie_in_the_unit_interval(law):
    t = training_times(Noise(0, 1000), law)
    assert t.shape == (1000,)
    assert 0 <= t.min() < t.max() <= 1
    assert t.mean() == pytest.approx(0.5, abs=0.05)


def test_stratified_times_fill_every_stratum():
    u = torch.special.ndtr(torch.logit(training_times(Noise(0, 50), "stratified").double()))
    assert (u * 50).floor().long().tolist() == list(range(50))


def test_times_shifted_towards_noise(pixels):
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert shifted(t, 4.0).tolist() == pytest.approx(shifted_times(t.tolist(), 4.0))
    assert torch.equal(shifted(t, 1.0), t)
    plain, later = make(), make(time_shift=4.0)
    tokens = plain.encode(pixels)
    painted = [model.decode(tokens, noise=Noise(0, 2), num_inference_steps=3) for model in (plain, later)]
    losses = [model(pixels, noise=Noise(0, 2)).losses["flow"] for model in (plain, later)]
    assert not torch.allclose(*painted)
    assert losses[0] != losses[1]
    with pytest.raises(ConfigError, match="time_shift 0"):
        make(time_shift=0)


def test_errors(pixels):
    model = make()
    for tokens in (torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(SpaceError, match=r"1\.\.6"):
            model.decode(tokens)
    with pytest.raises(SpaceError, match=r"0\.\.11"):
        model.decode(torch.full((1, 2), 12))
    with pytest.raises(SpaceError, match=r"1\.\.2"):
        model.decode(torch.zeros(1, 2, dtype=torch.long), keep=torch.tensor([3]))
    for size in ((16, 18), (32, 16), (0, 16)):
        with pytest.raises(VargenError, match="multiples of 4 up to 16"):
            model.encode(torch.zeros(1, 3, *size))
    for size in ((16, 18), (32, 32), (16,)):
        with pytest.raises(VargenError, match="multiples of 4 up to 16"):
            model.decode(torch.zeros(1, 2, dtype=torch.long), size=size)
    with pytest.raises(ConfigError, match="at least 1"):
        model.decode(torch.zeros(1, 2, dtype=torch.long), num_inference_steps=0)
    with pytest.raises(VargenError, match="NaN"):
        model.encode(pixels * float("nan"))
    with pytest.raises(ConfigError, match="nested dropout"):
        make(nested="powers")
    with pytest.raises(ConfigError, match="multiple of the 8"):
        make(encoder_dim=30)
    with pytest.raises(ConfigError, match="repa_layer 2"):
        make(repa_dim=4, repa_layer=2)


def test_saving_round_trip(tmp_path, pixels):
    model = make(vae=VAE, patch_size=2)
    model.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pixels), model.encode(pixels))


def entry(kind, **arguments):
    return {"_target_": f"flextok.some.place.{kind}", **arguments}


def official_config(trunk=None):
    patches = {"channels_in": 3, "patch_sizes": [4, 4]}
    places = {"max_sizes": [4, 4], "posemb_type": "sincos", "posemb_scaling": "absolute"}
    encoder = {
        "to_last": entry("PerSampleOp", per_sample_op={"_target_": "flextok.permute", "_partial_": True}),
        "emb": entry("PatchEmbedder", **patches),
        "pos": entry("PositionalEmbeddingAdder", **places),
        "reg": entry("Registers1D", n_min=6, n_max=6),
        "pack": entry("BlockWiseSequencePacker", mask_mode="causal_last"),
        "trunk": entry(trunk or "FlexTransformer", dim=32, depth=1, head_dim=8),
        "unpack": entry("SequenceUnpacker"),
        "head": entry("LinearHead", dim_out=2),
    }
    decoder = {
        "lin": entry("LinearLayer", dim_in=2),
        "places": entry("PositionalEmbeddingAdder", max_sizes=[6], posemb_type="learnable_sum", posemb_scaling="absolute"),
        "nested": entry("MaskedNestedDropout", size_sampling_mode="pow2"),
        "null": entry("LearnedNullCond", dropout_prob=0.1),
        "emb": entry("PatchEmbedder", **patches),
        "pos": entry("PositionalEmbeddingAdder", **places),
        "pack": entry("BlockWiseSequencePacker", mask_mode="full", per_subseq_embs=True),
        "time": entry("TimestepEmbedder", max_timestep=1.0),
        "trunk": entry("FlexTransformer", dim=32, depth=2, head_dim=8, adaLN_expansion=2),
        "unpack": entry("SequenceUnpacker"),
        "out": entry("ToPatchesLinearHead", channels_out=3, patch_sizes=[4, 4]),
    }
    wrapper = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
    return {
        "encoder": {"_target_": wrapper, "module_dict": encoder},
        "decoder": {"_target_": wrapper, "module_dict": decoder},
        "regularizer": entry("FSQ", levels=[4, 3]),
    }


def official_state(model):
    """The weights of a model on pixels, under the names of :func:`official_config`."""
    state, own = {}, model.state_dict()
    order = torch.tensor(CHUNKS).argsort()
    for key, value in own.items():
        part, _, rest = key.partition(".")
        prefix = f"{part}.module_dict"
        if ".attn.qkv." in key:
            for name, piece in zip(("wq", "wk", "wv"), value.chunk(3)):
                state[f"{prefix}.trunk.{rest.replace('qkv', name)}"] = piece.clone()
        elif rest.startswith("blocks."):
            names = (("attn.out", "attn.proj"), ("mlp.gate", "mlp.fc1"), ("mlp.up", "mlp.fc3"), ("mlp.down", "mlp.fc2"))
            for ours, theirs in names:
                rest = rest.replace(ours, theirs)
            state[f"{prefix}.trunk.{rest}"] = value
        elif rest.startswith("modulations."):
            _, index, _, kind = rest.split(".")
            chunks = value.unflatten(0, (2, 6, -1))[:, order].flatten(0, 2)
            state[f"{prefix}.trunk.blocks.{index}.adaLN_modulation.1.{kind}"] = chunks.clone()
        else:
            for ours, theirs in (
                ("patches.proj", "emb.patch_proj"),
                ("registers", "reg.registers"),
                ("to_code", "head.proj"),
                ("from_code", "lin.proj"),
                ("register_positions", "places.posembs"),
                ("dropped", "nested.dropout_mask_token"),
                ("time.mlp.up", "time.mlp.0"),
                ("time.mlp.down", "time.mlp.2"),
                ("modulation_out.linear", "out.adaLN_modulation.1"),
                ("to_patch", "out.proj"),
            ):
                if rest.startswith(ours):
                    rest = rest.replace(ours, theirs)
                    break
            rest = "null.nullcond" if rest == "null" else rest
            state[f"{prefix}.{rest}"] = value.T[None, None].contiguous() if rest == "places.posembs" else value
    for part in ("encoder", "decoder"):
        table = getattr(model, part).patches.positions
        state[f"{part}.module_dict.pos.posembs"] = table.permute(2, 0, 1)[None].contiguous()
    return state


def test_official_file_is_built_from_the_configuration_in_its_header(tmp_path, pixels):
    model = make(nested="pow2", condition_dropout=0.1)
    header = {key: repr(value) for key, value in official_config().items()} | {"_target_": "flextok.flextok_wrapper.FlexTok"}
    save_file(official_state(model), tmp_path / "model.safetensors", metadata=header)
    loaded = load(tmp_path)
    assert loaded.config_dict() == model.config_dict()
    ids = model.encode(pixels)
    assert torch.equal(loaded.encode(pixels), ids)
    assert torch.equal(
        loaded.decode(ids, noise=Noise(0, 2), num_inference_steps=2), model.decode(ids, noise=Noise(0, 2), num_inference_steps=2)
    )


@pytest.mark.parametrize("nested", [False, True])
def test_official_configuration_beside_the_file(tmp_path, nested):
    save_file(official_state(make()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="carries no configuration"):
        load(tmp_path)
    config = official_config()
    (tmp_path / "config.json").write_text(json.dumps({"config": config} if nested else config))
    assert load(tmp_path).config.num_registers == 6


def test_official_configurations_that_do_not_fit(tmp_path):
    state = official_state(make())
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError, match="FlexTransformerDecoder"):
        load(file, config=official_config("FlexTransformerDecoder"))
    with pytest.raises(CheckpointError, match="os"):
        load(file, config=official_config("os.system"))
    config = official_config()
    config["encoder"]["module_dict"]["pack"]["mask_mode"] = "full"
    with pytest.raises(CheckpointError, match="mask_mode=full"):
        load(file, config=config)
    config = official_config()
    config["decoder"]["module_dict"]["places"]["max_sizes"] = [7]
    with pytest.raises(CheckpointError, match="num_registers 6 and its decoder 7"):
        load(file, config=config)
    with pytest.raises(CheckpointError, match="module_dict"):
        load(file, config={"encoder": {}})
    save_file({**state, "encoder.module_dict.pos.posembs": torch.zeros(1, 32, 4, 4)}, file)
    with pytest.raises(CheckpointError, match="sine-cosine"):
        load(file, config=official_config())
    save_file({k: v for k, v in state.items() if "reg." not in k}, file)
    with pytest.raises(CheckpointError, match="missing keys"):
        load(file, config=official_config())
