"""Processes of a distributed training that diverge, wait for one, or see the same data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median

from tui_trainer.findings.observation import TableRow
from tui_trainer.findings.rule import Found, Rule, RuleThreshold, Streak, evidence
from tui_trainer.protocol.formatting import milliseconds, percent

OWN_PHASES = ("data", "zero_grad", "forward", "loss")
"""Phases in which a process of a data-parallel training waits for no other."""


def _listed(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"


Checksum = tuple[float, float]


def _checksum(row: TableRow, kind: str = "checksum") -> Checksum | None:
    high, low = row.get(f"{kind}_high"), row.get(f"{kind}_low")
    return None if high is None or low is None or high != high else (high, low)


class ClipsAlone(Rule):
    """One process clips gradients that the others do not clip."""

    name = "clips-alone"
    title = "one rank clips its gradients alone"
    level = "error"
    needs = "the clippings of all ranks in two steps"
    explanation = (
        "Some processes clip the gradients of a step and the others do not, although gradients "
        "that were averaged are the same on all of them. Their updates differ, and the replicas "
        "diverge. The usual causes are clipping inside `if rank == 0` and before the average."
    )
    advice = "clip on every rank, after backward (DDP has averaged the gradients then)"
    source = (
        "clipping on one rank only is the BLOOM-176B divergence that TrainCheck reproduces (Jiang "
        "et al., OSDI 2025)"
    )
    thresholds = (RuleThreshold("steps", 2, "steps in a row of those in which any rank clips"),)

    def start(self) -> None:
        self._streak = Streak()
        self._reported = False

    def ranks(self, step: int, rows: Mapping[int, TableRow]) -> Iterable[Found]:
        if self._reported:
            return
        scales = {rank: row.get("clip_scale") for rank, row in rows.items()}
        clip = {rank for rank, scale in scales.items() if scale is not None and scale < 1}
        rest = rows.keys() - clip
        if not clip:
            return  # no rank clips, so the ranks cannot differ
        # Norms that were summed in different orders may lie on either side of the limit.
        holds = bool(rest) and min(scales[rank] or 0.0 for rank in clip) < 0.99
        if self._streak.add(holds, step) < self.limits["steps"]:
            return
        self._reported = True
        lowest = min(scales[rank] or 0.0 for rank in clip)
        yield Found(
            self._streak.onset,
            f"{_listed(clip)} of {len(rows)} clips its gradients (to {percent(lowest, 0, 1)}), and "
            f"{_listed(rest)} does not",
            confidence="certain",
            phase="clip",
            evidence=(
                evidence(
                    "ranks that clip",
                    len(clip),
                    len(rows),
                    len(rows),
                    text=f"{len(clip)} of {len(rows)}",
                ),
            ),
            ranks=tuple(sorted(clip)),
        )


class RanksDiverge(Rule):
    """Replicas whose weights were equal and no longer are."""

    name = "ranks-diverge"
    title = "the ranks' weights diverge"
    level = "error"
    unconditional = True  # otherwise one of several models would be saved silently
    needs = (
        "checksums of the weights of all ranks: of a sample of them at every step, of all of them "
        "every 50 steps"
    )
    explanation = (
        "The replicas of a data-parallel training have the same bits at every step, since all "
        "apply the same gradients to the same weights. Once they differ they stay different, and "
        "what is saved is the model of rank 0 alone. Usual causes are something that one rank "
        "does by itself (clipping, skipping a step, another learning rate), parameters outside of "
        "the wrapped model, and buffers that are not synchronised."
    )
    advice = "look for code that depends on the rank, and for parameters that DDP does not know"
    source = (
        "PyTorch's documentation of DistributedDataParallel; diverging replicas are silent errors "
        "of TrainCheck (Jiang et al., OSDI 2025)"
    )
    explained_by = ("clips-alone",)
    slack = 60

    def start(self) -> None:
        self._agreed_at: dict[str, int] = {}
        """Kind of checksum → the last step after which it was equal on all ranks."""
        self._reported = False

    def ranks(self, step: int, rows: Mapping[int, TableRow]) -> Iterable[Found]:
        for kind, after in (("checksum", step), ("sample", step - 1)):
            sums = {
                rank: found
                for rank, row in rows.items()
                if (found := _checksum(row, kind)) is not None
            }
            if len(sums) == len(rows) and not self._reported:
                yield from self._compare(kind, after, sums)

    def _compare(self, kind: str, after: int, sums: Mapping[int, Checksum]) -> Iterable[Found]:
        """`after`: the step whose update made these weights; 0: the initial ones."""
        usual = Counter(sums[rank] for rank in sorted(sums)).most_common(1)[0][0]
        others = {rank for rank, found in sums.items() if found != usual}
        if not others:
            self._agreed_at[kind] = after
            return
        agreed_at = self._agreed_at.get(kind)
        if agreed_at is None:  # the processes never were replicas
            return
        self._reported = True
        before = f"after step {agreed_at:,}" if agreed_at else "at the start"
        yield Found(
            agreed_at + 1,
            f"the weights of {_listed(others)} differ from those of the other ranks after step "
            f"{after:,}; they were equal {before}",
            confidence="certain",
            phase="step",
            evidence=(
                evidence("different models", len(set(sums.values())), high=1,
                         text=str(len(set(sums.values())))),
            ),
            ranks=tuple(sorted(others)),
        )  # fmt: skip


class RanksSameBatch(Rule):
    """All processes are given the same batches."""

    name = "ranks-same-batch"
    title = "all ranks have the same batches"
    needs = "the inputs of all ranks in five steps, and replicas"
    explanation = (
        "Every process of a data-parallel training is given the same inputs: all processes but "
        "one repeat the same work, and an epoch contains the data once per process. Usually the "
        "DistributedSampler is missing, or all ranks draw their examples with the same seed."
    )
    advice = "give the DataLoader a DistributedSampler, or seed the data with a number per rank"
    source = (
        "PyTorch's documentation of DistributedSampler; the same seed in all workers is a silent "
        "error of TrainCheck (Jiang et al., OSDI 2025)"
    )
    thresholds = (RuleThreshold("steps", 5, "measured steps in a row"),)

    def start(self) -> None:
        self._streak = Streak()
        self._replicas = False
        self._reported = False

    def ranks(self, step: int, rows: Mapping[int, TableRow]) -> Iterable[Found]:
        if self._reported:
            return
        sums = [_checksum(row) for row in rows.values()]
        self._replicas = self._replicas or all(each is not None for each in sums)
        batches = [row.get("batch_checksum") for row in rows.values()]
        if any(each is None for each in batches):
            return
        count = self._streak.add(len(set(batches)) == 1, step)
        if count < self.limits["steps"] or not self._replicas:
            return
        self._reported = True
        yield Found(
            self._streak.onset,
            f"all {len(rows)} ranks were given the same inputs in all {count} examined steps",
            confidence="certain",
            phase="data",
            evidence=(evidence("steps with the same inputs", count, high=0, text=str(count)),),
        )


class Straggler(Rule):
    """One process is slower than the others, which wait for it."""

    name = "straggler"
    title = "one rank is slower than the others"
    needs = "the phases of all ranks in sixty steps of at least 20 ms"
    explanation = (
        "Until backward begins, a process waits for no other. This one needs much more time for "
        "that part of the step than the others, which wait for it when gradients are averaged. "
        "Usual causes are longer sequences or more data on one rank, a busy or hot machine, and "
        "work that only rank 0 does in the loop (logging, saving)."
    )
    advice = "balance the data; see what this rank does before backward that the others do not"
    source = (
        "Lin et al., Understanding Stragglers in Large Model Training Using What-if Analysis (OSDI "
        "2025)"
    )
    thresholds = (
        RuleThreshold("factor", 1.5, "times the median of the other ranks"),
        RuleThreshold("share", 0.1, "smallest share of a step that the others wait"),
        RuleThreshold("step_ms", 20, "shortest step that is checked"),
    )

    FIRST, STEPS = 10, 60

    def start(self) -> None:
        self._busy: dict[int, list[float]] = {}
        self._steps: list[tuple[int, float]] = []
        self._skipped = 0
        self._reported = False

    def ranks(self, step: int, rows: Mapping[int, TableRow]) -> Iterable[Found]:
        if self._reported:
            return
        self._skipped += 1
        if self._skipped <= self.FIRST:
            return
        duration = max(row.get("step_ms") or 0.0 for row in rows.values())
        self._steps.append((step, duration))
        for rank, row in rows.items():
            times = [row.get(f"phase_ms.{phase}") for phase in OWN_PHASES]
            busy = sum(time for time in times if time is not None and time == time)
            self._busy.setdefault(rank, []).append(busy)
        if len(self._steps) < self.STEPS:
            return
        first = self._steps[0][0]
        step_ms = median(duration for _, duration in self._steps)
        usual = {rank: median(times) for rank, times in self._busy.items()}
        self._steps, self._busy = [], {}
        slowest = max(usual, key=lambda rank: usual[rank])
        others = median(time for rank, time in usual.items() if rank != slowest)
        extra = usual[slowest] - others
        if (
            step_ms < self.limits["step_ms"]
            or usual[slowest] < self.limits["factor"] * others
            or extra < self.limits["share"] * step_ms
        ):
            return
        self._reported = True
        yield Found(
            first,
            f"rank {slowest} needs {milliseconds(usual[slowest], 0)} until backward, the others "
            f"{milliseconds(others, 0)}: they wait {milliseconds(extra, 0)} of each step's "
            f"{milliseconds(step_ms, 0)} for it",
            phase="forward",
            evidence=(
                evidence(f"time of rank {slowest} until backward", usual[slowest],
                         high=self.limits["factor"] * others, unit=" ms"),
            ),
            ranks=(slowest,),
        )  # fmt: skip
