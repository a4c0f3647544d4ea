"""The probes: a file for each quantity that is measured, or for a few that belong together.

`PROBES` lists them in the order in which their rows are made, so that later ones can use what
earlier ones have found. A new probe is added to this list, and its columns to
`protocol/schema.py`.
"""

from __future__ import annotations

from tui_trainer.probes.attention.heads import AttentionHeads
from tui_trainer.probes.attention.health import AttentionHealth
from tui_trainer.probes.attention.spectrum import AttentionSpectrum
from tui_trainer.probes.attention.weights import AttentionWeights
from tui_trainer.probes.batch import BatchProbe
from tui_trainer.probes.clipping import ClippingProbe
from tui_trainer.probes.dropout_modes import DropoutModes
from tui_trainer.probes.initial_weights import InitialWeights
from tui_trainer.probes.nonfinite import NonFiniteProbe, OutputSums
from tui_trainer.probes.parameter_norms import Gradients, Weights
from tui_trainer.probes.replica import ReplicaChecksum, ReplicaSample
from tui_trainer.probes.step import Memory, Overhead, PhasesProbe, StepProbe
from tui_trainer.probes.units import UnitsProbe
from tui_trainer.probes.update_ratio import KeptUpdates, UpdateRatio
from tui_trainer.trace.probe import Probe

PROBES: tuple[type[Probe], ...] = (
    Gradients,
    Weights,
    UpdateRatio,
    AttentionWeights,
    AttentionSpectrum,
    AttentionHealth,
    AttentionHeads,
    StepProbe,
    ClippingProbe,
    PhasesProbe,
    NonFiniteProbe,
    OutputSums,
    BatchProbe,
    UnitsProbe,
    DropoutModes,
    InitialWeights,
    KeptUpdates,
    Memory,
    Overhead,
)

RULE_PROBES: tuple[type[Probe], ...] = (
    OutputSums,
    BatchProbe,
    UnitsProbe,
    DropoutModes,
    InitialWeights,
    KeptUpdates,
)
"""Probes that only rules use."""

REPLICA_PROBES: tuple[type[Probe], ...] = (ReplicaChecksum, ReplicaSample)
"""Probes that every process of a distributed run has as well."""

RANK_PROBES: tuple[type[Probe], ...] = (
    *(Gradients, StepProbe, ClippingProbe, PhasesProbe, NonFiniteProbe, BatchProbe, Memory),
    *REPLICA_PROBES,
)
"""Probes of each further process of a distributed run."""
