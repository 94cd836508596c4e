"""Operations that the ways to compute a share of the kernel take, in multiply-adds.

Symbols: outputs (u, v) and examples (n, m) of the two sides; groups g, entries K and Q of the two factors, positions P.
"""

ELEMENTWISE = 40
"""Multiply-adds of a matrix product in the time of one elementwise operation (measured on 2 cores: 30 to 60)."""


def pairs_of_rows(outputs: tuple[int, int], examples: tuple[int, int], *, paired: bool, lower: bool) -> float:
    """Products of two rows of Jacobians.

    Args:
        outputs: (u, v)
        examples: (n, m)
        paired: Whether only equal outputs meet.
        lower: Whether one triangle is enough.
    """
    units = outputs[0] if paired else outputs[0] * outputs[1]
    return units * examples[0] * examples[1] / (2 if lower else 1)


def factored(
    sizes: tuple[int, int, int, int, int],
    outputs: tuple[int, int],
    examples: tuple[int, int],
    *,
    paired: bool,
    lower: bool,
    elementwise: float = ELEMENTWISE,
) -> dict[str, float]:
    """Each way to add the share of a weight whose gradient is a sum of outer products.

    Args:
        sizes: (g, K, Q, P, P')
        outputs: (u, v)
        examples: (n, m)
        paired: Whether only equal outputs meet.
        lower: Whether one triangle is enough.
        elementwise: What one elementwise operation counts; 0 to count products alone.

    Returns:
        "positions", over pairs of positions; "outer", with the gradients written out; "separable", with those of one
        output written out, where the derivatives allow it.
    """
    (g, k, q, p, p2), (u, v), (n, m) = sizes, outputs, examples
    pairs = pairs_of_rows(outputs, examples, paired=paired, lower=lower)
    elementwise *= (n * m if paired else pairs) * p * p2 * g
    units = u if paired else u * v
    return {
        "positions": n * m * p * p2 * g * k + pairs * p * p2 * g * q + elementwise,
        "outer": (u * n * p + (0 if lower else v * m * p2)) * g * k * q + pairs * g * k * q,
        "separable": (n * p + m * p2) * g * k * q + n * m * g * q * (k + units),
    }
