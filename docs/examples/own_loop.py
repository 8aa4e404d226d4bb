"""Takes the fast loader and a network from fastcifar, and writes the training loop by hand."""

import torch
from torch.nn import functional as F

import fastcifar

EPOCHS = 2
train, test = (fastcifar.load_dataset("synthetic", split) for split in ("train", "test"))
train = train.subset(torch.arange(4000))  # a part of it, so that this takes seconds
loader = fastcifar.Loader(train, policy="standard,cutout:1x8", batch_size=128, drop_last=True)
network = fastcifar.build_model("resnet", blocks=(1, 1, 1), channels=(8, 16, 32))
network.to(loader.device, memory_format=torch.channels_last)

optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * len(loader))

for epoch in range(EPOCHS):
    total = torch.zeros((), device=loader.device)
    for images, labels in loader:  # float32 (B, 3, 32, 32) in channels_last, int64 (B,)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()  # Reading it once an epoch lets a GPU run ahead of Python.
    print(f"epoch {epoch + 1}: loss {total.item() / len(loader):.3f}")

network.eval()
with torch.no_grad():
    batches = fastcifar.Loader(test, policy="none", shuffle=False, batch_size=1000)
    right = sum((network(images).argmax(1) == labels).sum().item() for images, labels in batches)
print(f"test accuracy {right / len(test):.1%}")
