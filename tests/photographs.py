"""Draw photographs of test digits; print how many are read right. No camera was used."""

import io
import random
import sys
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from torchvision.datasets import MNIST
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import digit  # noqa: E402

KINDS = {  # what is not as in `photograph`
    "flat paper": {}, "pencil": {"ink": "#aaa", "noise": 4}, "noise": {"noise": 25},
    "a shadow across the page": {"shadow": 0.45}, "turned by EXIF": {"turn": True},
    "pencil, noise and a shadow": {"ink": "#959595", "noise": 8, "shadow": 0.35},
    "transparent canvas": {"paper": None}, "white ink on such": {"paper": None, "ink": "#fff"},
    "light on dark": {"ink": "#dfe5df", "paper": "#2d3c32", "noise": 6},
    "red on green, a shadow": {"ink": "#c83c3c", "paper": "#5aa05a", "shadow": 0.3},
    "a tenth of the page high": {"height": 0.1}, "nine tenths": {"height": 0.9},
    "thin strokes, 4 %": {"stroke": 0.04}, "thick strokes, 25 %": {"stroke": 0.25}}


def draw(image, height, stroke):
    """Return a digit (uint8 28x28) as a mask "L" of that height; with `stroke` drawn anew."""
    mask = Image.fromarray(image.numpy()).resize((112, 112)).filter(ImageFilter.GaussianBlur(2))
    mask = ImageOps.expand(mask.point(lambda grey: 255 * (grey > 100)), 30)
    if stroke:
        rest, mask = mask, Image.new("L", mask.size)  # gets the middle of the strokes
        while rest.getbbox():
            middle, rest = rest, rest.filter(ImageFilter.MinFilter(3))
            middle = ImageChops.subtract(middle, rest.filter(ImageFilter.MaxFilter(3)))
            mask = ImageChops.lighter(mask, middle)
        middle = pil_to_tensor(mask)[0].nonzero()
        reach = (middle[-1, 0] - middle[0, 0] + 1).item() * stroke / (1 - stroke) / 2
        for y, x in middle.tolist():  # a round pen
            ImageDraw.Draw(mask).ellipse([x - reach, y - reach, x + reach, y + reach], fill=255)
    mask = ImageOps.expand(mask.crop(mask.getbbox()), 6).filter(ImageFilter.GaussianBlur(1.5))
    mask = ImageOps.scale(mask, height / (mask.height - 12))
    return mask.point(lambda grey: max(0, min(255, 4 * (grey - 96))))  # sharp edges


def photograph(image, ink="#28282d", paper="#ddd", height=0, stroke=0, shadow=0, noise=0, turn=0):
    """Return a picture file with a digit (uint8 28x28) at a random place of a page."""
    width, tall = random.randint(600, 1600), random.randint(600, 1600)
    mask = draw(image, round(tall * (height or random.uniform(0.2, 0.6))), stroke)
    mask.thumbnail((0.95 * width, 0.95 * tall))
    page, file, exif = Image.new("L", (width, tall)), io.BytesIO(), Image.Exif()
    page.paste(mask, (random.randint(0, width - mask.width), random.randint(0, tall - mask.height)))
    picture = Image.new("RGBA", page.size, ink)
    picture.putalpha(page)
    if not paper:
        picture.save(file, "PNG", compress_level=1)
        return file
    picture = Image.alpha_composite(Image.new("RGBA", page.size, paper), picture).convert("RGB")
    across = torch.linspace(-8, 8, tall)[:, None] + torch.linspace(-8, 8, width)
    light = 1 - shadow * (across * random.choice((-1, 1)) + random.uniform(-4, 4)).sigmoid()
    grain = noise * torch.randn(3, tall, width) if noise else 0
    picture = to_pil_image((pil_to_tensor(picture) * light + grain).clamp(0, 255).byte())
    exif[0x0112], angle = random.choice([(3, 180), (6, 90), (8, 270)]) if turn else (1, 0)
    picture.rotate(angle, expand=True).save(file, "JPEG", quality=85, exif=exif)
    return file


def main(seed=1, count=100):
    """Print the table for `count` digits of each kind."""
    net, test = digit.Net().eval(), MNIST(digit.ROOT / "data", train=False)
    digit.load_weights(net, digit.ROOT / "results/step4_aug_lr-seed1/weights.pt")
    print(f"| kind | right of {count} |\n| --- | ---: |")
    for kind, options in KINDS.items():
        random.seed(seed)
        order, right = torch.randperm(10000, generator=torch.manual_seed(seed)), 0
        for number in order[:count].tolist():
            picture = Image.open(photograph(test.data[number], **options))
            with suppress(ValueError):  # it sees no digit
                image = digit.test_transform(digit.prepare(picture)[None])
                right += (net(image).argmax() == test.targets[number]).item()
        print(f"| {kind} | {right} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
