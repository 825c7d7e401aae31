"""Checks: what a cap matches. A check works like a lambda, and combines by ``&``, ``|``, ``~``.

``mc_...`` check a module, ``pc_...`` a parameter. In a parameter cap, a module check applies to the
module that holds the parameter. So ``mc_type(nn.Conv2d) & pc_name("bias")`` matches the biases of
convolutions.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from gift.core.dynamic_class import plain_class
from gift.core.iterator import ModuleIterator, Site
from gift.core.raw_parameters import is_experts
from gift.factories.serializable import Recorded, bind, recorded
from gift.layers.table import FAMILIES, LAYERS, family_of, is_norm, row_of

Names = str | Iterable[str] | None
Test = Callable[..., bool]


class Check(Recorded):
    """A predicate on a module or parameter and its place in the network.

    Args:
        test: function with the arguments of a cap's check that returns whether it matches.
        prepare: function that returns the test for a network, if the check depends on the whole
            network.
    """

    optional = False
    """Whether a cap with the check may match nothing without a warning."""

    def __init__(
        self, test: Test | None = None, prepare: Callable[[nn.Module], Test] | None = None
    ) -> None:
        self.test = test
        self.prepare = prepare

    def __call__(self, *place: Any) -> bool:
        """Return whether the module or parameter at `place` matches."""
        if self.test is None:
            raise RuntimeError(f"{self!r} needs the whole network: use it as the check of a cap")
        return bool(self.test(*place))

    def bind(self, network: nn.Module) -> "Check":
        """Return the check for that network."""
        if self.prepare is None:
            return self
        return self.like(Check(self.prepare(network)))

    def __bool__(self) -> bool:
        raise TypeError(f"combine checks with &, | and ~, not with `and`, `or`, `not`: {self!r}")

    def __and__(self, other: Test) -> "Check":
        return all_of(self, other)

    def __rand__(self, other: Test) -> "Check":
        return all_of(other, self)

    def __or__(self, other: Test) -> "Check":
        return any_of(self, other)

    def __ror__(self, other: Test) -> "Check":
        return any_of(other, self)

    def __invert__(self) -> "Check":
        return none_of(self)


def _combined(fold: Callable[[Iterable[bool]], bool], checks: tuple[Test, ...]) -> Check:
    wrong = [check for check in checks if not callable(check)]
    if wrong:
        raise TypeError(f"to combine as a check: {wrong[0]!r}, expected a callable")

    def test(*place: Any) -> bool:
        return fold(check(*place) for check in checks)

    def prepare(network: nn.Module) -> Test:
        bound = tuple(bind(check, network) for check in checks)
        return lambda *place: fold(check(*place) for check in bound)

    return Check(test, prepare)


@recorded
def all_of(*checks: Test) -> Check:
    """Match if all of the checks match: ``check & check``."""
    return _combined(all, checks)


@recorded
def any_of(*checks: Test) -> Check:
    """Match if at least one of the checks matches: ``check | check``."""
    return _combined(any, checks)


@recorded
def none_of(*checks: Test) -> Check:
    """Match if none of the checks matches: ``~check``."""
    return _combined(lambda results: not any(results), checks)


def _name_test(equal: Names, contains: Names, glob: Names, regex: Names) -> Callable[[str], bool]:
    tests: list[Callable[[str], bool]] = []
    for text in _listed(equal):
        tests.append(text.__eq__)
    for text in _listed(contains):
        tests.append(lambda name, text=text: text in name)  # type: ignore[misc]
    for text in _listed(glob):
        tests.append(lambda name, text=text: fnmatchcase(name, text))  # type: ignore[misc]
    for text in _listed(regex):
        tests.append(re.compile(text).fullmatch)  # type: ignore[arg-type]
    if not tests:
        raise ValueError("no name given: pass names, or contains=, glob= or regex=")
    return lambda name: any(test(name) for test in tests)


def _listed(names: Names) -> list[str]:
    if names is None:
        return []
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"expected names, got {wrong}")
    return names


@recorded
def mc_any() -> Check:
    """Match every module. The network is visited first, so a cap claims the whole network."""
    return Check(lambda *place: True)


@recorded
def mc_name(
    *names: str, contains: Names = None, glob: Names = None, regex: Names = None
) -> Check:  # fmt: skip
    """Match modules by their name in their parent: ``fc`` for ``head.fc``.

    A module matches if any of the arguments matches.

    Args:
        names: names to equal.
        contains: substrings.
        glob: shell patterns.
        regex: regular expressions that match the whole name.
    """
    test = _name_test(names, contains, glob, regex)
    return Check(lambda *place: test(Site(*place).name))


@recorded
def mc_path(
    *names: str, contains: Names = None, glob: Names = None, regex: Names = None
) -> Check:  # fmt: skip
    """Match modules by their dotted path from the network, ``layer4.0.conv1``; see `mc_name`."""
    test = _name_test(names, contains, glob, regex)
    return Check(lambda *place: test(Site(*place).path))


@recorded
def mc_class_name(*names: str) -> Check:
    """Match modules by the exact name of their class before adaptation, without subclasses."""
    test = _name_test(names, None, None, None)
    return Check(lambda *place: test(Site(*place).class_name))


@recorded
def mc_type(*types: type) -> Check:
    """Match instances of any of the types, subclasses included."""
    wrong = [t for t in types if not isinstance(t, type)]
    if wrong or not types:
        raise TypeError(f"mc_type expects classes, got {wrong or 'none'}")
    return Check(lambda *place: isinstance(Site(*place).module, types))


@recorded
def mc_layer(*families: str) -> Check:
    """Match layers whose weights gift knows, optionally only those of some families.

    Args:
        families: some of ``linear``, ``conv``, ``embedding``, ``bilinear``, ``recurrent``,
            ``attention``; none means all. A subclass belongs to the family of its base.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"unknown families {unknown}, expected some of {list(FAMILIES)}")

    def test(*place: Any) -> bool:
        return family_of(Site(*place).module) in (families or FAMILIES)

    return Check(test)


