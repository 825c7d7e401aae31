"""Class names and class numbers."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from gift.errors import DataError, some

_NUMBER = re.compile(r"-?\d{1,18}")  # longer ones are names
_DECIMAL = re.compile(r"[-+]?(\d{1,18}\.?\d{0,18}|\.\d{1,18})([eE][-+]?\d{1,3})?")
_MISSING = ("nan", "na", "n/a", "none", "null", "inf", "-inf", "<na>")


def classes_of(labels: Iterable[str], classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the class names in numerical or alphabetical order, or those that are given.

    Raises:
        DataError: if there are fewer than two, one is given twice, or labels without given classes
            look like measured numbers.

    Example:
        >>> classes_of(["10", "9", "9"])
        ('9', '10')
        >>> classes_of(["wasp", "ant", "bee"])
        ('ant', 'bee', 'wasp')
    """
    if classes is not None:
        given = tuple(map(str, classes))
        if twice := [name for name, count in Counter(given).items() if count > 1]:
            raise DataError(f"classes are given twice: {some(twice)}")
        return given
    found = set(labels)
    numbers = all(_DECIMAL.fullmatch(name) for name in found)
    whole = all(_NUMBER.fullmatch(name) for name in found)
    if not whole:
        _refuse_measured(found)
    value = int if whole else float
    names = tuple(sorted(found, key=lambda name: (value(name) if numbers else 0, name)))
    if len(names) < 2:
        raise DataError(
            f"there is no more than one class, {some(names) or 'none'}: nothing to distinguish; if "
            "there are other classes, give classes=train.classes"
        )
    return names


def _refuse_measured(labels: set[str]) -> None:
    """Raise an error for labels that are numbers, but not class numbers."""
    missing = {name for name in labels if name.lower() in _MISSING}
    numbers = sorted(labels - missing, key=lambda name: (len(name), name))
    if not numbers or not all(_DECIMAL.fullmatch(name) for name in numbers):
        return
    advice = "if each of them is a class nevertheless, give their names, classes=[...]"
    if missing:
        raise DataError(f"labels are numbers and {some(sorted(missing))}: is one missing? {advice}")
    if broken := [name for name in numbers if not float(name).is_integer()]:
        raise DataError(
            f"labels such as {some(broken, 4)} are measured numbers, {len(numbers)} different ones,"
            f" and no classes: for a regression give task='regression'; {advice}"
        )
    twice = Counter(float(name) for name in numbers)
    if same := [name for name in numbers if twice[float(name)] > 1]:
        raise DataError(f"labels {some(same, 4)} are one number written in several ways; {advice}")


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Make class names unique: names of several classes, as in ImageNet, get the class number.

    Example:
        >>> distinct(["crane", "ant", "crane"])
        ('crane (0)', 'ant', 'crane (2)')
    """
    given = list(names)
    counts = Counter(given)
    return tuple(f"{n} ({i})" if counts[n] > 1 else n for i, n in enumerate(given))


def numbers_of(
    labels: Sequence[str], classes: tuple[str, ...]
) -> tuple[list[int], list[tuple[int, str]]]:
    """Return the numbers of labels, and the positions of unknown labels, each with a reason.

    Labels that are numbers may also be class numbers of classes with other names.

    Example:
        >>> numbers_of(["bee", "ant", "cat"], ("ant", "bee"))
        ([1, 0, -1], [(2, "'cat' is none of the classes ant, bee")])
        >>> numbers_of(["0", "2"], ("negative", "positive"))
        ([0, -1], [(1, 'label 2 is out of range: there are 2 classes, numbered from 0')])
    """
    known = {name: number for number, name in enumerate(classes)}
    by_number = not any(map(_NUMBER.fullmatch, classes)) and all(map(_NUMBER.fullmatch, labels))
    numbers, problems = [], []
    for place, label in enumerate(labels):
        number = known.get(label, -1)
        if by_number and 0 <= int(label) < len(classes):
            number = int(label)
        numbers.append(number)
        if number < 0:
            count = len(classes)
            reason = f"label {label} is out of range: there are {count} classes, numbered from 0"
            if not by_number:
                reason = f"{label!r} is none of the classes {some(classes)}"
            problems.append((place, reason))
    return numbers, problems
