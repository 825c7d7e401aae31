"""The choice of a layer's form: a pure function of shapes, and what it must never do."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.kernels import conv_layers
from gift.kernels.cost_model import FORMS, Form, Plan, linear_form, plan
from gift.kernels.geometry import Geometry
from gift.methods import METHODS
from gift.strategies import LoRALinearFineTuningStrategy
from gift.utils.info import forms

pytestmark = pytest.mark.as_large

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64)
CHANNELS = (3, 16, 64, 128, 256, 512, 1024)
POSITIONS = (1, 16, 49, 196, 784, 3136, 16384, 65536, 262144)
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7))


def geometry(
    outputs: int, inputs: int, kernel: tuple[int, ...] = (3, 3), stride: int = 1
) -> Geometry:
    padding = tuple(size // 2 for size in kernel)
    return Geometry(
        (outputs, inputs, *kernel), (stride,) * len(kernel), padding, (1,) * len(kernel)
    )


def cuts_of(kernel: tuple[int, ...]) -> set[int]:
    """In both layouts."""
    return {1, kernel[0]}


def cases() -> Iterator[tuple[Geometry, int, int]]:
    """Geometries, cuts and positions, densely."""
    for outputs, inputs, kernel, stride in itertools.product(CHANNELS, CHANNELS, KERNELS, (1, 2)):
        for cuts, positions in itertools.product(cuts_of(kernel), POSITIONS):
            yield geometry(outputs, inputs, kernel, stride), cuts, positions


both = pytest.mark.parametrize("trained", [True, False])


def test_the_same_arguments_give_the_same_plan() -> None:
    """Also those of an equal geometry."""
    for given, cuts, positions in itertools.islice(cases(), 0, None, 7):
        first = plan(given, 3, cuts, positions)
        assert first == plan(replace(given), 3, cuts, positions)
        assert first.form in FORMS


def test_no_tensor_is_made() -> None:
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, *rest: Any) -> Any:
            raise AssertionError(f"{op} was called")

    with Nothing():
        plan(geometry(64, 64), 3, 3, 4096)


def test_the_words_are_those_of_the_type() -> None:
    assert get_args(Form) == FORMS


@pytest.mark.parametrize(("form", "given", "rank", "cuts", "positions"), [
    pytest.param("merged", geometry(64, 64), 3, 1, 16 * 56 * 56, id="early layer of a ResNet"),
    pytest.param("side", geometry(512, 512), 3, 1, 4 * 4 * 4, id="late layer, few images"),
    pytest.param("side", geometry(512, 512), 3, 3, 4 * 4 * 4, id="the same, balanced"),
    pytest.param("whole", geometry(64, 3, (7, 7), 2), 64, 1, 16 * 64 * 64, id="few channels"),
    pytest.param("whole", geometry(16, 16), 16, 3, 16 * 32 * 32, id="a rank that saves nothing"),
])  # fmt: skip
def test_each_form_is_chosen_where_it_should(
    form: Form, given: Geometry, rank: int, cuts: int, positions: int
) -> None:
    """Many positions and a small weight; the reverse; a delta as large as the weight."""
    assert plan(given, rank, cuts, positions).form == form


def test_each_form_is_chosen_somewhere_in_a_resnet_50() -> None:
    """At every rank something else, but each of them."""
    chosen = {
        plan(geometry(outputs, inputs, kernel), rank, 1, positions).form
        for outputs, inputs, kernel, positions in [
            (64, 64, (3, 3), 16 * 32 * 32),
            (2048, 512, (1, 1), 16 * 4 * 4),
            (512, 512, (3, 3), 16 * 4 * 4),
        ]
        for rank in (1, 64)
    }
    assert chosen == set(FORMS)


@both
def test_more_weight_never_turns_side_into_merged(trained: bool) -> None:
    """At equal positions: what is merged costs the more, the larger it is.

    That is, as long as filters are computed in the same way.
    """
    failures = []
    for kernel, stride, rank, positions in itertools.product(KERNELS, (1, 2), RANKS, POSITIONS):
        for cuts in cuts_of(kernel):
            for few in CHANNELS:
                for axis in (0, 1):
                    grown = [(few, many) if axis else (many, few) for many in CHANNELS]
                    plans = [
                        plan(geometry(*sizes, kernel, stride), rank, cuts, positions,
                             trained=trained)
                        for sizes in grown
                    ]  # fmt: skip
                    forms = [p.form for p in plans if p.as_product == plans[-1].as_product]
                    after = forms[forms.index("side") :] if "side" in forms else []
                    if "merged" in after:
                        failures.append(
                            f"{kernel} {stride} {rank} {cuts} {positions} {few} {forms}"
                        )
    assert not failures, f"{len(failures)}: {failures[:5]}"


@both
def test_more_positions_never_turn_merged_into_side(trained: bool) -> None:
    """At an equal weight: what is merged costs the same for however many."""
    failures = []
    for outputs, inputs, kernel, rank in itertools.product(CHANNELS, CHANNELS, KERNELS, RANKS):
        for cuts in cuts_of(kernel):
            forms = [
                plan(geometry(outputs, inputs, kernel), rank, cuts, positions, trained=trained).form
                for positions in POSITIONS
            ]
            after = forms[forms.index("merged") :] if "merged" in forms else []
            if "side" in after:
                failures.append(f"{outputs} {inputs} {kernel} {rank} {cuts}: {forms}")
    assert not failures, f"{len(failures)}: {failures[:5]}"


def test_more_rank_never_turns_whole_back() -> None:
    """The gradient of the whole weight costs the same at every rank, that of factors more.

    Kernels compute 16 filters at once: within such a block more rank costs nothing more. And where
    there are few positions, what is made of the weight costs more than all that is convolved.
    """
    failures = []
    for given, cuts, positions in cases():
        if positions < 1024:
            continue
        largest = min(given.shape[0] * cuts, given.shape[1] * given.taps // cuts)
        forms = [
            plan(given, rank, cuts, positions).form for rank in (16, 32, 64) if rank <= largest
        ]
        after = forms[forms.index("whole") :] if "whole" in forms else []
        if set(after) - {"whole"}:
            failures.append(f"{given.shape} {given.stride} {cuts} {positions}: {forms}")
    assert not failures, f"{len(failures)}: {failures[:5]}"


def test_without_a_backward_pass_there_is_no_gradient_to_choose_by() -> None:
    for given, cuts, positions in cases():
        assert plan(given, 3, cuts, positions, trained=False).form != "whole"


@both
@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_was_chosen_is_taken_everywhere(form: Form, trained: bool) -> None:
    """And changes nothing else."""
    for given, cuts, positions in itertools.islice(cases(), 0, None, 7):
        free = plan(given, 3, cuts, positions, trained=trained)
        chosen = plan(given, 3, cuts, positions, trained=trained, form=form)
        assert chosen == replace(free, form=form)


def test_products_of_matrices_are_only_for_what_they_can_compute() -> None:
    """Those of pointwise convolutions always; of others where the stride is one; on a processor."""
    for given, cuts, positions in cases():
        for rank in (1, 3, 64):
            made = plan(given, rank, cuts, positions)
            assert not made.as_product or given.pointwise or given.stride_one
            assert made.as_product or not given.pointwise
            elsewhere = plan(given, rank, cuts, positions, on_processor=False)
            assert elsewhere.as_product == given.pointwise


@pytest.mark.parametrize("bad", ["both", "", "Merged", 1, True, ["side"]])
def test_other_words_are_refused_with_those_that_are_allowed(bad: Any) -> None:
    for method in ("lora", "rslora", "lora_fa", "pissa", "olora"):
        with pytest.raises(ValueError, match=r"form is .*'merged' or 'side' or 'whole'"):
            METHODS[method](form=bad)


def test_the_setting_is_no_part_of_what_a_delta_means() -> None:
    """What was saved under one form is read under another."""
    plain, *others = (METHODS["lora"](rank=3, form=form) for form in (None, *FORMS))
    assert all(other.compat_settings == plain.compat_settings for other in others)
    assert len({*others, plain}) == 4


def plans_of(monkeypatch: pytest.MonkeyPatch, call: Any) -> list[Plan]:
    """The plans that are made within `call`."""
    seen: list[Plan] = []

    def record(*args: Any, **kwargs: Any) -> Plan:
        seen.append(plan(*args, **kwargs))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(conv_layers, "plan", record)
        conv_layers._planned.cache_clear()  # what was planned before is not planned again
        call()
    return seen


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("form", [None, *FORMS])
def test_plans_of_a_layer_follow_the_setting_and_never_the_values(
    form: Form | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = nn.Conv2d(16, 16, 3)
    adapt = ma_adapt("lora", rank=2, form=form)
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), adapt)]))
    plans = set()
    for value in (0.0, 1.0, 1e30, float("nan")):
        with torch.no_grad():
            for parameter in nn.Module.parameters(net):
                parameter.fill_(value)
        (made,) = plans_of(monkeypatch, lambda value=value: net(torch.full((2, 16, 9, 9), value)))
        plans.add(made)
    (made,) = plans
    assert form is None or made.form == form
    assert made.form in FORMS


def linear_cases() -> Iterator[tuple[tuple[int, int], int]]:
    """Shapes and ranks."""
    for outputs, inputs, rank in itertools.product(CHANNELS, CHANNELS, RANKS):
        if rank <= min(outputs, inputs):
            yield (outputs, inputs), rank


def test_a_linear_layer_takes_the_form_with_the_fewest_multiplications() -> None:
    """Counted product by product, as the forms are written."""
    for (outputs, inputs), rank in linear_cases():
        for rows in POSITIONS:
            into, out_of = rank * rows * inputs, rank * rows * outputs
            made, whole = rank * outputs * inputs, rows * outputs * inputs
            counts = {
                "side": [into, out_of, out_of, out_of, into, into],
                "merged": [made, made, into, out_of, out_of, into],
                "whole": [made, made, whole, made, made],
            }
            chosen = linear_form((outputs, inputs), rank, rows)
            assert sum(counts[chosen]) == min(map(sum, counts.values())), (outputs, inputs, rank)
            chosen = linear_form((outputs, inputs), rank, rows, trained=False)
            assert chosen == ("side" if into + out_of < made else "merged")


def test_more_rows_never_bring_a_linear_layer_back_to_its_side() -> None:
    for shape, rank in linear_cases():
        forms = [linear_form(shape, rank, rows) for rows in POSITIONS]
        after = [form for form in forms if form != "side"]
        assert forms == ["side"] * (len(forms) - len(after)) + after


@both
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_layer_takes_the_form_that_was_chosen(form: Form, trained: bool) -> None:
    for shape, rank in linear_cases():
        for rows in POSITIONS:
            assert linear_form(shape, rank, rows, trained=trained, form=form) == form


def test_forms_of_a_network_are_those_of_its_layers() -> None:
    """Of few rows and many; while inputs are dropped, and in 16 bits, only one is right."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4096))
    strategy = LoRALinearFineTuningStrategy(rank=2)
    enable_fine_tuning(net, strategy)
    assert forms(net, torch.zeros(32, 32)) == {"0": "merged", "1": "side"}
    assert forms(net, torch.zeros(4, 9, 32)) == {"0": "merged", "1": "side"}
    assert forms(net, torch.zeros(31, 32)) == {"0": "side", "1": "side"}
    assert forms(net, torch.zeros(64, 32)) == {"0": "merged", "1": "merged"}
    assert forms(net.bfloat16(), torch.zeros(64, 32).bfloat16()) == {"0": "side", "1": "side"}


def test_forms_are_reported_of_the_networks_own_layers_alone() -> None:
    """Others may run meanwhile: in another thread, or as here within the network."""
    nets = [nn.Sequential(nn.Linear(32, 32)) for _ in range(2)]
    for net in nets:
        enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=2))
    nets[0].register_forward_pre_hook(lambda _, inputs: print(nets[1](*inputs).shape))
    assert forms(nets[0], torch.zeros(64, 32)) == {"0": "merged"}
