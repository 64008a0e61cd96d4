"""Step 2: a new skeleton, with a three-hundredth of the parameters.

Target
    A network that is small enough not to learn its training images by heart. Only the
    architecture changes.

Results
    One run, seed 1, of 15 epochs on two cores of an Intel Xeon with torch 2.14.1 in fp32:
    20,750 parameters; best training accuracy 99.24 %, best test accuracy 98.90 %, last epoch
    98.80 %. (The documented run: 98.85 % and 98.69 %.)

Analysis
    Training and test end 0.44 points apart, in step 1 it was 0.71, and the test loss settles
    where that of step 1 rises (results/curves.png). With 1x1 convolutions the network
    brings 32 channels down to 10 before it computes on, at 320 weights each time. What it lacks
    shows at the start: nothing keeps the scale of a layer's inputs steady, so the first epoch
    ends at a mean loss of 1.97, little below the 2.303 of guessing. And its last layer, a 7x7
    convolution that sees the whole image, costs 4,900 weights, a quarter of all.

Next
    Step 3 gives the skeleton what it lacks: batch normalization, dropout, and global average
    pooling in the place of the 7x7 convolution.
"""

import sys

import torch
from torch import nn, optim
from torch.nn import functional as F
from torchvision.transforms import v2

from common import Run, evaluate, get_loaders, parse_args, prepare, setup, test, train

EPOCHS = 15
BATCH_SIZE = 128  # 469 batches an epoch
LEARNING_RATE = 0.01  # the same for every batch
MOMENTUM = 0.9  # each step is about the mean of the last ten gradients, times ten
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, scaled to 0..1

train_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),  # 0..255 to 0..1
    v2.Normalize(MEAN, STD),
])
test_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])


def block(in_channels, out_channels, kernel_size=3):
    """Return a convolution and its ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, bias=False),
        nn.ReLU(),
    )


class Net(nn.Module):
    """Takes normalised images Nx1x28x28, returns log-probabilities Nx10.

    Beside each line: its output, height x width x channels, and its receptive field (RF), the
    pixels of the image, across, that one value of the output depends on.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            block(1, 10),  # 26x26x10 | RF 3
            block(10, 20),  # 24x24x20 | RF 5
            block(20, 32),  # 22x22x32 | RF 7
            nn.MaxPool2d(2),  # 11x11x32 | RF 8
            block(32, 10, kernel_size=1),  # 11x11x10 | RF 8
            block(10, 20),  # 9x9x20 | RF 12
            block(20, 32),  # 7x7x32 | RF 16
            block(32, 10, kernel_size=1),  # 7x7x10 | RF 16
            nn.Conv2d(10, 10, 7, bias=False),  # 1x1x10 | RF 28
        )

    def forward(self, images):
        scores = self.layers(images).flatten(1)  # Nx10x1x1 to Nx10
        return F.log_softmax(scores, dim=1)


def main(argv=None):
    args = parse_args(argv, __doc__, EPOCHS, BATCH_SIZE)
    with Run(__file__, args) as run:
        setup(args)
        train_loader, test_loader = get_loaders(args, train_transform, test_transform)
        model = prepare(Net(), args)
        if args.evaluate:
            return evaluate(model, test_loader, args.evaluate)
        optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        for epoch in run.epochs(model, optimizer):
            print(f"EPOCH: {epoch}")
            train_loss, train_accuracy, seconds = train(model, train_loader, optimizer, args)
            test_loss, test_accuracy = test(model, test_loader)
            run.record(train_loss, train_accuracy, seconds, test_loss, test_accuracy)


if __name__ == "__main__":
    sys.exit(main())
