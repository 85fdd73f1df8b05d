"""Muon: orthogonal updates, all matrices of a shape at once."""

import pytest
import torch
from torch import nn

from seats_cli.demo.optimiser import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 24), (2, 24, 64)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u * torch.logspace(0, -1.3, u.shape[-1]) @ vh  # singular values from 1 to 0.05
    values = torch.linalg.svdvals(newton_schulz(g).float())
    assert values.min() > 0.5
    assert values.max() < 1.35
    # The directions are those of g: the update is its nearest semi-orthogonal matrix, roughly.
    cosine = nn.functional.cosine_similarity(newton_schulz(g).float().flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95


def _updated(
    matrices: list[torch.Tensor], grads: list[torch.Tensor], **settings: float
) -> list[torch.Tensor]:
    params = [nn.Parameter(m.clone()) for m in matrices]
    optimiser = Muon(params, **{"lr": 0.1, "weight_decay": 0.0} | settings)
    for _ in range(2):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimiser.step()
    return [p.detach() for p in params]


def test_steps_are_deterministic_and_each_matrix_gets_its_own():
    torch.manual_seed(1)
    shapes = [(16, 16), (16, 16), (32, 16)]
    matrices, grads = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    together = _updated(matrices, grads)
    again = _updated(matrices, grads)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for i in range(3):
        alone = _updated([matrices[i]], [grads[i]])[0]
        torch.testing.assert_close(together[i], alone, atol=2e-3, rtol=0)
        assert not torch.allclose(together[i], matrices[i], atol=0.05)


def test_the_size_of_a_step_does_not_depend_on_the_gradient_but_on_lr():
    torch.manual_seed(2)
    start, grad = torch.zeros(16, 16), torch.randn(16, 16)
    small, large = (_updated([start], [grad * scale])[0] for scale in (2.0**-10, 2.0**10))
    torch.testing.assert_close(small, large, atol=2e-3, rtol=0)
    half = _updated([start], [grad], lr=0.05)[0]
    torch.testing.assert_close(half * 2, small, atol=1e-5, rtol=0)


def test_weight_decay_shrinks():
    start = torch.eye(8)
    decayed = _updated([start], [torch.zeros(8, 8)], weight_decay=0.5)[0]
    torch.testing.assert_close(decayed, start * (1 - 0.1 * 0.5) ** 2)


def test_vectors_and_missing_gradients_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises((RuntimeError, ValueError), match=r"gradient|non-empty"):
        Muon([nn.Parameter(torch.zeros(4, 4))], lr=0.1).step()
