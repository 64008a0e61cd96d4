"""Step 4: a high learning rate has to fall; augmentation stands in for digits you don't have.

Tried
    Step 3's network, hardly changed (as in the course: less dropout, a second 1x1 convolution), but
    trained better. The learning rate rises to 0.1, ten times that of step 3, while the weights are
    fresh (warm-up), then falls along half a cosine wave to almost 0. Nesterov momentum (takes the
    gradient where momentum alone would lead) and weight decay (pulls the weights towards 0) often
    go with a high rate. Augmentation: every epoch turns, slants, stretches and shifts each image a
    little, at random (results/augmentation.png).

Came out (10 runs of 15 epochs)
    9,538 weights, and 47 of 10,000 test digits wrong in the end (step 3: 74): 99.53 % are right.
    (Course, best epoch: 99.52 %.) Each run ends above 99.4 %: the challenge is met.

Why: what a change does, five runs each (results/step4.png)
    Wrong digits in the end      a constant rate    warm-up, then a fall
        0.01                           69                  63
        0.1 (step 4: its peak)         90                  47
    At a constant 0.1 wrong digits jump from epoch to epoch; as the rate falls they settle. Most of
    the gain needs a high rate and its fall: with a constant 0.01, all else as here, 69 are wrong.
    Without augmentation 50 are wrong, which may be chance: 60,000 digits are many. With only the
    first 3,000, and as many updates, 144 are wrong without augmentation, 91 with it.

Left open: try with --validate (README.md)
    Do more epochs help (--epochs 30)? Can it learn from 1,000 digits? Below get_loaders(...) add
        train_loader.images = train_loader.images[:1000].repeat(50, 1, 1, 1)
        train_loader.labels = train_loader.labels[:1000].repeat(50)
"""

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms import v2

from common import Run, get_loaders, load_weights, parse_args, show_summary, speed_up, test, train

EPOCHS = 15  # the course's
BATCH_SIZE = 128  # the course's; 469 batches an epoch
LEARNING_RATE = 0.1  # the peak of the schedule, ten times the rate of step 3
WARM_UP = 0.15  # share of the run in which the rate rises, from a 25th (OneCycleLR's default)
MOMENTUM = 0.9  # the course's; an update adds 0.9 of the one before, so it keeps its direction
WEIGHT_DECAY = 5e-4  # each update also pulls the weights towards 0: a usual value
DROPOUT = 0.03  # share of channels set to 0 in training; the course's figure
AUGMENTATION = 0.12  # each alone: at most 7 degrees, 12 %, 1.7 pixels; chosen on held-out images
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, scaled to 0..1; one value per channel


def augment(images):
    """Turn, slant, stretch and shift each image (float32 Bx1x28x28) by random amounts of its own.

    An affine map sends each pixel (x, y) of the new image to a place in the old one:
    (a x + b y + c, d x + e y + f). With 1 0 0, 0 1 0 nothing changes; all six change a little.
    """
    change = AUGMENTATION * (2 * torch.rand(len(images), 2, 3, device=images.device) - 1)
    maps = torch.eye(2, 3, device=images.device) + change  # Bx2x3: a b c, d e f of each image
    places = F.affine_grid(maps, images.shape, align_corners=False)  # x, y from -1 to 1
    return F.grid_sample(images, places, align_corners=False)  # 0 (black) from outside


train_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),  # 0..255 to 0..1
    augment,
    v2.Normalize(MEAN, STD),
])
test_transform = v2.Compose([  # separate: step 4 changes training images, at random
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])


def block(in_channels, out_channels):
    """Return a 3x3 convolution, ReLU, batch normalization and dropout."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(out_channels),  # as in the course; Ioffe and Szegedy (2015): before the ReLU
        nn.Dropout2d(DROPOUT),
    )


class Net(nn.Module):
    """Takes normalized images Nx1x28x28, returns logits Nx10: the highest marks the digit.

    The receptive field (RF) is the side of the input square that one output value depends on. Two
    3x3, a pool and a 3x3 see 1 + 2 + 2 + 1 + 4 = 10 pixels: after a pool, a 3x3 adds 4.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(  # height x width x channels of the output | RF
            block(1, 10),  # 26x26x10 | RF 3
            block(10, 20),  # 24x24x20 | RF 5
            nn.Conv2d(20, 10, 1, bias=False),  # 24x24x10 | RF 5: as in the course, no ReLU
            nn.MaxPool2d(2),  # 12x12x10 | RF 6
            block(10, 16),  # 10x10x16 | RF 10
            block(16, 16),  # 8x8x16 | RF 14
            block(16, 20),  # 6x6x20 | RF 18
            nn.AvgPool2d(6),  # 1x1x20 | RF 28
            nn.Conv2d(20, 22, 1, bias=False),  # 1x1x22 | RF 28: no ReLU; one 1x1 could do the same
            nn.Conv2d(22, 10, 1, bias=False),  # 1x1x10 | RF 28
        )

    def forward(self, images):
        return self.layers(images).flatten(1)  # Nx10x1x1 to Nx10


def main(argv=None):
    """Train and test, epoch by epoch; return the trained network (--evaluate: loss, accuracy)."""
    args = parse_args(argv, __doc__, EPOCHS, BATCH_SIZE)
    torch.manual_seed(args.seed)
    train_loader, test_loader = get_loaders(args, train_transform, test_transform)
    model = Net().to(args.device)
    show_summary(model, test_loader)
    if args.evaluate:
        load_weights(model, args.evaluate)
        return test(model, test_loader)
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM,
                          nesterov=True, weight_decay=WEIGHT_DECAY)
    scheduler = OneCycleLR(  # counts batches, not epochs; so would any other, StepLR say
        optimizer, LEARNING_RATE, args.epochs * len(train_loader),
        pct_start=WARM_UP, cycle_momentum=False)  # or it would lower momentum at a high rate
    run = Run(__file__, args, model, optimizer, scheduler)  # saves it; with --resume: goes on
    fast = speed_up(model, args, train_loader, run.next_epoch)  # trains the same weights faster
    for epoch in range(run.next_epoch, args.epochs):
        print(f"EPOCH: {epoch}")
        train_loss, train_accuracy = train(fast, train_loader, optimizer, scheduler)
        test_loss, test_accuracy = test(model, test_loader)  # `model`: in full precision
        run.save(train_loss, train_accuracy, test_loss, test_accuracy)
    return model.cpu().eval()  # ready to use


if __name__ == "__main__":
    main()
