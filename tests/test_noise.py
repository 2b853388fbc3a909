"""Noise is Gaussian of the asked size, independent everywhere, repeatable when seeded, and on a grid when secure.

Statistical bounds: every test has fixed randomness and would fail for about one seed in 10**6 (P below).
"""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpcompile import noise
from dpcompile.errors import PrivacyError
from dpcompile.noise import GaussianNoise, NoiseSource, SecureNoise, discrete_gaussian, grid_step, noise_std

P = 1e-6
SIZE = 200_000


@pytest.fixture
def fixed_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secure noise from a seeded generator: the distribution under test, without the chance of a failure."""
    generator = np.random.PCG64(20)
    monkeypatch.setattr(noise, "random_words", generator.random_raw)


@pytest.fixture(params=["seeded", "secure"])
def source(request: pytest.FixtureRequest) -> NoiseSource:
    return SecureNoise() if request.param == "secure" else GaussianNoise(seed=3)


def assert_correlation_is_chance(a: Tensor, b: Tensor) -> None:
    """Of independent normal draws, correlation * sqrt(count) is about standard normal."""
    correlation = float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
    assert abs(correlation) * math.sqrt(a.numel()) < stats.norm.isf(P / 2)


@pytest.mark.usefixtures("fixed_words")
class TestDistribution:
    def test_variance_is_the_one_asked_for(self, source: NoiseSource) -> None:
        for std in (0.37, 1.0, 250.0):
            draws = source.noised(torch.zeros(SIZE), std)
            chi_square = float((draws.double() / std).square().sum())
            low, high = stats.chi2.ppf([P / 2, 1 - P / 2], SIZE)
            assert low < chi_square < high

    def test_draws_are_normal_around_the_sum(self, source: NoiseSource) -> None:
        value = torch.full((SIZE,), 5.0)
        assert stats.kstest(((source.noised(value, 2.0) - value) / 2).numpy(), "norm").pvalue > P

    def test_tails_are_there(self, source: NoiseSource) -> None:
        beyond = int((source.noised(torch.zeros(1_000_000), 1.0).abs() > 4).sum())
        assert stats.binomtest(beyond, 1_000_000, 2 * float(stats.norm.sf(4))).pvalue > P

    def test_parameters_and_steps_are_independent(self, source: NoiseSource) -> None:
        steps = [[source.noised(torch.zeros(SIZE // 4), 1.0) for _ in range(3)] for _ in range(2)]
        draws = [draw for step in steps for draw in step]
        for i, a in enumerate(draws):
            for b in draws[:i]:
                assert not torch.equal(a, b)
                assert_correlation_is_chance(a, b)

    def test_neighbouring_coordinates_are_independent(self, source: NoiseSource) -> None:
        draws = source.noised(torch.zeros(SIZE), 1.0)
        for lag in (1, 2, 32):
            assert_correlation_is_chance(draws[lag:], draws[:-lag])


class TestInterface:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision_sums_get_float32_noise(self, source: NoiseSource, dtype: torch.dtype) -> None:
        result = source.noised(torch.ones(1000, dtype=dtype), 1e-4)
        assert result.dtype == torch.float32
        assert len(result.unique()) > 500  # bfloat16 could tell 1 from 1.0078 at best
        assert 0.5e-4 < float((result - 1).std()) < 2e-4

    def test_float64_stays_and_other_dtypes_are_made_at_the_end(self, source: NoiseSource) -> None:
        assert source.noised(torch.ones(3, dtype=torch.float64), 1.0).dtype == torch.float64
        assert source.noised(torch.ones(3), 1.0, dtype=torch.bfloat16).dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
    def test_any_shape_is_kept_and_the_sum_is_not_changed(self, source: NoiseSource, shape: tuple[int, ...]) -> None:
        value = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        result = source.noised(value, 1.0)
        assert result.shape == value.shape
        assert not result.requires_grad
        assert torch.equal(value, torch.ones_like(value))

    def test_strided_sums(self, source: NoiseSource) -> None:
        value = torch.arange(12.0).reshape(3, 4).T
        assert torch.allclose(source.noised(value, 1e-9), value, atol=1e-5)

    def test_no_noise_returns_a_copy_of_the_sum(self, source: NoiseSource) -> None:
        value = torch.randn(5, generator=torch.Generator().manual_seed(0))
        result = source.noised(value, 0.0)
        assert torch.equal(result, value)
        assert result.data_ptr() != value.data_ptr()

    @pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
    def test_impossible_std_is_refused(self, source: NoiseSource, std: float) -> None:
        with pytest.raises(ValueError, match="Expected a finite std="):
            source.noised(torch.ones(2), std)

    def test_whole_numbers_are_refused(self, source: NoiseSource) -> None:
        with pytest.raises(ValueError, match=r"got torch\.int64"):
            source.noised(torch.ones(2, dtype=torch.int64), 1.0)


class TestSeeds:
    def test_a_seed_reproduces_and_another_does_not(self) -> None:
        draws = [GaussianNoise(seed).noised(torch.zeros(100), 1.0) for seed in (7, 7, 8, None, None)]
        assert torch.equal(draws[0], draws[1])
        assert len({tuple(draw.tolist()) for draw in draws}) == 4

    def test_ranks_with_equal_seeds_are_independent(self) -> None:
        draws = [GaussianNoise(7, rank=rank).noised(torch.zeros(SIZE), 1.0) for rank in range(4)]
        for i, a in enumerate(draws):
            for b in draws[:i]:
                assert_correlation_is_chance(a, b)

    def test_torch_seeds_have_no_part(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = GaussianNoise(7).noised(torch.zeros(100), 1.0)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(GaussianNoise(7).noised(torch.zeros(100), 1.0), first)

    def test_resume_is_bit_for_bit(self) -> None:
        source = GaussianNoise(seed=None)
        source.noised(torch.zeros(33), 1.0)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        ahead = [source.noised(torch.zeros(n), 1.0) for n in (7, 100)]
        file.seek(0)
        resumed = GaussianNoise(seed=1)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        again = resumed.state_dict()  # before any draw: the state must not be lost
        resumed = GaussianNoise(seed=2)
        resumed.load_state_dict(again)
        assert all(
            torch.equal(resumed.noised(torch.zeros(n), 1.0), draw) for n, draw in zip((7, 100), ahead, strict=True)
        )

    def test_a_state_of_another_rank_or_kind_is_refused(self) -> None:
        with pytest.raises(PrivacyError, match="rank 1 does not fit rank 0"):
            GaussianNoise(7).load_state_dict(GaussianNoise(7, rank=1).state_dict())
        with pytest.raises(PrivacyError, match="expected a state of gaussian noise, got 'secure'"):
            GaussianNoise(7).load_state_dict(SecureNoise().state_dict())
        with pytest.raises(PrivacyError, match="expected a state of secure noise, got 'gaussian'"):
            SecureNoise().load_state_dict(GaussianNoise(7).state_dict())

    def test_negative_seeds_and_ranks_are_refused(self) -> None:
        with pytest.raises(ValueError, match="Expected seed=-1 >= 0"):
            GaussianNoise(-1)
        with pytest.raises(ValueError, match="Expected rank=-1 >= 0"):
            GaussianNoise(1, rank=-1)


class TestDiscreteGaussian:
    @pytest.mark.usefixtures("fixed_words")
    @pytest.mark.parametrize("scale", [1, 3, 50, 300])  # 300: strips of 4 magnitudes
    def test_frequencies_are_those_of_the_formula(self, scale: int) -> None:
        count = 1_000_000
        reach = 5 * scale
        x = np.arange(-12 * scale, 12 * scale + 1)
        weight = np.exp(-(x**2) / (2 * scale**2))
        expected = count * weight / weight.sum()
        drawn = np.bincount(discrete_gaussian(count, scale) + 12 * scale, minlength=len(x))
        inside = np.abs(x) <= reach
        observed = np.append(drawn[inside], drawn[~inside].sum())
        wanted = np.append(expected[inside], expected[~inside].sum())
        many = wanted >= 5
        observed = np.append(observed[many], observed[~many].sum())
        wanted = np.append(wanted[many], wanted[~many].sum())
        used = wanted > 0
        assert stats.chisquare(observed[used], wanted[used]).pvalue > P

    def test_rounded_real_noise_has_the_same_probabilities_as_stated(self) -> None:
        scale = 50
        x = np.arange(-12 * scale, 12 * scale + 1)
        discrete = np.exp(-(x**2) / (2 * scale**2))
        upper = np.abs(x)  # by symmetry in the upper tail, where differences of sf keep their digits
        rounded = stats.norm.sf((upper - 0.5) / scale) - stats.norm.sf((upper + 0.5) / scale)
        ratio = rounded / (discrete / discrete.sum())
        stated = ((x / scale) ** 2 - 1) / (24 * scale**2)
        assert np.allclose(ratio - 1, stated, rtol=0.02, atol=1e-9)

    @pytest.mark.usefixtures("fixed_words")
    def test_at_full_scale_low_bits_are_uniform_and_the_whole_is_normal(self) -> None:
        scale = int(1.37 * 2**40)
        draws = discrete_gaussian(SIZE, scale)
        assert stats.kstest(draws / scale, "norm").pvalue > P
        assert stats.chisquare(np.bincount(draws & 255, minlength=256)).pvalue > P
        assert stats.chisquare(np.bincount((draws >> 28) & 255, minlength=256)).pvalue > P

    @pytest.mark.parametrize("scale", [1, 300, 2**40 + 12345])
    def test_strips_propose_enough_everywhere(self, scale: int) -> None:
        """The proposal covers the Gaussian: no acceptance probability exceeds 1, and most proposals are accepted."""
        strips = noise._strips(scale)
        edges = np.arange(len(strips.slots)) * 2.0**strips.width_bits
        highest = strips.height * np.exp(-0.5 * (edges / scale) ** 2) / strips.slots
        assert highest.max() <= 1
        assert strips.slots.sum() == noise.SLOTS
        assert edges[-1] + 2**strips.width_bits >= noise.REACH * scale
        assert strips.height * math.sqrt(math.pi / 2) * scale / 2**strips.width_bits > 0.96 * noise.SLOTS or scale < 50

    @pytest.mark.parametrize("scale", [3, 300, 2**40 + 12345])
    def test_the_exact_comparison_agrees_where_float64_is_sure(
        self, scale: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = np.random.PCG64(5).random_raw(4000)
        strips = noise._strips(scale)
        fast = noise._accepted(strips, words[:2000], words[2000:])
        calls: list[bool] = []
        exact = noise._accepts
        monkeypatch.setattr(noise, "MARGIN", 2.0)
        monkeypatch.setattr(noise, "_accepts", lambda *given: calls.append(exact(*given)) or calls[-1])
        assert np.array_equal(noise._accepted(strips, words[:2000], words[2000:]), fast)
        assert len(calls) == 2000
        assert 0 < sum(calls) < 2000

    def test_float64_errs_far_below_the_margin(self) -> None:
        """The fast probability against 100 digits, near the edge of the support and in the middle."""
        scale = 2**40 + 12345
        strips = noise._strips(scale)
        for deviations in (0.01, 1.0, 3.5, 5.0, 11.9):
            magnitude = int(deviations * scale)
            strip = magnitude >> strips.width_bits
            quick = math.exp(-0.5 * (magnitude / scale) ** 2) * (strips.height / int(strips.slots[strip]))
            error = 2.0**-46
            below = max(0, math.floor((quick - error) * 2**64))
            assert noise._accepts(strips, strip, magnitude, below) or quick < 2 * error
            assert not noise._accepts(strips, strip, magnitude, math.ceil((quick + error) * 2**64))

    @pytest.mark.parametrize("scale", [0, 2**42])
    def test_scales_beyond_the_table_are_refused(self, scale: int) -> None:
        with pytest.raises(ValueError, match="Expected scale="):
            discrete_gaussian(1, scale)


class TestGrid:
    @pytest.mark.parametrize("std", [0.1, 1.0, 3.7e-5, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_every_result_is_a_multiple_of_the_grid_step(self, std: float, dtype: torch.dtype) -> None:
        value = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        for sums in (value, value * 1e-20, value * 1e6):
            steps = SecureNoise().noised(sums, std).double() / grid_step(std)
            assert torch.equal(steps, steps.round())

    def test_what_can_be_reached_does_not_depend_on_the_sum(self) -> None:
        """Mironov's observation as a test: of plain noise, the low bits of a result tell which sum was noised."""
        sums = [torch.full((20_000,), fill, dtype=torch.float64) for fill in (0.0, 1 / 3)]
        std = 1.0
        off_grid = [float((GaussianNoise(1).noised(s, std) / grid_step(std) % 1 != 0).double().mean()) for s in sums]
        assert min(off_grid) > 0.5
        for s in sums:
            low_bits = (SecureNoise().noised(s, std) / grid_step(std)).long() & 15
            assert stats.chisquare(low_bits.bincount(minlength=16).numpy()).pvalue > 1e-9  # not seeded

    @pytest.mark.parametrize("std", [1e-200, 0.3, 1.0, 1.5, 1e200])
    def test_the_step_is_a_power_of_two_of_the_stated_size(self, std: float) -> None:
        step = grid_step(std)
        assert math.frexp(step)[0] == 0.5
        assert 2**40 <= std / step < 2**41

    @pytest.mark.parametrize("std", [1e-300, 1e300])
    def test_a_std_beyond_the_grid_is_refused(self, std: float) -> None:
        with pytest.raises(ValueError, match=r"2\*\*-900 to 2\*\*900"):
            SecureNoise().noised(torch.zeros(1), std)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_sums_that_are_not_finite_are_refused(self, bad: float) -> None:
        with pytest.raises(PrivacyError, match="not finite"):
            SecureNoise().noised(torch.tensor([1.0, bad]), 1.0)

    def test_sums_far_above_the_noise_are_not_distorted(self) -> None:
        value = torch.tensor([1e12, -1e12], dtype=torch.float64)
        assert torch.allclose(SecureNoise().noised(value, 1e-3), value, rtol=1e-14, atol=0)

    def test_rounding_stays_within_the_stated_slack(self) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 10_000, generator=generator, dtype=torch.float64)
        std = 1.9e6  # coarse enough to see the rounding
        step = grid_step(std)
        rounded = (torch.round(a / step) - torch.round(b / step)) * step
        growth = float(rounded.norm() - (a - b).norm())
        slack = SecureNoise().sensitivity_slack(10_000) * std
        assert growth <= slack
        assert slack == pytest.approx(2**-40 * 100 * std)
        assert SecureNoise().sensitivity_slack(10**9) < 3e-8

    def test_several_pieces_are_one_tensor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(noise, "PIECE", 7)
        value = torch.arange(30.0).reshape(5, 6)
        assert torch.allclose(SecureNoise().noised(value, 1e-9), value, atol=1e-6)


