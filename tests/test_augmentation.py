"""The random affine of step 4 against torchvision's affine transform of one image."""

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import common


def measure_amounts(transform, count):
    """Return what a RandomAffine does to each of `count` images: float64 5×count.

    The rows are angle and shear in degrees, factor, shift to the right and down in pixels. Two
    images hold the column and the row of each pixel, so their results tell where it comes from.
    """
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    origins = []
    for image in (column, row):
        torch.manual_seed(0)
        source = transform(image.repeat(count, 1, 1, 1))[:, 0, 9:19, 9:19].double() - 13.5
        origins += [(source[:, :, 9] - source[:, :, 0]).mean(dim=1) / 9,  # per pixel to the right
                    (source[:, 9] - source[:, 0]).mean(dim=1) / 9,  # per pixel down
                    source.mean(dim=(1, 2))]
    # (x, y) = [[1, slope], [0, 1]] @ [[cos, sin], [-sin, cos]] / scale @ ((right, down) - shift)
    x_right, x_down, x, y_right, y_down, y = origins
    scale = 1 / torch.hypot(y_right, y_down)
    sin, cos = -y_right * scale, y_down * scale
    slope = (x_down * cos - x_right * sin) * scale
    inverse = torch.stack((x_right, x_down, y_right, y_down), dim=1).view(-1, 2, 2)
    shift = -torch.linalg.solve(inverse, torch.stack((x, y), dim=1))
    angle, shear = torch.atan2(sin, cos).rad2deg(), slope.atan().rad2deg()
    return torch.stack((angle, shear, scale, shift[:, 0], shift[:, 1]))


def test_each_image_is_transformed_as_by_torchvision():
    augment = common.RandomAffine(degrees=20, shear=15, scale=(0.8, 1.3), translate=0.1)
    amounts = measure_amounts(augment, 20).T.tolist()
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    for image, result, amount in zip(images, augment(images), amounts, strict=True):
        angle, shear, scale, *shift = amount
        expected = functional.affine(image, angle, shift, scale, [shear, 0.0],
                                     interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)


def test_each_image_gets_amounts_of_its_own_that_fill_their_ranges():
    amounts = measure_amounts(common.RandomAffine(10, 5, (0.9, 1.2), 0.1), 2000)
    low = torch.tensor([-10, -5, 0.9, -2.8, -2.8], dtype=torch.float64)
    high = torch.tensor([10, 5, 1.2, 2.8, 2.8], dtype=torch.float64)
    for found, wanted in ((amounts.amin(1), low), (amounts.amax(1), high),
                          (amounts.mean(1), (low + high) / 2)):
        assert ((found - wanted) / (high - low)).abs().max() < 0.02
    assert (amounts.corrcoef() - torch.eye(5)).abs().max() < 0.1
