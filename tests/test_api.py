"""What a user does with a dp_model beside one training step."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CASES

from dpcompile import CaptureError, DPCompileError, DPModule, dpcompile

B, WIDTH, CLASSES = 4, 6, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, CLASSES)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(F.relu(self.first(x)) * self.scale))


def net(dropout: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net()
    if not dropout:
        model.drop.p = 0.0
    return model


def batch(size: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, WIDTH, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def step(dp_model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    dp_model.zero_grad()
    F.cross_entropy(dp_model(x), y).backward()
    return grads(dp_model)


@pytest.fixture
def model() -> Net:
    return net()


@pytest.fixture
def dp_model(model: Net) -> DPModule:
    return dpcompile(model, batch()[0], max_grad_norm=0.1)


def test_parameters_buffers_and_state_dict_are_the_models_own(model: Net, dp_model: DPModule) -> None:
    assert [id(p) for p in dp_model.parameters()] == [id(p) for p in model.parameters()]
    assert [name for name, _ in dp_model.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(dp_model.state_dict()) == list(model.state_dict())
    dp_model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()})
    assert all((p == 0).all() for p in model.parameters())


def test_an_optimizer_step_trains_the_model(model: Net, dp_model: DPModule) -> None:
    optimizer = torch.optim.AdamW(dp_model.parameters(), lr=0.05)
    x, y = batch()
    before = F.cross_entropy(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(dp_model(x), y).backward()
        optimizer.step()
    assert F.cross_entropy(model(x), y).item() < before


def test_repeated_backwards_accumulate(dp_model: DPModule) -> None:
    once = step(dp_model, *batch())
    F.cross_entropy(dp_model(batch()[0]), batch()[1]).backward()
    for twice, one in zip(grads(dp_model), once, strict=True):
        torch.testing.assert_close(twice, 2 * one)


def test_a_retained_graph_can_be_run_backward_again(dp_model: DPModule) -> None:
    x, y = batch()
    once = step(dp_model, x, y)
    dp_model.zero_grad()
    loss = F.cross_entropy(dp_model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    for twice, one in zip(grads(dp_model), once, strict=True):
        torch.testing.assert_close(twice, 2 * one)


def test_a_retained_graph_of_a_widening_layer_is_not_written_over() -> None:
    """The smaller factor of a clipped sum is scaled in its place: here a result of the forward."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 64)), torch.randn(4, 5, 8)
    dp_model = dpcompile(model, x, max_grad_norm=0.1, norm_method="ghost", validate="off")
    loss = dp_model(x).square().mean((1, 2)).mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for twice, one in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(twice.grad, 2 * one)


def test_two_forwards_before_their_two_backwards(dp_model: DPModule) -> None:
    (x1, y1), (x2, y2) = batch(seed=1), batch(3, seed=2)
    expected = [a + b for a, b in zip(step(dp_model, x1, y1), step(dp_model, x2, y2), strict=True)]
    norms_2 = dp_model.per_sample_norms
    dp_model.zero_grad()
    first, second = F.cross_entropy(dp_model(x1), y1), F.cross_entropy(dp_model(x2), y2)
    first.backward()
    second.backward()
    for actual, want in zip(grads(dp_model), expected, strict=True):
        torch.testing.assert_close(actual, want)
    torch.testing.assert_close(dp_model.per_sample_norms, norms_2)


def test_every_contribution_is_at_most_the_bound(dp_model: DPModule) -> None:
    x, y = batch(1)
    total = sum(g.square().sum() for g in step(dp_model, x, y))
    assert math.sqrt(total) <= 0.1 * (1 + 1e-5)
    assert dp_model.per_sample_norms.shape == (1,)
    assert not dp_model.per_sample_norms.requires_grad


def test_eval_and_no_grad_are_the_models_own_inference(model: Net, dp_model: DPModule) -> None:
    x, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(dp_model(x), model(x))
    dp_model.eval()
    assert not model.training
    assert not model.drop.training
    torch.testing.assert_close(dp_model(x), model(x))
    dp_model.train()
    assert model.drop.training
    assert dp_model.training


def test_no_unclipped_gradient_can_reach_the_parameters_in_eval_mode(dp_model: DPModule) -> None:
    dp_model.eval()
    x, y = batch()
    x.requires_grad_()
    F.cross_entropy(dp_model(x), y).backward()  # the gradient of the input is anybody's; the parameters get none
    assert x.grad is not None
    assert not grads(dp_model)


