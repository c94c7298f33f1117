"""Attacks keep to their budget, raise their loss, and do what a library's attacks of the same name do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from services.bundle.load import Bundle
from training.defense.attacks import apgd, ascend, checkpoints, feature_matching, pgd, untargeted
from training.defense.corruptions import HARMLESS, typographic
from training.defense.victim import Victim, to_images, to_pixels

EPSILON = 8 / 255


class Linear(nn.Module):
    """A classifier whose gradient is the same everywhere, so that a perfect attack is known in closed form."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3 * 8 * 8, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


@pytest.fixture()
def images() -> torch.Tensor:
    # Away from 0 and 1, so that only the budget binds.
    return 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def cross_entropy(model: nn.Module, truth: torch.Tensor):
    return lambda x: nn.functional.cross_entropy(model(x), truth, reduction="none")


def two_classes(images: torch.Tensor):
    model = Linear(2)
    return model, cross_entropy(model, torch.zeros(len(images), dtype=torch.long))


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_on_a_linear_classifier_the_attack_is_the_best_there_is(attack, images: torch.Tensor) -> None:
    model, loss = two_classes(images)
    direction = (model.weight[1] - model.weight[0]).sign().reshape(1, 3, 8, 8)
    moved = attack(loss, images, EPSILON, steps=20, generator=torch.Generator().manual_seed(0))
    # APGD's last steps are small: within a tenth of the budget of the corner.
    torch.testing.assert_close(moved, images + EPSILON * direction.detach(), atol=0.1 * EPSILON, rtol=0)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_attacks_keep_to_the_budget_and_to_the_pixel_range(attack) -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).round()
    model = Linear()
    loss = cross_entropy(model, torch.zeros(4, dtype=torch.long))
    moved = attack(loss, images, EPSILON, steps=5, generator=torch.Generator().manual_seed(0))
    assert (moved - images).abs().max() <= EPSILON + 1e-6  # float32
    assert moved.min() >= 0 and moved.max() <= 1
    # And as 8-bit pictures: 8/255 is a whole number of levels.
    sent = to_images(to_pixels(moved))
    assert (sent - images).abs().max() <= EPSILON + 1e-6


def test_the_checkpoints_are_the_papers() -> None:
    # Croce and Hein, section 3: 0.22, then steps of max(last - 0.03, 0.06) of the iterations.
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_our_attacks_are_as_strong_as_the_librarys(name: str, tiny: Bundle) -> None:
    """The Adversarial Robustness Toolbox on the tiny tower: the same budget, steps and start at the image."""
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    victim = Victim(tiny)
    side = victim.image_size[0]
    generator = torch.Generator().manual_seed(3)
    images = 0.2 + 0.6 * torch.rand(8, 3, side, side, generator=generator)
    texts = nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=1)

    class Classifier(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return victim.logit_scale * victim(x) @ texts.T

    model = Classifier()
    truth = model(images).argmax(1)
    theirs = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, side, side), 5, clip_values=(0.0, 1.0))
    steps = 10
    if name == "pgd":
        made = evasion.ProjectedGradientDescentPyTorch(
            theirs, eps=EPSILON, eps_step=2.5 * EPSILON / steps, max_iter=steps, verbose=False
        ).generate(images.numpy(), truth.numpy())
        ours = pgd(untargeted(victim, texts, truth, victim.logit_scale), images, EPSILON, steps=steps)
    else:
        made = evasion.AutoProjectedGradientDescent(
            theirs, eps=EPSILON, eps_step=2 * EPSILON, max_iter=steps, nb_random_init=1, verbose=False,
            loss_type="cross_entropy",
        ).generate(images.numpy(), truth.numpy())  # fmt: skip
        ours = apgd(
            untargeted(victim, texts, truth, victim.logit_scale), images, EPSILON, steps=steps,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    loss = untargeted(victim, texts, truth, victim.logit_scale)
    before, reference, reached = (loss(x).detach() for x in (images, torch.from_numpy(made), ours))
    assert (reference > before).all()
    if name == "pgd":
        # The same algorithm from the same start: the same pictures, but for signs of gradients that are nearly 0.
        assert ((ours - torch.from_numpy(made)).abs() > 1e-5).float().mean() < 0.01
    # The gain in loss, in all: theirs starts elsewhere, so a tenth either way for APGD.
    gain, expected = (reached - before).sum(), (reference - before).sum()
    assert gain > (0.99 if name == "pgd" else 0.9) * expected


def test_feature_matching_moves_an_image_to_its_target(tiny: Bundle) -> None:
    victim = Victim(tiny)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *victim.image_size, generator=generator)
    target = nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)
    loss = feature_matching(victim, target)
    moved = pgd(loss, images, EPSILON, steps=10)
    assert (loss(moved) > loss(images)).all()


def test_attacking_leaves_no_gradient_on_the_weights(images: torch.Tensor) -> None:
    model, loss = two_classes(images)
    ascend(loss, images)
    assert model.weight.grad is None


def test_the_typographic_attack_writes_in_the_lower_third_only() -> None:
    images = torch.full((2, 3, 60, 60), 0.5)
    written = typographic(images, ["lion", "a much longer text that has to shrink"])
    torch.testing.assert_close(written[:, :, :40], to_images(to_pixels(images))[:, :, :40])
    for picture in written:
        # Black letters on white.
        assert picture[:, 40:].min() < 0.2 and picture[:, 40:].max() > 0.9
    assert not torch.equal(written[0], written[1])


@pytest.mark.parametrize("name", list(HARMLESS))
def test_harmless_changes_leave_a_drawing_what_it_was(name: str) -> None:
    drawing = torch.ones(1, 3, 64, 64)
    drawing[:, 0, 16:48, 16:48] = 0.1
    changed = HARMLESS[name](drawing)
    assert changed.shape == drawing.shape
    # A shift by a pixel changes two edges of 32 pixels: 128 of 4,096, in one channel of three.
    assert (changed - drawing).abs().mean() < 0.03
    assert np.isfinite(changed.numpy()).all()
