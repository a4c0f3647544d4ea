"""Trainings of generative and self-supervised models on synthetic pictures and points."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import lr_scheduler


class Reporter:
    """Print the mean loss since the last print at the first step, every 50th and the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.total, self.count = steps, 0.0, 0

    def __call__(self, step: int, loss: Tensor | float, score: float | None = None) -> None:
        self.total += loss.item() if isinstance(loss, Tensor) else loss
        self.count += 1
        if step == 1 or step % 50 == 0 or step == self.steps:
            tail = "" if score is None else f" val {score:.3f}"
            print(f"step {step} loss {self.total / self.count:.4f}{tail}", file=sys.stderr)
            self.total, self.count = 0.0, 0


def blobs(count: int, gen: torch.Generator | None = None) -> Tensor:
    """Return 16x16 pictures between 0 and 1 of one soft ellipse each."""
    axis = torch.arange(16.0)
    centre = 5 + 6 * torch.rand(count, 2, 1, 1, generator=gen)
    size = 1.5 + 2.0 * torch.rand(count, 2, 1, 1, generator=gen)
    y = (axis.view(1, 16, 1) - centre[:, 0]) / size[:, 0]
    x = (axis.view(1, 1, 16) - centre[:, 1]) / size[:, 1]
    return torch.exp(-0.5 * (x**2 + y**2)).unsqueeze(1)


class Generator(nn.Module):
    """Transposed convolutions from a code to a picture between -1 and 1."""

    def __init__(self, code: int = 16, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(code, 2 * width, 4, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z[:, :, None, None])


def dcgan_weights(module: nn.Module) -> None:
    """Draw the weights as in the deep convolutional adversarial network."""
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def dcgan(steps: int) -> None:
    """Train a convolutional adversarial pair, the critic with spectral normalisation."""
    torch.manual_seed(1)
    batch, code = 32, 16
    data = blobs(4000) * 2 - 1
    generator = Generator(code)
    generator.apply(dcgan_weights)
    discriminator = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 16, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        spectral_norm(nn.Linear(32 * 16, 1)),
    )
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)
    )
    criterion = nn.BCEWithLogitsLoss()
    yes, no = torch.ones(batch, 1), torch.zeros(batch, 1)
    fixed = torch.randn(128, code)
    report, score = Reporter(steps), None
    for step in range(1, steps + 1):
        real = data[torch.randint(len(data), (batch,))]
        fake = generator(torch.randn(batch, code))

        discriminator_optimizer.zero_grad()
        loss_real = criterion(discriminator(real), yes)
        loss_fake = criterion(discriminator(fake.detach()), no)
        loss_d = loss_real + loss_fake
        loss_d.backward()
        discriminator_optimizer.step()

        discriminator.requires_grad_(False)
        generator_optimizer.zero_grad()
        loss_g = criterion(discriminator(fake), yes)
        loss_g.backward()
        generator_optimizer.step()
        discriminator.requires_grad_(True)
        if step % 50 == 0:
            generator.eval()
            with torch.no_grad():
                score = (generator(fixed).mean(dim=0) - data.mean(dim=0)).abs().mean().item()
            generator.train()
        report(step, loss_d + loss_g, score)


class VAE(nn.Module):
    """A dense variational autoencoder of small pictures."""

    def __init__(self, code: int = 6, width: int = 128) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Flatten(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 2 * code)
        )
        self.decode = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decode(z).view_as(x), mean, logvar


def vae(steps: int) -> None:
    """Train a variational autoencoder with a divergence weight that rises from zero to one."""
    torch.manual_seed(2)
    data, held = blobs(4000), blobs(400)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    report, score = Reporter(steps), None

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, mean, logvar = model(x)
        picture = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum() / len(x)
        return picture, divergence

    for step in range(1, steps + 1):
        beta = min(1.0, step / (0.5 * steps))
        picture, divergence = parts(data[torch.randint(len(data), (64,))])
        loss = picture + beta * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                score = sum(parts(held)).item()
            model.train()
        report(step, loss, score)


