"""GELU, and its derivative with it, of float32 values: exact, or cheap where 16 bits are stored anyway (docs/math.md, "A cheaper GELU")."""

import triton
import triton.language as tl

from cmt_fast.backend import interpreting

#: The instructions exist on a GPU only; the interpreter has a plain twin.
_ASSEMBLY = tl.constexpr(not interpreting())


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x * Phi(x). With EXACT by erf; else x * sigmoid(2 u), u an odd polynomial: absolute error below 3e-5.

    Args:
        x: float32, any shape.
        EXACT: for float32 outputs.
    """
    if EXACT:
        return x * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476))
    return x * _sigmoid_2u(x, tl.minimum(x * x, 16.0))


@triton.jit
def gelu_and_derivative(x, EXACT: tl.constexpr):
    """GELU and its derivative, which share what is dear: the error function, or the exponential.

    The cheap derivative is that of the cheap GELU: absolute error below 2e-4.
    """
    if EXACT:
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
        return x * phi, phi + x * density
    s = tl.minimum(x * x, 16.0)
    sigmoid = _sigmoid_2u(x, s)
    value = x * sigmoid
    slope = 1.595015308 + s * (0.2220346392 - 0.00351506834 * s)  # of 2 u
    return value, sigmoid + (value - value * sigmoid) * slope


@triton.jit
def _sigmoid_2u(x, s):
    """1 / (1 + e^(-2 u)) for u = x (c0 + c1 s + c2 s^2), s = min(x^2, 16)."""
    exponent = x * (-2.3011207 + s * (-0.10677609 + 0.0010142343 * s))  # -2 u log2(e)
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [exponent],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp2(exponent))
