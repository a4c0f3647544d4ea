"""Programs of other kinds that train well: `others.py NAME [STEPS]`.

Graphs, reinforcement learning, regression, recommendation, and several ways to use a network.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import deque

import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F


def report(step: int, steps: int, loss: torch.Tensor) -> None:
    if step in (1, steps) or step % 100 == 0:
        print("step", step, "loss", loss.item())


def citations() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features of each node, adjacency, class): nodes of a class are linked more often."""
    classes = torch.randint(4, (300,))
    same = classes.unsqueeze(0) == classes.unsqueeze(1)
    links = torch.rand(300, 300) < torch.where(same, 0.06, 0.005)
    links = (links | links.T).fill_diagonal_(True).float()
    features = F.one_hot(classes, 4).float() @ torch.randn(4, 32) + 2 * torch.randn(300, 32)
    return features, links, classes


def gcn(steps: int) -> None:
    """All nodes are in every batch; only a few have a label; dropout and weight decay."""
    features, links, classes = citations()
    degrees = links.sum(1).rsqrt()
    passing = degrees.unsqueeze(1) * links * degrees.unsqueeze(0)
    first, second = nn.Linear(32, 16, bias=False), nn.Linear(16, 4, bias=False)
    model = nn.ModuleList((first, second))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    known = torch.randperm(300)[:60]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        hidden = F.dropout(F.relu(passing @ first(features)), 0.5)
        loss = F.nll_loss((passing @ second(hidden)).log_softmax(1)[known], classes[known])
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class GraphAttention(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(before, after)))
        self.a = nn.Parameter(nn.init.xavier_normal_(torch.empty(2, after, 1)))

    def forward(self, x: torch.Tensor, links: torch.Tensor) -> torch.Tensor:
        h = x @ self.weight
        scores = F.leaky_relu(h @ self.a[0] + (h @ self.a[1]).T, 0.2)
        scores = scores.masked_fill(links == 0, float("-inf"))
        return F.dropout(scores.softmax(1), 0.4, self.training) @ h


class GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(GraphAttention(32, 8) for _ in range(4))
        self.out = GraphAttention(32, 4)

    def forward(self, x: torch.Tensor, links: torch.Tensor) -> torch.Tensor:
        hidden = F.elu(torch.cat([head(x, links) for head in self.heads], 1))
        return self.out(hidden, links).log_softmax(1)


def gat(steps: int) -> None:
    """Attention over the neighbours of a node; the same whole graph in every step."""
    features, links, classes = citations()
    model = GAT()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=5e-4)
    known = torch.randperm(300)[:100]
    for step in range(1, steps + 1):
        model.train()
        optimizer.zero_grad()
        loss = F.nll_loss(model(features, links)[known], classes[known])
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class CartPole:
    """The usual cart and pole, with Euler's steps of 0.02 s."""

    def reset(self) -> torch.Tensor:
        self.state = [random.uniform(-0.05, 0.05) for _ in range(4)]
        return torch.tensor(self.state)

    def step(self, action: int) -> tuple[torch.Tensor, bool]:
        x, speed, angle, turning = self.state
        force = 10.0 if action else -10.0
        sine, cosine = math.sin(angle), math.cos(angle)
        pushed = (force + 0.05 * turning**2 * sine) / 1.1
        turned = (9.8 * sine - cosine * pushed) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        moved = pushed - 0.05 * turned * cosine / 1.1
        self.state = [x + 0.02 * speed, speed + 0.02 * moved, angle + 0.02 * turning]
        self.state.append(turning + 0.02 * turned)
        return torch.tensor(self.state), abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21


def returns_of(rewards: int) -> torch.Tensor:
    discounted = torch.tensor([(1 - 0.99 ** (rewards - at)) / 0.01 for at in range(rewards)])
    return (discounted - discounted.mean()) / (discounted.std() + 1e-6)


def reinforce(steps: int) -> None:
    """One step after each episode; a loss that does not fall while the policy improves."""
    policy = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    game = CartPole()
    for step in range(1, steps + 1):
        state, done, chances = game.reset(), False, []
        while not done and len(chances) < 60:
            choice = Categorical(logits=policy(state))
            action = choice.sample()
            chances.append(choice.log_prob(action))
            state, done = game.step(int(action))
        loss = -(torch.stack(chances) * returns_of(len(chances))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Linear(4, 64)
        self.action, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.affine(state))
        return self.action(hidden), self.value(hidden)


