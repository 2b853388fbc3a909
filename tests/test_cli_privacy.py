"""The commands about privacy: what they print, and how they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dpcompile.accountant import epsilon
from dpcompile.cli_privacy import _up, register
from dpcompile.ledger import Ledger
from dpcompile.schemes import FixedSize, Neighbours, Poisson, Step

APP = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
register(APP)
RUN = ["--steps", "200", "--delta", "1e-5"]
NOISE = ["--noise-multiplier", "2", *RUN]
SIZES = ["--dataset-size", "1000", "--batch-size", "20"]


def told(*arguments: str, code: int = 0) -> str:
    """What a command prints, on stderr if it refuses."""
    result = CliRunner().invoke(APP, list(arguments))
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(Neighbours.ADD_OR_REMOVE_ONE, 1e-5)
    for count, noise in ((100, 2.0), (1, 3.0)):
        ledger.record(Step(Poisson(0.02), noise, count), max_grad_norm=0.5)
    ledger.save(tmp_path / "ledger.json")
    return ledger


def test_epsilon_by_both_accountants() -> None:
    text = told("epsilon", *NOISE, "--sample-rate", "0.02")
    spent = epsilon([Step(Poisson(0.02), 2.0, 200)], 1e-5)
    assert f"epsilon {_up(spent)} at delta 1e-05 (pld)" in text
    assert "(rdp)" in text
    assert "add-or-remove-one: noise std = 2 * max_grad_norm" in text
    assert told("epsilon", *NOISE, *SIZES) == text
    assert "(pld)" not in told("epsilon", *NOISE, *SIZES, "--accountant", "rdp")


def test_epsilon_of_batches_of_fixed_size() -> None:
    text = told("epsilon", *NOISE, *SIZES, "--scheme", "fixed-size")
    assert "replace-one: noise std = 4 * max_grad_norm" in text
    assert "no result by pld" in text
    assert "(rdp)" in text


def test_shuffled_epochs_are_set_against_the_false_claim() -> None:
    text = told("epsilon", *NOISE, *SIZES, "--scheme", "shuffled")
    claim = epsilon([Step(Poisson(0.02), 2.0, 200)], 1e-5, neighbours=Neighbours.REPLACE_ONE)
    assert f"Accounted as if it were poisson, wrongly: epsilon {_up(claim)} (pld)" in text


def test_calibrate_gives_noise_for_the_target() -> None:
    text = told("calibrate", "--epsilon", "1", *RUN, *SIZES, "--accountant", "rdp")
    noise = float(text.split("noise multiplier ")[1].split()[0])
    assert 1 < noise < 3
    assert "epsilon 1 at delta 1e-05 (rdp)" in text
    assert "fixed-size sampling" in told("calibrate", "--epsilon", "1", *RUN, *SIZES, "--scheme", "fixed-size")


def test_printed_epsilon_is_never_rounded_down() -> None:
    assert _up(1.23401) == "1.235"
    assert _up(1.234) == "1.234"
    assert _up(0.0) == "0"
    assert _up(float("inf")) == "inf"
    assert _up(9999.1) == "1e+04"


def test_ledger_of_a_file_and_of_checkpoints(ledger: Ledger, tmp_path: Path) -> None:
    text = told("ledger", str(tmp_path / "ledger.json"))
    assert "101 steps, add-or-remove-one, target delta 1e-05" in text
    for cell in ("1-100", "poisson", "0.02", "0.5", _up(ledger.epsilon(until=100))):
        assert cell in text
    assert f"epsilon {_up(ledger.epsilon())} at delta 1e-05 (pld)" in text
    state = ledger.state_dict()
    for i, checkpoint in enumerate(({"ledger": state}, {"model": {"w": torch.ones(2)}, "private": {"ledger": state}})):
        torch.save(checkpoint, tmp_path / f"{i}.pt")
        assert told("ledger", str(tmp_path / f"{i}.pt")).split("\n")[1:] == text.split("\n")[1:]
    assert "at delta 1e-07" in told("ledger", str(tmp_path / "ledger.json"), "--delta", "1e-7")


def test_ledger_draws_a_plot_and_shortens_a_long_table(tmp_path: Path) -> None:
    ledger = Ledger(Neighbours.REPLACE_ONE, 1e-5)
    for i in range(30):
        ledger.record(Step(FixedSize(1000, 20), 9.0), max_grad_norm=1.0 + i)
    ledger.save(tmp_path / "ledger.json")
    text = told("ledger", str(tmp_path / "ledger.json"), "--plot", str(tmp_path / "spent.png"))
    assert "6 rows" in text
    assert "epsilon so far" in text
    assert "no result by pld" in text
    assert (tmp_path / "spent.png").read_bytes().startswith(b"\x89PNG")
    refusal = told("ledger", str(tmp_path / "ledger.json"), "--plot", str(tmp_path / "spent.doc"), code=2)
    assert "cannot write" in refusal


def test_an_empty_ledger_is_shown(tmp_path: Path) -> None:
    Ledger(Neighbours.ADD_OR_REMOVE_ONE, 1e-5).save(tmp_path / "ledger.json")
    text = told("ledger", str(tmp_path / "ledger.json"), "--plot", str(tmp_path / "spent.svg"))
    assert "epsilon 0 at delta 1e-05 (pld)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NOISE, "--sample-rate", "1.5"], "Expected sample_rate=1.5 in (0, 1]."),
        ([*NOISE, "--sample-rate", "0.1", *SIZES], "not both"),
        (NOISE, "--scheme poisson needs --sample-rate, or --dataset-size and --batch-size"),
        ([*NOISE, "--sample-rate", "0.1", "--scheme", "shuffled"], "--scheme shuffled needs --dataset-size"),
        ([*NOISE, "--dataset-size", "10", "--batch-size", "20"], "Expected batch_size=20 <= dataset_size=10."),
        ([*NOISE[:-1], "1", "--sample-rate", "0.1"], "Expected delta=1.0 in (0, 1)."),
        (["--noise-multiplier", "-1", *RUN, "--sample-rate", "0.1"], "Expected noise_multiplier=-1.0"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    text = told("epsilon", *arguments, code=2)
    assert message in text
    assert text.startswith("dpcompile: ")
    assert text.count("\n") == 1


def test_sampling_without_accounting_is_refused_with_the_cure() -> None:
    text = told("epsilon", *NOISE, *SIZES, "--scheme", "fixed-size", "--accountant", "pld", code=1)
    assert "it is accounted under: replace-one by rdp" in text
    text = told("epsilon", *NOISE, *SIZES, "--scheme", "shuffled", "--neighbours", "add-or-remove-one", code=1)
    assert "it is accounted under: replace-one by pld or rdp" in text


def test_files_without_a_ledger_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert "cannot read" in told("ledger", str(file), code=2)
    file.write_text("hello")
    assert "neither a ledger in JSON nor a torch checkpoint" in told("ledger", str(file), code=2)
    file.write_text("{}")
    assert "malformed" in told("ledger", str(file), code=2)
    torch.save({"model": {}}, file)
    assert "checkpoint without a ledger" in told("ledger", str(file), code=2)
    torch.save({"ledger": ledger.state_dict() | {"format": 9}}, file)
    assert "format 9" in told("ledger", str(file), code=2)
    assert "Expected delta=0.0" in told("ledger", str(tmp_path / "ledger.json"), "--delta", "0", code=2)
