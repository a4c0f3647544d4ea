"""The process of ssh, with `cat` in its place."""

from __future__ import annotations

import asyncio
import select
import time

from tui_trainer.client import ssh
from tui_trainer.client.ssh import SshProcess
from tui_trainer.protocol.framing import RelayGreeting, encode_greeting


def test_a_greeting_that_arrives_as_a_wait_ends_is_not_lost(monkeypatch):
    monkeypatch.setattr(ssh, "SHOW_AFTER_S", 0.05)
    process = SshProcess(["cat"], interactive=False)

    async def receive():
        receiving = asyncio.create_task(process.greeting(240))
        await asyncio.sleep(0)  # the wait begins
        process.socket.send(encode_greeting(RelayGreeting("connected", run="gpt")))
        # The event loop is held up until the greeting is there and the wait is over.
        select.select([process.socket], [], [])
        time.sleep(0.06)
        return await receiving

    try:
        assert asyncio.run(receive()).run == "gpt"
    finally:
        process.close()