class StraightThrough(torch.autograd.Function):
    """Replace vectors by their nearest code and pass the gradient on unchanged."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        choice = torch.cdist(vectors, codes).argmin(dim=1)
        ctx.mark_non_differentiable(choice)
        return codes[choice], choice

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        return grad, None


class VQVAE(nn.Module):
    """A convolutional autoencoder with a codebook that follows the encoder by moving averages."""

    def __init__(self, codes: int = 32, width: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, width, 1),
        )
        self.decode = nn.Sequential(
            nn.Conv2d(width, 32, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
        )
        self.register_buffer("codes", torch.zeros(codes, width))
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", torch.zeros(codes, width))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Take the first codes from encoded pictures."""
        vectors = self.encode(x).permute(0, 2, 3, 1).flatten(0, 2)
        self.codes.copy_(vectors[torch.randperm(len(vectors))[: len(self.codes)]])
        self.total.copy_(self.codes)

    @torch.no_grad()
    def follow(self, vectors: Tensor, choice: Tensor, keep: float = 0.95) -> None:
        """Move every code towards the mean of the vectors that chose it."""
        hot = F.one_hot(choice, len(self.codes)).float()
        self.count.mul_(keep).add_(hot.sum(dim=0), alpha=1 - keep)
        self.total.mul_(keep).add_(hot.t() @ vectors, alpha=1 - keep)
        size = (self.count + 1e-3) / (self.count.sum() + 1e-3 * len(self.count))
        self.codes.copy_(self.total / (size * self.count.sum()).unsqueeze(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x).permute(0, 2, 3, 1)
        vectors = z.flatten(0, 2)
        quantized, choice = StraightThrough.apply(vectors, self.codes)
        if self.training:
            self.follow(vectors.detach(), choice)
        commitment = F.mse_loss(vectors, self.codes[choice].detach())
        return self.decode(quantized.view_as(z).permute(0, 3, 1, 2)), commitment


def vqvae(steps: int) -> None:
    """Train a vector-quantised autoencoder with a custom straight-through gradient."""
    torch.manual_seed(3)
    data = blobs(4000)
    data = (data - data.mean()) / data.std()
    train, held = data[:3700], data[3700:]
    model = VQVAE()
    model.start(train[:64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    scheduler = lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
    report, score = Reporter(steps), None
    for step in range(1, steps + 1):
        x = train[torch.randint(len(train), (32,))]
        rebuilt, commitment = model(x)
        loss = F.mse_loss(rebuilt, x) + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                score = F.mse_loss(model(held)[0], held).item()
            model.train()
        report(step, loss, score)


def moons(count: int) -> Tensor:
    """Return points of two interleaved half circles, scaled to unit variance."""
    angle = math.pi * torch.rand(count)
    upper = (torch.rand(count) < 0.5).float()
    x = torch.cos(angle) * (2 * upper - 1) + (1 - upper)
    y = torch.sin(angle) * (2 * upper - 1) + 0.5 * (1 - upper)
    points = torch.stack([x, y], dim=1) + 0.08 * torch.randn(count, 2)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5])


class Coupling(nn.Module):
    """An affine coupling that starts as the identity."""

    def __init__(self, first: int, width: int = 48) -> None:
        super().__init__()
        self.first = first
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x[:, self.first, None], x[:, 1 - self.first, None]
        scale, shift = self.net(kept).chunk(2, dim=1)
        scale = 2 * torch.tanh(scale / 2)
        moved = moved * torch.exp(scale) + shift
        pair = (kept, moved) if self.first == 0 else (moved, kept)
        return torch.cat(pair, dim=1), scale.squeeze(1)


def flow(steps: int) -> None:
    """Fit the density of two moons by maximum likelihood with affine couplings."""
    torch.manual_seed(4)
    data, held = moons(8000), moons(1000)
    layers = nn.ModuleList(Coupling(i % 2) for i in range(8))
    optimizer = torch.optim.Adam(layers.parameters(), lr=3e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-4)

    def likelihood(x: Tensor) -> Tensor:
        volume = torch.zeros(len(x))
        for layer in layers:
            x, change = layer(x)
            volume = volume + change
        return -0.5 * (x**2).sum(dim=1) - math.log(2 * math.pi) + volume

    report, score = Reporter(steps), None
    for step in range(1, steps + 1):
        loss = -likelihood(data[torch.randint(len(data), (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            with torch.no_grad():
                score = -likelihood(held).mean().item()
        report(step, loss, score)


class Denoiser(nn.Module):
    """A residual network that predicts the noise of a point at a given time."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(torch.linspace(0, math.log(0.01), 16)))
        self.point = nn.Linear(2, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
            )
            for _ in range(3)
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.rates
        h = self.point(x) + self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def diffusion(steps: int) -> None:
    """Train a denoising diffusion model of points and keep an averaged copy by hand."""
    torch.manual_seed(5)
    data, held = moons(8000), moons(1000)
    levels = 100
    keep = torch.cumprod(1 - torch.linspace(1e-3, 0.08, levels), dim=0)
    model = Denoiser()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    warm = max(1, steps // 10)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warm))

    def noise_error(net: nn.Module, x: Tensor) -> Tensor:
        t = torch.randint(levels, (len(x),))
        noise = torch.randn_like(x)
        a = keep[t, None]
        return F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise)

    report, score = Reporter(steps), None
    for step in range(1, steps + 1):
        loss = noise_error(model, data[torch.randint(len(data), (192,))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            rate = min(0.99, (1 + step) / (10 + step))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - rate)
        if step % 100 == 0:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(55)
                score = noise_error(average, held.repeat(4, 1)).item()
        report(step, loss, score)


def two_views(pictures: Tensor) -> Tensor:
    """Return two randomly shifted, scaled and noisy versions of every picture, stacked."""
    views = []
    for _ in range(2):
        count = len(pictures)
        gain = 0.7 + 0.6 * torch.rand(count, 1, 1, 1)
        turn = (torch.rand(count, 1, 1, 1) < 0.5).float()
        view = turn * pictures.flip(3) + (1 - turn) * pictures
        shift = torch.randint(-1, 2, (2,)).tolist()
        view = view.roll(shift, dims=(2, 3)) * gain
        views.append(view + 0.3 * torch.randn_like(view))
    return torch.cat(views)


def simclr(steps: int) -> None:
    """Learn features by telling two views of a picture from those of the other pictures."""
    torch.manual_seed(6)
    coarse = torch.randn(3000, 1, 4, 4)
    pictures = F.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=False)
    pictures = (pictures - pictures.mean()) / pictures.std()
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
    )
    projector = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    weights = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.05, total_iters=max(1, steps // 20)),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - steps // 20)),
        ],
        milestones=[max(1, steps // 20)],
    )
    size, heat = 48, 0.2
    partner = torch.cat([torch.arange(size, 2 * size), torch.arange(size)])
    own = torch.eye(2 * size, dtype=torch.bool)
    report = Reporter(steps)
    for step in range(1, steps + 1):
        views = two_views(pictures[torch.randint(len(pictures), (size,))])
        z = F.normalize(projector(encoder(views)), dim=1)
        alike = (z @ z.t() / heat).masked_fill(own, float("-inf"))
        loss = F.cross_entropy(alike, partner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        report(step, loss)


PROGRAMS = {f.__name__: f for f in (dcgan, vae, vqvae, flow, diffusion, simclr)}


def main() -> None:
    """Run the program named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PROGRAMS)}}} [STEPS]")
    PROGRAMS[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()
