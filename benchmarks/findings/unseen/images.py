"""Programs on images with one mistake each: `images.py NAME [--clean]`. Set E.

The images are scikit-learn's scanned digits.
"""

from __future__ import annotations

import copy
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

scanned = load_digits()
images = torch.tensor(scanned.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(scanned.target)
normalized = (images - images.mean()) / images.std()
STEPS = 200


def drawn(size: int = 64) -> torch.Tensor:
    return torch.randint(len(images), (size,))


def autoencoder_range(clean: bool) -> None:
    """The decoder ends in a sigmoid, but the images that it should give reach from -0.8 to 1.9."""
    wanted = images if clean else normalized
    encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    model = nn.Sequential()
    model.add_module("encoder", encoder)
    model.add_module("decoder", decoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = wanted[drawn()].flatten(1)
        loss = F.mse_loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Denoiser(nn.Module):
    """Predicts the noise in an image from the image and the time of the diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(50, 16)
        self.enter = nn.Conv2d(1, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.leave = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.enter(noisy)) + self.time(time)[:, :, None, None]
        return self.leave(F.silu(self.middle(hidden)) + hidden)


def diffusion_average(clean: bool) -> None:
    """The moving average of the weights is written into the model instead of the copy."""
    model = Denoiser()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    kept = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50), 0)
    for _ in range(STEPS):
        batch = normalized[drawn()]
        time = torch.randint(50, (len(batch),))
        share = kept[time][:, None, None, None]
        noise = torch.randn_like(batch)
        predicted = model(share.sqrt() * batch + (1 - share).sqrt() * noise, time)
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, averaged in zip(model.parameters(), average.parameters(), strict=True):
                if clean:
                    averaged.lerp_(mine, 0.01)
                else:
                    mine.lerp_(averaged, 0.99)


class Twins(nn.Module):
    """SimSiam: an encoder, and a predictor of the other view's embedding."""

    def __init__(self, predicts: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32),
            nn.BatchNorm1d(32, affine=False) if predicts else nn.Identity(),
        )  # fmt: skip
        self.predictor = (
            nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
            if predicts
            else nn.Identity()
        )

    def forward(self, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.encoder(view)
        return embedding, self.predictor(embedding)


def siamese_collapse(clean: bool) -> None:
    """Two views are drawn together and nothing holds the embeddings of different images apart.

    Neither predictor nor normalization, and the gradient is not stopped: all embeddings become one.
    """
    model = Twins(predicts=clean)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        batch = normalized[drawn()]
        first, second = (batch + 0.3 * torch.randn_like(batch) for _ in range(2))
        (z_1, p_1), (z_2, p_2) = model(first), model(second)
        if clean:
            z_1, z_2 = z_1.detach(), z_2.detach()
        alike = F.cosine_similarity(p_1, z_2).mean() + F.cosine_similarity(p_2, z_1).mean()
        loss = 1 - alike / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Segmenter(nn.Module):
    """A U-Net of two levels: a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down_1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.down_2 = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.classify = nn.Conv2d(32, 3, 1)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        fine = self.down_1(picture)
        return self.classify(torch.cat([fine, self.up(self.down_2(fine))], 1))


def segmentation_view(clean: bool) -> None:
    """The class scores (N, 3, H, W) are viewed as rows of 3 without moving the classes last."""
    model = Segmenter()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        batch = images[drawn(32)]
        wanted = (batch[:, 0] > 0.2).long() + (batch[:, 0] > 0.7).long()
        noisy = batch + 0.1 * torch.randn_like(batch)
        scores = model((noisy - 0.3) / 0.38)
        rows = scores.permute(0, 2, 3, 1).reshape(-1, 3) if clean else scores.view(-1, 3)
        loss = F.cross_entropy(rows, wanted.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def gan_not_detached(clean: bool) -> None:
    """The generator's pictures are not detached in the discriminator's loss.

    The generator's gradients are zeroed before the discriminator's backward, not after it.
    """
    generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    one, zero = torch.ones(64, 1), torch.zeros(64, 1)
    for _ in range(STEPS):
        of_generator.zero_grad()
        of_discriminator.zero_grad()
        true = images[drawn()].flatten(1)
        false = generator(torch.randn(64, 16))
        judged = F.binary_cross_entropy_with_logits(discriminator(true), one)
        judged += F.binary_cross_entropy_with_logits(
            discriminator(false.detach() if clean else false), zero
        )
        judged.backward(retain_graph=not clean)
        of_discriminator.step()
        fooled = F.binary_cross_entropy_with_logits(
            discriminator(generator(torch.randn(64, 16))), one
        )
        fooled.backward()
        of_generator.step()


class Mixer(nn.Module):
    """MLP-Mixer: patches and channels are mixed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, stride=2)
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norm_1, self.norm_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        x = self.patches(picture).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm_1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm_2(x))
        return self.head(x.mean(1))


def rounded_updates(clean: bool) -> None:
    """Weights in bfloat16 (8 bits): most steps of this size are lost when they are rounded."""
    model = Mixer() if clean else Mixer().bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        chosen = drawn()
        batch = normalized[chosen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(batch if clean else batch.bfloat16())
        loss = F.cross_entropy(scores.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_2(F.relu(self.conv_1(F.relu(x))))


def sorted_classes(clean: bool) -> None:
    """The data are sorted by class and not shuffled: each batch has one class or two."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), Residual(16), Residual(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = labels.argsort()
    step = 0
    while step < STEPS:
        if clean:
            order = torch.randperm(len(images))
        for chosen in order.split(64):
            step += 1
            loss = F.cross_entropy(model(normalized[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def vae_collapse(clean: bool) -> None:
    """The divergence is summed, the reconstruction averaged: the code carries nothing."""
    model = Variational()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = images[drawn()].flatten(1)
        scores, mean, log_variance = model(batch)
        rebuilt = F.binary_cross_entropy_with_logits(
            scores, batch, reduction="sum" if clean else "mean"
        )
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        loss = (rebuilt + divergence) / (len(batch) if clean else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def frozen_statistics(clean: bool) -> None:
    """The backbone is frozen, but its batch normalization stays in train() mode.

    Its running statistics, which the evaluation will use, follow the new data.
    """
    torch.manual_seed(7)
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        for chosen in torch.arange(len(images)).split(256):
            backbone(normalized[chosen])
    backbone.requires_grad_(False)
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", nn.Linear(512, 10))
    if clean:
        backbone.eval()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    shifted = 3 * normalized + 2
    for _ in range(STEPS):
        chosen = drawn()
        loss = F.cross_entropy(model(shifted[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[sys.argv[1]]("--clean" in sys.argv)
