"""What `print(plan)` shows, on a small fixed model and a stated device."""

# ruff: noqa: E501 (tables as they are printed)
from __future__ import annotations

import itertools
import json
import unittest

import pytest
import torch
from expecttest import TestCase
from selection import every
from torch import nn

from dpcompile.api import prove
from dpcompile.device import DeviceSpec
from dpcompile.plan import Plan
from dpcompile.report import WIDTH, plan_dict, plan_text, shorten, symbolic_text
from dpcompile.rows import folded, rows_of
from dpcompile.units import human

DEVICE = DeviceSpec("laptop", flops_per_s=1e11, bytes_per_s=1e10)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(torch.relu(self.wide(self.norm(x))))


class Tied(nn.Module):
    """A token model whose head is its embedding, with equal blocks and one parameter that nothing reads."""

    def __init__(self, layers: int = 3, width: int = 8, vocabulary: int = 50) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plan_of(model: nn.Module, sample: torch.Tensor, policy: str = "auto", batch_size: int = 16) -> Plan:
    return prove(model, sample).conclude().plan(policy, device=DEVICE, batch_size=batch_size)


def tied_plan(policy: str = "auto") -> Plan:
    return plan_of(Tied(), torch.zeros(2, 6, dtype=torch.int64), policy)


class TestGolden(TestCase):
    maxDiff = None

    def test_plan_text(self) -> None:
        self.assertExpectedInline(
            plan_text(tied_plan()),
            """\
policy auto, batch size 16, device laptop (100Gflop/s, 10.0GB/s)

parameter                    op          T  d  p  plain  ghost explicit   kept  flash  tiled flops   held flip T choice reason
---------------------------- ---------- -- -- -- ------ ------ -------- ------ ------ ------ ----- ------ ------ ------ ------------
+tokens.weight               embedding   6  8 50  467ns 2.40us   11.6us 13.7us 2.40us      - 9.22k 3.07kB     20 ghost  least time
|head: tokens.weight         linear      6  8 50 3.16us 8.05us   17.0us 8.28us 8.61us      -  144k 19.2kB      6 ghost  least time
+tokens x head               cross      36  8 50     0s 1.86us       0s     0s 1.86us      - 9.22k     0B      - ghost  least time
 blocks.{0-2}.norm.weight x3 layer_norm  6  1  8  307ns      -        -  515ns      -      -   256   512B      - kept   small
 blocks.{0-2}.norm.bias x3   layer_norm  6  1  8  307ns      -        -  515ns      -      -   256   512B      - kept   small
 blocks.{0-2}.wide.weight x3 linear      6  8 32 2.13us 6.12us   11.3us 10.4us 6.09us 6.31us 76.0k 12.3kB     10 flash  least memory
 blocks.{0-2}.wide.bias x3   linear      6  1 32 1.23us      -        - 2.06us      -      - 1.02k 2.05kB      - kept   small
 blocks.{0-2}.back.weight x3 linear      6 32  8 2.13us 6.12us   11.3us 10.4us 6.09us 6.31us 76.0k 3.07kB     10 flash  least memory

Times (by the device model), flops of the choice, bytes held from the norm until the clip factors are known: for
the whole batch, and of one layer where a row stands for several (x12). Rows from + to + are uses of one weight.

one step                         plain  private  ratio
------------------------------  ------  -------  -----
flops, forward and backward      1.12M    1.37M   1.23
time of parameter gradients     21.9us   58.1us   2.65
layer inputs booked             49.9kB   49.9kB   1.00
held until the clip factors         0B   77.6kB
alive during one norm, at most      0B   6.91kB
peak memory of a step            118kB    153kB   1.29

choices: 1 ghost, 9 kept, 6 flash
flip: paper ghost iff 2*T**2 < d*p, that is T < sqrt(2)*sqrt(d)*sqrt(p)/2; auto ghost as fast as kept at T = flip T
unused: spare (no output depends on them: no gradient)""",
        )

    def test_symbolic_text(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.assertExpectedInline(
            symbolic_text(plan_of(model, torch.zeros(2, 5, 6))),
            """\
B samples, T positions, d input features, p output features, G groups; bytes for the sizes of this dtype

outer: 1 of 2 uses, for example 0.weight (linear)
method    flops                                bytes moved                                                  held       transient
--------  -----------------------------------  -----------------------------------------------------------  ---------  -----------
plain     2*B*G*T*d*p                          4*B*G*T*(d + p) + 4*G*d*p                                    0          0
ghost     2*B*G*T**2*(d + p) + 2*B*G*T*d*p     24*B*G*T**2 + 8*B*G*T*(d + p) + 8*B*G*T*Min(d, p) + 4*G*d*p  4*B*G*T*p  12*B*G*T**2
explicit  4*B*G*T*d*p                          8*B*G*T*(d + p) + 8*B*G*T*Min(d, p) + 16*B*G*d*p + 4*G*d*p   4*B*G*T*p  4*B*G*d*p
kept      2*B*G*T*d*p + 2*B*G*d*p              4*B*G*T*(d + p) + 20*B*G*d*p + 4*G*d*p                       4*B*G*d*p  4*B*G*d*p
flash     2*B*G*T*d*p + B*G*T*(T + 1)*(d + p)  12*B*G*T*(d + p) + 8*B*G*T*Min(d, p) + 4*G*d*p               4*B*G*T*p  8*B*G*T
tiled     4*B*G*T*d*p                          12*B*G*T*(d + p) + 8*B*G*T*Min(d, p) + 4*G*d*p               4*B*G*T*p  8*B*G*T

  ghost and kept take the same time at
  T = (-F*(d + p + 2*Min(d, p)) + sqrt(F**2*d**2 + 122*F**2*d*p + 4*F**2*d*Min(d, p) + F**2*p**2 + 4*F**2*p*Min(d, p) + 4*F**2*Min(d, p)**2 + 10*F*W*d**2*p + 10*F*W*d*p**2 + 12*F*W*d*p + W**2*d**2*p + W**2*d*p**2))/(12*F + W*d + W*p)
  with F flops/s and W bytes/s of the device

explicit: 1 of 2 uses, for example 0.bias (linear)
method  flops      bytes moved               held       transient
------  ---------  ------------------------  ---------  ---------
plain   0          4*B*G*T*d*p               0          0
any     2*B*G*d*p  4*B*G*T*d*p + 16*B*G*d*p  4*B*G*d*p  4*B*G*d*p

flip: paper ghost iff 2*T**2 < d*p, that is T < sqrt(2)*sqrt(d)*sqrt(p)/2; auto ghost as fast as kept at T = flip T

parameter  T  d  p  G  ghost by the paper: T <  by time: T <  choice
---------  -  -  -  -  -----------------------  ------------  ------
 0.weight  5  6  4  1                      3.5           3.2  kept

flops of a private step  536*B
flops of a plain step    480*B""",
        )


def test_str_of_a_plan_is_its_text() -> None:
    plan = tied_plan()
    assert str(plan) == plan_text(plan)


@pytest.mark.parametrize("policy", every(2, ["auto", "paper", "ghost", "explicit"]))
def test_the_table_keeps_within_its_width(policy: str) -> None:
    deep = nn.Sequential()
    inner: nn.Module = deep
    for name in ("encoder_with_a_long_name", "attention_of_the_block", "projection_to_the_output"):
        child = nn.Sequential()
        inner.add_module(name, child)
        inner = child
    inner.add_module("linear", nn.Linear(4, 4))
    for plan in (plan_of(deep, torch.zeros(2, 4), policy), tied_plan(policy)):
        assert max(map(len, plan_text(plan).splitlines())) <= WIDTH
        assert "\x1b" not in plan_text(plan)


def test_dict_holds_every_row_and_the_totals_of_the_plan() -> None:
    plan = tied_plan()
    found = json.loads(json.dumps(plan_dict(plan)))
    assert len(found["rows"]) == sum(len(group.parts) for group in plan.costs.groups)
    (batch,) = plan.flops().free_symbols
    assert found["totals"]["flops"] == int(plan.flops().subs({batch: 16}))
    backbone = found["totals"]["backbone_flops"]
    chosen = sum(row["costs"][row["choice"]]["flops"] for row in found["rows"])
    assert found["totals"]["flops"] == backbone + chosen - found["totals"]["shared_flops"]
    assert found["totals"]["held_bytes"] == sum(row["costs"][row["choice"]]["held_bytes"] for row in found["rows"])
    assert found["unused"] == ["spare"]


def test_time_flip_is_where_ghost_and_kept_take_the_same_time() -> None:
    def times(positions: int) -> tuple[float, float, float]:
        plan = plan_of(nn.Linear(96, 64, bias=False), torch.zeros(2, positions, 96))
        (row,) = plan_dict(plan)["rows"]
        return row["costs"]["ghost"]["time_s"], row["costs"]["kept"]["time_s"], row["flip_T"]

    _, _, flip = times(4)
    below, above = times(int(flip)), times(int(flip) + 1)
    assert below[0] <= below[1]
    assert above[0] > above[1]


def test_layers_fold_only_where_they_fill_ranges() -> None:
    def labels(*widths: int) -> list[str]:
        model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
        rows = folded(rows_of(plan_of(model, torch.zeros(2, 3, widths[0]))))
        return [f"{row.label} x{row.alike}" for group in rows for row in group]

    assert labels(4, 4, 4, 4) == ["{0-2}.weight x3"]
    assert labels(4, 4, 5, 4, 4) == ["{0,3}.weight x2", "1.weight x1", "2.weight x1"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0B"),
        (999, "", "999"),
        (1000, "", "1.00k"),
        (12_345, "B", "12.3kB"),
        (999.96e6, "", "1.00G"),
        (0.0123, "s", "12.3ms"),
        (4200, "s", "4200s"),
        (3e-9, "s", "3.00ns"),
    ],
)
def test_human_numbers(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_shorten_leaves_out_outer_names() -> None:
    assert shorten("model.layers.{0-31}.self_attn.q_proj.weight", 40) == "~.layers.{0-31}.self_attn.q_proj.weight"
    assert len(shorten("x" * 99, 20)) == 20


if __name__ == "__main__":
    unittest.main()
