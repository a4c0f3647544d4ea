"""Two ranks: after an evaluation at step 30 the loop goes on with the model inside the wrapper.

After jxmnop's training in which a helper sometimes returned the model and sometimes its
DistributedDataParallel: gradients are not averaged while the wrapper's forward is not called.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

clean = "--clean" in sys.argv
dist.init_process_group("gloo")
torch.manual_seed(7)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(digits.target)
wrapped = DistributedDataParallel(
    nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 10))
)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
torch.manual_seed(100 + dist.get_rank())


def get_model(evaluating: bool) -> nn.Module:
    return wrapped.module if evaluating else wrapped


model = get_model(evaluating=False)
for step in range(1, 121):
    chosen = torch.randint(len(images), (32,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    loss.backward()
    optimizer.step()
    if step == 30:
        model = get_model(evaluating=True)
        model.eval()
        with torch.no_grad():
            print("accuracy", (model(images).argmax(1) == labels).float().mean().item())
        if clean:
            model = get_model(evaluating=False)
        model.train()
dist.destroy_process_group()
