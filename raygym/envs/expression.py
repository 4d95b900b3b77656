"""`evaluate`: arithmetic out of text, exact, bounded in time and size, without Python's `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

MAX_CHARACTERS = 400
_MAX_NODES = 200
_MAX_BITS = 4096
"""Of a numerator or denominator, at every step."""
_DIGITS = 12
"""Significant digits that a result that is no whole number is shown with."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[range, Callable[..., Fraction]]] = {
    "abs": (range(1, 2), abs),
    "ceil": (range(1, 2), lambda x: Fraction(math.ceil(x))),
    "floor": (range(1, 2), lambda x: Fraction(math.floor(x))),
    "max": (range(1, 99), max),
    "min": (range(1, 99), min),
    "round": (range(1, 3), lambda x, digits=Fraction(0): _rounded(x, digits)),
    "sqrt": (range(1, 2), lambda x: _power(x, Fraction(1, 2))),
}


class ExpressionError(ValueError):
    """Text that is no arithmetic, or too much of it. The message says which, for whoever wrote it."""


def evaluate(text: str) -> Fraction:
    """The value of an expression of numbers, `+ - * / // % **`, parentheses and `abs ceil floor max min round sqrt`.

    Exact, but for powers with a broken exponent, which have a float's precision.

    Raises:
        ExpressionError: it is something else, has no real value, or is too long or too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"the expression has {len(text)} characters; expected at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
            raise ExpressionError(f"the expression has too many parts; expected at most {_MAX_NODES}")
        return _value(tree.body)
    except ExpressionError:
        raise
    except ZeroDivisionError as error:
        raise ExpressionError("division by zero") from error
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"{text!r} is no arithmetic expression; expected one such as (3 + 4) * 2.5") from error
    except OverflowError as error:
        raise ExpressionError("a number is too large") from error


def shown(value: Fraction) -> str:
    """A value in decimal: whole numbers in full, others with twelve significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    # Exact division first, one rounding after; and never in scientific notation.
    quotient = Context(prec=_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    text = format(quotient, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            # Through its shortest decimal, so that 0.1 means a tenth.
            return _bounded(Fraction(repr(number)) if math.isfinite(number) else _too_large())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bounded(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.BinOp(op=ast.BitXor()):
            raise ExpressionError("^ is unknown; write ** for a power")
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            counts, function = _FUNCTIONS[name]
            if len(arguments) not in counts:
                raise ExpressionError(f"{name} got {len(arguments)} numbers; expected {counts[0]} to {counts[-1]}")
            return _bounded(function(*(_value(argument) for argument in arguments)))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ExpressionError(f"{name!r} is unknown; expected numbers, + - * / // % ** and {', '.join(_FUNCTIONS)}")
        case ast.Tuple():
            raise ExpressionError("a comma stands between numbers; write 1234.5 for one number, without a comma")
    raise ExpressionError("only numbers, + - * / // % **, parentheses and functions are known")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base in (0, 1, -1):  # whatever the exponent
            return base if exponent.numerator % 2 else abs(base) if exponent else Fraction(1)
        if bits * abs(exponent.numerator) > 2 * _MAX_BITS:
            _too_large()
        return base**exponent.numerator
    if base < 0:
        raise ExpressionError("a broken power (or a root) of a negative number is no real number")
    if exponent == Fraction(1, 2):
        numerator, denominator = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if numerator**2 == base.numerator and denominator**2 == base.denominator:
            return Fraction(numerator, denominator)
    result = float(base) ** float(exponent)
    return Fraction(repr(result)) if math.isfinite(result) else _too_large()


def _rounded(value: Fraction, digits: Fraction) -> Fraction:
    """To `digits` places, halves away from zero, as people do."""
    if digits.denominator != 1 or abs(digits) > 100:
        raise ExpressionError(f"round got {shown(digits)} places; expected a whole number up to 100")
    scale = Fraction(10) ** digits.numerator
    return math.floor(abs(value) * scale + Fraction(1, 2)) / scale * (1 if value >= 0 else -1)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        _too_large()
    return value


def _too_large() -> Fraction:
    raise ExpressionError(f"a number is too large; expected at most {int(_MAX_BITS * math.log10(2))} digits")
