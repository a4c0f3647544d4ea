"""All rules, in the order in which they are evaluated and documented: causes before effects.

To add a rule, write a subclass of `Rule` with its `thresholds`, and list it here.
"""

from __future__ import annotations

import re

from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules.attention import AttentionEntropy, AttentionLogits
from tui_trainer.findings.rules.batch import (
    BadBatchRule,
    BatchesRepeat,
    ConstantInputs,
    InputScale,
    SameBatch,
)
from tui_trainer.findings.rules.clipping import AlwaysClipped, ClippedAfterStep, ClippedToNothing
from tui_trainer.findings.rules.coverage import (
    EvaluationMode,
    FrozenLate,
    MostlyFrozen,
    NeverReached,
    NoGradients,
    NotInOptimizer,
    ZeroGradients,
)
from tui_trainer.findings.rules.gradients import GradientsExplode, GradientsVanish
from tui_trainer.findings.rules.initialisation import ConstantWeights, InitialScale, UntiedWeights
from tui_trainer.findings.rules.learning_rate import (
    AdamEpsilon,
    LearningRateJump,
    LearningRateZero,
    MomentumHigh,
    NoWarmUp,
)
from tui_trainer.findings.rules.loop import (
    BackwardTwice,
    GradientsKept,
    IdleSchedule,
    LossesMixed,
    ScheduleEnds,
    ScheduleFirst,
    TrainModeEvaluation,
    ZeroedBeforeStep,
)
from tui_trainer.findings.rules.loss import (
    InitialLoss,
    LossDiverges,
    LossOscillates,
    NoBetterThanPrior,
    NoProgress,
    OverFitting,
    SoftmaxTwice,
)
from tui_trainer.findings.rules.loss_graph import (
    ClassesMixed,
    LogOfLogits,
    LossScaled,
    LossSign,
    SoftmaxInside,
    SoftmaxOverBatch,
    SquaredSoftmax,
)
from tui_trainer.findings.rules.nonfinite import NonFiniteRule
from tui_trainer.findings.rules.ranks import ClipsAlone, RanksDiverge, RanksSameBatch, Straggler
from tui_trainer.findings.rules.resources import (
    EvaluationExpensive,
    InputBound,
    LossScale,
    MemoryGrowth,
)
from tui_trainer.findings.rules.targets import (
    ConstantLabels,
    LabelRange,
    LossBroadcasts,
    NotShuffled,
    TargetScale,
    TargetsOutOfReach,
    UnbalancedClasses,
)
from tui_trainer.findings.rules.trends import LossPlateau, OverflowAhead
from tui_trainer.findings.rules.units import DeadUnits, DropoutOff, SaturatedUnits, SignalVanishes
from tui_trainer.findings.rules.update_parts import PartNotUpdated, PartUpdatedTooMuch
from tui_trainer.findings.rules.update_ratio import (
    UpdateRatioHigh,
    UpdateRatioLow,
    UpdatesRounded,
    UpdatesSmall,
    UpdatesUndone,
    WeightsShrink,
)

RULES: tuple[type[Rule], ...] = (
    GradientsKept,
    ZeroedBeforeStep,
    NoGradients,
    NotInOptimizer,
    NeverReached,
    MostlyFrozen,
    FrozenLate,
    BackwardTwice,
    LossesMixed,
    ScheduleFirst,
    IdleSchedule,
    EvaluationMode,
    DropoutOff,
    TrainModeEvaluation,
    ConstantInputs,
    InputScale,
    SameBatch,
    BatchesRepeat,
    ConstantLabels,
    UnbalancedClasses,
    NotShuffled,
    LabelRange,
    TargetScale,
    TargetsOutOfReach,
    LossBroadcasts,
    BadBatchRule,
    ConstantWeights,
    InitialScale,
    UntiedWeights,
    SoftmaxTwice,
    SoftmaxOverBatch,
    ClassesMixed,
    LogOfLogits,
    SoftmaxInside,
    SquaredSoftmax,
    LossScaled,
    LossSign,
    LearningRateZero,
    ScheduleEnds,
    LearningRateJump,
    NoWarmUp,
    AdamEpsilon,
    MomentumHigh,
    UpdateRatioHigh,
    UpdateRatioLow,
    UpdatesSmall,
    UpdatesRounded,
    UpdatesUndone,
    PartNotUpdated,
    PartUpdatedTooMuch,
    WeightsShrink,
    GradientsVanish,
    GradientsExplode,
    DeadUnits,
    SaturatedUnits,
    SignalVanishes,
    ZeroGradients,
    ClippedAfterStep,
    ClippedToNothing,
    AlwaysClipped,
    LossScale,
    OverflowAhead,
    NonFiniteRule,
    AttentionLogits,
    AttentionEntropy,
    InitialLoss,
    LossDiverges,
    LossOscillates,
    NoProgress,
    LossPlateau,
    NoBetterThanPrior,
    OverFitting,
    ClipsAlone,
    RanksDiverge,
    RanksSameBatch,
    InputBound,
    EvaluationExpensive,
    Straggler,
    MemoryGrowth,
)

ENDINGS = re.compile(r"(ing|ed|es|e|s)$")


def rules_named(text: str) -> frozenset[str]:
    """The rules whose name or title contains every word of `text`, whatever its ending: `exploding`
    finds `gradients-explode`."""
    words = re.split(r"[\s_-]+", text.casefold().strip())
    stems = [ENDINGS.sub("", word) if len(word) > 4 else word for word in words]
    return frozenset(
        rule.name
        for rule in RULES
        if all(stem in f"{rule.name} {rule.title}".casefold() for stem in stems)
    )
