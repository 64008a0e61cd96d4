"""Step 1: a huge network learns its training set by heart.

Tried
    All that a classifier of digits needs, in its simplest form: data, a network, a training loop,
    a test loop. The network is huge on purpose: 6,379,786 weights (the printed summary calls them
    parameters), 106 for each training image.

Came out (2 runs of 15 epochs; an epoch is one pass over the 60,000 training images)
    In the end 26 of the 60,000 training digits are wrong, and 74 of the 10,000 test digits: test
    accuracy is 99.26 %. (The course exercise "CodingDrillDown", source of the four networks,
    reports 99.26 %, but of the best epoch of its one run.)

Why
    The network overfits: it learns its training digits by heart, and this hardly helps with new
    ones. Look at results/step1.png: after epoch 5 (the first is 0) the training loss goes on
    falling, but the test loss rises a little, and the number of wrong test digits goes up and down.
    So the network is good, but heavy, and its last nine epochs hardly helped: from about 80 wrong
    digits to 74.

Left open
    Do we need millions of weights? Step 2 tries 300 times fewer. (You need not wait for step 1:
    results/step1_setup-seed1/log.txt is what it prints.)
"""

import torch
from torch import nn, optim
from torchvision.transforms import v2

from common import Run, get_loaders, load_weights, parse_args, show_summary, speed_up, test, train

EPOCHS = 15  # the course's
BATCH_SIZE = 128  # the course's; 469 batches an epoch
LEARNING_RATE = 0.01  # the course's, the same for every batch
MOMENTUM = 0.9  # the course's; an update adds 0.9 of the one before, so it keeps its direction
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, scaled to 0..1; one value per channel

train_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),  # 0..255 to 0..1
    v2.Normalize(MEAN, STD),
])
test_transform = v2.Compose([  # separate: step 4 changes training images, at random
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])


def block(in_channels, out_channels, padding=0):
    """Return a 3x3 convolution and its ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=padding),
        nn.ReLU(),
    )


class Net(nn.Module):
    """Takes normalized images Nx1x28x28, returns logits Nx10: the highest marks the digit.

    The receptive field (RF) is the side of the input square that one output value depends on. Two
    3x3, a pool and a 3x3 see 1 + 2 + 2 + 1 + 4 = 10 pixels: after a pool, a 3x3 adds 4.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(  # height x width x channels of the output | RF
            block(1, 32, padding=1),  # 28x28x32 | RF 3: padding (zeros around) keeps 28x28
            block(32, 64, padding=1),  # 28x28x64 | RF 5: more channels for more kinds of shapes
            nn.MaxPool2d(2),  # 14x14x64 | RF 6
            block(64, 128, padding=1),  # 14x14x128 | RF 10
            block(128, 256, padding=1),  # 14x14x256 | RF 14
            nn.MaxPool2d(2),  # 7x7x256 | RF 16
            block(256, 512),  # 5x5x512 | RF 24: without padding, to end at 1x1
            block(512, 1024),  # 3x3x1024 | RF 32
            nn.Conv2d(1024, 10, 3),  # 1x1x10 | RF 40: no ReLU, as logits may be negative
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
    optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    run = Run(__file__, args, model, optimizer)  # saves it; with --resume: goes on
    fast = speed_up(model, args, train_loader, run.next_epoch)  # trains the same weights faster
    for epoch in range(run.next_epoch, args.epochs):
        print(f"EPOCH: {epoch}")
        train_loss, train_accuracy = train(fast, train_loader, optimizer)
        test_loss, test_accuracy = test(model, test_loader)  # `model`: in full precision
        run.save(train_loss, train_accuracy, test_loss, test_accuracy)
    return model.cpu().eval()  # ready to use


if __name__ == "__main__":
    main()
