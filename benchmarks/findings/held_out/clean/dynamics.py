"""Trainings with equations, integrators, policies and inner loops."""

from __future__ import annotations

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
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


def pinn(steps: int) -> None:
    """Solve a heat equation with a physics-informed network, first by Adam and then by LBFGS."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, 32), (32, 32), (32, 32)):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    inside = torch.rand(400, 2)
    start = torch.cat([torch.rand(100, 1), torch.zeros(100, 1)], dim=1)
    walls = torch.cat([torch.randint(2, (100, 1)).float(), torch.rand(100, 1)], dim=1)
    rate = 0.1

    def residuals(points: Tensor) -> Tensor:
        points = points.clone().requires_grad_(True)
        u = model(2 * points - 1)
        first = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)[0]
        equation = first[:, 1] - rate * second[:, 0]
        initial = model(2 * start - 1)[:, 0] - torch.sin(math.pi * start[:, 0])
        edge = model(2 * walls - 1)[:, 0]
        return (equation**2).mean() + 10 * (initial**2).mean() + 10 * (edge**2).mean()

    grid = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21))
    exact = torch.sin(math.pi * grid[:, 0]) * torch.exp(-rate * math.pi**2 * grid[:, 1])
    report, score = Reporter(steps), None
    first_part = steps * 9 // 10
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    for step in range(1, first_part + 1):
        optimizer.zero_grad()
        loss = residuals(inside)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            with torch.no_grad():
                score = (model(2 * grid - 1)[:, 0] - exact).abs().max().item()
        report(step, loss, score)
    polish = torch.optim.LBFGS(
        model.parameters(), lr=1.0, max_iter=5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        polish.zero_grad()
        loss = residuals(inside)
        loss.backward()
        return loss

    for step in range(first_part + 1, steps + 1):
        loss = polish.step(closure)
        report(step, loss.detach(), score)


class Field(nn.Module):
    """A vector field of the plane that a small network describes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y**3)


def integrate(field: nn.Module, y: Tensor, gap: float, count: int) -> Tensor:
    """Return the path of the classical Runge-Kutta method, with the start."""
    path = [y]
    for _ in range(count):
        a = field(y)
        b = field(y + gap / 2 * a)
        c = field(y + gap / 2 * b)
        d = field(y + gap * c)
        y = y + gap / 6 * (a + 2 * b + 2 * c + d)
        path.append(y)
    return torch.stack(path)


