"""Frameworks at their installed versions: `make test-frameworks` installs them.

Each program runs by itself, under `tui-trainer run`, and with the callback. The results are the
same to the last bit, and what is recorded is what the framework itself reports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.cli.calling import COMMAND
from tests.integrations.seen import LENGTH, compared

HUGGING_FACE = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
set_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2))

class Data(torch.utils.data.Dataset):
    def __init__(self, n):
        g = torch.Generator().manual_seed(3)
        self.x = (torch.randint(0, 31, (n, 1), generator=g) + torch.arange(8) * 3) % 31
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i]}

arguments = TrainingArguments(
    "out", per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2,
    learning_rate=2e-3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
    disable_tqdm=True, seed=0, eval_strategy="steps", eval_steps=3,
)
callbacks = []
if "callback" in sys.argv:
    from tui_trainer.integrations.huggingface import TuiTrainerCallback
    callbacks = [TuiTrainerCallback(name="r")]
trainer = Trainer(
    model, arguments, train_dataset=Data(34), eval_dataset=Data(9), callbacks=callbacks
)
trainer.train()
for entry in trainer.state.log_history:
    if "eval_loss" in entry:
        print("EVAL", entry["step"], entry["eval_loss"])
    elif "loss" in entry:
        print("STEP", entry["step"], entry["loss"], entry["grad_norm"])
print("FINAL", trainer.state.max_steps, sum(p.double().sum().item() for p in model.parameters()))
"""

LIGHTNING = """
import sys, warnings, torch, lightning as L
from torch.utils.data import DataLoader, TensorDataset
warnings.simplefilter("ignore")
L.seed_everything(0, verbose=False)

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(16, 4)
        self.losses = []
    def training_step(self, batch, i):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        self.losses.append(loss.item() / 2)
        return loss
    def on_before_optimizer_step(self, optimizer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        print("STEP", self.global_step + 1, sum(self.losses), norm.item())
        self.losses.clear()
    def validation_step(self, batch, i):
        x, y = batch
        output = self.net(x)
        self.log("val_loss", torch.nn.functional.cross_entropy(output, y))
        self.log("val_accuracy", (output.argmax(1) == y).float().mean())
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            values = self.trainer.callback_metrics
            print("EVAL", self.global_step, values["val_loss"].item())
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)

x = torch.randn(160, 16)
y = x[:, :4].argmax(1)
callbacks = []
if "callback" in sys.argv:
    from tui_trainer.integrations.lightning import TuiTrainerCallback
    callbacks = [TuiTrainerCallback(name="r")]
trainer = L.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
    gradient_clip_val=0.5, accumulate_grad_batches=2, log_every_n_steps=1,
    enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
)
module = Module()
data = TensorDataset(x, y)
trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 32))
print("FINAL", trainer.global_step, sum(p.double().sum().item() for p in module.parameters()))
"""

ACCELERATE = """
import sys, torch
from accelerate import Accelerator
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), 4)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
if "callback" in sys.argv:
    import tui_trainer
    run = tui_trainer.watch(model, optimizer, name="r")
step, losses = 0, []
for epoch in range(2):
    for (x,) in data:
        with accelerator.accumulate(model):
            loss = model(x).pow(2).mean()
            losses.append(loss.item() / 2)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                step += 1
                print("STEP", step, sum(losses), norm.item())
                losses.clear()
            optimizer.step()
            optimizer.zero_grad()
print("FINAL", step, sum(p.double().sum().item() for p in model.parameters()))
"""

PROGRAMS = {
    "transformers": (HUGGING_FACE, {"total_steps": 10, "steps_per_epoch": 5, "items_per_step": 8}),
    "lightning": (LIGHTNING, {"total_steps": 15, "steps_per_epoch": 5, "items_per_step": 32}),
    "accelerate": (ACCELERATE, {"total_steps": 16, "steps_per_epoch": 8, "items_per_step": 8}),
}


