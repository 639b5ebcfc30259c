import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import VargenError
from vargen.kernels.sample import filter_logits, guided_logits, guided_sample, inverse_cdf

INF, NAN = float("inf"), float("nan")


def test_inverse_cdf_counts_the_entries_at_or_below_the_threshold():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24, 1.0])
    assert inverse_cdf(probs.expand(7, -1), uniform).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_inverse_cdf_draws_in_proportion():
    weights = torch.tensor([3.0, 0.0, 1.0, 4.0])
    drawn = inverse_cdf(weights.expand(800, -1), (torch.arange(800) + 0.5) / 800)
    assert drawn.bincount(minlength=4).tolist() == [300, 0, 100, 400]


def kept(logits, **settings):
    return filter_logits(torch.tensor(logits), **settings).isfinite().nonzero()[:, 0].tolist()


def test_top_k_keeps_ties_with_the_kth():
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2, 3]
    assert kept([1.0, 3.0], top_k=5) == [0, 1]
    assert kept([1.0, 3.0], top_k=0) == [0, 1]


def test_top_p_drops_after_the_token_that_crosses_p():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()
    assert kept(logits, top_p=0.49) == [1]
    assert kept(logits, top_p=0.51) == [1, 2]
    assert kept(logits, top_p=0.85) == [0, 1, 2]  # equal ones go by index
    assert kept(logits, top_p=1e-9) == [1]


def test_top_p_sees_probabilities_after_top_k():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept(logits, top_p=0.5) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.5) == [0]


def test_temperature_divides_first_and_is_bounded_below():
    logits = torch.tensor([1.0, 2.0])
    assert torch.equal(filter_logits(logits, 2.0), logits / 2)
    assert torch.equal(filter_logits(logits, 0.0), logits / 1e-5)


def test_guidance_is_linear_and_keeps_forbidden_tokens_forbidden():
    cond, null = torch.tensor([2.0, -INF, 1.0, -INF]), torch.tensor([1.0, 0.0, -INF, -INF])
    assert guided_logits(cond, null, 3.0).tolist() == [4.0, -INF, -INF, -INF]
    assert guided_logits(cond, None, 3.0).tolist() == cond.tolist()


@st.composite
def sampling(draw):
    """Logits on a coarse grid (many ties) or not, some forbidden, with any filters."""
    v = draw(st.sampled_from([1, 2, 5, 16, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    cond, null = (torch.randn(2, 2, v, generator=generator) * draw(st.sampled_from([0.0, 1.0, 4.0])) for _ in range(2))
    if draw(st.booleans()):
        cond, null = cond.round(), null.round()
    cond[torch.rand(cond.shape, generator=generator) < 0.1] = -INF
    cond[..., -1] = 1.0
    return {
        "cond": cond.to(dtype),
        "null": null.to(dtype) if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([1.0, 1.5, 4])),
        "uniform": torch.rand(2, 2, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64]))),
        "temperature": draw(st.sampled_from([1, 0.7, 0.0])),
        "top_k": draw(st.sampled_from([0, 1, 3, 12, 99])),
        "top_p": draw(st.sampled_from([1.0, 0.9, 0.5, 1e-4])),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sampling())
def test_drawn_token_survives_the_filters(case):
    uniform = case.pop("uniform")
    filtered = filter_logits(
        guided_logits(case["cond"], case["null"], case["scale"]), case["temperature"], case["top_k"], case["top_p"]
    )
    assert filtered.gather(-1, guided_sample(uniform=uniform, **case)[..., None]).isfinite().all()


def agrees(tokens, case):
    """Equal to the reference, or to it with p and the uniform moved by less than float32 rounding may amount to."""
    moved = [
        guided_sample(
            **{**case, "uniform": (case["uniform"].double() + du).clamp(0, 1), "top_p": min(case["top_p"] * (1 + dp), 1.0)}
        )
        for du in (0.0, -2e-6, 2e-6)
        for dp in (0.0, -1e-5, 1e-5)
    ]
    return bool((torch.stack(moved) == tokens).any(0).all())


def on(device, case):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in case.items()}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sampling())
def test_kernel_draws_the_reference_token(run_triton, device, case):
    assert agrees(run_triton("guided_sample", **on(device, case)).cpu(), case)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (700, 0.9)])
