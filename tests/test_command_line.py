"""A preset comes first, and several numbers are taken as people write them."""

from __future__ import annotations

import pytest
import tyro

from pcl_fast.command_line import Numbers
from pcl_fast.config import PRESETS, Config
from pcl_fast.plan import main as plan
from pcl_fast.train import main as train

COMMANDS = pytest.mark.parametrize(("command", "name"), [(train, "pcl_fast.train"), (plan, "pcl_fast.plan")])


def parse(*arguments: str) -> Config:
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def ended(command, monkeypatch, *arguments: str) -> str | int:
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        command()
    return end.value.code


@pytest.mark.parametrize(
    "written", [("50", "100", "200"), ("50,100,200",), ("50,", "100,", "200"), ("50, 100, 200",)], ids=" ".join
)
def test_numbers_are_divided_by_spaces_or_commas(written):
    assert parse("pcl_v2", "--cluster.ks", *written, "--epochs", "3").cluster.ks == (50, 100, 200)
    assert parse("pcl_v1", "--optim.milestones", *written).optim.milestones == (50, 100, 200)
    assert tyro.cli(Numbers, args=["0.1,0.2"]) == (0.1, 0.2)


def test_what_is_no_number_is_named_with_the_flag(capsys):
    with pytest.raises(SystemExit):
        parse("pcl_v2", "--cluster.ks", "50,1e5")
    message = " ".join(capsys.readouterr().err.split())
    assert "Error parsing --cluster.ks: '1e5' is no INT" in message


@COMMANDS
def test_a_missing_preset_is_one_line_that_lists_them(command, name, monkeypatch):
    for arguments in ((), ("--epochs", "3"), ("--epochs", "3", "pcl_v2")):
        message = ended(command, monkeypatch, *arguments)
        assert message.startswith(f"{name}: a preset must come first; choose from ")
        assert "pcl_v1, pcl_v2, moco_v1" in message
        assert "\n" not in message
    assert ended(command, monkeypatch, "pcl_v3").startswith(f"{name}: there is no preset 'pcl_v3'; choose from")


@COMMANDS
def test_other_mistakes_are_explained_as_before(command, name, monkeypatch, capsys):
    assert ended(command, monkeypatch, "pcl_v2", "--epoch", "3") == 2
    assert "--epochs INT" in capsys.readouterr().err
    assert ended(command, monkeypatch, "--help") == 0
    assert "pcl_v2" in capsys.readouterr().out
