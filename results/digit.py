"""Ask step 4's network which digit each picture shows: `python results/digit.py photo.jpg`.

It knows MNIST's digits only: white on black, the larger side 20 pixels, the centre of mass in the
middle of 28x28. `prepare` makes this of a photograph. Most wrong answers are wrong pictures.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import load_weights  # noqa: E402
from step4_aug_lr import Net, test_transform  # noqa: E402

BILINEAR = Image.Resampling.BILINEAR
SIDE, WIDEST = 384, 104  # pixels of a small copy of the page, and of the widest stroke on it


def prepare(picture):
    """Return the digit of a PIL image as MNIST has it, uint8 1x28x28; ValueError if it has none."""
    page = put_on_paper(ImageOps.exif_transpose(picture))  # a camera only notes how it was held
    if page.size == (28, 28) and pil_to_tensor(page)[:, [0, -1]].float().mean() < 64:
        return pil_to_tensor(page.convert("L"))  # white on black already
    # Ink covers less than paper, so it is farther from the average around: the mean cube has its
    # sign. Of red, green, blue it is largest in the one that shows this ink on this paper best.
    small = ImageOps.contain(page, (SIDE, SIDE), BILINEAR)  # most of the noise averages out
    average = pil_to_tensor(small.filter(ImageFilter.BoxBlur(0.3 * SIDE)))
    cubes = (pil_to_tensor(small).float() - average).pow(3).mean(dim=(1, 2))
    page = page.getchannel(cubes.abs().argmax().item())
    page = ImageOps.invert(page) if cubes.max() > -cubes.min() else page  # light on dark
    small = pil_to_tensor(ImageOps.contain(page, (SIDE, SIDE), BILINEAR)).float()
    paper = remove_ink(small)
    paper = paper - (paper - small).median()  # it was the lightest of the noise
    ink = F.avg_pool2d(paper - small, 3, 1, 1)  # shadows are in both
    least = max(0.3 * ink.max().item(), 7.5 * ink.abs().median().item() + 4)  # 5 sigma of noise
    sharp = ink - F.avg_pool2d(ink, 15, 1, 7) > least  # strokes have edges, soft shadows have none
    left, top, right, bottom = box = find_digit(ink[0] > least if sharp.any() else sharp[0])
    x, y = page.width / small.shape[2], page.height / small.shape[1]  # cut from the large page
    sides = right - left, bottom - top
    size = [max(round(20 * side / max(sides)), 1) for side in sides]  # as MNIST's digits
    cut = page.resize(size, BILINEAR, (left * x, top * y, right * x, bottom * y))
    paper = Image.fromarray(paper[0].numpy()).resize(size, BILINEAR, box)
    ink = (pil_to_tensor(paper) - pil_to_tensor(cut))[0].clamp(min=0)
    white = ink.pow(2).sum() / ink.sum().clamp(min=1)  # the mean of ink, weighted by itself
    ink = (1.2 * ink / white - 0.2).clamp(0, 1)  # strokes mostly white, all between them black
    ink = -F.max_pool2d(-ink[None], 3, 1, 1)[0] if ink.sum() > 180 else ink  # thinner if too thick
    row, column = ((ink.nonzero() + 0.5).T @ ink[ink > 0] / ink.sum()).tolist()  # centre of mass
    image = Image.new("L", (28, 28))
    image.paste(Image.fromarray((255 * ink).byte().numpy()), (round(14 - column), round(14 - row)))
    return pil_to_tensor(image)


def put_on_paper(picture):
    """Return a PIL image as RGB. Where it is transparent: white, or black if its ink is light."""
    if picture.mode.startswith("I"):  # 16 bits
        picture = picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
    picture = picture.convert("RGBA")
    *colours, alpha = pil_to_tensor(picture.resize((99, 99), BILINEAR)).float()
    light = (sum(colours) / 3 * alpha).sum() > 127 * alpha.sum()  # what is seen: ink, or paper
    canvas = Image.new("RGBA", picture.size, "black" if light == (alpha.mean() < 127) else "white")
    return Image.alpha_composite(canvas, picture).convert("RGB")


def remove_ink(page):
    """Fill each place of a page (1xHxW) that no square fits into, not even one over its edge."""
    page = F.pad(page, [WIDEST - 1] * 4, value=-torch.inf)
    for sign in (1, -1):  # the lightest in each square, then the darkest of these over each pixel
        page = sign * F.max_pool2d(sign * page, (WIDEST, 1), 1)
        page = sign * F.max_pool2d(sign * page, (1, WIDEST), 1)
    return page


def find_digit(mask):
    """Return the box of the ink (bool HxW) without specks; ValueError if there are only specks."""
    cells = F.max_pool2d(mask[None].float(), 3, ceil_mode=True)  # coarse, so gaps are bridged
    pieces = cells * torch.arange(1.0, cells.numel() + 1).view_as(cells)
    while not (grown := cells * F.max_pool2d(pieces, 3, 1, 1)).equal(pieces):
        pieces = grown  # the highest number in a piece spreads through it
    pieces = mask * F.interpolate(pieces[None], scale_factor=3)[0, 0, :len(mask), :mask.shape[1]]
    numbers, counts = pieces[mask].unique(return_counts=True)
    if not len(counts) or counts.max() <= 12:
        raise ValueError("looks blank: write larger, or with a darker pen")
    digit = torch.isin(pieces, numbers[counts > counts.max() / 10])
    return Image.fromarray(digit.byte().numpy()).getbbox()


def main(argv=None):
    """Print what the network sees of each picture, and its answer; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--weights", default=ROOT / "results/step4_aug_lr-seed1/weights.pt")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
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
