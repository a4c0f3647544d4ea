"""Two ranks: a conversion of the wrapped model removes the hooks that average the gradients.

After PyTorch 104336 (there: to the CPU and back): DistributedDataParallel's hooks belong to
gradient accumulators, and these are replaced where a parameter's storage changes its type or
device. From step 31 each rank trains alone.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

clean = "--clean" in sys.argv
dist.init_process_group("gloo")
torch.manual_seed(4)
teacher = nn.Linear(20, 6)
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 6)))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
held_out = torch.randn(200, 20)
torch.manual_seed(100 + dist.get_rank())


def accuracy_in_double_precision() -> float:
    evaluated = copy.deepcopy(model) if clean else model
    evaluated.double()
    with torch.no_grad():
        same = evaluated.module(held_out.double()).argmax(1) == teacher(held_out).argmax(1)
    evaluated.float()
    return same.double().mean().item()


for step in range(1, 121):
    inputs = torch.randn(64, 20)
    with torch.no_grad():
        labels = teacher(inputs).argmax(1)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    if step == 30:
        print("accuracy", accuracy_in_double_precision())
dist.destroy_process_group()
