"""The batch augmentation against torchvision's affine transform of one image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import common


@pytest.mark.parametrize("seed", range(20))
def test_affine_is_that_of_torchvision(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 1, 28, 28, generator=generator)
    angle, shear, scale, right, down = torch.rand(5, generator=generator).tolist()
    angle, shear, scale = 40 * angle - 20, 30 * shear - 15, 0.7 + 0.6 * scale
    right, down = round(8 * right - 4), round(8 * down - 4)  # torchvision shifts by whole pixels
    expected = functional.affine(images, angle, [right, down], scale, [shear, 0.0],
                                 interpolation=InterpolationMode.BILINEAR)
    result = common.affine(images, torch.tensor([angle]), torch.tensor([shear]),
                           torch.tensor([scale]), torch.tensor([[right / 28, down / 28]]))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_every_image_gets_amounts_of_its_own():
    image = torch.zeros(1, 1, 28, 28)
    image[..., 10:18, 12:14] = 1
    torch.manual_seed(0)
    augmented = common.RandomAffine(10, 5, (0.9, 1.1), 0.1)(image.repeat(50, 1, 1, 1))
    assert augmented.shape == (50, 1, 28, 28)
    assert len(torch.unique(augmented.flatten(1), dim=0)) == 50


def test_nothing_changes_where_nothing_may():
    images = torch.rand(4, 1, 28, 28)
    same = common.RandomAffine(degrees=0, shear=0, scale=(1, 1), translate=0)(images)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["degrees", "shear", "scale", "translate"])
def test_amounts_fill_their_range_and_no_more(which, monkeypatch):
    """What RandomAffine hands to affine, for 10,000 images."""
    given = {}
    monkeypatch.setattr(common, "affine", lambda images, *amounts: given.update(
        zip(("degrees", "shear", "scale", "translate"), amounts, strict=True)))
    torch.manual_seed(0)
    common.RandomAffine(10, 5, (0.9, 1.2), 0.1)(torch.zeros(10_000, 1, 1, 1))
    low, high = {"degrees": (-10, 10), "shear": (-5, 5), "scale": (0.9, 1.2),
                 "translate": (-0.1, 0.1)}[which]
    slack = (high - low) / 200
    assert low <= given[which].min() < low + slack
    assert high - slack < given[which].max() <= high + 1e-6