def test_a_model_in_eval_mode_is_compiled_for_training_and_left_in_eval_mode() -> None:
    model = net(dropout=True).eval()
    dp_model = dpcompile(model, batch()[0])
    assert not model.training
    assert not model.drop.training
    dp_model.train()
    torch.manual_seed(1)
    first = dp_model(batch()[0])
    assert not torch.equal(first, dp_model(batch()[0]))  # dropout is at work


def test_dropout_draws_the_masks_of_plain_training() -> None:
    model = net(dropout=True)
    dp_model = dpcompile(model, batch()[0], max_grad_norm=math.inf)
    x, y = batch()
    torch.manual_seed(3)
    private = step(dp_model, x, y)
    model.zero_grad()
    torch.manual_seed(3)
    F.cross_entropy(model(x), y).backward()
    for actual, want in zip(private, grads(model), strict=True):
        torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_alike_and_apart(dp_model: DPModule, way: str) -> None:
    x, y = batch()
    expected = step(dp_model, x, y)
    norms = dp_model.per_sample_norms.clone()
    if way == "deepcopy":
        twin = copy.deepcopy(dp_model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(dp_model))
    else:
        file = io.BytesIO()
        torch.save(dp_model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in dp_model.parameters()}
    for actual, want in zip(step(twin, x, y), expected, strict=True):
        torch.testing.assert_close(actual, want)
    step(twin, *batch(2, seed=9))
    torch.testing.assert_close(dp_model.per_sample_norms, norms)
    assert twin.per_sample_norms.shape == (2,)


@pytest.mark.slow
def test_any_number_of_modules_is_compiled_by_torch_in_one_process(dp_model: DPModule) -> None:
    x, y = batch()
    expected = step(dp_model, x, y)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        twin = copy.deepcopy(dp_model)
        twin.zero_grad()
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        for actual, want in zip(step(compiled, x, y), expected, strict=True):
            torch.testing.assert_close(actual, want)


def test_attributes_of_the_model_are_there(dp_model: DPModule) -> None:
    assert isinstance(dp_model.second, nn.Linear)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = dp_model.nothing_of_that_name


def test_the_emitted_graphs_can_be_read(dp_model: DPModule) -> None:
    assert "def forward" in dp_model.graph_module.code
    assert "record_norms" in dp_model.backward_module.code
    assert "max_grad_norm" not in dp_model.forward_module.code
    assert "second" in str(dp_model.plan)


def test_norms_before_the_first_backward_are_an_error(dp_model: DPModule) -> None:
    with pytest.raises(DPCompileError, match="no backward yet"):
        _ = dp_model.per_sample_norms


def test_frozen_parameters_get_no_gradient_and_have_no_site() -> None:
    model = net()
    model.first.requires_grad_(False)
    dp_model = dpcompile(model, batch()[0])
    step(dp_model, *batch())
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None
    assert not any("first" in group.name for group in dp_model.plan.costs.groups)


@pytest.mark.parametrize("change", ["freeze", "unfreeze", "add", "replace"])
def test_changed_parameters_are_noticed(change: str) -> None:
    model = net()
    model.first.bias.requires_grad_(change != "unfreeze")
    dp_model = dpcompile(model, batch()[0])
    if change == "freeze":
        model.second.bias.requires_grad_(False)
    elif change == "unfreeze":
        model.first.bias.requires_grad_(True)
    elif change == "add":
        model.extra = nn.Parameter(torch.zeros(1))
    else:
        model.second.bias = nn.Parameter(torch.zeros(CLASSES))
    with pytest.raises(DPCompileError, match=r"[Cc]ompile again"):
        dp_model(batch()[0])


@pytest.mark.parametrize("change", ["rate", "size", "training", "kind", "gone"])
def test_changed_modules_are_noticed(change: str) -> None:
    """What the graph has taken from a module: the rate of a dropout, a flag, the module's own type."""
    model = net()
    dp_model = dpcompile(model, batch()[0])
    if change == "rate":
        model.drop.p = 0.5
    elif change == "size":
        model.first.in_features = 7  # no graph depends on it, and no forward reads it
        dp_model(batch()[0])
        return
    elif change == "training":
        model.drop.eval()
    elif change == "kind":
        model.drop = nn.Identity()
    else:
        del model.drop
    with pytest.raises(DPCompileError, match=r"`drop.* (compile again|take it back)"):
        dp_model(batch()[0])


