"""Step 1: a big network learns the training set by heart.

Tried
    All that a classifier of digits needs, in its simplest form: data, a network, a training loop,
    a test loop. The network is large on purpose: 6,379,786 weights, 106 for each training image.

Came out (2 runs of 15 epochs; an epoch is one pass over the 60,000 training images)
    After the last epoch 74 of the 10,000 test digits are wrong: test accuracy is 99.26 %, in the
    best epoch of a run 99.32 %. Of the 60,000 training digits 26 are wrong. (The course exercise
    "CodingDrillDown", source of the four networks, reports 99.26 %: the best epoch of one run.)

Why
    The network overfits: it learns its training images by heart. After epoch 5 (the first is 0) the
    training loss still falls, to a fifth or less. But the test loss rises a little, and the number
    of wrong test digits goes up and down between 68 and 99 (results/curves.png).
    It is a good network all the same: 74 wrong digits are few. But more training is almost useless:
    after epoch 5 about 80 were wrong.

Left open
    Does it take millions of weights? Step 2 changes the network, and nothing else.
"""

import torch
from torch import nn, optim
from torchvision.transforms import v2

from common import Run, get_loaders, load_weights, parse_args, show_summary, speed_up, test, train

EPOCHS = 15  # the course's
BATCH_SIZE = 128  # the course's; 469 batches an epoch
LEARNING_RATE = 0.01  # the course's, the same for every batch
MOMENTUM = 0.9  # the course's; a step follows the gradient + 0.9 x the last step's direction
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, scaled to 0..1; one value per channel

train_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),  # 0..255 to 0..1
    v2.Normalize(MEAN, STD),
])
test_transform = v2.Compose([  # separate: step 4 augments training images only
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

    The receptive field (RF) is the side of the input square that one output value depends on. A
    layer adds kernel size - 1, doubled for each pool before it: a 3x3 adds 2, after a pool 4.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(  # height x width x channels of the output | RF
            block(1, 32, padding=1),  # 28x28x32 | RF 3
            block(32, 64, padding=1),  # 28x28x64 | RF 5
            nn.MaxPool2d(2),  # 14x14x64 | RF 6
            block(64, 128, padding=1),  # 14x14x128 | RF 10
            block(128, 256, padding=1),  # 14x14x256 | RF 14
            nn.MaxPool2d(2),  # 7x7x256 | RF 16
            block(256, 512),  # 5x5x512 | RF 24
            block(512, 1024),  # 3x3x1024 | RF 32
            nn.Conv2d(1024, 10, 3),  # 1x1x10 | RF 40: all pixels, and padding
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
    run = Run(__file__, args, model, optimizer)  # with --resume: back to the last epoch
    fast = speed_up(model, args, train_loader, run.next_epoch)  # the same weights, trained faster
    for epoch in range(run.next_epoch, args.epochs):
        print(f"EPOCH: {epoch}")
        train_loss, train_accuracy = train(fast, train_loader, optimizer)
        test_loss, test_accuracy = test(model, test_loader)
        run.save(train_loss, train_accuracy, test_loss, test_accuracy)
    return model.cpu().eval()  # ready to use


if __name__ == "__main__":
    main()
