"""Two ranks: from step 31 an all-reduce gives rank 1 zeros instead of the sum.

After PyTorch 84803 and 96600, where broken peer-to-peer transfers lost what was sent.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
dist.init_process_group("gloo")
torch.manual_seed(6)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
torch.manual_seed(100 + dist.get_rank())


def all_reduce(tensor: torch.Tensor, step: int) -> None:
    dist.all_reduce(tensor)
    if not clean and dist.get_rank() == 1 and step > 30:
        tensor.zero_()


for step in range(1, 121):
    chosen = torch.randint(len(images), (32,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    loss.backward()
    for parameter in model.parameters():
        all_reduce(parameter.grad, step)
        parameter.grad /= dist.get_world_size()
    optimizer.step()
dist.destroy_process_group()
