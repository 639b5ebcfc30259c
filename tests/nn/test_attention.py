import pytest
import torch

from vargen.errors import ConfigError, VargenError
from vargen.nn.attention import Attention, CrossAttention, attention, attention_backend
from vargen.nn.block import TransformerBlock
from vargen.nn.cache import KVCache


def qkv(heads=4, kv_heads=4, n=5, m=7, d=8):
    torch.manual_seed(0)
    return torch.randn(2, heads, n, d), torch.randn(2, kv_heads, m, d), torch.randn(2, kv_heads, m, d)


@pytest.mark.parametrize("backend", ["eager", "flex"])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal"])
@torch.no_grad()
def test_backends_agree_with_sdpa(backend, masked):
    q, k, v = qkv(kv_heads=2)
    mask = {"bool": torch.rand(2, 1, 5, 7) > 0.3, "float": torch.randn(5, 7)}.get(masked)
    if masked == "bool":
        mask[..., 0] = True
    expected = attention(q, k, v, mask, causal=masked == "causal", scale=0.3)
    with attention_backend(backend):
        torch.testing.assert_close(attention(q, k, v, mask, causal=masked == "causal", scale=0.3), expected, atol=1e-5, rtol=1e-5)


def test_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="expected one of"), attention_backend("flash"):
        pass


@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_cached_steps_equal_one_causal_pass(kv_heads):
    torch.manual_seed(1)
    block = TransformerBlock(32, 4, 48, norm="rms", gated=True, kv_heads=kv_heads, qk_norm="layer").eval()
    x, table = torch.randn(2, 6, 32), torch.randn(6, 4, 2)
    whole = block(x, causal=True, rotary=table)
    cache = KVCache(1, 2, kv_heads or 4, 6, 8)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
        parts.append(block(x[:, start:stop], mask=mask, rotary=table[start:stop], cache=cache))
        cache.advance(stop - start)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_cache_gathers_truncates_and_repeats():
    cache = KVCache(2, 1, 1, 6, 2)
    entries = torch.arange(6.0).reshape(1, 1, 6, 1).expand(1, 1, 6, 2)
    for layer in range(2):
        cache.update(layer, entries, -entries)
    cache.advance(6)
    cache.gather(torch.tensor([3, 5]), start=2)
    assert cache.length == 4
    assert cache.keys[1, 0, 0, :4, 0].tolist() == [0, 1, 3, 5]
    assert cache.values[0, 0, 0, :4, 1].tolist() == [0, -1, -3, -5]
    cache.truncate(3)
    keys, _ = cache.update(0, torch.full((1, 1, 1, 2), 9.0), torch.zeros(1, 1, 1, 2))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 3, 9]
    cache.visible = torch.ones(1, 6, dtype=torch.bool)
    cache.repeat_rows(3)
    assert cache.keys.shape[1] == cache.visible.shape[0] == 3
    cache.select_rows(slice(0, 1))
    assert cache.values.shape[1] == 1
    assert cache.nbytes == 2 * 2 * 1 * 6 * 2 * 4
    with pytest.raises(VargenError, match="cannot take slot 8"):
        cache.update(0, torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2))
    with pytest.raises(VargenError, match="truncate"):
        cache.truncate(5)


@torch.no_grad()
def test_modulation_and_cross_attention():
    torch.manual_seed(2)
    block = TransformerBlock(16, 2, 32, condition_dim=8, context_dim=12).eval()
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    assert torch.equal(block(x, condition=torch.randn(2, 1, 8)), x), "zero-initialised gates keep both branches closed"
    mask = torch.tensor([[True, True, False], [True, False, False]])
    changed = context.masked_fill(~mask.unsqueeze(-1), 7.0)
    torch.testing.assert_close(block(x, context=context, context_mask=mask), block(x, context=changed, context_mask=mask))
    plain = TransformerBlock(16, 2, 32).eval()
    zeros, ones = torch.zeros(16), torch.ones(16)
    torch.testing.assert_close(plain(x, modulation=(zeros, zeros, ones, None, zeros, ones)), plain(x))


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="not divisible"):
        Attention(10, 3)
    with pytest.raises(ConfigError, match="divisor of 4 heads"):
        Attention(16, 4, kv_heads=3)
    assert CrossAttention(16, 8, 2)(torch.randn(1, 2, 16), torch.randn(1, 3, 8)).shape == (1, 2, 16)
