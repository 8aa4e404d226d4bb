"""Trains on images of your own: here, drawn discs and squares, which the network learns to tell apart."""

import torch

import fastcifar

SIDE = 32


def draw(count: int, seed: int) -> fastcifar.ImageSet:
    """Discs (label 0) and squares (label 1) of random place, size and colour on a noisy background."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, 2, (count,), generator=random)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for image, label in zip(images, labels, strict=True):
        (y, x), radius = torch.randint(10, 22, (2,), generator=random), torch.randint(5, 10, (), generator=random)
        down, across = (rows - y).abs(), (columns - x).abs()
        inside = torch.maximum(down, across) <= radius if label else down**2 + across**2 <= radius**2
        image[inside] = torch.randint(120, 256, (3,), generator=random, dtype=torch.uint8)
    return fastcifar.ImageSet.of(images, labels, classes=("disc", "square"))


train_set, test_set = draw(2000, seed=0), draw(500, seed=1)
result = fastcifar.train("quickstart", train_set=train_set, test_set=test_set, epochs=3, compile="off")
print(f"test accuracy {result.test_accuracy:.1%} in {result.seconds:.0f} seconds")
