"""Requirements that several modules share."""

from collections.abc import Collection

from ntk.errors import UnknownNameError


def require_choice(parameter: str, value: object, admissible: Collection[str], next_step: str) -> str:
    """Return ``value`` if it is one of the admissible names.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        value: What was received.
        admissible: The names that are accepted.
        next_step: A sentence telling what to do instead.

    Returns:
        The value, unchanged.

    Raises:
        UnknownNameError: If the value is not one of the admissible names; names the nearest ones.
    """
    if isinstance(value, str) and value in admissible:
        return value
    raise UnknownNameError(parameter, value, admissible, next_step)


def require_integer(
    parameter: str, value: object, minimum: int, reason: str, error: type[ValueError] = ValueError
) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``minimum``.

    Args:
        parameter: Name of the parameter, as the caller knows it.
        value: What was received; a NumPy integer is accepted, a bool or a float is not.
        minimum: The smallest admissible value.
        reason: Why, and what to do next, in full sentences.
        error: What to raise.

    Returns:
        The value as a Python int.

    Raises:
        ValueError: Or the ``error`` given, if it is not an integer or too small.
    """
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    number = int(value) if is_integer else minimum - 1  # type: ignore[call-overload]
    if number < minimum:
        raise error(f"{parameter}: must be an integer of at least {minimum}; received {value!r}. {reason}")
    return number
