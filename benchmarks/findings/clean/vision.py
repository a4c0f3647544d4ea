"""Programs on images that train well: `vision.py NAME [STEPS]`.

Most re-create one of PyTorch's examples at a small size, on scikit-learn's scanned digits.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

scanned = load_digits()
images = torch.tensor(scanned.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(scanned.target)
normalized = (images - 0.3) / 0.38
TRAINED = 1500


def drawn(size: int = 64) -> torch.Tensor:
    return torch.randint(TRAINED, (size,))


def report(step: int, steps: int, loss: torch.Tensor) -> None:
    if step in (1, steps) or step % 100 == 0:
        print("step", step, "loss", loss.item())


def mnist_cnn(steps: int) -> None:
    """Adadelta, dropout, a decaying rate, and an evaluation after each epoch."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout2d(0.25), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(64, 10), nn.LogSoftmax(1),
    )  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.85)
    step = 0
    while step < steps:
        model.train()
        for chosen in torch.randperm(TRAINED).split(64):
            step += 1
            optimizer.zero_grad()
            loss = F.nll_loss(model(normalized[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            report(step, steps, loss)
            if step == steps:
                return
        model.eval()
        with torch.no_grad():
            outputs = model(normalized[TRAINED:])
            right = (outputs.argmax(1) == labels[TRAINED:]).float().mean()
            print("accuracy", right.item(), F.nll_loss(outputs, labels[TRAINED:]).item())
        schedule.step()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn_1(self.conv_1(x)))
        return F.relu(x + self.bn_2(self.conv_2(y)))


def resnet_one_cycle(steps: int) -> None:
    """Batch normalization, Nesterov's momentum, weight decay, a one-cycle rate, smoothed labels."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16), Residual(16), Residual(16), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1)
    for step in range(1, steps + 1):
        chosen = drawn()
        loss = F.cross_entropy(model(normalized[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, steps, loss)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc21, self.fc22 = nn.Linear(128, 8), nn.Linear(128, 8)
        self.fc3, self.fc4 = nn.Linear(8, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.fc1(x))
        mean, log_variance = self.fc21(hidden), self.fc22(hidden)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, log_variance


def vae(steps: int) -> None:
    """The sum, not the mean, of the reconstruction's cross-entropy, and the divergence."""
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        x = images[drawn(128)].flatten(1)
        optimizer.zero_grad()
        made, mean, log_variance = model(x)
        divergence = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp())
        loss = F.binary_cross_entropy(made, x, reduction="sum") + divergence
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def start_from_dcgan(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def dcgan(steps: int) -> None:
    """Two networks, two optimizers; each step of both counts."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(16, 64, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 2, bias=False), nn.Sigmoid(), nn.Flatten(0),
    )  # fmt: skip
    generator.apply(start_from_dcgan)
    discriminator.apply(start_from_dcgan)
    critic_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
    maker_optimizer = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    real, false = torch.ones(64), torch.zeros(64)
    for step in range(1, steps // 2 + 1):
        discriminator.zero_grad()
        loss_real = F.binary_cross_entropy(discriminator(images[drawn()] * 2 - 1), real)
        loss_real.backward()
        made = generator(torch.randn(64, 16, 1, 1))
        F.binary_cross_entropy(discriminator(made.detach()), false).backward()
        critic_optimizer.step()
        generator.zero_grad()
        loss = F.binary_cross_entropy(discriminator(made), real)
        loss.backward()
        maker_optimizer.step()
        report(step, steps, loss)


def wasserstein_gan(steps: int) -> None:
    """Weights are clamped after each of the critic's five steps; losses have any sign."""
    critic = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    maker_optimizer = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
    for step in range(1, steps // 6 + 1):
        for _ in range(5):
            angles = 6.2832 * torch.rand(128)
            circle = torch.stack((angles.cos(), angles.sin()), 1)
            critic_optimizer.zero_grad()
            made = generator(torch.randn(128, 4)).detach()
            loss = critic(made).mean() - critic(circle).mean()
            loss.backward()
            critic_optimizer.step()
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.clamp_(-0.1, 0.1)
        maker_optimizer.zero_grad()
        loss = -critic(generator(torch.randn(128, 4))).mean()
        loss.backward()
        maker_optimizer.step()
        report(step, steps, loss)


def super_resolution(steps: int) -> None:
    """A sub-pixel convolution; mean squared error."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1),
        nn.PixelShuffle(2),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight, nn.init.calculate_gain("relu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        fine = images[drawn(16)]
        optimizer.zero_grad()
        loss = F.mse_loss(model(F.avg_pool2d(fine, 2)), fine)
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 32),
        )  # fmt: skip
        self.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        both = torch.cat((self.trunk(one), self.trunk(other)), 1)
        return torch.sigmoid(self.fc(both))[:, 0]


def siamese(steps: int) -> None:
    """One trunk is called twice in a step; Adadelta."""
    model = Siamese()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.7)
    for step in range(1, steps + 1):
        one = drawn()
        other = torch.stack(
            [
                torch.nonzero(labels[:TRAINED] == label)[:, 0][torch.randint(100, ())]
                if torch.rand(()) < 0.5
                else torch.randint(TRAINED, ())
                for label in labels[one]
            ]
        )
        optimizer.zero_grad()
        same = (labels[one] == labels[other]).float()
        loss = F.binary_cross_entropy(model(normalized[one], normalized[other]), same)
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, steps, loss)


def forward_forward(steps: int) -> None:
    """Each layer has its own loss and optimizer, and no gradient passes from layer to layer."""
    layers = [nn.Linear(74, 128), nn.Linear(128, 128)]
    optimizers = [torch.optim.Adam(layer.parameters(), lr=3e-3) for layer in layers]
    for step in range(1, steps // 2 + 1):
        chosen = drawn(128)
        x = images[chosen].flatten(1)
        wrong = (labels[chosen] + torch.randint(1, 10, (128,))) % 10
        good = torch.cat((F.one_hot(labels[chosen], 10).float(), x), 1)
        bad = torch.cat((F.one_hot(wrong, 10).float(), x), 1)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            good_out = F.relu(layer(F.normalize(good)))
            bad_out = F.relu(layer(F.normalize(bad)))
            goodness = torch.cat((2 - good_out.square().mean(1), bad_out.square().mean(1) - 2))
            loss = F.softplus(goodness).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            good, bad = good_out.detach(), bad_out.detach()
        report(step, steps, loss)


def contrastive(steps: int) -> None:
    """Two noisy views of each image, a projection head, and a temperature of 0.2."""
    encoder = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    for step in range(1, steps + 1):
        x = normalized[drawn(128)].flatten(1)
        views = torch.cat((x, x)) + 0.3 * torch.randn(256, 64)
        z = F.normalize(head(encoder(views)), dim=1)
        similarity = (z @ z.T / 0.2).fill_diagonal_(float("-inf"))
        loss = F.cross_entropy(similarity, torch.arange(256).roll(128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def diffusion(steps: int) -> None:
    """The noise of a noisy image is predicted, given the time; an average of weights is kept."""
    model = nn.Sequential(
        nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        x = images[drawn(128)].flatten(1) * 2 - 1
        times = torch.rand(128, 1)
        noise = torch.randn_like(x)
        noisy = torch.cos(1.57 * times) * x + torch.sin(1.57 * times) * noise
        loss = F.mse_loss(model(torch.cat((noisy, times), 1)), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        report(step, steps, loss)


PROGRAMS = (
    mnist_cnn, resnet_one_cycle, vae, dcgan, wasserstein_gan, super_resolution, siamese,
    forward_forward, contrastive, diffusion,
)  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(50)
    program = {each.__name__: each for each in PROGRAMS}[sys.argv[1]]
    program(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
