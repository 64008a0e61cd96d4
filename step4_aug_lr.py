"""Step 4: augmentation and a learning-rate schedule.

Target
    A consistent 99.4 % and more within 15 epochs, still with fewer than 10,000 parameters.

Results
    One run, seed 1, of 15 epochs on two cores of an Intel Xeon with torch 2.14.1 in fp32:
    9,538 parameters; best training accuracy 99.09 %, best test accuracy 99.56 %, last epoch
    99.55 %, the last five all at 99.51 % and more. (The documented run: 98.49 % and 99.52 %.)

Analysis
    Every epoch shows every digit turned, sheared, scaled and shifted otherwise, so there is
    nothing to learn by heart: training, on harder images, stays below testing. The schedule
    starts the run with long steps, ten times those of step 3 at the peak, and shortens them to
    nothing: in the last five epochs the test accuracy no longer jumps. The tested network is a
    moving average of the weights of the last epoch, which evens out what single batches did;
    with it the test accuracy is above 99.40 % from epoch 7 on. A second 1x1 convolution after
    the pooling adds 460 parameters.
"""

import sys

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from common import RandomAffine, Run, evaluate, get_loaders, parse_args, prepare, setup, test, train

EPOCHS = 15
BATCH_SIZE = 128  # 469 batches an epoch
LEARNING_RATE = 0.1  # at its peak: batch normalization and the schedule allow it
WARM_UP = 0.15  # part of the run until that peak; the rest falls to zero
MOMENTUM = 0.9  # each step is about the mean of the last ten gradients, times ten
WEIGHT_DECAY = 5e-4  # keeps weights small, so that late steps can still turn them
DROPOUT = 0.03  # part of the channels that training sets to zero
AVERAGED = 500  # batches that the average of weights reaches back, about an epoch
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, scaled to 0..1

train_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),  # 0..255 to 0..1
    RandomAffine(degrees=10, shear=5, scale=(0.9, 1.1), translate=0.08),
    v2.Normalize(MEAN, STD),
])
test_transform = v2.Compose([
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])


def block(in_channels, out_channels):
    """Return a 3x3 convolution, its ReLU, batch normalization and dropout."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(out_channels),
        nn.Dropout2d(DROPOUT),
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
            nn.Conv2d(20, 10, 1, bias=False),  # 24x24x10 | RF 5
            nn.MaxPool2d(2),  # 12x12x10 | RF 6
            block(10, 16),  # 10x10x16 | RF 10
            block(16, 16),  # 8x8x16 | RF 14
            block(16, 20),  # 6x6x20 | RF 18
            nn.AvgPool2d(6),  # 1x1x20 | RF 28
            nn.Conv2d(20, 22, 1, bias=False),  # 1x1x22 | RF 28
            nn.Conv2d(22, 10, 1, bias=False),  # 1x1x10 | RF 28
        )

    def forward(self, images):
        scores = self.layers(images).flatten(1)  # Nx10x1x1 to Nx10
        return F.log_softmax(scores, dim=1)


def move_average(average, weights, batches):
    """Return the average, moved towards the weights; further at first, to forget the start."""
    return average + (weights - average) / min(AVERAGED, 1 + batches / 10)


def main(argv=None):
    args = parse_args(argv, __doc__, EPOCHS, BATCH_SIZE)
    with Run(__file__, args) as run:
        setup(args)
        train_loader, test_loader = get_loaders(args, train_transform, test_transform)
        model = prepare(Net(), args)
        if args.evaluate:
            return evaluate(model, test_loader, args.evaluate)
        optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM,
                              weight_decay=WEIGHT_DECAY, nesterov=True)
        scheduler = OneCycleLR(optimizer, LEARNING_RATE, args.epochs * len(train_loader),
                               pct_start=WARM_UP, cycle_momentum=False)
        average = AveragedModel(model, avg_fn=move_average, use_buffers=True)
        for epoch in run.epochs(model, optimizer, scheduler, average):
            print(f"EPOCH: {epoch}")
            train_loss, train_accuracy, seconds = train(
                model, train_loader, optimizer, args, scheduler, average)
            test_loss, test_accuracy = test(average, test_loader)
            run.record(train_loss, train_accuracy, seconds, test_loss, test_accuracy)


if __name__ == "__main__":
    sys.exit(main())
