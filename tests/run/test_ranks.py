"""Several training processes as one run: ranks over gloo, and children of a script."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from tests import processes
from tests.integrations.seen import compared
from tests.ports import ReservedPort
from tests.runs.starting import until
from tui_trainer.client.connection import RunClient
from tui_trainer.protocol import schema
from tui_trainer.protocol.actions import (
    Back,
    Branch,
    ChangeBreakpoint,
    ChangeSettings,
    KeepSnapshots,
    Pause,
    Resume,
    Step,
    StepPhase,
    Stop,
    UndoSettings,
)
from tui_trainer.protocol.attention import ExamineAttention
from tui_trainer.protocol.autograd import CheckGradient, DescribeGraph
from tui_trainer.protocol.events import Clip, Notice
from tui_trainer.protocol.framing import read_as
from tui_trainer.protocol.inspection import (
    DescribeUse,
    ExplainUpdate,
    ListTensors,
    OfRank,
    ReadTensor,
    Summarize,
    TensorRef,
)
from tui_trainer.protocol.ranks import MAX_BYTES, Go, to_rank
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.protocol.settings import SettingChange
from tui_trainer.protocol.travel import ExperimentResult, MeasureLandscape, WhatIf
from tui_trainer.record.recorder import Recorder
from tui_trainer.run import rank_server
from tui_trainer.run.rank_server import Peer, RankServer, ending_of
from tui_trainer.runs.registry import resolve
from tui_trainer.store.events import StoredEvents
from tui_trainer.store.reader import StoredHistory

SCRIPT = """
    import os, sys, time
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    model = DDP(torch.nn.Sequential(*layers))
    torch.manual_seed(0 if "SAME" in os.environ else rank)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    steps, pause = int(os.environ["STEPS"]), float(os.environ.get("PAUSE", "0"))
    for step in range(1, steps + 1):
        x = torch.randn(16, 8)
        if rank == 1:
            time.sleep(pause)
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.tensor(0.0)
        if rank == 0 or "ALONE" not in os.environ:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if rank == 1 and step == int(os.environ.get("PART", "0")):
            model.module[0].weight.data.view(-1)[3] += 1e-6
        if step % 10 == 0:
            print("SEEN", rank, step, loss.item().hex(), norm.item().hex(), flush=True)
    weights = [p.double().sum().item().hex() for p in model.parameters()]
    print("WEIGHTS", rank, *weights, flush=True)
    dist.destroy_process_group()