def actor_critic(steps: int) -> None:
    """Losses of an actor and a critic, summed over an episode."""
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    game = CartPole()
    for step in range(1, steps + 1):
        state, done, chances, values = game.reset(), False, [], []
        while not done and len(chances) < 60:
            logits, value = model(state)
            choice = Categorical(logits=logits)
            action = choice.sample()
            chances.append(choice.log_prob(action))
            values.append(value[0])
            state, done = game.step(int(action))
        wanted = returns_of(len(chances))
        judged = torch.stack(values)
        loss = -(torch.stack(chances) * (wanted - judged.detach())).sum()
        loss = loss + F.smooth_l1_loss(judged, wanted, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def deep_q(steps: int) -> None:
    """A target network that follows slowly and is in no optimizer; a memory of transitions."""
    policy = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    target = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, amsgrad=True)
    memory: deque[tuple[torch.Tensor, int, torch.Tensor, float]] = deque(maxlen=2000)
    game, taken, step = CartPole(), 0, 0
    state = game.reset()
    while step < steps:
        with torch.no_grad():
            known = int(policy(state).argmax())
        action = random.randrange(2) if random.random() < math.exp(-taken / 200) else known
        taken += 1
        after, done = game.step(action)
        memory.append((state, action, after, float(done)))
        state = game.reset() if done else after
        if len(memory) < 64:
            continue
        step += 1
        before, actions, afterwards, ended = zip(*random.sample(memory, 64), strict=True)
        q = policy(torch.stack(before)).gather(1, torch.tensor(actions).unsqueeze(1))[:, 0]
        with torch.no_grad():
            best = target(torch.stack(afterwards)).amax(1)
            wanted = 1 + 0.95 * best * (1 - torch.tensor(ended))
        loss = F.smooth_l1_loss(q, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(policy.parameters(), 100)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), policy.parameters(), strict=True):
                old.lerp_(new, 0.01)
        report(step, steps, loss)


def regression(steps: int) -> None:
    """A polynomial of degree 4, fitted by a single linear layer."""
    weights = torch.randn(4, 1) * 5
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        x = torch.randn(32, 1)
        powers = torch.cat([x**power for power in range(1, 5)], 1)
        powers = powers / torch.tensor([1.0, 3.0, 15.0, 105.0]).sqrt()
        optimizer.zero_grad()
        loss = F.smooth_l1_loss(model(powers), powers @ weights + 3)
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def recommender(steps: int) -> None:
    """Products of two embeddings; a batch touches few of their rows."""
    likes, has = torch.randn(400, 6), torch.randn(300, 6)
    users, items = nn.Embedding(400, 12), nn.Embedding(300, 12)
    nn.init.normal_(users.weight, std=0.1)
    nn.init.normal_(items.weight, std=0.1)
    model = nn.ModuleList((users, items))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    for step in range(1, steps + 1):
        user, item = torch.randint(400, (512,)), torch.randint(300, (512,))
        rating = (likes[user] * has[item]).sum(1) / 2.4
        loss = F.mse_loss((users(user) * items(item)).sum(1), rating)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def spirals(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(3, (size,))
    along = torch.rand(size)
    angles = 4 * along + labels * 2.094 + 0.15 * torch.randn(size)
    return torch.stack((along * angles.cos(), along * angles.sin()), 1) * 1.7, labels


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def distillation(steps: int) -> None:
    """A teacher trains first; then it is frozen, in `eval()`, and a student follows its outputs."""
    teacher, student = network(64), network(16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for step in range(1, steps // 2 + 1):
        x, labels = spirals(128)
        loss = F.cross_entropy(teacher(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for step in range(1, steps // 2 + 1):
        x, labels = spirals(128)
        with torch.no_grad():
            soft = (teacher(x) / 2).softmax(1)
        outputs = student(x)
        loss = 0.3 * F.cross_entropy(outputs, labels)
        loss = loss + 0.7 * 4 * F.kl_div((outputs / 2).log_softmax(1), soft, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class Experts(nn.Module):
    """A gate sends each row to the best of four experts, some of which see none in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2, 4)
        self.experts = nn.ModuleList(network(24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x)
        # Without noise an expert may never be tried.
        chances = (scores + torch.randn_like(scores)).softmax(1)
        weight, chosen = chances.max(1)
        outputs = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == number)[:, 0]
            if len(rows):
                outputs = outputs.index_add(0, rows, weight[rows].unsqueeze(1) * expert(x[rows]))
        return outputs


def mixture_of_experts(steps: int) -> None:
    model = Experts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        x, labels = spirals(64)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def frozen_then_unfrozen(steps: int) -> None:
    """A new head alone trains first; halfway the body is released at a tenth of the rate."""
    body, head = network(48)[:-1], nn.Linear(48, 3)
    model = nn.Sequential(body, head)
    body.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, steps + 1):
        if step == steps // 2:
            body.requires_grad_(True)
            optimizer.add_param_group({"params": body.parameters(), "lr": 0.03})
        x, labels = spirals(128)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


def two_tasks(steps: int) -> None:
    """A shared body, two heads, two losses of one sum; mixed examples."""
    body = nn.Sequential(nn.Linear(2, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
    kind, length = nn.Linear(48, 3), nn.Linear(48, 1)
    model = nn.ModuleDict({"body": body, "kind": kind, "length": length})
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        x, labels = spirals(128)
        hot = F.one_hot(labels, 3).float()
        share, other = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(128)
        mixed = share * x + (1 - share) * x[other]
        hidden = body(mixed)
        loss = F.cross_entropy(kind(hidden), share * hot + (1 - share) * hot[other])
        loss = loss + F.mse_loss(length(hidden)[:, 0], mixed.norm(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


PROGRAMS = (
    gcn, gat, reinforce, actor_critic, deep_q, regression, recommender, distillation,
    mixture_of_experts, frozen_then_unfrozen, two_tasks,
)  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(50)
    random.seed(50)
    program = {each.__name__: each for each in PROGRAMS}[sys.argv[1]]
    program(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
