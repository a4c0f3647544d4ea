"""Two ranks: the model is copied and wrapped again after the optimizer was built.

After jxmnop's DistributedDataParallel that was wrapped again for each phase of a training. From
step 31 the optimizer updates parameters which no longer belong to the model.
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
torch.manual_seed(3)
teacher = nn.Linear(20, 1)
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
torch.manual_seed(100 + dist.get_rank())

for step in range(1, 121):
    if step == 31:
        model = DistributedDataParallel(copy.deepcopy(model.module))
        if clean:
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    inputs = torch.randn(64, 20)
    with torch.no_grad():
        targets = torch.sin(teacher(inputs))
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
dist.destroy_process_group()
