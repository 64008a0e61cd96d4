"""Step 1: the set-up, with a network far too large for its task.

Target
    Data, a training loop and a test loop that every later step uses, and a first network to
    show that they work.

Results
    2 runs, seeds 1 and 2, of 15 epochs on two cores of an Intel Xeon with torch 2.14.1 in fp32:
    6,379,786 parameters; last epoch 99.26 ± 0.08 % (mean and standard deviation), best test
    accuracy 99.32 %, best training accuracy 99.97 %. (The documented run, best epochs: test
    99.26 %, training 99.94 %.)

Analysis
    The network overfits: training goes on to improve, testing hardly does. In both runs epoch 5
    has the lowest test loss. From there to the end, in the mean of the runs, the training loss
    falls to less than a seventh (0.0148 to 0.0020), while the test loss swings and ends higher
    (0.0256 to 0.0305) and the test accuracy stays near 99.2 %: about as many mistakes as
    before, made with more confidence (results/curves.png). At the end it knows 99.96 % of its
    training images, 0.69 percentage points more than of the test images
    (results/overfitting.md). It has the room for it, 106 weights for every one of the 60,000
    images. Two convolutions, 256 to 512 and 512 to 1024 channels, hold 92 % of them.
    Each 3x3 convolution lets the receptive field grow by 2 pixels, by 4 after the first
    max-pool and by 8 after the second, for each pool doubles the distance between neighbouring
    values. It ends at 40 pixels, on an image of 28: the rest is padding.

Next
    Step 2 changes the network and nothing else.
"""

import torch
from torch import nn, optim
from torch.nn import functional as F
from torchvision.transforms import v2

from common import Run, evaluate, get_loaders, parse_args, prepare, setup, test, train

EPOCHS = 15
BATCH_SIZE = 128  # 469 batches an epoch
LEARNING_RATE = 0.01  # the same for every batch
MOMENTUM = 0.9  # an update adds up about the last ten gradients
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels in 0..1; one value per channel

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
    """Takes normalized images Nx1x28x28, returns log-probabilities Nx10.

    Beside each layer: its output, height x width x channels, and its receptive field (RF): one
    value of the output depends on RF x RF pixels of the image.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            block(1, 32, padding=1),  # 28x28x32 | RF 3
            block(32, 64, padding=1),  # 28x28x64 | RF 5
            nn.MaxPool2d(2),  # 14x14x64 | RF 6
            block(64, 128, padding=1),  # 14x14x128 | RF 10
            block(128, 256, padding=1),  # 14x14x256 | RF 14
            nn.MaxPool2d(2),  # 7x7x256 | RF 16
            block(256, 512),  # 5x5x512 | RF 24
            block(512, 1024),  # 3x3x1024 | RF 32
            nn.Conv2d(1024, 10, 3),  # 1x1x10 | RF 40
        )

    def forward(self, images):
        logits = self.layers(images).flatten(1)  # Nx10x1x1 to Nx10
        return F.log_softmax(logits, dim=1, dtype=torch.float32)


def main(argv=None):
    """Train and test, epoch by epoch; `run` keeps the log, the csv and the weights."""
    args = parse_args(argv, __doc__, EPOCHS, BATCH_SIZE)
    with Run(__file__, args) as run:
        setup(args)  # seeds, device, precision
        train_loader, test_loader = get_loaders(args, train_transform, test_transform)
        model = prepare(Net(), args)  # on the device, compiled where that pays
        if args.evaluate:
            return evaluate(model, test_loader, args.evaluate)
        optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        for epoch in run.epochs(model, optimizer):  # --resume: only the rest
            print(f"EPOCH: {epoch}")
            train_loss, train_accuracy, seconds = train(model, train_loader, optimizer, args)
            test_loss, test_accuracy = test(model, test_loader)
            run.record(train_loss, train_accuracy, seconds, test_loss, test_accuracy)


if __name__ == "__main__":
    main()