def test_a_part_in_eval_mode_stays_in_it() -> None:
    """As it was compiled: train() and eval() of the whole change nothing of it."""
    model = net(dropout=True)
    model.drop.eval()
    dp_model = dpcompile(model, batch()[0])
    before = step(dp_model, *batch())
    dp_model.eval()
    dp_model.train()
    assert not model.drop.training
    assert all(torch.equal(a, b) for a, b in zip(step(dp_model, *batch()), before, strict=True))
    model.train()  # past the compiled module
    with pytest.raises(DPCompileError, match=r"`drop.training` was False and is True now"):
        dp_model(batch()[0])


def test_a_counter_of_calls_may_change() -> None:
    """What the model's own code writes is no part of the graph: inference goes on counting."""
    model = Counts()
    dp_model = dpcompile(model, batch()[0])
    assert model.calls == 0
    with torch.no_grad():
        dp_model(batch()[0])
    assert model.calls == 1
    step(dp_model, *batch())


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


def test_moving_to_another_type_needs_compiling_again(model: Net, dp_model: DPModule) -> None:
    """Norms are certified for the type that was compiled."""
    dp_model.double()
    x, y = batch()
    with pytest.raises(DPCompileError, match="another type than when they were compiled"):
        dp_model(x.double())
    again = dpcompile(model, x.double())
    assert all(g.dtype is torch.float64 for g in step(again, x.double(), y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"max_grad_norm": "1"}, "max_grad_norm"),
        ({"norm_method": "fast"}, "norm_method"),
        ({"loss_reduction": "none"}, "loss_reduction"),
        ({"loss_fn": F.cross_entropy}, "sample_targets"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(model: Net, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpcompile(model, batch()[0], **arguments)


def test_a_thing_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        dpcompile(lambda x: x, batch()[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"y": torch.zeros(B, WIDTH)}, "does not fit"),
        ((torch.zeros(B, WIDTH), torch.zeros(B)), "does not fit"),
        (torch.zeros(B, WIDTH + 1), "cannot be captured"),
        (torch.zeros(()), "batch"),
        (3, "batch"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(model: Net, sample: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        dpcompile(model, sample)


def test_sample_tensors_of_different_batch_sizes_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.linear(x + z)

    with pytest.raises(CaptureError, match=r"x has 4.*z has 1|x has 4, z has 1"):
        dpcompile(Two(), (torch.zeros(4, WIDTH), torch.zeros(1, WIDTH)))
    dp_model = dpcompile(Two(), (torch.zeros(4, WIDTH), torch.zeros(1, WIDTH)), batched={"z": None})
    dp_model(torch.zeros(3, WIDTH), z=torch.ones(1, WIDTH)).sum().backward()
    assert dp_model.per_sample_norms.shape == (3,)


def test_no_trainable_parameters_and_complex_ones_are_refused(model: Net) -> None:
    with pytest.raises(DPCompileError, match="no trainable parameters"):
        dpcompile(model.requires_grad_(False), batch()[0])
    broken = net()
    broken.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(DPCompileError, match="phase"):
        dpcompile(broken, batch()[0])


def test_a_model_that_branches_on_data_is_refused_with_its_line() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.linear(x)
            return self.linear(-x)

    with pytest.raises(CaptureError, match=r"test_api\.py") as caught:
        dpcompile(Branches(), batch()[0])
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) <= 4


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4)).eval()
    model[0].train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with pytest.raises(DPCompileError, match="batch_norm"):
        dpcompile(model, batch()[0])
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_every_offender_is_named_in_one_message() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(DPCompileError) as caught:
        dpcompile(model, batch()[0])
    assert "`1`" in str(caught.value)
    assert "`3`" in str(caught.value)
    assert "GroupNorm" in str(caught.value)


def test_other_shapes_than_the_samples_are_refused(dp_model: DPModule) -> None:
    with pytest.raises(CaptureError, match="compile again"):
        dp_model(torch.zeros(B, WIDTH + 1))
    with pytest.raises(CaptureError, match="arguments"):
        dp_model(batch()[0], mask=torch.zeros(B))


def test_the_fused_form_gives_the_loss_and_the_gradients_of_the_split_form(model: Net) -> None:
    x, y = batch()
    expected = step(dpcompile(model, x, max_grad_norm=0.1), x, y)
    for loss_fn in (F.cross_entropy, lambda out, t: F.cross_entropy(out, t, reduction="none")):
        fused = dpcompile(model, x, max_grad_norm=0.1, loss_fn=loss_fn, sample_targets=y)
        model.zero_grad()
        loss = fused(x, targets=y)
        torch.testing.assert_close(loss, F.cross_entropy(model(x), y))
        (loss * 3).backward()
        for actual, want in zip(grads(model), expected, strict=True):
            torch.testing.assert_close(actual, 3 * want)
        assert fused.backward_module is None
        assert "placeholder" not in fused.graph_module.code
        fused.eval()
        torch.testing.assert_close(fused(x), model(x))
        fused.train()


def test_targets_may_be_the_inputs_themselves() -> None:
    """As those of language models are; torch.compile takes no tensor two times."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    x = torch.randn(5, 4)
    fused = dpcompile(model, x, max_grad_norm=0.1, loss_fn=F.mse_loss, sample_targets=x.clone())
    F.mse_loss(dpcompile(model, x, max_grad_norm=0.1)(x), x).backward()
    expected = grads(model)
    for run in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x, targets=x).backward()
        torch.testing.assert_close(grads(model), expected)


def test_a_scalar_sum_of_losses_is_a_sum(model: Net) -> None:
    x, y = batch()
    expected = step(dpcompile(model, x, max_grad_norm=0.1), x, y)
    fused = dpcompile(
        model,
        x,
        max_grad_norm=0.1,
        loss_reduction="sum",
        sample_targets=y,
        loss_fn=lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    )
    model.zero_grad()
    fused(x, targets=y).backward()
    for actual, want in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(actual, B * want)


@pytest.mark.slow
def test_models_that_return_caches_return_them() -> None:
    case = CASES["gpt2"]()
    case.model.config.use_cache = True
    dp_model = dpcompile(case.model, case.sample_input)
    out = dp_model(case.sample_input)
    want = case.model(case.sample_input)
    assert type(out) is type(want)
    assert type(out.past_key_values) is type(want.past_key_values)
    torch.testing.assert_close(out.logits, want.logits)
    out.logits.sum().backward()
    assert dp_model.per_sample_norms.shape == (len(case.sample_input),)


@pytest.mark.slow
def test_an_encoder_decoder_returns_its_caches() -> None:
    case = CASES["t5"]()
    sample = {**case.sample_input, "use_cache": True}
    out = dpcompile(case.model, sample)(**sample)
    want = case.model(**sample)
    assert type(out.past_key_values) is type(want.past_key_values)
    torch.testing.assert_close(out.logits, want.logits)


def test_buffers_that_count_steps_go_on_counting() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, CLASSES)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.linear(x)

    model = Counts()
    dp_model = dpcompile(model, batch()[0])
    step(dp_model, *batch())
    step(dp_model, *batch())
    assert model.steps == 2


class ReturnsItTwice(nn.Module):
    """As the last hidden state of a language model is among its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        return h, h


class LooksUpInAnotherOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3))
        self.mix = nn.Parameter(torch.randn(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[x.transpose(1, 2).abs().long() % 3]
        return torch.einsum("qt,...td->...qd", self.mix, rows.flatten(1, 2).unsqueeze(-2))


@pytest.mark.parametrize(
    ("model", "shape"), [(ReturnsItTwice, (4, 3)), (LooksUpInAnotherOrder, (4, 2, 3))], ids=lambda x: str(x)
)
def test_torch_compile_gives_the_gradients_of_the_eager_module(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = model().double(), 2 * torch.randn(*shape, dtype=torch.double)
    dp_model = dpcompile(module, x, max_grad_norm=0.5)
    torch._dynamo.reset()
    found = []
    for run in (dp_model, torch.compile(dp_model, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        outputs = run(x)
        sum(((k + 1) * out).square().sum() for k, out in enumerate(outputs)).backward()
        found.append([p.grad for p in module.parameters()] + [dp_model.per_sample_norms])
    torch.testing.assert_close(*found)


def test_the_collector_of_cycles_runs_again_behind_a_compilation() -> None:
    dpcompile(nn.Linear(3, 2), torch.randn(2, 3))
    assert gc.isenabled()
    with pytest.raises(DPCompileError):
        dpcompile(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(2, 3))
    assert gc.isenabled()
    gc.disable()
    try:
        dpcompile(nn.Linear(3, 2), torch.randn(2, 3))
        assert not gc.isenabled()
    finally:
        gc.enable()
