"""Callbacks for frameworks: `from tui_trainer.integrations.huggingface import TuiTrainerCallback`,
or `from tui_trainer.integrations.lightning import TuiTrainerCallback`.

Scripts that are started by `tui-trainer run` need none: their frameworks are recognised.
"""
