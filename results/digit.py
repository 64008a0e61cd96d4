"""Ask step 4's network which digit each picture shows: `python results/digit.py photo.jpg`.

It knows MNIST's digits only: white on black, the larger side 20 pixels, the centre of mass in the
middle of 28x28. `prepare` makes this of a photograph.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import load_weights  # noqa: E402
from step4_aug_lr import Net, test_transform  # noqa: E402


def prepare(picture):
    """Return the digit of a PIL image as MNIST has it, uint8 1x28x28; ValueError if it has none."""
    if picture.mode.startswith("I"):  # 16 bits
        picture = picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
    page = ImageOps.exif_transpose(picture).convert("RGBA")  # a camera only notes how it was held
    if page.size == (28, 28) and max(page.getpixel((0, 0))[:3]) < 64:
        return pil_to_tensor(page.convert("L"))  # white on black already
    # Of red, green, blue, opacity and their negatives, take the one with the darkest ink. Ink
    # covers less than paper, so it is farther from the average: the mean cube has its sign.
    channels = *page.split(), *ImageChops.invert(page).split()
    page = min(channels, key=lambda channel: above_average(channel, 115).pow(3).mean())
    edges = F.avg_pool2d(-above_average(page, 7), 3, 1, 1)  # strokes have some, soft shadows none
    least = max(0.3 * edges.max().item(), 7.5 * edges.abs().median().item() + 8)  # 5 sigma of noise
    mask = to_pil_image((edges > least).byte()).filter(ImageFilter.MedianFilter(5))  # no specks
    box = mask.filter(ImageFilter.MaxFilter(9)).getbbox()  # with some paper around
    if not box:
        raise ValueError("looks blank: write larger, or with a darker pen")
    x, y = page.width / mask.width, page.height / mask.height  # cut from the large page
    cut = page.crop([edge * scale for edge, scale in zip(box, (x, y, x, y), strict=True)])
    cut = pil_to_tensor(ImageOps.contain(cut, (64, 64))).float()
    # The paper: the lightest of each square, then the darkest of all squares over a pixel. Ink is
    # gone, for each square holds some paper; shadows stay, so they are not in the difference.
    paper = -F.max_pool2d(-F.max_pool2d(F.pad(cut, [40] * 4, value=-1), 41, 1), 41, 1)
    ink = (paper - cut) / (paper - cut).max()
    digit = to_pil_image((1.8 * ink - 0.7).clamp(0, 1))  # strokes white, all between them black
    digit = digit.crop(digit.getbbox())
    while ImageStat.Stat(digit).sum[0] > 255 * 0.4 * max(digit.size) ** 2:  # MNIST's are thinner
        digit = ImageOps.expand(digit, 1).filter(ImageFilter.MinFilter(3))
        digit = digit.crop(digit.getbbox())
    digit.thumbnail((20, 20))  # the larger side
    mass = pil_to_tensor(digit)[0] / ImageStat.Stat(digit).sum[0]  # of each pixel; in all 1
    row, column = ((mass.nonzero() + 0.5).T @ mass[mass > 0]).tolist()  # centre of mass
    image = Image.new("L", (28, 28))
    image.paste(digit, (round(14 - column), round(14 - row)))
    return pil_to_tensor(image)


def above_average(channel, radius):
    """Return how much lighter than the average around each pixel of a small copy is, 1xHxW."""
    small = ImageOps.contain(channel, (384, 384))  # most of the noise averages out
    return pil_to_tensor(small).float() - pil_to_tensor(small.filter(ImageFilter.BoxBlur(radius)))


def main(argv=None):
    """Print what the network sees of each picture, and its answer; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--weights", default=ROOT / "results/step4_aug_lr-seed1/weights.pt")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")
    marks = " ▄▀█" if "█".encode(sys.stdout.encoding or "ascii", "ignore") else " .'#"
    net = Net().eval()
    load_weights(net, args.weights)
    status = 0
    for path in args.pictures:
        try:
            image = prepare(Image.open(path))
        except Exception as error:  # Pillow raises a dozen kinds
            words = str(error) if isinstance(error, (ValueError, FileNotFoundError)) else (
                f"cannot be read: export it as JPEG, below 100 megapixels ({error})")
            print(f"{path}: {' '.join(words.split())}", file=sys.stderr)
            status = 1
            continue
        for rows in (image > 127).view(14, 2, 28).tolist():  # two pixels a character
            print("".join(marks[2 * above + below] for above, below in zip(*rows, strict=True)))
        shares, digits = net(test_transform(image[None])).softmax(dim=1)[0].topk(2)
        sure, other = (f"{100 * share:.{0 if 0.01 <= share < 0.995 else 1}f} %" for share in shares)
        print(f"{path}: {digits[0]} ({sure} sure; next {digits[1]}, {other})")
        if ((image[0] > 100).any(dim=0).int().diff() > 0).sum() > 1:  # empty columns between
            print(f"{path}: several parts side by side are taken for one digit", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
