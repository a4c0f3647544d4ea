"""An input whose keys take effect in the order in which they come."""

from __future__ import annotations

from textual import events
from textual.widgets import Input

from tui_trainer.ui.textual_hacks import bindings_of


class OrderedInput(Input):
    """An input that runs the actions of its keys at once.

    Textual inserts a character at once, but runs the action of a key such as `ctrl+u` only after
    the event has passed every parent. Keys that arrive together, as over ssh or while the machine
    is busy, would change places.
    """

    async def on_key(self, event: events.Key) -> None:
        """Run the input's own action of a key at once, unless the action leaves it to others."""
        for binding in bindings_of(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return