def test_kernel_draws_from_vocabularies_of_several_blocks(run_triton, device, top_k, top_p):
    generator = torch.Generator().manual_seed(top_k)
    cond, null = (torch.randn(1, 2, 4100, generator=generator) for _ in range(2))
    cond[0, 1, :4097], null[0, 1] = -INF, 0.0  # all mass in the last block
    case = {"cond": cond, "null": null, "scale": 2.0, "uniform": torch.tensor([[0.6, 0.3]]), "top_k": top_k, "top_p": top_p}
    tokens = run_triton("guided_sample", **on(device, case)).cpu()
    assert agrees(tokens, case)
    assert tokens[0, 1] >= 4097


@pytest.mark.parametrize("top_k, survivors", [(1, [3]), (3, [3, 5, 6]), (4, [0, 2, 3, 5, 6]), (6, [0, 1, 2, 3, 5, 6])])
def test_kernel_keeps_the_top_k_and_their_ties(run_triton, device, top_k, survivors):
    logits = torch.tensor([0.0, -0.1, -0.0, 0.3, -INF, 0.1, 0.2]).expand(1, 32, 7).to(device)
    uniform = ((torch.arange(32) + 0.5) / 32).reshape(1, 32).to(device)
    assert run_triton("guided_sample", logits, None, 1.0, uniform, top_k=top_k).unique().tolist() == survivors


def test_kernel_keeps_the_first_of_equal_tokens_under_top_p(run_triton, device):
    uniform = (torch.arange(4) / 4).reshape(1, 4).to(device)  # on the edges between tokens, which belong to the upper one
    tokens = run_triton("guided_sample", torch.zeros(1, 4, 8, device=device), None, 1.0, uniform, top_p=0.45)
    assert tokens.tolist() == [[0, 1, 2, 3]]  # 3/8 <= 0.45 < 4/8


def test_kernel_counts_equal_tokens_across_blocks(run_triton, device):
    logits, uniform = torch.zeros(1, 1, 4100, device=device), torch.full((1, 1), 1 - 2**-24, device=device)
    assert run_triton("guided_sample", logits, None, 1.0, uniform, top_p=4097.5 / 4100).tolist() == [[4097]]
    assert run_triton("guided_sample", logits, None, 1.0, uniform).tolist() == [[4099]]
    assert run_triton("guided_sample", logits, None, 1.0, uniform, greedy=True).tolist() == [[0]]


def test_kernel_takes_the_first_largest_logit_if_greedy(run_triton, device):
    cond = torch.randint(-3, 4, (3, 4, 37), generator=torch.Generator().manual_seed(0)).float().to(device)
    null = cond.roll(1, -1)
    uniform = torch.zeros(3, 4, device=device)
    tokens = run_triton("guided_sample", cond, null, 2.0, uniform, greedy=True)
    assert torch.equal(tokens, guided_sample(cond, null, 2.0, uniform, greedy=True))
    assert torch.equal(tokens, (null + 2 * (cond - null)).argmax(-1))


@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.9}, {"greedy": True}])
def test_rows_without_a_distribution_yield_minus_one(run_triton, device, settings):
    cond = torch.tensor([[[1.0, NAN, 0.0], [1.0, INF, 0.0], [-INF, -INF, -INF], [-INF, 3e38, 0.0]]], device=device)
    uniform = torch.full((1, 4), 0.5, device=device)
    assert guided_sample(cond, None, 1.0, uniform, **settings).tolist() == [[-1, -1, -1, 1]]
    assert run_triton("guided_sample", cond, None, 1.0, uniform, **settings).tolist() == [[-1, -1, -1, 1]]
    # finite logits that guidance carries out of float32
    assert guided_sample(cond[:, 3:], -cond[:, 3:], 9.0, uniform[:, 3:], **settings).tolist() == [[-1]]
    assert run_triton("guided_sample", cond[:, 3:], -cond[:, 3:], 9.0, uniform[:, 3:], **settings).tolist() == [[-1]]


def test_arguments_that_do_not_fit_are_refused(run_triton, device):
    logits, uniform = torch.zeros(1, 2, 4, device=device), torch.zeros(1, 2, device=device)
    for sample in (guided_sample, lambda *args, **settings: run_triton("guided_sample", *args, **settings)):
        with pytest.raises(VargenError, match="expected logits \\(B, T, V\\)"):
            sample(logits, logits[:, :1], 1.0, uniform)
        with pytest.raises(VargenError, match="uniforms \\(B, T\\)"):
            sample(logits, None, 1.0, uniform[0])
        with pytest.raises(VargenError, match="top_p 0.0"):
            sample(logits, None, 1.0, uniform, top_p=0.0)
    assert run_triton("guided_sample", logits[:0], None, 1.0, uniform[:0]).shape == (0, 2)