class TestKeystream:
    def test_calls_share_nothing(self) -> None:
        a, b = noise.random_words(1000), noise.random_words(1000)
        assert len(np.unique(np.concatenate([a, b]))) == 2000

    @pytest.mark.parametrize("count", [0, 1, 7, 32768, 32769, 100_000])
    def test_all_of_a_request_is_filled(self, count: int) -> None:
        words = noise.random_words(count)
        assert words.shape == (count,)
        assert len(np.unique(words)) == count  # the block counter did not begin anew in the middle

    def test_bits_are_balanced(self) -> None:
        ones = int(np.unpackbits(noise.random_words(2**15).view(np.uint8)).sum())
        assert abs(ones - 2**20) < 6.5 * 2**9.5 * math.sqrt(2)  # not seeded: 1e-10

    def test_secure_noise_never_repeats_and_keeps_nothing(self) -> None:
        source = SecureNoise()
        state = source.state_dict()
        assert json.loads(json.dumps(state)) == {"kind": "secure"}
        first = source.noised(torch.zeros(100), 1.0)
        source.load_state_dict(state)
        assert not torch.equal(source.noised(torch.zeros(100), 1.0), first)


def test_noise_std_includes_the_slack() -> None:
    assert noise_std(1.1, 2.0) == 2.2
    slack = 0.01
    std = noise_std(1.1, 2.0, slack)
    assert std / (2.0 + slack * std) == pytest.approx(1.1)


@pytest.mark.parametrize(("given", "message"), [((-1, 1), "noise_multiplier=-1"), ((1, math.inf), "sensitivity=inf")])
def test_noise_std_refuses_what_has_no_meaning(given: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_std(*given)
    with pytest.raises(ValueError, match="the grid is too coarse"):
        noise_std(10.0, 1.0, slack=0.1)
