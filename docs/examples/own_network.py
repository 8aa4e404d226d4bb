"""Trains a network of your own: any module from images (N, 3, H, W) to logits (N, classes)."""

import torch
from torch import nn

import fastcifar


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


network = nn.Sequential(
    convolution(3, 16),
    nn.MaxPool2d(2),
    convolution(16, 32),
    nn.MaxPool2d(2),
    convolution(32, 64),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)

result = fastcifar.train(model=network, dataset="synthetic", epochs=1, optimizer="adamw", compile="off")
print(f"test accuracy {result.test_accuracy:.1%}, {result.images_per_second:,.0f} images a second")

network.eval()  # It was trained itself, not a copy, and now holds the last weights.
test = fastcifar.load_dataset("synthetic", "test")
loader = fastcifar.Loader(test, policy="none", batch_size=1000, shuffle=False)
images, labels = next(iter(loader))
with torch.no_grad():
    print("first labels  ", labels[:10].tolist())
    print("first answers ", network.to(images.device)(images[:10]).argmax(1).tolist())