def execute(place, *command):
    environment = {
        **os.environ,
        "TUI_TRAINER_RUNS_DIR": str(place / "runs"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done


def printed(text, word):
    return [line.split()[1:] for line in text.splitlines() if line.startswith(word + " ")]


@pytest.mark.slow
@pytest.mark.timeout(2400)  # five processes that import a framework
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_framework(tmp_path, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make test-frameworks")
    source, known = PROGRAMS[name]
    (tmp_path / "train.py").write_text(source)
    alone = execute(tmp_path, sys.executable, "train.py").stdout
    final = printed(alone, "FINAL")

    done = execute(tmp_path, *COMMAND, "run", "--json", "--name", "plain", "train.py")
    assert printed(done.stderr, "FINAL") == final
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines if line.get("kind") == "fault"] == []
    found = check(lines, alone, known)

    if name != "accelerate":  # under the command the callback has nothing to do
        done = execute(
            tmp_path, *COMMAND, "run", "--json", "--name", "both", "train.py", "callback"
        )
        check([json.loads(line) for line in done.stdout.splitlines()], alone, known)
    watched = execute(tmp_path, sys.executable, "train.py", "callback")
    assert printed(watched.stdout, "FINAL") == final
    exported = execute(tmp_path, *COMMAND, "export", "r", "--format", "jsonl").stdout
    lines = [json.loads(line) for line in exported.splitlines()]
    assert lines[-1]["reason"] == "finished"
    check(lines, alone, known)
    compared(name, *found)


def check(lines, alone, known):
    """Compare what was recorded with what the framework printed; returns what was compared."""
    found = set(LENGTH)
    header = [line for line in lines if line["type"] == "run"][-1]
    assert {name: header[name] for name in known} == known
    assert len(header["optimizers"]) == 1
    steps = [line for line in lines if line["type"] == "step"]
    assert len(steps) == int(printed(alone, "FINAL")[0][0]) == known["total_steps"]
    for number, loss, norm in printed(alone, "STEP"):
        step = steps[int(number) - 1]
        assert step["clip"]["norm_before"] == pytest.approx(float(norm), rel=1e-4)
        # Trainer prints the mean of the micro-batches' losses, in four digits.
        assert step["loss"] == pytest.approx(float(loss), abs=2e-3)
        found.add("loss")
    evaluated = {line["step"]: line["loss"] for line in lines if line["type"] == "validation"}
    expected = {int(number): float(loss) for number, loss in printed(alone, "EVAL")}
    assert evaluated == pytest.approx(expected, rel=1e-4)
    logged = [line for line in lines if line["type"] == "logged"]
    for number, loss, _ in printed(alone, "STEP"):
        at = [line["values"] for line in logged if line["step"] == int(number)]
        if at and "loss" in at[0]:
            assert at[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    return found | ({"evaluation"} if expected else set()) | ({"logged"} if logged else set())


PROCESSES = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model, optimizer = accelerator.prepare(model, optimizer)
torch.manual_seed(accelerator.process_index)
for step in range(6):
    x = torch.randn(8, 4)
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print("LOSS", f"{accelerator.process_index}/{step + 1}/{loss.item()}", flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_accelerate_in_several_processes(tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed: make test-frameworks")
    (tmp_path / "train.py").write_text(PROCESSES)
    done = execute(tmp_path, *COMMAND, "run", "--json", "--nproc", "2", "train.py")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {
        (line["rank"], line["step"]): line["loss"] for line in lines if line.get("table") == "ranks"
    }
    # Both processes print to one stream, in which their lines may run together.
    expected = {
        (int(rank), int(step)): float(loss)
        for rank, step, loss in re.findall(r"(\d)/(\d)/([\d.e-]+)", done.stderr)
    }
    assert len(expected) == 12
    assert found == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["reason"] == "finished"
    compared("accelerate", "ranks")


ADAPTED = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)
kind = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora="dora" in sys.argv)
model = get_peft_model(LlamaForCausalLM(config), kind)
layer = model.base_model.model.model.layers[0].self_attn.q_proj
first = layer.base_layer.weight.detach().clone()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
for step in range(5):
    x = (torch.randint(0, 31, (4, 1)) + torch.arange(8)) % 31
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    print("STEP", step + 1, loss.item(), norm.item())
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    used = layer(torch.eye(32)).t()
print("WEIGHTS", *[p.double().sum().item().hex() for p in model.parameters()])
print("FINAL", used.norm().item(), ((used - first).norm() / first.norm()).item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_peft(tmp_path, kind):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed: make test-frameworks")
    (tmp_path / "train.py").write_text(ADAPTED)
    alone = execute(tmp_path, sys.executable, "train.py", kind).stdout
    done = execute(tmp_path, *COMMAND, "run", "--json", "train.py", kind)
    assert printed(done.stderr, "WEIGHTS") == printed(alone, "WEIGHTS")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines if line.get("kind") == "fault"] == []
    steps = [line for line in lines if line["type"] == "step"]
    expected = [tuple(map(float, line)) for line in printed(alone, "STEP")]
    found = [(step["step"], step["loss"], step["clip"]["norm_before"]) for step in steps]
    assert found == [pytest.approx(line, rel=1e-5) for line in expected]
    (layer,) = steps[-1]["attention"]
    norm, drift = (float(value) for value in printed(done.stderr, "FINAL")[0])
    assert layer["norm_q"] == pytest.approx(norm, rel=1e-5)
    assert layer["drift_q"] == pytest.approx(drift, rel=1e-4)
    assert layer["drift_k"] == 0
    compared("peft", "steps", "loss", "attention")