@recorded
def mc_grouped() -> Check:
    """Match convolutions with groups, such as depthwise ones.

    Their weights are small: a low-rank delta of a depthwise convolution is larger than its weight.
    """

    def test(*place: Any) -> bool:
        module = Site(*place).module
        return getattr(module, "groups", 1) > 1 and hasattr(module, "kernel_size")

    return Check(test)


@recorded
def mc_norm() -> Check:
    """Match norm layers: torch's batch, instance, layer, group and RMS norms and their subclasses.

    This includes norm layers of other packages (``LlamaRMSNorm``, ``T5LayerNorm``, timm's
    ``RmsNorm``), recognised by their structure: a class with "norm" in its name, no submodules, and
    no parameter with more than one axis longer than one.
    """
    return Check(_is_norm)


_NORM_NAME = re.compile(r"[Nn]orm(?!al(?!i[sz]))")  # matches "Normalize", but not "Normal"


def _is_norm(*place: Any) -> bool:
    site = Site(*place)
    module = site.module
    if is_norm(module):
        return True
    if any(True for _ in module.children()) or not _NORM_NAME.search(site.class_name):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    return all(not is_lazy(p) and sum(n > 1 for n in p.shape) <= 1 for p in parameters)


@recorded
def mc_depth(at_least: int = 0, at_most: int | None = None) -> Check:
    """Match modules by depth: the network has depth 0, its submodules 1, and so on."""

    def test(*place: Any) -> bool:
        path = Site(*place).path
        depth = len(path.split(".")) if path else 0
        return depth >= at_least and (at_most is None or depth <= at_most)

    return Check(test)


