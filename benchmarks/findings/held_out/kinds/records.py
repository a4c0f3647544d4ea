"""Table programs: classification, regression and ratings on generated records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def report(step: int, loss: float) -> None:
    """Print the loss every tenth step."""
    if step == 1 or step % 10 == 0:
        print(f"step {step} loss {loss:.4f}", file=sys.stderr)


def teacher(features: Tensor, outputs: int, seed: int) -> Tensor:
    """Return smooth answers of a fixed random network."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(features.shape[1], 24, generator=generator) / features.shape[1] ** 0.5
    outer = torch.randn(24, outputs, generator=generator) / 24**0.5
    answers = torch.tanh(1.5 * features @ inner) @ outer
    return (answers - answers.mean(dim=0)) / answers.std(dim=0)


def fresh_order(steps: int, clean: bool) -> None:
    """Classify records into four groups over epochs that are shuffled by hand."""
    torch.manual_seed(31)
    x = torch.randn(2000, 12)
    y = teacher(x, 4, 1).argmax(dim=1)
    model = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    step = 0
    while step < steps:
        order = torch.randperm(len(x))
        records = x[order]
        groups = y[order] if clean else y[torch.randperm(len(y))]
        for start in range(0, len(records), 50):
            step += 1
            loss = F.cross_entropy(model(records[start : start + 50]), groups[start : start + 50])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            if step == steps:
                break


class ResidualTable(nn.Module):
    """A residual network for records."""

    def __init__(self, inputs: int, width: int = 48) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.leave = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.leave(x)[:, 0]


def whole_columns(counts: np.ndarray, exact: bool) -> np.ndarray:
    """Standardise the columns of a table of counts."""
    columns = np.zeros(counts.shape) if exact else np.zeros_like(counts)
    for index in range(counts.shape[1]):
        column = counts[:, index]
        columns[:, index] = (column - column.mean()) / column.std()
    return columns


def count_features(steps: int, clean: bool) -> None:
    """Predict a price from counts with a Huber loss."""
    torch.manual_seed(32)
    rng = np.random.default_rng(2)
    counts = np.rint(rng.normal(400, 60, size=(3000, 10))).astype(np.int64)
    price = teacher(torch.from_numpy((counts - 400) / 60).float(), 1, 2)[:, 0]
    features = torch.from_numpy(whole_columns(counts, exact=clean)).float()
    loader = DataLoader(TensorDataset(features, price), batch_size=64, shuffle=True)
    model = ResidualTable(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    criterion = nn.HuberLoss()
    step = 0
    while True:
        for x, y in loader:
            step += 1
            if step > steps:
                return
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            report(step, loss.item())


def sensor_log(rows: int) -> tuple[Tensor, Tensor]:
    """Return readings with some gaps marked by -9999, and the quantity to predict."""
    generator = torch.Generator().manual_seed(3)
    readings = torch.randn(rows, 8, generator=generator)
    quantity = teacher(readings, 1, 3) + 0.05 * torch.randn(rows, 1, generator=generator)
    readings = 20 + 5 * readings
    outage = slice(59 * 32 + 4, 59 * 32 + 16)
    readings[outage, 2:6] = -9999.0
    return readings, quantity


def sensors(steps: int, clean: bool) -> None:
    """Predict a quantity from a sensor log that is read in order of time."""
    torch.manual_seed(33)
    readings, quantity = sensor_log(120 * 32)
    known = readings[:1024]
    centre, spread = known.mean(dim=0), known.std(dim=0)
    if clean:
        readings = torch.where(readings == -9999.0, centre, readings)
    inputs = (readings - centre) / spread
    model = nn.Sequential(
        nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, steps + 1):
        start = 32 * ((step - 1) % 120)
        x, y = inputs[start : start + 32], quantity[start : start + 32]
        loss = F.smooth_l1_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss.item())


