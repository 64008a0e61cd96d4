"""The random affine of step 4 against torchvision's affine transform of one image."""

import pytest
import torch
from conftest import STEPS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import common


def measure_amounts(transform, count, batches=1):
    """Return angle, shear (degrees), factor, shift right, down (pixels): 5×batches×count."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    origins = []
    for image in (column, row):  # the results tell where a pixel comes from
        torch.manual_seed(0)
        results = [transform(image.repeat(count, 1, 1, 1)) for _ in range(batches)]
        origins.append(torch.cat(results)[:, 0].double() - 13.5)  # from the centre
    source = torch.stack(origins, dim=1)  # N×2×28×28
    corner, right, down = source[..., 9, 9], source[..., 9, 18], source[..., 18, 9]
    # output = matrix @ source + shift; [[cos, -sin], [sin, cos]] @ [[1, -slope], [0, 1]] * scale
    matrix = torch.linalg.inv(torch.stack((right - corner, down - corner), dim=2) / 9)
    shift = -matrix @ (right + down).unsqueeze(2) / 2  # the middle of the two is the centre
    x, y = matrix.unbind(dim=2)
    scale = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0]).rad2deg()
    shear = -((x * y).sum(dim=1) / scale**2).atan().rad2deg()
    return torch.stack((angle, shear, scale, shift[:, 0, 0], shift[:, 1, 0])).view(5, batches, -1)


def test_each_image_is_transformed_as_by_torchvision():
    augment = common.RandomAffine(degrees=20, shear=15, scale=(0.8, 1.3), translate=0.1)
    amounts = measure_amounts(augment, 20)[:, 0].T.tolist()
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    for image, result, amount in zip(images, augment(images), amounts, strict=True):
        angle, shear, scale, *shift = amount
        expected = functional.affine(image, angle, shift, scale, [shear, 0.0],
                                     interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("transform", "lowest", "highest"), [
    (common.RandomAffine(10, 5, (0.9, 1.2), 0.1),
     (-10, -5, 0.9, -2.8, -2.8), (10, 5, 1.2, 2.8, 2.8)),
    (lambda images: 255 * (0.1307 + 0.3081 * STEPS["step4"].train_transform(images.byte())),
     (-8, -4, 0.93, -1.68, -1.68), (8, 4, 1.07, 1.68, 1.68)),
], ids=["any", "step4"])
def test_amounts_are_uniform_and_independent(transform, lowest, highest):
    """Within an image, from one image to the next, and from one batch to the next."""
    lowest, highest = (torch.tensor(it).double().view(5, 1, 1) for it in (lowest, highest))
    amounts = (measure_amounts(transform, 1000, batches=4) - lowest) / (highest - lowest)
    quantiles = amounts.flatten(1).sort().values
    assert (quantiles - torch.linspace(0, 1, 4000)).abs().max() < 0.04
    assert (quantiles[:, [0, -1]] - torch.tensor([0, 1])).abs().max() < 0.005
    neighbours = torch.cat((amounts, amounts.roll(1, dims=2), amounts.roll(1, dims=1))).flatten(1)
    features = torch.cat((neighbours, (neighbours - 0.5) ** 2))  # the sign may hide what is alike
    assert (features.corrcoef() - torch.eye(30)).abs().max() < 0.1


def test_batches_and_amounts_follow_the_device():
    """The device "meta" computes nothing, but mixes with no other one, as a GPU."""
    images = torch.zeros(8, 1, 28, 28, device="meta")
    augment = common.RandomAffine(degrees=8, shear=4, scale=(0.93, 1.07), translate=0.06)
    loader = common.Loader("Training", images, images, augment, batch_size=4, shuffle=True)
    assert [part.device.type for batch in loader for part in batch] == ["meta"] * 4
