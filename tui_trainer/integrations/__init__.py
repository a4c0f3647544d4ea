"""Callbacks for frameworks: `from tui_trainer.integrations.huggingface import TuiTrainerCallback`,
or `from tui_trainer.integrations.lightning import TuiTrainerCallback`.

Scripts started by `tui-trainer run` need no callback: their frameworks are recognised.
"""
