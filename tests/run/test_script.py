"""Scripts run as python runs them, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from tests import processes
from tests.runs.starting import until

RUNNER = """
import sys
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.run.host import main
module = sys.argv[2] == "-m"
rest = sys.argv[3:] if module else sys.argv[2:]
sys.exit(main(RunSpec(name="r", directory=sys.argv[1], task="script", script=rest[0],
                      module=module, arguments=tuple(rest[1:]))))
"""


@pytest.fixture
def place(tmp_path):
    runner = tmp_path / "bin" / "runner.py"
    runner.parent.mkdir()
    runner.write_text(RUNNER)
    work = tmp_path / "work"
    work.mkdir()
    return work


def write(place, text, name="train.py"):
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return name


def command(place, *arguments):
    runner = place.parent / "bin" / "runner.py"
    return [sys.executable, str(runner), str(place.parent / "run"), *arguments]


def ours(place, *arguments, **options):
    return processes.run(
        command(place, *arguments),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def pythons(place, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, capture_output=True, text=True, timeout=240
    )


SELF_PORTRAIT = """
    import pickle, sys, os, __main__
    class Thing: pass
    print(sys.argv, __name__, __file__, __spec__, __package__, __doc__)
    print(sys.path[0], os.getcwd(), __main__.Thing is Thing, sorted(globals()))
    print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)
    print(__loader__.name, sys.modules["__main__"].__file__)
    import neighbour
"""


def test_it_looks_the_same_from_inside(place):
    write(place, "print('the neighbour is found')", "inner/neighbour.py")
    write(place, SELF_PORTRAIT, "inner/train.py")
    arguments = ("inner/train.py", "--lr", "0.1", "-m", "x y")
    mine, theirs = ours(place, *arguments), pythons(place, *arguments)
    assert mine.stdout == theirs.stdout
    assert mine.returncode == theirs.returncode == 0


def test_a_module_looks_the_same_from_inside(place):
    write(place, "", "package/__init__.py")
    write(
        place,
        """
        import sys
        from . import helper
        print(sys.argv, __name__, __file__, __spec__.name, __package__, sys.path[0])
        """,
        "package/train.py",
    )
    write(place, "print('helped')", "package/helper.py")
    write(place, "import sys; print('main of the package', __spec__.name)", "package/__main__.py")
    for name in ("package.train", "package"):
        mine, theirs = ours(place, "-m", name, "a", "b"), pythons(place, "-m", name, "a", "b")
        assert mine.stdout == theirs.stdout != ""
        assert mine.returncode == 0


@pytest.mark.parametrize("name", ["package", "package/", "."])
def test_a_folder_looks_the_same_from_inside(place, name):
    write(place, "print('helped')", "package/helper.py")
    write(
        place,
        """
        import pickle, sys, os, __main__
        import helper
        class Thing: pass
        print(sys.argv, __name__, __file__, __spec__.name, repr(__package__), __loader__.name)
        print(sys.path[0], os.getcwd(), __main__.Thing is Thing, sorted(globals()))
        print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, __cached__, __spec__.origin)
        """,
        "package/__main__.py",
    )
    at = place / "package" if name == "." else place
    runner = command(place, name, "a", "-m")
    mine = processes.run(runner, cwd=at, capture_output=True, text=True, timeout=240)
    theirs = pythons(at, name, "a", "-m")
    assert mine.stdout == theirs.stdout != ""
    assert mine.returncode == theirs.returncode == 0


def test_a_folder_with_a_main_that_is_not_python(place):
    write(place, "def f(:", "package/__main__.py")
    done = ours(place, "package")
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert "tui_trainer" not in done.stderr


THREAD = """
import threading, time
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit(300)", 300 & 0xFF),
        ("import sys; sys.exit(-1)", 255),
        ("import sys; sys.exit('no data')", 1),
        ("raise SystemExit(None)", 0),
        ("import os; os._exit(7)", 7),
        ("raise ValueError('broken')", 1),
        ("import nonexistent_thing", 1),
        ("def f(:\n    pass", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'last words')", 0),
        (THREAD, 0),
    ],
)
def test_exit_status_and_output_are_pythons(place, body, status):
    (place / "train.py").write_text(body)
    mine, theirs = ours(place, "train.py"), pythons(place, "train.py")
    assert mine.returncode == theirs.returncode == status
    assert mine.stdout == theirs.stdout
    shown = mine.stderr.replace("  hint: install it for this Python: " + sys.executable + "\n", "")
    assert shown == theirs.stderr


def test_a_traceback_shows_none_of_our_frames(place):
    write(
        place,
        """
        def deeper():
            raise ValueError("at step 7")
        try:
            {}["x"]
        except KeyError:
            deeper()
        """,
    )
    mine, theirs = ours(place, "train.py"), pythons(place, "train.py")
    assert mine.stderr == theirs.stderr
    assert "tui_trainer" not in mine.stderr


def test_its_own_excepthook_is_used(place):
    write(
        place,
        """
        import sys, traceback
        def hook(kind, value, trace):
            print("hooked", kind.__name__, len(traceback.extract_tb(trace)))
        sys.excepthook = hook
        1 / 0
        """,
    )
    assert ours(place, "train.py").stdout == "hooked ZeroDivisionError 1\n"


@pytest.mark.parametrize("name", ["missing.py", "nowhere/x.py", "."])
def test_a_missing_script(place, name):
    write(place, "", "almost.py")
    done = ours(place, name)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "hint" in done.stderr


def test_a_missing_module(place):
    done = ours(place, "-m", "no.such.module")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_its_signal_handlers_are_its_own(place):
    write(
        place,
        """
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: print("own term", flush=True))
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            print("own interrupt")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        """,
    )
    done = ours(place, "train.py")
    assert done.stdout == "own interrupt\nown term\n"
    assert done.returncode == 5


def test_terminated_before_any_step(place):
    write(place, "import time; print('up', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        command(place, "train.py"), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    # Any Python program learns only at the end of a call in C of a signal that has come between its
    # last look for signals and that call: let it be asleep first.
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING, "it sleeps")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143
    assert err == b""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes_find_its_classes(place, method):
    write(
        place,
        """
        import multiprocessing, sys
        class Square:
            def __call__(self, x): return x * x
        if __name__ == "__main__":
            with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
                print(pool.map(Square(), range(5)))
        """,
    )
    done = ours(place, "train.py", method)
    assert done.stdout == "[0, 1, 4, 9, 16]\n", done.stderr
    assert done.returncode == 0


def test_a_child_that_is_terminated_right_after_the_fork_ends(place):
    """As Pool.terminate does with a worker that has just been started."""
    write(
        place,
        """
        import multiprocessing, os, signal, time
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()
        print(child.exitcode)
        """,
    )
    assert ours(place, "train.py").stdout == "-15\n"


def test_a_child_that_is_terminated_before_its_interpreter_is_ready_ends(place):
    """Python drops a signal that comes this early if it has a handler for it."""
    write(
        place,
        """
        import os, signal, time
        for _ in range(50):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(status)
            if status == 0:
                break
        """,
    )
    assert ours(place, "train.py").stdout == "-15\n" * 50


def test_a_megabyte_passes_unchanged(place):
    write(place, "import sys; sys.stdout.write('x' * 1_000_000)")
    assert ours(place, "train.py").stdout == "x" * 1_000_000


@pytest.mark.slow
def test_the_environment_set_before_importing_torch_counts(place):
    write(
        place,
        """
        import os, sys
        assert "torch" not in sys.modules
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch
        print(torch.get_num_threads())
        """,
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = ours(place, "train.py", env=environment)
    assert done.stdout == "1\n", done.stderr