"""


class LaunchFolder:
    def __init__(self, path):
        self.path = path
        self.runs = path / "runs"
        self.started = []
        self.ports = []
        (path / "train.py").write_text(textwrap.dedent(SCRIPT))

    def start(self, ranks, *command, each=lambda rank: {}, **variables):
        """The processes of a launch, as a launcher would start them; `each(rank)`: variables of
        one of them."""
        self.ports.append(ReservedPort())
        for rank in range(ranks):
            environment = {
                **os.environ,
                **variables,
                "TUI_TRAINER_RUNS_DIR": str(self.runs),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.ports[-1].number),
                **each(rank),
            }
            with (
                open(self.path / f"out-{rank}.txt", "w") as out,
                open(self.path / f"err-{rank}.txt", "w") as err,
            ):
                process = processes.Popen(
                    [sys.executable, *command],
                    cwd=self.path,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                )
            self.started.append(process)
        return self.started[-ranks:]

    def printed(self, word, ranks):
        """Lines of all ranks that begin with `word`."""
        lines = [
            line
            for rank in range(ranks)
            for line in (self.path / f"out-{rank}.txt").read_text().splitlines()
        ]
        return sorted(line for line in lines if line.startswith(word))

    def errors(self, rank):
        return (self.path / f"err-{rank}.txt").read_text()

    def run(self, name):
        return resolve(name, self.runs)

    def end(self):
        for process in self.started:
            process.kill()
            process.wait()
        for port in self.ports:
            port.release()

    def tables(self, name):
        history = StoredHistory(self.runs / name, ended=True)
        return {t.table.rank: t for t in history.tables_named(schema.RANKS)}


@pytest.fixture
def place(tmp_path):
    found = LaunchFolder(tmp_path)
    yield found
    found.end()


RANK_REQUESTS = (
    ListTensors(),
    ReadTensor(TensorRef("0.weight")),
    ExplainUpdate("0.weight", (0, 0)),
    DescribeUse(),
    DescribeGraph(),
    CheckGradient("0.weight", ((0, 0),)),
)
RUN = ("-P", "-m", "tui_trainer", "run", "--plain")


def column(table, name):
    block = np.concatenate([block.value for block in table.blocks()])
    return block[:, schema.RANK_INDEX[name]]


@pytest.mark.slow
def test_ranks_train_as_without_us_and_are_recorded_as_one_run(place):
    for process in place.start(2, "train.py", STEPS="40"):
        assert process.wait(240) == 0
    alone = place.printed("", 2)
    for process in place.start(2, *RUN, "--name", "both", "--budget", "0", "train.py", STEPS="40"):
        assert process.wait(240) == 0, place.errors(0) + place.errors(1)
    assert place.printed("WEIGHTS", 2) + place.printed("SEEN", 2) == [
        line for word in ("WEIGHTS", "SEEN") for line in alone if line.startswith(word)
    ]
    assert [path.name for path in place.runs.iterdir() if path.name != ".launches"] == ["both"]

    tables = place.tables("both")
    assert sorted(tables) == [0, 1]
    for line in place.printed("SEEN", 2):
        _, rank, step, loss, norm = line.split()
        table, at = tables[int(rank)], int(step) - 1
        assert table.rows == 40
        assert column(table, "loss")[at] == np.float32(float.fromhex(loss))
        assert column(table, "grad_norm_preclip")[at] == pytest.approx(
            float.fromhex(norm), rel=1e-5
        )
        assert column(table, "phase_ms.backward")[at] > 0
        parts = [name for name in schema.RANK_INDEX if name.startswith("phase_ms.")]
        total = sum(np.nan_to_num(column(table, name)[at]) for name in parts)
        assert total == pytest.approx(column(table, "step_ms")[at], rel=0.01)
    assert np.isfinite(column(tables[1], "lag_ms")).all()
    assert (column(tables[0], "lag_ms") == 0).all()
    assert column(tables[1], "host_bytes")[0] > 1e6
    info = StoredHistory(place.runs / "both", ended=True).store.info()
    assert [(p.rank, p.state) for p in info.processes] == [(0, "finished"), (1, "finished")]
    compared("ddp", "steps", "loss", "ranks")


@pytest.mark.slow
def test_replicas_that_part_are_named_within_one_cadence(place):
    command = (*RUN, "--name", "parted", "train.py")
    for process in place.start(2, *command, STEPS="120", PART="70"):
        assert process.wait(240) == 0, place.errors(0)
    expected = (
        "the ranks' weights diverge: the weights of rank 1 differ from those of the other ranks "
        "after step 101; they were equal after step 51"
    )
    found = [line for line in place.printed("step 1", 1) if "weights" in line]
    assert found == [f"step 101: error: {expected}"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("ALONE", "one rank clips its gradients alone"),
        ("SAME", "all ranks have the same batches"),
    ],
)
def test_rank_that_clips_alone_and_ranks_with_the_same_batches_are_named(place, variable, expected):
    command = (*RUN, "--name", "wrong", "train.py")
    for process in place.start(2, *command, STEPS="60", **{variable: "1"}):
        assert process.wait(240) == 0, place.errors(0)
    lines = place.printed("step ", 1)
    assert [line for line in lines if expected in line], lines


def look_into_ranks(client):
    """All that a rank other than 0 can be asked, of a run that is paused."""

    until(lambda: _held(client, 2), "both ranks are held")
    weight = TensorRef("0.weight")
    own, other = (client.inspect(OfRank(rank, Summarize(weight))) for rank in (0, 1))
    assert (own.rank, other.rank) == (0, 1)
    assert other.moment == f"{own.moment}, rank 1"
    assert own.result.statistics == other.result.statistics  # replicas
    client.inspect(OfRank(1, ExplainUpdate("0.weight", (0, 0))))  # from now on it is observed
    step = client.snapshot.status.step
    assert client.command(Step(2)).ok  # the first may be in its middle already
    until(lambda: _held(client, 2) and client.snapshot.status.step == step + 2, "two steps more")
    batches = [client.inspect(OfRank(rank, Summarize(TensorRef("0", "input")))) for rank in (0, 1)]
    assert batches[0].result.statistics != batches[1].result.statistics
    done = {type(request).__name__: client.inspect(OfRank(1, request)) for request in RANK_REQUESTS}
    assert {name for name, answer in done.items() if answer.state != "done"} == set()
    data = done["ReadTensor"].result
    assert len(data.data) == data.total == 8 * 16 * 4
    update = done["ExplainUpdate"].result
    assert update.difference <= 4 * update.precision
    refused = client.inspect(OfRank(1, ExamineAttention()))
    assert (refused.state, refused.rank) == ("failed", 1)
    absent = client.inspect(OfRank(7, ListTensors()))
    assert (absent.message, absent.hint) == ("rank 7 is not connected", "connected are 0, 1")
    changes = (SettingChange("lr", 0.1),)
    commands = ChangeSettings(changes), UndoSettings(), Back(), KeepSnapshots(1 << 20)
    for action in (*commands, Branch(changes)):
        ack = client.command(action)
        assert not ack.ok, action
        assert ack.message.startswith("this run trains in 2 processes"), ack
    experiment = client.inspect(WhatIf(changes))
    assert experiment.state == "failed"
    assert experiment.message.startswith("the steps of a script cannot be made twice"), experiment
    along = client.inspect(MeasureLandscape("random", 3, 0.1))
    assert isinstance(along.result, ExperimentResult), along
    assert f"on the batch of step {along.step}" in along.result.text
    assert all(map(math.isfinite, along.result.curves[0].loss))


@pytest.mark.slow
def test_a_breakpoint_compares_ranks_and_the_paused_run_stops(place):
    """They train on different data, so that their losses differ in every step."""
    condition = ("--break", "rank(1).loss != loss")
    started = place.start(2, *RUN, "--name", "two", *condition, "train.py", STEPS="1000000")
    run = until(lambda: place.runs.is_dir() and _listening(place, "two"), "the run listens")
    with RunClient.connect(run, "test", read_only=False) as client:

        def stopped_at():
            client.poll()
            return client.snapshot.status.stopped_at

        stop = until(stopped_at, "the condition is met")
        assert stop.condition == "rank(1).loss != loss"
        assert stop.text.startswith("loss of rank 1 ")
        assert client.command(ChangeBreakpoint(1, enabled=False)).ok  # steps meet it as well
        look_into_ranks(client)
        assert client.command(Stop()).ok
        for process in started:
            assert process.wait(240) == 0, place.errors(0) + place.errors(1)


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_boundary_and_a_killed_one_is_named(place):
    started = place.start(
        4, *RUN, "--name", "four", "--paused", "train.py", STEPS="1000000", PAUSE="0.01"
    )
    run = until(lambda: place.runs.is_dir() and _listening(place, "four"), "the run listens")
    with RunClient.connect(run, "test", read_only=False) as client:

        def command(action):
            assert client.command(action).ok

        def held(where):
            client.poll()
            status = client.snapshot.status
            places = {(at.step, at.phase) for at in status.processes}
            ready = len(status.processes) == 4 and all(at.held for at in status.processes)
            return ready and len(places) == 1 and places == {where} and status.state == "paused"

        until(lambda: held((1, "data")), "all ranks are held before the first step")
        for phase in ("zero_grad", "forward"):
            seen = until(lambda: _step_phase(client, command), f"one phase, to {phase}")
            assert seen
        command(Step(3))
        until(lambda: held((3, "step")), "three steps")
        command(Resume())
        for _ in range(3):
            until(lambda: _running_on(client), "steps are made")
            command(Pause())
            until(lambda: _together(client), "all ranks are held at one boundary")
            command(Resume())
        until(lambda: _running_on(client), "steps are made")
        os.kill(started[2].pid, signal.SIGKILL)
    for process in started:
        process.wait(240)
    assert started[0].returncode == 1
    reported = place.run("four").reported
    assert reported.state == "crashed"
    assert reported.reason.startswith("rank 2 ")
    assert " at step " in reported.reason


def _listening(place, name):
    try:
        run = place.run(name)
    except Exception:
        return None
    return run if run.live and (run.directory / "run.sock").exists() else None


def _held(client, ranks):
    client.poll()
    at = client.snapshot.status.processes
    return len(at) == ranks and all(process.held for process in at)


def _together(client):
    client.poll()
    at = client.snapshot.status.processes
    return len(at) == 4 and all(p.held for p in at) and len({(p.step, p.phase) for p in at}) == 1


def _step_phase(client, command):
    before = client.snapshot.status.processes[0]
    command(StepPhase())

    def moved():
        after = client.snapshot.status.processes[0]
        return _together(client) and (after.step, after.phase) != (before.step, before.phase)

    return until(moved, "the next boundary")


def _running_on(client):
    first = client.snapshot.status.step
    until(lambda: client.poll() and client.snapshot.status.step > first + 2, "further steps")
    return True


@pytest.mark.slow
def test_torchrun_is_started_for_nproc(place):
    environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": str(place.runs), "STEPS": "5"}
    command = [sys.executable, *RUN[:-1], "--json", "--nproc", "2", "--name", "launched"]
    done = processes.run(
        [*command, "train.py"],
        starts=True,
        cwd=place.path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ranks = [line for line in lines if line.get("table") == "ranks"]
    assert sorted((line["rank"], line["step"]) for line in ranks) == [
        (rank, step) for rank in (0, 1) for step in range(1, 6)
    ]
    assert lines[-1]["reason"] == "finished"
    assert done.stderr.count("WEIGHTS") == 2


CHILDREN = """
    import os
    import torch, torch.multiprocessing as mp
    def train(seed, model):
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(12):
            x = torch.randn(8, 4)
            loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("SEEN", seed, loss.item().hex(), flush=True)
    if __name__ == "__main__":
        for seed, method in enumerate(("fork", "spawn", "forkserver")):
            torch.manual_seed(seed)
            child = mp.get_context(method).Process(target=train, args=(seed, torch.nn.Linear(4, 1)))
            child.start()
            child.join()
            assert child.exitcode == 0
        pid = os.fork()
        if not pid:
            train(3, torch.nn.Linear(4, 1))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
