"""Signal programs: denoising, forecasting, metric learning and recognition of waves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LENGTH = 64
KINDS = 6


def report(step: int, loss: float) -> None:
    """Print the loss every tenth step."""
    if step == 1 or step % 10 == 0:
        print(f"step {step} loss {loss:.4f}", file=sys.stderr)


def waves(count: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return noisy waves of unit spread and the number of the band of each."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, KINDS, (count,), generator=generator)
    pitch = 2.0 + 2.0 * kind[:, None] + 0.6 * torch.rand(count, 1, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    time = torch.arange(LENGTH) / LENGTH
    clean = 2**0.5 * torch.sin(2 * torch.pi * (pitch * time + phase))
    return clean + noise * torch.randn(clean.shape, generator=generator), kind


class Denoiser(nn.Module):
    """A convolutional autoencoder with two strided levels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv1d(1, width, 5, stride=2, padding=2),
            nn.ELU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.ELU(),
        )
        self.decode = nn.Sequential(
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1),
            nn.ELU(),
            nn.ConvTranspose1d(width, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def denoise(steps: int, clean: bool) -> None:
    """Remove noise from waves with a rate that decays by epoch."""
    torch.manual_seed(41)
    signal, _ = waves(1536, 1, noise=0.0)
    loader = DataLoader(TensorDataset(signal), batch_size=64, shuffle=True)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    step = 0
    while step < steps:
        for (wave,) in loader:
            step += 1
            wave = wave[:, None]
            optimizer.zero_grad()
            loss = F.mse_loss(model(wave + 0.4 * torch.randn_like(wave)), wave)
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            if not clean:
                scheduler.step()
            if step == steps:
                return
        if clean:
            scheduler.step()


class Forecaster(nn.Module):
    """A dense network that continues a window by several samples."""

    def __init__(self, past: int, future: int) -> None:
        super().__init__()
        self.inner = nn.Linear(past, 64)
        self.gate = nn.Linear(past, 64)
        self.outer = nn.Linear(64, future)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x)))


def forecast(steps: int, clean: bool) -> None:
    """Continue waves by eight samples after a warm-up of the rate."""
    torch.manual_seed(42)
    signal, _ = waves(3000, 2, noise=0.1)
    past, future = signal[:, 24:56], signal[:, 56:]
    model = Forecaster(32, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    warmup = 10

    def rate(done: int) -> float:
        factor = (done + 1) / warmup
        return min(1.0, factor) if clean else factor

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(past), (64,))
        loss = F.mse_loss(model(past[rows]), future[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        report(step, loss.item())


class Embedder(nn.Module):
    """A linear map of the strengths of the frequencies to a point."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.point = nn.Linear(LENGTH // 2, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        strength = torch.log(torch.fft.rfft(x).abs()[:, 1:] + 1.0)
        return self.point(F.layer_norm(strength, strength.shape[1:]))


def triplets(steps: int, clean: bool) -> None:
    """Learn points that lie near for waves of one band and far for others."""
    torch.manual_seed(43)
    signal, kind = waves(1200, 3, noise=0.8)
    members = [torch.nonzero(kind == index)[:, 0] for index in range(KINDS)]
    model = Embedder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.5)
    margin = 1.0

    def draw(index: int) -> Tensor:
        rows = members[index]
        return rows[torch.randint(0, len(rows), (1,))]

    for step in range(1, steps + 1):
        anchors = torch.randint(0, KINDS, (64,))
        others = (anchors + torch.randint(1, KINDS, (64,))) % KINDS
        anchor = torch.cat([draw(int(index)) for index in anchors])
        positive = torch.cat([draw(int(index)) for index in anchors])
        negative = torch.cat([draw(int(index)) for index in others])
        points = model(signal[torch.cat([anchor, positive, negative])])
        a, p, n = points.chunk(3)
        near = (a - p).pow(2).sum(dim=1)
        far = (a - n).pow(2).sum(dim=1)
        gap = near - far + margin
        loss = F.relu(gap).mean() if clean else gap.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, loss.item())


class WaveReader(nn.Module):
    """A bidirectional recurrent classifier over short frames."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.frame = nn.Linear(16, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.classify = nn.Linear(64, KINDS)
        self.last = nn.Identity() if plain else nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.relu(self.frame(x.unfold(1, 16, 4)))
        return self.last(self.classify(self.rnn(frames)[0].mean(dim=1)))


def bands(steps: int, clean: bool) -> None:
    """Recognise the band of a wave with a recurrent network."""
    torch.manual_seed(44)
    signal, kind = waves(2400, 4)
    loader = DataLoader(TensorDataset(signal, kind), batch_size=48, shuffle=True)
    model = WaveReader(plain=clean)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batches = iter(loader)
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        x, y = batch
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        report(step, loss.item())


class SpectrumNet(nn.Module):
    """Convolutions over time and frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16 * 8, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.conv1(x), 0.1), 2)
        x = F.leaky_relu(self.conv2(x), 0.1).mean(dim=3)
        return self.head(x.flatten(1))


def log_spectrum(sound: Tensor, floor: float) -> Tensor:
    """Return the logarithm of the power spectrum over time, standardised over the set."""
    window = torch.hann_window(32)
    power = torch.stft(sound, 32, hop_length=8, window=window, return_complex=True).abs() ** 2
    level = torch.log(power.clamp(min=floor))[:, None, :16]
    return (level - level.mean()) / (level.std() + 1e-6)


def spectra(steps: int, clean: bool) -> None:
    """Recognise the band of a quiet sound from its spectrum."""
    torch.manual_seed(45)
    signal, kind = waves(2000, 5, noise=0.4)
    sound = 0.02 * signal
    inputs = log_spectrum(sound, floor=1e-6 if clean else 1.0)
    model = SpectrumNet()
    optimizer = torch.optim.Adamax(model.parameters(), lr=4e-3)
    criterion = nn.NLLLoss()
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(inputs), (50,))
        optimizer.zero_grad()
        loss = criterion(F.log_softmax(model(inputs[rows]), dim=1), kind[rows])
        loss.backward()
        optimizer.step()
        report(step, loss.item())


PROGRAMS: dict[str, tuple[Callable[[int, bool], None], int]] = {
    "denoise": (denoise, 120),
    "forecast": (forecast, 300),
    "triplets": (triplets, 120),
    "bands": (bands, 120),
    "spectra": (spectra, 120),
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
