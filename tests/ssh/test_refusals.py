"""Each problem on the remote host has its own message."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from tests.runs.starting import until
from tui_trainer import __version__
from tui_trainer.client.ssh import (
    SshConnector,
    parse_address,
    remote_command,
    ssh_command,
)
from tui_trainer.protocol import PROTOCOL_VERSION
from tui_trainer.protocol.framing import (
    MAX_NOISE_BYTES,
    NoGreeting,
    RelayGreeting,
    encode_greeting,
    find_greeting,
)
from tui_trainer.runs.errors import RunError


def refusal(address, **options):
    """The error of `attach`."""
    with pytest.raises(RunError) as refused:
        SshConnector(parse_address(address), **options).begin(lambda runs: runs[0].name, False)
    return refused.value


def test_tui_trainer_is_not_installed_there(bare_host):
    error = refusal("ssh://Box/gpt")
    assert "Box has no tui-trainer" in error.message
    assert "TUI_TRAINER_REMOTE_COMMAND" in error.hint


def test_a_missing_remote_command(host):
    error = refusal("ssh://Box/gpt", command="/nowhere/tui-trainer")
    assert "Box cannot run the remote command" in error.message
    assert "/nowhere/tui-trainer" in error.message


def test_another_version_there(host):
    greeting = json.dumps({"kind": "connected", "protocol": 99, "product": "9.9", "run": "gpt"})
    old = host.home / "old"
    old.write_text(f"#!/bin/sh\necho 'TUI-TRAINER-RELAY {greeting}'\ncat >/dev/null\n")
    old.chmod(0o755)
    error = refusal("ssh://Box/gpt", command=str(old))
    assert "tui-trainer 9.9, which speaks protocol 99" in error.message
    assert f"{__version__}, which speaks {PROTOCOL_VERSION}" in error.message
    assert "same version" in error.hint


def test_a_version_without_a_relay(host):
    error = refusal("ssh://Box/gpt", command="sh -c 'echo no such command >&2; exit 2' x")
    assert "is not tui-trainer's relay" in error.message
    assert "no such command" in error.message


def test_a_login_shell_that_exits(host):
    host.login_shell("echo welcome to the login menu; exit 0\n")
    error = refusal("ssh://Box/gpt")
    assert "welcome to the login menu" in error.message


def test_a_login_shell_that_prints(host, runs, attach):
    host.login_shell("echo welcome; printf 'no newline at the end'; echo to stderr >&2\n")
    runs.start("gpt-noisy")
    session = attach("ssh://Box/gpt-noisy")
    until(lambda: session.poll().status.step > 0, "steps arrive")


def test_a_refused_key(host):
    (host.directory / "user").unlink()
    shutil.copy(host.directory / "stranger", host.directory / "user")
    error = refusal("ssh://Box/gpt")
    assert "ssh cannot reach Box" in error.message
    assert "Permission denied" in error.message
    assert error.hint == "try it alone: ssh Box true"


def test_a_host_key_that_changed(host):
    other = (host.directory / "stranger.pub").read_text().split()[:2]
    (host.directory / "known").write_text(f"[127.0.0.1]:{host.port} {' '.join(other)}\n")
    assert "Host key verification failed" in refusal("ssh://Box/gpt").message


def test_no_listener(host):
    host.stop()
    error = refusal(f"ssh://Box:{host.port}/gpt")
    assert "Connection refused" in error.message
    assert f"ssh -p {host.port} Box true" in error.hint


def test_an_unknown_host(host):
    error = refusal("ssh://no-such-host.invalid/gpt")
    assert "ssh cannot reach no-such-host.invalid" in error.message


def test_an_unknown_run_and_one_that_ended(host, runs):
    error = refusal("ssh://Box/gpt-quiet")
    assert "Box: there is no run gpt-quiet" in error.message
    assert "Box: there are no runs yet" in refusal("ssh://Box").message
    runs.start("gpt-silent", steps=1)
    until(lambda: runs.reported("gpt-silent").ended, "it ends")
    assert "did you mean gpt-silent" in refusal("ssh://Box/gpt-slient").hint
    assert "gpt-silent has finished" in refusal("ssh://Box/gpt-silent").message
    assert "no run is live" in refusal("ssh://Box").message


def test_several_runs_are_offered(host, runs):
    for name in ("gpt-one", "gpt-two", "gpt-dead"):
        runs.start(name)
    runs.kill("gpt-dead")
    offered = []

    def choose(found):
        offered.extend(found)
        return "gpt-one"

    connect = SshConnector(parse_address("ssh://Box"))
    assert connect.begin(choose, False) == "gpt-one"
    assert [run.name for run in offered] == ["gpt-two", "gpt-one"]
    assert all(run.step > 0 for run in offered)

    async def enter():
        async with connect() as connected:
            return connected.fileno()

    assert asyncio.run(enter()) >= 0
    assert connect.address.run == "gpt-one"


def test_ssh_is_not_installed(monkeypatch):
    monkeypatch.setenv("TUI_TRAINER_SSH", "no-such-ssh")
    assert "there is no no-such-ssh on this machine" in refusal("ssh://Box").message


# ---------------------------------------------------------------- what reaches a command line


@pytest.mark.parametrize(
    ("given", "destination", "port", "run"),
    [
        ("ssh://host", "host", None, ""),
        (
            "ssh://ada@GPU-box_1.lab:2222/gpt-quiet-otter",
            "ada@GPU-box_1.lab",
            2222,
            "gpt-quiet-otter",
        ),
        ("ssh://[fe80::1%25eth0]:22/gpt", "fe80::1%25eth0", 22, "gpt"),
        ("ssh://[::1]/", "::1", None, ""),
        ("ssh://ada@10.0.0.1/vit", "ada@10.0.0.1", None, "vit"),
    ],
)
def test_addresses(given, destination, port, run):
    address = parse_address(given)
    assert (address.destination, address.port, address.run) == (destination, port, run)


@pytest.mark.parametrize(
    "given",
    [
        "ssh://",
        "ssh:///gpt",
        "ssh://-oProxyCommand=touch%20x/gpt",
        "ssh://-oProxyCommand=x",
        "ssh://host;reboot/",
        "ssh://host$(x)/",
        "ssh://a`x`@host",
        "ssh://-l@host",
        "ssh://@host",
        "ssh://ada:secret@host",
        "ssh://host:0",
        "ssh://host:99999",
        "ssh://host:x",
        "ssh://host/-rf",
        "ssh://host/a;b",
        "ssh://host/a/b",
        "ssh://host/../x",
        "ssh://host/%24(x)",
        "ssh://host?x=1",
        "ssh://ho st",
        "ssh://host\n",
        "http://host",
    ],
)
def test_invalid_addresses(given):
    with pytest.raises(RunError):
        parse_address(given)


def test_the_command_line(monkeypatch):
    monkeypatch.delenv("TUI_TRAINER_SSH", raising=False)
    monkeypatch.delenv("TUI_TRAINER_REMOTE_COMMAND", raising=False)
    command = ssh_command(parse_address("ssh://ada@host:22/r"), "remote", batch=True)
    assert command[0] == "ssh"
    assert command[-3:] == ["--", "ada@host", "remote"]
    assert "BatchMode=yes" in command
    assert (
        remote_command("gpt", "conda run -n x tui-trainer")
        == "conda run -n x tui-trainer relay gpt"
    )
    quoted = remote_command("gpt", "t", "/my runs/$x")
    assert quoted == "t relay '--runs-dir=/my runs/$x' gpt"
    looked_up = remote_command("gpt")
    assert looked_up.startswith("sh -c '")
    assert not set("!\\\n") & set(looked_up)
    assert looked_up.count("'") == 2


def test_greetings_in_noise():
    greeting = RelayGreeting("connected", run="gpt")
    whole = b"motd" + encode_greeting(greeting)
    for cut in range(len(whole)):
        assert find_greeting(whole[:cut]) is None
    assert find_greeting(whole) == greeting
    assert find_greeting(b"TUI-TRAINER-RELAY missing\n").kind == "missing"
    with pytest.raises(NoGreeting):
        find_greeting(b"TUI-TRAINER-RELAY {\n")
    with pytest.raises(NoGreeting):
        find_greeting(b"x" * (MAX_NOISE_BYTES + 1))
    with pytest.raises(NoGreeting):
        find_greeting(b"TUI-TRAINER-RELAY " + b"x" * (MAX_NOISE_BYTES + 1))
