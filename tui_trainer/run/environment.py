"""The environment of a run: OpenMP's threads, versions of libraries, the device, and the first
`RunInfo`, which is complete before torch is imported."""

from __future__ import annotations

import os
import platform
import socket
import time
from typing import TYPE_CHECKING

import psutil

from tui_trainer import __version__
from tui_trainer.config.machine import OtherLoad, allowed_cores, cpu_quota, usable_cores
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.schema import DeviceInfo, RunInfo

if TYPE_CHECKING:
    import torch

SPIN_COUNT = "10000"
"""Iterations that an OpenMP thread spins at a barrier before it sleeps, on a busy machine."""
TOLERATED_CORES = 0.5
"""Load of other processes, in cores, that does not count as competition."""
TITLE_CHARACTERS = 200


def initial_info(spec: RunSpec) -> RunInfo:
    """The description of a run before torch is imported."""
    return RunInfo(
        name=spec.name,
        task=spec.task,
        title=spec.title or _title(spec),
        command=spec.command,
        directory=spec.directory,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=time.time(),
        versions={
            "tui-trainer": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        configuration=dict(spec.configuration),
        working_directory=spec.working_directory or os.getcwd(),
        source=spec.source,
        parent=spec.parent,
        branch_step=spec.branch_step,
        budget=spec.budget,
    )


def _title(spec: RunSpec) -> str:
    if spec.is_script:
        path = os.path.abspath(spec.script or "")  # a folder may be given as `.` or end in `/`
        name = f"-m {spec.script}" if spec.module else os.path.basename(path)
        return " ".join((name, *spec.arguments))[:TITLE_CHARACTERS]
    preset = spec.configuration.get("preset")
    return f"{spec.task} · {preset}" if preset else spec.task


# ---------------------------------------------------------------- OpenMP


def limit_openmp_spinning(spec: RunSpec, others: OtherLoad) -> None:
    """Let OpenMP's threads sleep early at barriers when other processes need the cores.

    GNU's runtime spins 300,000 iterations at each barrier, about 15 ms. On an idle machine this is
    fastest: waking a thread makes steps up to a quarter slower. When more threads want to run than
    there are cores, spinning threads occupy the cores that the last thread needs, and steps become
    twenty times slower (figures in docs/decisions.md). Results do not change. Must be called before
    torch is imported; variables that the user has set take precedence.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    threads = expected_threads(spec)
    crowded = threads + others.cores() > allowed_cores() + TOLERATED_CORES
    if crowded or threads > cpu_quota() + TOLERATED_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def expected_threads(spec: RunSpec) -> int:
    """The number of threads that PyTorch will use.

    A task uses the configured number, or all cores but one. A script uses OMP_NUM_THREADS, or one
    for each core, since PyTorch ignores a container's CPU quota.
    """
    if not spec.is_script:
        configured = spec.configuration.get("threads")
        if isinstance(configured, int) and configured > 0:
            return configured
        return max(1, usable_cores() - 1)
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if variable.isdecimal() and int(variable):
        return int(variable)
    return min(allowed_cores(), psutil.cpu_count(logical=False) or allowed_cores())


def busy_cores_warning(threads: int) -> str:
    """A warning when PyTorch's threads occupy every core, "" otherwise.

    PyTorch's default is one thread per core. Anything else that runs, even just the screen, then
    takes a core from a thread that all the others wait for (figures in docs/performance.md).
    """
    cores = usable_cores()
    if threads == 1 or threads < cores:
        return ""
    occupied = f"all {cores} cores" if cores > 1 else "the only core"
    return (
        f"PyTorch's {threads} threads use {occupied}: if other programs run on this machine, "
        f"OMP_NUM_THREADS={max(1, cores - 1)} is often faster"
    )


# ---------------------------------------------------------------- torch


def with_torch_versions(versions: dict[str, str]) -> dict[str, str]:
    """`versions` with those of torch and of the CUDA it was built for. Imports torch."""
    import torch

    versions = {**versions, "torch": str(torch.__version__)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def device_info(model: torch.nn.Module, threads: int) -> DeviceInfo | None:
    """The device that a model's parameters are on; None when it has no parameters."""
    import torch

    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    device = parameter.device
    match device.type:
        case "cuda":
            properties = torch.cuda.get_device_properties(device)
            return DeviceInfo("cuda", properties.name, properties.total_memory, threads)
        case "cpu":
            return DeviceInfo("cpu", _processor_name(), threads=threads)
        case "mps" | "xpu":
            return DeviceInfo(device.type, device.type, threads=threads)
    return DeviceInfo("other", device.type, threads=threads)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
