import math

import pytest
import torch
import torch.nn.functional as F

from vargen.losses.contrastive import contrastive_loss, retrieval_accuracy


def test_loss_is_that_of_matching_both_ways():
    first, second = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    logits = first @ second.T / 0.1
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    assert contrastive_loss(first, second, 0.1) == pytest.approx(expected.item(), rel=1e-5)


def test_identical_rows_leave_chance():
    x = F.normalize(torch.ones(4, 8), dim=-1)
    assert contrastive_loss(x, x, 0.07, label_smoothing=0.1) == pytest.approx(math.log(4), rel=1e-5)


def test_temperature_is_learned():
    temperature = torch.tensor(0.5, requires_grad=True)
    x = torch.eye(4)
    contrastive_loss(x, x, temperature).backward()
    assert temperature.grad > 0


def test_retrieval():
    x = torch.eye(4)
    assert retrieval_accuracy(x, x) == 1
    assert retrieval_accuracy(x, x[[1, 0, 2, 3]]) == 0.5
