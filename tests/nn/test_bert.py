import torch
import torch.nn.functional as F

from vargen.nn.bert import BertLayer, PostNormMLP


def layer(**options):
    torch.manual_seed(0)
    return BertLayer(16, 4, 32, **options).eval()


def test_is_the_layer_of_transformers():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer as Theirs

    config = BertConfig(hidden_size=16, num_attention_heads=4, intermediate_size=32)
    config._attn_implementation = "eager"
    theirs, ours = Theirs(config).eval(), layer()
    own = theirs.attention.self
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (own.query, own.key, own.value)]
            getattr(ours.attn.qkv, name).copy_(torch.cat(parts))
            getattr(ours.attn.out, name).copy_(getattr(theirs.attention.output.dense, name))
            getattr(ours.feed.mlp.up, name).copy_(getattr(theirs.intermediate.dense, name))
            getattr(ours.feed.mlp.down, name).copy_(getattr(theirs.output.dense, name))
        x = torch.randn(2, 5, 16)
        expected = theirs(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert torch.allclose(ours(x), expected, atol=1e-5)


def test_output_is_normed():
    y = layer()(torch.randn(2, 5, 16))
    assert torch.allclose(y.mean(-1), torch.zeros(2, 5), atol=1e-5)
    assert torch.allclose(PostNormMLP(16, 32)(y).std(-1, unbiased=False), torch.ones(2, 5), atol=1e-4)


def test_causal_and_mask_agree():
    x = torch.randn(2, 5, 16)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.allclose(layer()(x, causal=True), layer()(x, mask=lower), atol=1e-6)
    shorter = layer()(x[:, :3], causal=True)
    assert torch.allclose(layer()(x, causal=True)[:, :3], shorter, atol=1e-6)


def test_context_is_read_only_where_there_is_a_cross_attention():
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 8)
    with_cross = layer(context_dim=8)
    assert not torch.allclose(with_cross(x, context), with_cross(x, 2 * context))
    assert torch.equal(layer()(x, context), layer()(x))


def test_attend_leaves_the_feed_forward_part_to_others():
    ours, x = layer(context_dim=8), torch.randn(2, 5, 16)
    assert torch.equal(ours.feed(ours.attend(x)), ours(x))


def test_dropout_acts_in_training_only():
    ours, x = layer(dropout=0.5, attn_dropout=0.5, context_dim=8), torch.randn(2, 5, 16)
    assert torch.equal(ours(x), ours(x))
    ours.train()
    assert not torch.equal(ours(x), ours(x))
    assert F.mse_loss(ours(x), ours(x)) > 0
