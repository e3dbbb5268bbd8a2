"""Nothing that happens to its output or its terminal ends a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.tiny import flags_of_tiny
from launches import interrupt, same_state, train

from pcl_fast import train as trainer_command
from pcl_fast.command import command
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.ownership import owned
from pcl_fast.run.saving import Saver
from pcl_fast.run.signals import StopSignals

SPEAKING = """
import sys
from pathlib import Path
from pcl_fast.command import command
from rich.console import Console
with command("speaking"):
    for number in range(20000):
        print("a line", number, "\\u2713 ü \\udcff", flush=True)
    Console().print("rich, too \\u2713")
    print("to the end", file=sys.stderr)
"""


def speaking(stdout, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", SPEAKING], stdout=stdout, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_closed_pipe_and_an_ascii_terminal_end_nothing(encoding):
    reading, writing = os.pipe()
    os.close(reading)
    done = speaking(writing, PYTHONIOENCODING=encoding)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"to the end\n")


@pytest.mark.parametrize(
    ("folder", "reason"), [("/proc/run", "No such file or directory"), ("/tmp/" + "a" * 300, "File name too long")]
)
def test_a_folder_that_cannot_be_made_is_named(folder, reason):
    with pytest.raises(SystemExit) as ended, command("train"), owned(Path(folder)):
        pass
    assert ended.value.code == f"train: the folder {folder} cannot be made: {reason}; choose another place"


@pytest.mark.parametrize(
    ("words", "what"), [(["demo", "--output", ""], "--output"), (["--data="], "--data"), ([""], "an argument")]
)
def test_an_empty_argument_is_refused(words, what, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", *words])
    with pytest.raises(SystemExit) as ended, command("train"):
        pass
    assert ended.value.code == f"train: {what} is empty; is it a variable of a script that has no value?"


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda path: path.mkdir(), "File exists; a file is where a folder is wanted"),
        (lambda path: (path / "run").mkdir(parents=True), "Not a directory; a file is where a folder is wanted"),
        (lambda path: path.parent.read_text(), "Is a directory; a folder is where a file is wanted"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, do, said):
    path = tmp_path / "runs"
    path.write_text("")
    whole = f"^train: {tmp_path}.*: {said}: move it away, or choose another place$"
    with pytest.raises(SystemExit, match=whole), command("train"):
        do(path)


def test_what_ascii_lacks_is_written_as_an_escape():
    done = speaking(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"to the end\n")
    assert b"a line 0 \\u2713 \\xfc \\udcff\n" in done.stdout


def test_a_full_disk_below_the_log_ends_nothing():
    with open("/dev/full", "wb") as full:
        assert speaking(full).returncode == 0


def test_no_output_at_all_is_one_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with command("silent"):
        print("nobody hears this")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ValueError("--epochs must be positive"), "x: --epochs must be positive"),
        (PermissionError("cannot write a"), "x: cannot write a"),
        (KeyboardInterrupt(), "x: stopped"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "x: another rank is gone"),
    ],
)
def test_faults_become_sentences(fault, said):
    with pytest.raises(SystemExit) as ended, command("x"):
        raise fault
    assert ended.value.code.startswith(said)


def test_a_fault_of_our_own_keeps_its_trace():
    with pytest.raises(RuntimeError, match="a bug"), command("x"):
        raise RuntimeError("a bug")


@pytest.fixture
def closed_ascii_output(monkeypatch):
    """Standard output as it is after `| head` has ended, on a terminal that knows ASCII only."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding="ascii"))  # noqa: SIM115


def test_a_run_into_a_closed_pipe_comes_to_its_end(tmp_path, image_folder, monkeypatch, closed_ascii_output):
    output = tmp_path / "läuft"
    monkeypatch.setattr(sys, "argv", ["pcl_fast.train", "demo", *flags_of_tiny(image_folder, output)])
    trainer_command.main()
    assert load_checkpoint(output)["finished"]
    assert (output / "report.png").exists()


def test_an_epoch_is_saved_before_it_is_spoken_of(tmp_path, image_folder, monkeypatch, capsys):
    save, said = Saver.save, []

    def noted(self, learner, progress, *arguments, **options):
        said.append((progress.epoch, capsys.readouterr().out))
        save(self, learner, progress, *arguments, **options)

    monkeypatch.setattr(Saver, "save", noted)
    monkeypatch.setattr(sys, "argv", ["pcl_fast.train", "demo", *flags_of_tiny(image_folder, tmp_path / "run")])
    trainer_command.main()
    spoken = [(epoch, f"epoch {epoch}/2" in text) for epoch, text in said]
    assert spoken == [(0, False), (0, False), (1, False), (2, False), (2, True)]


@pytest.mark.parametrize("module", ["train", "evaluate", "demo", "plan", "data"])
def test_an_interrupt_while_pytorch_is_imported_ends_with_a_line(tmp_path, module):
    (tmp_path / "torch").mkdir()
    # As some modules do, it catches whatever comes.
    text = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass"
    (tmp_path / "torch" / "__init__.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-m", f"pcl_fast.{module}"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", f"pcl_fast.{module}: stopped\n")


def test_a_hangup_is_noted_like_any_signal_unless_it_is_ignored():
    """As nohup has it."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signals.asked == asked
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_ranks_whose_terminal_is_gone_save_and_go_on(two_ranks, image_folder, tmp_path):
    """torchrun passes the hangup on."""
    run = tmp_path / "run"
    done = interrupt(5, signal.SIGHUP, tmp_path, image_folder, run, ranks=2)
    assert "stopped by a signal, all is saved" in done.stdout, done.stdout + done.stderr
    assert 5 <= load_checkpoint(run)["global_step"] < 12
    train(image_folder, run, ranks=2)
    same_state(two_ranks[0], run)


# Rank 1 is killed in the second epoch.
DYING = """
import os, signal
from pcl_fast.run.metrics import StepMetrics
from pcl_fast.train import main
add = StepMetrics.add
def dying(self, reached, *args):
    add(self, reached, *args)
    if reached == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
StepMetrics.add = dying
main()
"""


@pytest.mark.slow
def test_a_rank_that_is_killed_is_a_sentence_of_the_others(image_folder, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    text = train(image_folder, tmp_path / "run", ranks=2, program=(str(script),), code=1)
    assert "pcl_fast.train: another rank is gone" in text
    assert text.count("Traceback") == 1, text  # torchrun's own
    assert load_checkpoint(tmp_path / "run")["global_step"] == 4
