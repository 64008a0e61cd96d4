"""The augmentation of step 4 against PIL's affine map of one image, and the amounts it draws."""

import numpy
import torch
from conftest import STEPS
from PIL import Image

import common


def augment(images):
    """Return images (float32, 0 to 1) as step 4 trains on them, but not normalized."""
    return 0.1307 + 0.3081 * STEPS["step4"].train_transform(images)


def measure_maps(count, batches=1):
    """Return six numbers of each image's map, batches×count×2×3: it takes (x, y, 1) to (x', y')."""
    place = torch.linspace(-27 / 28, 27 / 28, 28)  # the centres of the pixels, from -1 to 1
    origins = []
    for image in (place.expand(28, 28), place.expand(28, 28).T):  # a value tells where it is from
        torch.manual_seed(0)
        origins.append(torch.cat([augment(image.repeat(count, 1, 1, 1)) for _ in range(batches)]))
    origins = torch.cat(origins, dim=1).double()  # N×2×28×28
    corner, right, down = origins[..., 9, 9], origins[..., 9, 18], origins[..., 18, 9]
    centre = (right + down) / 2
    maps = torch.stack(((right - corner) * 14 / 9, (down - corner) * 14 / 9, centre), dim=2)
    return maps.view(batches, count, 2, 3)


def test_an_image_becomes_what_the_same_map_makes_of_it_elsewhere():
    images = torch.zeros(20, 1, 28, 28)
    images[..., 5:23, 5:23] = torch.rand(20, 1, 18, 18, generator=torch.Generator().manual_seed(1))
    maps = measure_maps(20)[0].tolist()
    torch.manual_seed(0)
    for image, result, ((a, b, c), (d, e, f)) in zip(images, augment(images), maps, strict=True):
        pixels = a, b, 14 * (c + 1 - a - b), d, e, 14 * (f + 1 - d - e)  # from 0 to 28
        expected = Image.fromarray(image[0].numpy()).transform(
            (28, 28), Image.Transform.AFFINE, pixels, Image.Resampling.BILINEAR)
        numpy.testing.assert_allclose(result[0], expected, atol=1e-5)


def test_amounts_are_uniform_and_independent_and_follow_the_device():
    """Within an image, from one image to the next, and from one batch to the next."""
    amounts = (measure_maps(1000, batches=4) - torch.eye(2, 3)) / 0.12
    amounts = amounts.flatten(2).permute(2, 0, 1)  # 6×4×1000
    quantiles = amounts.flatten(1).sort().values
    assert (quantiles - torch.linspace(-1, 1, 4000)).abs().max() < 0.08
    assert (quantiles[:, [0, -1]] - torch.tensor([-1, 1])).abs().max() < 0.01
    neighbours = torch.cat((amounts, amounts.roll(1, dims=2), amounts.roll(1, dims=1))).flatten(1)
    features = torch.cat((neighbours, neighbours**2))  # the sign may hide what is alike
    assert (features.corrcoef() - torch.eye(36)).abs().max() < 0.1
    # The device "meta" computes nothing, but mixes with no other one, as a GPU.
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8, device="meta")
    loader = common.Loader("Training", images, images, augment, 4, shuffle=True)
    assert [part.device.type for batch in loader for part in batch] == ["meta"] * 4