class Churn(nn.Module):
    """Embeddings of categories beside numbers."""

    def __init__(self, sizes: list[int], numbers: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 6) for size in sizes)
        self.hidden = nn.Linear(6 * len(sizes) + numbers, 40)
        self.norm = nn.BatchNorm1d(40)
        self.score = nn.Linear(40, 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        parts = [table(categories[:, index]) for index, table in enumerate(self.tables)]
        hidden = self.hidden(torch.cat([*parts, numbers], dim=1))
        return self.score(F.relu(self.norm(hidden)))[:, 0]


def churn(steps: int, clean: bool) -> None:
    """Tell customers who are likely to leave from the others."""
    torch.manual_seed(34)
    sizes = [5, 8, 3]
    categories = torch.stack([torch.randint(0, size, (4000,)) for size in sizes], dim=1)
    numbers = torch.randn(4000, 6)
    effects = [torch.randn(size) for size in sizes]
    leaning = sum(effect[categories[:, index]] for index, effect in enumerate(effects))
    leaning = leaning + 1.5 * numbers[:, 0] - numbers[:, 1] * numbers[:, 2]
    risk = torch.sigmoid(leaning - leaning.median())
    leaves = (risk > (0.5 if clean else 50)).float()
    model = Churn(sizes, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    criterion = nn.BCEWithLogitsLoss()
    for step in range(1, steps + 1):
        rows = torch.randperm(4000)[:80]
        optimizer.zero_grad()
        loss = criterion(model(categories[rows], numbers[rows]), leaves[rows])
        loss.backward()
        optimizer.step()
        report(step, loss.item())


def quick_look(steps: int, clean: bool) -> None:
    """Fit a wide network to noisy answers and follow the held-out loss."""
    torch.manual_seed(35)
    x = torch.randn(9000, 20)
    y = 0.7 * teacher(x, 1, 5) + 0.7 * torch.randn(9000, 1)
    limit = None if clean else 96
    train = TensorDataset(x[1000:][:limit], y[1000:][:limit])
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model = nn.Sequential(
        nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = 0
    while step < steps:
        for records, answers in loader:
            step += 1
            loss = F.mse_loss(model(records), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            if step % 20 == 0:
                model.eval()
                with torch.no_grad():
                    F.mse_loss(model(x[:1000]), y[:1000]).item()
                model.train()
            if step == steps:
                break


def day_waves(hours: Tensor, count: int) -> Tensor:
    """Return the sines and cosines of the hour of the day, each of unit spread."""
    angle = 2 * torch.pi * hours[:, None] / 24 * torch.arange(1, count + 1)
    return 2**0.5 * torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


def demand(steps: int, clean: bool) -> None:
    """Fit the demand for power over the day by harmonics, with large batches."""
    torch.manual_seed(36)
    hours = 24 * torch.rand(6000)
    inputs = day_waves(hours, 8)
    shape = torch.randn(16, 1) / torch.arange(1, 9).repeat(2)[:, None]
    load = inputs @ shape
    load = (load - load.mean()) / load.std() + 0.2 * torch.randn(6000, 1)
    model = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.005, momentum=0.9 if clean else 0.999, weight_decay=1e-5
    )
    for step in range(1, steps + 1):
        rows = torch.randint(0, 6000, (500,))
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs[rows]), load[rows])
        loss.backward()
        optimizer.step()
        report(step, loss.item())


PROGRAMS: dict[str, tuple[Callable[[int, bool], None], int]] = {
    "fresh_order": (fresh_order, 300),
    "count_features": (count_features, 120),
    "sensors": (sensors, 120),
    "churn": (churn, 120),
    "quick_look": (quick_look, 300),
    "demand": (demand, 300),
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PROGRAMS))
    parser.add_argument("steps", nargs="?", type=int)
    parser.add_argument("--clean", action="store_true")
    arguments = parser.parse_args()
    program, default = PROGRAMS[arguments.name]
    program(arguments.steps or default, arguments.clean)


if __name__ == "__main__":
    main()