@recorded
def mc_last(number: int, within: str = "") -> Check:
    """Match the last blocks of a network: direct submodules of a container that have parameters.

    Args:
        number: number of blocks, counted from the end.
        within: dotted path of the container, such as ``encoder.layer``; "" is the network.
    """
    if number < 1:
        raise ValueError(f"number of blocks is {number}, expected at least 1")

    def prepare(network: nn.Module) -> Test:
        try:
            container = network.get_submodule(within)
        except AttributeError as error:
            raise ValueError(f"there is no module {within!r} to take blocks from") from error
        blocks = [module for *_, module, _ in ModuleIterator(container, within)]
        blocks = [block for block in blocks if next(nn.Module.parameters(block), None) is not None]
        if number > len(blocks):
            raise ValueError(
                f"{within or 'the network'} has {len(blocks)} blocks with parameters, "
                f"the last {number} were asked for"
            )
        last = {id(block) for block in blocks[-number:]}
        return lambda *place: id(Site(*place).module) in last

    return Check(prepare=prepare)


def _parameter_test(test: Callable[[Site], bool]) -> Check:
    def check(*place: Any) -> bool:
        if len(place) != 7:
            raise TypeError(
                "a parameter check (pc_...) stands in a module cap; use it in para_caps"
            )
        return test(Site(*place))

    return Check(check)


@recorded
def pc_any() -> Check:
    """Match every parameter."""
    return _parameter_test(lambda site: True)


@recorded
def pc_name(
    *names: str, contains: Names = None, glob: Names = None, regex: Names = None
) -> Check:  # fmt: skip
    """Match parameters by their own name, ``bias``; see `mc_name`."""
    test = _name_test(names, contains, glob, regex)
    return _parameter_test(lambda site: test(site.parameter_name))


@recorded
def pc_path(
    *names: str, contains: Names = None, glob: Names = None, regex: Names = None
) -> Check:  # fmt: skip
    """Match parameters by their dotted path, ``layer4.0.bn1.bias``; see `mc_name`."""
    test = _name_test(names, contains, glob, regex)
    return _parameter_test(lambda site: test(site.full_path))


@recorded
def pc_experts() -> Check:
    """Match the expert weights of a mixture that are one parameter, ``(experts, rows, columns)``.

    Such a parameter has three axes, each longer than one, and belongs to a module whose weights
    gift does not know otherwise: ``gate_up_proj`` and ``down_proj`` of Mixtral, Qwen3-MoE,
    DeepSeek, GPT-OSS, Llama 4. Tables of positions or tokens and biases do not match. There is no
    warning if nothing matches.
    """
    check = _parameter_test(lambda site: is_experts(*site[4:]))
    check.optional = True
    return check


@recorded
def pc_ndim(at_least: int = 0, at_most: int | None = None) -> Check:
    """Match parameters by their number of axes: 2 for a matrix, 1 for a bias."""

    def test(site: Site) -> bool:
        axes = site.parameter.ndim
        return axes >= at_least and (at_most is None or axes <= at_most)

    return _parameter_test(test)


@recorded
def pc_bias() -> Check:
    """Match biases: parameters named ``bias``, or with a name that ends in it, like ``q_bias``.

    In layers that gift knows, biases of other names match too, like ``bias_ih_l0``. What a bias is
    computed from counts as the bias: ``bias_orig`` of a pruned layer, the original of a
    parametrised one. Three kinds are not biases: the weight of an embedding (T5's
    ``relative_attention_bias``), a ``relative_position_bias_table``, and the additional key and
    value of ``nn.MultiheadAttention``, ``bias_k`` and ``bias_v``.
    """
    return _parameter_test(_is_bias)


def _is_bias(site: Site) -> bool:
    module, name = site.module, site.parameter_name
    if isinstance(module, ParametrizationList):  # named after the tensor that it computes
        return name.startswith("original") and _is_bias_name(site.name, _BIASES)
    for suffix in ("_orig", "_g", "_v"):
        if isinstance(vars(module).get(name.removesuffix(suffix)), Tensor):
            name = name.removesuffix(suffix)
    row = row_of(plain_class(type(module)))
    return _is_bias_name(name, () if row is None else row.biases)


_BIASES = tuple({pattern for row in LAYERS for pattern in row.biases})


def _is_bias_name(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ("*bias", *patterns))