"""


ONLY_CHILDREN_IMPORT_TORCH = """
    import os, multiprocessing as mp
    def train():
        import torch
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    if __name__ == "__main__":
        for method in ("fork", "forkserver"):
            child = mp.get_context(method).Process(target=train)
            child.start()
            child.join()
            assert child.exitcode == 0
        pid = os.fork()
        if not pid:
            train()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
"""


def run_children(place, source):
    (place.path / "children.py").write_text(textwrap.dedent(source))
    environment = {**os.environ, "TUI_TRAINER_RUNS_DIR": str(place.runs)}
    done = processes.run(
        [sys.executable, *RUN, "--budget", "0", "--name", "family", "children.py"],
        cwd=place.path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_children_of_a_script_are_members_of_its_run(place):
    done = run_children(place, CHILDREN)
    tables = place.tables("family")
    assert {rank: table.rows for rank, table in tables.items()} == dict.fromkeys((1, 2, 3, 4), 12)
    for line in done.stdout.splitlines():
        if line.startswith("SEEN"):
            _, seed, loss = line.split()
            table = tables[int(seed) + 1]
            assert column(table, "loss")[-1] == np.float32(float.fromhex(loss))
            # The run's budget, 0 for no limit, is its children's too.
            assert np.isfinite(column(table, "grad_norm_preclip")).all()
    info = StoredHistory(place.runs / "family", ended=True).store.info()
    assert [(p.rank, p.state) for p in info.processes] == [
        (rank, "finished") for rank in (1, 2, 3, 4)
    ]
    assert place.run("family").reported.step == 12


@pytest.mark.slow
def test_children_of_a_script_that_does_not_import_torch(place):
    run_children(place, ONLY_CHILDREN_IMPORT_TORCH)
    tables = place.tables("family")
    assert {rank: table.rows for rank, table in tables.items()} == dict.fromkeys((1, 2, 3), 12)


@pytest.mark.slow
def test_a_program_that_a_script_starts_is_named_with_the_command_that_traces_it(place):
    (place.path / "worker.py").write_text("print('WORKED')\n")
    source = """
        import os, subprocess, sys
        for _ in range(2):
            subprocess.run([sys.executable, "-u", "worker.py", "--fast"], check=True)
        subprocess.check_output([sys.executable, "-c", "print(1)"])
        os.system("true")
    """
    done = run_children(place, source)
    assert done.stdout.count("WORKED") == 2
    store = StoredHistory(place.runs / "family", ended=True).store
    found = StoredEvents(store).first_events(10)
    said = [event.text for event in found if isinstance(event, Notice) and event.kind == "rank"]
    assert said == [
        "worker.py runs in a separate process, which is not traced: if it trains, start it with "
        "tui-trainer run worker.py"
    ]


@pytest.mark.slow
def test_a_rank_without_its_run_trains_on_and_says_so(place):
    (place.path / "train.py").write_text("import torch\nprint('TRAINED')\n")
    environment = {
        **os.environ,
        **{"TUI_TRAINER_RUNS_DIR": str(place.runs), "RANK": "1", "WORLD_SIZE": "2"},
    }
    done = processes.run(
        [sys.executable, *RUN, "train.py"],
        cwd=place.path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "TRAINED\n")
    assert done.stderr == "tui-trainer: rank 1 was not recorded: its run was not found\n"


class Blocking(socket.socket):
    """A socket whose mode does not change: another thread may be about to read from it."""

    def settimeout(self, value):
        raise AssertionError("a reading thread would get EAGAIN, or a timeout that is not its own")

    setblocking = settimeout


def test_a_message_to_a_process_leaves_the_thread_that_reads_from_it_alone():
    ours, theirs = socket.socketpair()
    with theirs, Blocking(fileno=ours.detach()) as stream:
        Peer(1, "", os.getpid(), stream, child=False).send(Go(7))
        assert read_as(theirs.recv, to_rank, MAX_BYTES) == Go(7)


def test_a_process_that_does_not_read_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(rank_server, "SEND_TIMEOUT_S", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = Peer(1, "", os.getpid(), ours, child=False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(1024), socket.MSG_DONTWAIT)
        with pytest.raises(BlockingIOError):
            peer.send(Go(7))


def test_times_of_another_machine_are_by_the_clock_of_rank_0():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Peer(1, "", os.getpid(), ours, child=False).on_our_clock(1100.0) == 1100.0
        peer = Peer(1, "", os.getpid(), ours, child=False, host="far")
        assert math.isnan(peer.on_our_clock(1100.0))
        peer.clock_differences += [-99.5, -100.0, -98.0]
        assert peer.on_our_clock(1100.0) == 1000.0


def test_the_status_of_a_run_does_not_wait_for_a_process_that_joins():
    """The recorder's lock is held while the status is made, and taken while a process joins."""
    ranks = RankServer(Recorder(RunInfo(name="r", task="script")))
    with ranks._lock:
        status = threading.Thread(target=ranks.positions, args=(None,), daemon=True)
        status.start()
        status.join(240)
        assert not status.is_alive()


