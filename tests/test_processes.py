"""Forked processes import PyTorch, and what needs it, as processes that start cold do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.cli.calling import call

SCRIPT = """
from torch import nn
from torch.nn import functional as F
net = nn.Linear(8, 4)
optimizer = torch.optim.SGD(net.parameters(), 0.05)
for step in range(10):
    x = torch.randn(16, 8)
    optimizer.zero_grad()
    F.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
    optimizer.step()
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "first",
    [
        "from tui_trainer.models import gpt",
        "import tui_trainer.models.gpt",
        "import functorch",
        "import torch.nn",
    ],
)
def test_torch_is_traced_whatever_imports_it_first(first: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(f"{first}\nimport torch\n{SCRIPT}")
    done = call("check", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "train.py: no findings in 10 steps\n"), done.stderr


SAVING = """
torch.manual_seed(0)
for step in range(4):
    optimizer.zero_grad()
    net(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    if step == 1:
        save_file(net.state_dict(), "weights.safetensors")
"""


def test_torch_is_traced_where_safetensors_imports_it_first(tmp_path: Path) -> None:
    """Its module is half imported then; a forked process would have all of it."""
    script = f"from safetensors.torch import save_file\nimport torch\n{SCRIPT}{SAVING}"
    (tmp_path / "train.py").write_text(script)
    done = call("run", "--json", "--runs-dir", "runs", "train.py", cwd=tmp_path, cold=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [line for line in lines if line["type"] == "step"]
    assert len(steps) == 14
    saved = [each["step"] for each in steps if each["phase_ms"].get("checkpoint")]
    assert saved in ([12], [13])


HIDDEN = """
import sys
from tests.fork_server import HIDDEN
hidden = sys.meta_path[0].modules
print(*(name for name in hidden if name.partition(".")[0] in set(HIDDEN) - {"torch"}))
"""
WITHOUT_TORCH = """
import importlib, sys

class Needed(Exception):
    pass

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Needed

sys.meta_path.insert(0, Finder())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Needed:
        continue
    print(name)
"""


@pytest.mark.skipif(processes.COLD, reason="no process is forked")
def test_only_what_imports_torch_is_hidden_with_it() -> None:
    """Any other would bring PyTorch with it, but not where a process starts cold."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", HIDDEN]
    done = processes.run(command, cwd=root, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "tui_trainer.run.progress" in names
    command = [sys.executable, "-c", WITHOUT_TORCH, *names]
    done = processes.run(command, cold=True, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
