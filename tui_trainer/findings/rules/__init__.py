"""All rules, in the order in which they are evaluated and documented: causes before effects."""

from __future__ import annotations

from tui_trainer.findings.rule import Rule
from tui_trainer.findings.rules.attention import AttentionEntropy, AttentionLogits
from tui_trainer.findings.rules.clipping import AlwaysClipped, ClippedToNothing
from tui_trainer.findings.rules.coverage import (
    EvaluationMode,
    MostlyFrozen,
    NeverReached,
    NoGradients,
    NotInOptimizer,
)
from tui_trainer.findings.rules.gradients import GradientsExplode, GradientsVanish
from tui_trainer.findings.rules.learning_rate import LearningRateJump, LearningRateZero, NoWarmUp
from tui_trainer.findings.rules.loss import (
    InitialLoss,
    LossDiverges,
    LossOscillates,
    NoProgress,
    OverFitting,
    SoftmaxTwice,
)
from tui_trainer.findings.rules.nonfinite import NonFiniteRule
from tui_trainer.findings.rules.resources import InputBound, LossScale, MemoryGrowth
from tui_trainer.findings.rules.update_ratio import UpdateRatioHigh, UpdateRatioLow
from tui_trainer.findings.rules.zero_grad import GradientsKept, ZeroedBeforeStep

RULES: tuple[type[Rule], ...] = (
    GradientsKept,
    ZeroedBeforeStep,
    NoGradients,
    NotInOptimizer,
    NeverReached,
    MostlyFrozen,
    EvaluationMode,
    SoftmaxTwice,
    LearningRateZero,
    LearningRateJump,
    NoWarmUp,
    UpdateRatioHigh,
    UpdateRatioLow,
    GradientsVanish,
    GradientsExplode,
    ClippedToNothing,
    AlwaysClipped,
    LossScale,
    NonFiniteRule,
    AttentionLogits,
    AttentionEntropy,
    InitialLoss,
    LossDiverges,
    LossOscillates,
    NoProgress,
    OverFitting,
    InputBound,
    MemoryGrowth,
)
