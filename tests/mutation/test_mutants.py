"""What the lane of mutants changes, and what it leaves alone."""

import ast
from typing import Any

from tests.mutation.__main__ import drawn
from tests.mutation.mutants import mutants, mutated

SOURCE = '''
def least(values: list[int] | None, strict: bool = True) -> int:
    """The least of them."""
    found = []
    for value in values or ():
        if value >= 0 and strict:
            found.append(value + 1)
    if not found:
        raise ValueError(f"{values} has {len(found) + 1} problems")
    return min(found)
    return None
'''


def run(number: int, *given: Any) -> Any:
    scope: dict[str, Any] = {}
    exec(compile(mutated(SOURCE, number), "least", "exec"), scope)
    try:
        return scope["least"](*given)
    except (ValueError, NameError) as error:
        return type(error)


def test_each_change_does_what_it_says() -> None:
    """Annotations, docstrings and texts of errors stay; each change is another."""
    found = {(one.line - 1, one.what): one.number for one in mutants("least.py", SOURCE)}
    expected = {
        (3, "dropped"): NameError, (4, "the last left out"): 2, (5, "negated"): 0,
        (5, "the last left out"): 2, (5, "the first left out"): 0, (5, "compared otherwise"): 2,
        (6, "dropped"): ValueError, (6, "computed otherwise"): 0, (6, "2"): 3,
        (7, "negated"): ValueError, (9, "None"): None,
    }  # fmt: skip
    assert {key: run(found[key], [-1, 1]) for key in expected} == expected
    assert {key for key in found if key[0] in (1, 2)} == set()
    assert {key for key in found if key[0] == 8} == {(8, "dropped")}
    trees = {ast.dump(mutated(SOURCE, number)) for number in found.values()}
    assert len(trees | {ast.dump(ast.parse(SOURCE))}) == len(found) + 1


def test_a_sample_stays_what_it_is_if_other_lines_change() -> None:
    more = f"def other(a):\n    return a + 1 if a else 0\n{SOURCE}"
    here, there = (drawn(mutants("least.py", source), 6, seed=3) for source in (SOURCE, more))
    assert len({one.lasting for one in here} & {one.lasting for one in there}) >= 3
    own = [one.lasting for one in drawn(mutants("least.py", more), 99, seed=3)]
    own = [name for name in own if name in {one.lasting for one in mutants("least.py", SOURCE)}]
    assert own[:6] == [one.lasting for one in here]
    assert here != drawn(mutants("least.py", SOURCE), 6, seed=4)


def test_lengths_that_zip_checks_are_left_alone() -> None:
    source = "def f(a, b):\n    return [x for x in zip(a, b, strict=True)]\n"
    assert {one.what for one in mutants("f.py", source)} == {"None"}


def test_a_function_is_known_as_python_names_it() -> None:
    """By that name it is found which tests call it."""
    source = "class A:\n  def f(self):\n    def g():\n      return 1\n    return g() + 2\n"
    found = {one.text: one.function for one in mutants("a.py", source) if one.what == "None"}
    assert found == {"return 1": "a.py: A.f.<locals>.g", "return g() + 2": "a.py: A.f"}
    scope: dict[str, Any] = {}
    exec(source, scope)
    assert scope["A"].f.__code__.co_qualname == "A.f"
