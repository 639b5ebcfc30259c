"""What generating one image takes: evaluations of backbone and head as the systems' sheets count them."""

import pytest
import torch

from vargen import ECAR, MAR, NAR, NBP, XAR, HiMAR, LlamaGen, MaskGIT
from vargen.condition import Condition
from vargen.decoding.flops import generation_cost, generation_flops
from vargen.guidance import Guidance
from vargen.noise import Noise

STACKS = {f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in (("dim", 16), ("depth", 1), ("heads", 2))}
SMALL = {"dim": 16, "depth": 1, "heads": 2}
TWO_STACKS = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
HEAD = {"head_width": 16, "head_depth": 1}
DENSE = {f"dense_{key}": value for key, value in HEAD.items()} | {"dense_head_heads": 2}
# model, its size, options, evaluations of backbone and head; n is 4 tokens a side
CASES = {
    "llamagen": (LlamaGen, SMALL, {}, 16, 0),
    "nar: 2n - 1": (NAR, {**SMALL, "depth": 3}, {}, 7, 0),
    "nbp: tokens / block + block - 1": (NBP, {**SMALL, "block_size": 4, "condition_vocabulary": 5, "max_positions": 32}, {}, 7, 0),
    "maskgit": (MaskGIT, {**SMALL, "mlp_hidden": 16}, {"steps": 5}, 5, 0),
    "mar: n, n x S": (MAR, {**STACKS, **HEAD, "head_steps": "ddim4"}, {"steps": 6}, 6, 24),
    "himar: pivots + dense, x S": (
        HiMAR,
        {**TWO_STACKS, **HEAD, **DENSE, "pivots": (2, 2), "head_steps": "ddim4", "dense_head_steps": "ddim5"},
        {"pivot_steps": 3, "steps": 2},
        5,
        3 * 4 + 2 * 5,
    ),
    "xar: K x M": (XAR, {**TWO_STACKS, "entity_size": (2, 2), "sampling_steps": 3}, {}, 12, 0),
    "ecar: K, K x N": (ECAR, {**SMALL, **HEAD, "stages": 3, "head_heads": 2}, {"sampling_steps": 4}, 3, 12),
}


def build(case):
    kind, config, options, *_ = CASES[case]
    torch.manual_seed(0)
    space = {"codebook_size": 8} if kind in (LlamaGen, NAR, NBP, MaskGIT) else {"channels": 3}
    classes = {} if kind is NBP else {"num_classes": 5}
    return kind(grid=(4, 4), **space, **classes, **config).eval(), options


@pytest.mark.parametrize("case", CASES)
def test_evaluations(case):
    model, options = build(case)
    *_, backbone, head = CASES[case]
    cost = generation_cost(model, **options)
    assert (cost.backbone, cost.head) == (backbone, head)
    assert cost.flops == generation_flops(model, **options) > 0
    if not case.startswith("nbp"):
        # rows for guidance ride in the same evaluations
        guided = generation_cost(model, guidance=Guidance(2.0), **options)
        assert (guided.backbone, guided.head) == (backbone, head)
        assert 1.5 * cost.flops < guided.flops <= 2 * cost.flops
    # nothing stays behind on the model
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("case", CASES)
def test_fresh_noise_leaves_torch_alone(case):
    """Drawing without a seed differs from call to call, and neither reads nor moves torch's generator."""
    model, options = build(case)
    condition = Condition(class_labels=torch.tensor([1, 2]))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [model.generate(condition, **options) for _ in range(2)]
    tokens = model.generate(condition, noise=Noise(0, 2), **options)
    losses = [float(model.training_losses(tokens, condition)["loss"].detach()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*drawn)
    if model.space.channels is not None or isinstance(model, MaskGIT):
        assert losses[0] != losses[1]