def neural_ode(steps: int) -> None:
    """Fit a vector field to pieces of a spiral by differentiating through the integrator."""
    torch.manual_seed(2)
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    gap, count = 0.05, 8
    with torch.no_grad():
        begin = torch.tensor([[2.0, 0.0]])
        path = integrate(lambda y: (y**3) @ matrix, begin, 0.025, 800)[::2, 0]
    field = Field()
    optimizer = torch.optim.RMSprop(field.parameters(), lr=3e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-5)
    report, score = Reporter(steps), None
    for step in range(1, steps + 1):
        at = torch.randint(len(path) - count, (24,))
        guess = integrate(field, path[at], gap, count)
        truth = torch.stack([path[at + i] for i in range(count + 1)])
        loss = (guess - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            with torch.no_grad():
                score = (integrate(field, begin, gap, 100)[:, 0] - path[:101]).abs().mean().item()
        report(step, loss, score)


class Carts:
    """Carts on a plane that are to be driven to the middle and kept there."""

    def __init__(self, count: int, seed: int) -> None:
        self.gen = torch.Generator().manual_seed(seed)
        self.count = count
        self.state = self.fresh()

    def fresh(self) -> Tensor:
        """Return random places and speeds."""
        place = 2 * torch.rand(self.count, 2, generator=self.gen) - 1
        speed = 0.2 * torch.randn(self.count, 2, generator=self.gen)
        return torch.cat([place, speed], dim=1)

    def reset(self) -> Tensor:
        """Start every cart afresh."""
        self.state = self.fresh()
        return self.state

    def step(self, push: Tensor) -> tuple[Tensor, Tensor]:
        """Push every cart and return the new states and the rewards."""
        place, speed = self.state.chunk(2, dim=1)
        speed = 0.9 * speed + 0.15 * push.clamp(-1, 1)
        place = (place + speed).clamp(-2, 2)
        self.state = torch.cat([place, speed], dim=1)
        return self.state, 0.2 * (1 - place.norm(dim=1))


MOVES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def dense(inputs: int, outputs: int, width: int = 48, last: float = 1.0) -> nn.Sequential:
    """Return a network with two hidden layers and orthogonal weights."""
    net = nn.Sequential(
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )
    for layer, gain in ((net[0], 2**0.5), (net[2], 2**0.5), (net[4], last)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return net


def reinforce(steps: int) -> None:
    """Train a policy by the likelihood ratio with a learned baseline, each with its optimizer."""
    torch.manual_seed(3)
    carts, horizon, discount = Carts(24, 30), 12, 0.9
    policy, baseline = dense(4, 5, last=0.1), dense(4, 1)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    baseline_optimizer = torch.optim.Adam(baseline.parameters(), lr=3e-3)
    policy_schedule = lr_scheduler.LinearLR(policy_optimizer, 1.0, 0.1, total_iters=steps)
    report = Reporter(steps)
    for step in range(1, steps + 1):
        state = carts.reset()
        states, logps, rewards, entropy = [], [], [], torch.zeros(())
        for _ in range(horizon):
            choice = torch.distributions.Categorical(logits=policy(state), validate_args=False)
            action = choice.sample()
            states.append(state)
            logps.append(choice.log_prob(action))
            entropy = entropy + choice.entropy().mean() / horizon
            state, reward = carts.step(MOVES[action])
            rewards.append(reward)
        returns, ahead = [], torch.zeros(carts.count)
        for reward in reversed(rewards):
            ahead = reward + discount * ahead
            returns.insert(0, ahead)
        gain = torch.stack(returns)
        value = baseline(torch.stack(states)).squeeze(2)
        advantage = (gain - value).detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        policy_loss = -(torch.stack(logps) * advantage).mean() - 0.01 * entropy
        baseline_loss = F.mse_loss(value, gain)

        policy_optimizer.zero_grad()
        policy_loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy_optimizer.step()
        policy_schedule.step()

        baseline_optimizer.zero_grad()
        baseline_loss.backward()
        baseline_optimizer.step()
        report(step, policy_loss + baseline_loss, torch.stack(rewards).mean().item())


class Memory:
    """A ring of transitions."""

    def __init__(self, size: int) -> None:
        self.size, self.full, self.at = size, 0, 0
        self.state, self.next = torch.zeros(size, 4), torch.zeros(size, 4)
        self.action = torch.zeros(size, dtype=torch.long)
        self.reward = torch.zeros(size)

    def add(self, state: Tensor, action: Tensor, reward: Tensor, following: Tensor) -> None:
        """Store a batch of transitions."""
        where = (self.at + torch.arange(len(state))) % self.size
        self.state[where], self.next[where] = state, following
        self.action[where], self.reward[where] = action, reward
        self.at = (self.at + len(state)) % self.size
        self.full = min(self.size, self.full + len(state))

    def sample(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return random transitions."""
        pick = torch.randint(self.full, (count,))
        return self.state[pick], self.action[pick], self.reward[pick], self.next[pick]


def dqn(steps: int) -> None:
    """Train a double deep Q network with a memory, a slow target and value clipping."""
    torch.manual_seed(4)
    carts, memory, discount = Carts(16, 40), Memory(8000), 0.9
    network = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, amsgrad=True)
    criterion = nn.SmoothL1Loss()

    def act(state: Tensor, explore: float) -> Tensor:
        with torch.no_grad():
            best = network(state).argmax(dim=1)
        anything = torch.randint(5, best.shape)
        return torch.where(torch.rand(best.shape) < explore, anything, best)

    def play(explore: float, time: int) -> float:
        state = carts.reset() if time % 25 == 0 else carts.state
        action = act(state, explore)
        following, reward = carts.step(MOVES[action])
        memory.add(state, action, reward, following)
        return reward.mean().item()

    for time in range(50):
        play(1.0, time)
    report, score = Reporter(steps), 0.0
    for step in range(1, steps + 1):
        explore = max(0.05, 1 - step / (0.6 * steps))
        for turn in range(2):
            score = 0.98 * score + 0.02 * play(explore, 2 * step + turn)
        state, action, reward, following = memory.sample(64)
        value = network(state).gather(1, action[:, None]).squeeze(1)
        with torch.no_grad():
            choice = network(following).argmax(dim=1, keepdim=True)
            aim = reward + discount * target(following).gather(1, choice).squeeze(1)
        loss = criterion(value, aim)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), 100)
        optimizer.step()
        with torch.no_grad():
            for slow, new in zip(target.parameters(), network.parameters(), strict=True):
                slow.lerp_(new, 0.02)
        report(step, loss, score)


class ActorCritic(nn.Module):
    """A Gaussian policy with a free spread, and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = dense(4, 2, last=0.01), dense(4, 1)
        self.spread = nn.Parameter(torch.full((2,), -0.5))

    def choice(self, state: Tensor) -> torch.distributions.Independent:
        """Return the distribution of pushes."""
        normal = torch.distributions.Normal(self.actor(state), self.spread.exp())
        return torch.distributions.Independent(normal, 1)


def ppo(steps: int) -> None:
    """Train a continuous policy by clipped ratios with generalised advantages."""
    torch.manual_seed(5)
    carts, horizon, discount, smooth = Carts(32, 50), 24, 0.95, 0.95
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3, eps=1e-5)
    report, step = Reporter(steps), 0
    while step < steps:
        state = carts.reset()
        states, actions, logps, rewards, values = [], [], [], [], []
        with torch.no_grad():
            for _ in range(horizon):
                choice = model.choice(state)
                action = choice.sample()
                states.append(state)
                actions.append(action)
                logps.append(choice.log_prob(action))
                values.append(model.critic(state).squeeze(1))
                state, reward = carts.step(action)
                rewards.append(reward)
            values.append(model.critic(state).squeeze(1))
            gains, ahead = [], torch.zeros(carts.count)
            for t in reversed(range(horizon)):
                delta = rewards[t] + discount * values[t + 1] - values[t]
                ahead = delta + discount * smooth * ahead
                gains.insert(0, ahead)
        old_state, old_action = torch.cat(states), torch.cat(actions)
        old_logp, advantage = torch.cat(logps), torch.cat(gains)
        aim = advantage + torch.cat(values[:-1])
        mean_reward = torch.stack(rewards).mean().item()
        for _ in range(4):
            for pick in torch.randperm(len(old_state)).split(192):
                for group in optimizer.param_groups:
                    group["lr"] = 1.5e-3 * (1 - step / steps)
                choice = model.choice(old_state[pick])
                ratio = torch.exp(choice.log_prob(old_action[pick]) - old_logp[pick])
                part = advantage[pick]
                part = (part - part.mean()) / (part.std() + 1e-8)
                policy_loss = -torch.minimum(ratio * part, ratio.clamp(0.8, 1.2) * part).mean()
                value_loss = F.mse_loss(model.critic(old_state[pick]).squeeze(1), aim[pick])
                loss = policy_loss + 0.5 * value_loss - 0.001 * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                step += 1
                report(step, loss, mean_reward)
                if step == steps:
                    return


def maml(steps: int) -> None:
    """Learn a start from which one inner step fits a sine, through second derivatives."""
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    inner, tasks, shots = 0.03, 4, 10

    def sines() -> tuple[Tensor, Tensor]:
        height, phase = 0.5 + 1.5 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)
        x = 6 * torch.rand(tasks, 2 * shots, 1) - 3
        return x, height * torch.sin(x + phase)

    def adapted_loss(x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        for _ in range(2):
            fit = F.mse_loss(functional_call(model, weights, (x[:shots],)), y[:shots])
            grads = torch.autograd.grad(fit, list(weights.values()), create_graph=True)
            weights = {
                name: weight - inner * grad
                for (name, weight), grad in zip(weights.items(), grads, strict=True)
            }
        return F.mse_loss(functional_call(model, weights, (x[shots:],)), y[shots:])

    report = Reporter(steps)
    for step in range(1, steps + 1):
        xs, ys = sines()
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(xs, ys, strict=True):
            loss = adapted_loss(x, y) / tasks
            loss.backward()
            total += loss.item()
        optimizer.step()
        report(step, total)


PROGRAMS = {f.__name__: f for f in (pinn, neural_ode, reinforce, dqn, ppo, maml)}


def main() -> None:
    """Run the program named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PROGRAMS)}}} [STEPS]")
    PROGRAMS[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()