def test_the_signal_that_ended_a_process_is_named():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        child.kill()
        assert ending_of(child.pid, 240) == "was killed by SIGKILL"
    with subprocess.Popen([sys.executable, "-c", "import os; os._exit(3)"]) as child:
        assert ending_of(child.pid, 240) == "exited with status 3"
    assert ending_of(child.pid).startswith("died without an exit status")


SHARDED = """
    import torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    collectives = []
    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if DTensor in types:  # it calls what it consists of
                return NotImplemented
            if "c10d" in str(function):
                collectives.append(str(function))
            return function(*args, **(kwargs or {}))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(rank)
    with Collectives():
        for step in range(12):
            x = torch.randn(16, 8)
            loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            shard = model[0].weight.grad.to_local().norm()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05 if step % 2 else 100.0)
            optimizer.step()
            print("SEEN", rank, step, loss.item().hex(), shard.item().hex(),
                  norm.full_tensor().item().hex(), flush=True)
    print("COLLECTIVES", rank, *collectives, flush=True)
    weights = [p.to_local().double().sum().item().hex() for p in model.parameters()]
    print("WEIGHTS", rank, *weights, flush=True)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_are_measured_without_a_collective(place):
    (place.path / "sharded.py").write_text(textwrap.dedent(SHARDED))
    for process in place.start(2, "sharded.py"):
        assert process.wait(240) == 0
    alone = place.printed("", 2)
    command = (*RUN, "--name", "sharded", "--budget", "0", "--paused", "sharded.py")
    started = place.start(2, *command)
    run = until(lambda: place.runs.is_dir() and _listening(place, "sharded"), "the run listens")
    with RunClient.connect(run, "test", read_only=False) as client:
        until(lambda: _held(client, 2), "both ranks are held")
        assert client.command(Step(2)).ok
        until(lambda: _held(client, 2) and client.snapshot.status.step == 2, "two steps")
        for rank in (0, 1):
            shard = client.inspect(OfRank(rank, Summarize(TensorRef("0.weight")))).result.tensor
            assert (shard.shape, shard.note) == ((8, 8), "the shard of this process")
            graph = client.inspect(OfRank(rank, DescribeGraph()))
            assert graph.result is None or graph.result.source == "live"
        assert client.command(Resume()).ok
    for process in started:
        assert process.wait(240) == 0, place.errors(0)
    words = ("WEIGHTS", "SEEN", "COLLECTIVES")
    seen = [line for word in words for line in place.printed(word, 2)]
    assert "all_reduce" in seen[-1]
    assert seen == [line for word in words for line in alone if line.startswith(word)]

    history = StoredHistory(place.runs / "sharded", ended=True)
    info = history.store.info()
    assert all(parameter.sharded for parameter in info.parameters)
    clips = StoredEvents(history.store).of_kind("clip", 100)
    assert clips
    assert not any(clip.shares for clip in clips if isinstance(clip, Clip))
    tables = place.tables("sharded")
    for line in place.printed("SEEN", 2):
        _, rank, step, loss, shard, norm = line.split()
        step = int(step)
        table = tables[int(rank)]
        assert column(table, "loss")[step] == np.float32(float.fromhex(loss))
        found = column(table, "grad_norm_preclip")[step]
        assert found == pytest.approx(float.fromhex(norm), rel=1e-5)
        if rank == "0":
            norms = history.table(schema.GRAD_NORM).blocks()
            values = np.concatenate([block.value for block in norms])
            assert values[step, 0] == pytest.approx(float.fromhex(shard), rel=1e-5)
    compared("fsdp2", "steps", "loss", "ranks")


PARTITIONED = """
    import torch, torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel as DDP
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.Adam, lr=1e-2
    )
    torch.manual_seed(rank)
    for step in range(5):
        x = torch.randn(16, 8)
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        print("TRUTH", rank, step, loss.item(), norm.item(), flush=True)
        optimizer.step()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_optimizer_whose_state_is_partitioned_is_one_optimizer(place):
    (place.path / "zero.py").write_text(textwrap.dedent(PARTITIONED))
    for process in place.start(2, *RUN, "--name", "zero", "--budget", "0", "zero.py"):
        assert process.wait(240) == 0, place.errors(0) + place.errors(1)
    info = StoredHistory(place.runs / "zero", ended=True).store.info()
    assert len(info.optimizers) == 1
    assert all(parameter.optimizer for parameter in info.parameters)
    tables = place.tables("zero")
    for line in place.printed("TRUTH", 2):
        _, rank, step, loss, norm = line.split()
        table = tables[int(rank)]
        assert table.rows == 5
        assert column(table, "loss")[int(step)] == pytest.approx(float(loss), rel=1e-6)
        found = column(table, "grad_norm_preclip")[int(step)]
        assert found == pytest.approx(float(norm), rel=1e-5)
