"""Muon's orthogonalisation and its step."""

from __future__ import annotations

import torch
from torch import nn

from training.towers.muon import Muon, orthogonalised


def test_orthogonalised_matrices_keep_their_singular_vectors_and_even_out_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 40), (40, 12)):
        u, _, v = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
        values = torch.logspace(0, -1.5, 12)
        found = u.T @ orthogonalised(u @ torch.diag(values) @ v) @ v.T
        # The quintic's five rounds bring values from 0.03 to 1 between 0.6 and 1.3.
        assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.3)).all()
        torch.testing.assert_close(
            found - torch.diag(found.diagonal()), torch.zeros(12, 12), atol=1e-3, rtol=0
        )


def test_step_of_a_convolution_has_the_size_of_an_adam_step_whatever_the_gradient_is() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    before = conv.weight.detach().clone()
    optimiser = Muon([conv.weight], lr=0.01)
    conv.weight.grad = 1e4 * torch.randn_like(conv.weight)
    optimiser.step()
    moved = (conv.weight.detach() - before).square().mean().sqrt()
    # 0.2 of the rate in root mean square (Liu et al., 2025), singular values being only about 1.
    assert 0.15 * 0.01 < moved < 0.25 * 0.01


def test_a_quadratic_is_solved() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(6, 9), nn.Parameter(torch.zeros(6, 9))
    optimiser = Muon([weight], lr=0.1)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        weight.grad = (weight - target).detach()
        optimiser.step()
    assert (weight - target).norm() < 0.1 * target.norm()
