"""Compiled models under `tui-trainer run`: the same graphs, breaks and compilations as alone."""

from __future__ import annotations

import shutil
import textwrap

import pytest

from tests.run.test_ranks import RUN, LaunchFolder
from tui_trainer.protocol import schema
from tui_trainer.store.reader import StoredHistory

SCRIPT = """
    import os, torch, torch.distributed as dist
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters
    # As little as can be for the C++ compiler, which takes two seconds for each kernel.
    inductor.compile_threads = 1
    inductor.cpp_cache_precompile_headers = inductor.cpp.vec_isa_ok = False
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    else:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    torch.manual_seed(0)
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU())
        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            if BREAK:
                torch._dynamo.graph_break()
            return x + self.mlp(x)
    class Layer(torch.nn.Module):
        # Each process takes a second less to compile it than a block with attention.
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 16, bias=False)
        def forward(self, x):
            return self.linear(x)
    BREAK = "break" in os.environ["HOW"]
    first = Block() if BREAK else Layer()
    between = torch.nn.GELU() if BREAK else torch.nn.Identity()
    model = torch.nn.Sequential(first, between, torch.nn.Linear(16, 3))
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(model, backend=os.environ["BACKEND"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(rank)
    losses = []
    for step in range(8):
        x = torch.randn(4, 5, 16)
        loss = compiled(x).mean(1).logsumexp(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
        if step % 4 == 3:
            with torch.no_grad():
                compiled(x)
    print("SEEN", rank, losses[-1].hex())
    # The forward of DDP breaks the graph; frames are then also those that are only looked at.
    for kind in ("stats", "graph_break") + (() if ranks > 1 else ("frames",)):
        for name, count in sorted(counters[kind].items()):
            print("COUNTED", rank, kind, name.splitlines()[0], count)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("backend", "how", "ranks"),
    [
        ("inductor", "whole", 1),
        ("aot_eager", "break", 1),
        ("aot_eager", "whole", 2),
    ],
)
def test_graphs_breaks_and_compilations_are_the_same(tmp_path, backend, how, ranks):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    place = LaunchFolder(tmp_path)
    (tmp_path / "compiled.py").write_text(textwrap.dedent(SCRIPT))
    variables = {
        "BACKEND": backend,
        "HOW": how,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    try:
        for process in place.start(ranks, "compiled.py", **variables):
            assert process.wait(280) == 0, place.errors(0)
        alone = place.printed("COUNTED", ranks) + place.printed("SEEN", ranks)
        command = (*RUN, "--name", "r", "--budget", "0", "compiled.py")
        for process in place.start(ranks, *command, **variables):
            assert process.wait(280) == 0, place.errors(0)
        traced = place.printed("COUNTED", ranks) + place.printed("SEEN", ranks)
    finally:
        place.end()
    assert traced == alone
    assert any("unique_graphs" in line for line in alone)
    broken = any(line.split()[2] == "graph_break" for line in alone)
    assert broken == (how == "break" or ranks > 1)
    (table,) = StoredHistory(place.runs / "r", ended=True).tables_named(schema.STEP)
    assert table.rows == 8
