"""Step 2: 300 times fewer weights, nearly twice the mistakes. Too few, or badly trained?

Tried
    A small network: 20,750 weights, one for three training images. Two things save weights: few
    channels, at most 32, and 1x1 convolutions, which mix the channels of each pixel. A 3x3 from 32
    to 20 channels has 5,760 weights (3 x 3 x 32 x 20); a 1x1 from 32 to 10 channels and then a 3x3
    to 20 have 320 + 1,800.

Came out (5 runs of 15 epochs)
    The small network works, but less well: 131 of 10,000 test digits are wrong in the end (step 1:
    74). Test accuracy is 98.69 %, as in the course.

Two suspects
    Too few weights: after 15 epochs it has not learned its training digits by heart. 452 of 60,000
    are wrong (step 1: 26).
    Bad training: in the first epoch the loss is 1.53 (step 1: 0.42), where a guess gives 2.303.
    PyTorch's first weights are small: before training, eight layers shrink the values a
    thousandfold, the falling line of results/step2.png.

Exercise
    Which one is it? Batch normalization keeps the values of each channel at mean 0 and variance 1,
    so they cannot die out. Predict. In a copy, step2_mine.py, below the line of nn.ReLU, add
        nn.BatchNorm2d(out_channels),
    and run `make step2_mine`, three to ten minutes. Does it learn its training digits by heart, to
    99.9 % in the log? Larger first weights keep the values up too (He et al., 2015). As good? In a
    fresh copy add, below model = ... in main (step 3 opens with both answers)
        for weights in model.parameters(): nn.init.kaiming_uniform_(weights)
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


def block(in_channels, out_channels, kernel_size=3):
    """Return a convolution and its ReLU. (Why no biases? The course has none; we kept that.)"""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, bias=False),
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
            block(1, 10),  # 26x26x10 | RF 3
            block(10, 20),  # 24x24x20 | RF 5
            block(20, 32),  # 22x22x32 | RF 7
            nn.MaxPool2d(2),  # 11x11x32 | RF 8
            block(32, 10, kernel_size=1),  # 11x11x10 | RF 8: fewer channels for the next layer
            block(10, 20),  # 9x9x20 | RF 12
            block(20, 32),  # 7x7x32 | RF 16
            block(32, 10, kernel_size=1),  # 7x7x10 | RF 16
            nn.Conv2d(10, 10, 7, bias=False),  # 1x1x10 | RF 28: weighs all 7x7 positions
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
