"""Launching the training kernels of the inverted residual feed-forward network.

Maps are contiguous (B, H, W, channels) in one dtype but x, out and their gradients, which may be wider (autocast); statistics (6, channels) and sums
(2, channels) are float32: see ``ops/batch_norm/schema.py``. Weights of products are in the dtype of the maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.products import is_exact, precision_of
from cmt_fast.ops._triton.statistics import add_partials
from cmt_fast.ops._triton.tiling import block
from cmt_fast.ops.irffn.train_configs import (
    EXPAND_TILE,
    PROJECT_INPUT_TILE,
    WHOLE_ROW,
    ProductConfig,
    StripConfig,
    element_blocks,
    expand_input_config,
    product_config,
    row_block,
    strip_config,
    strip_programs,
    weight_config,
)
from cmt_fast.ops.irffn.triton_train_kernels import (
    dw_gradient_kernel,
    dw_kernel,
    expand_input_kernel,
    expand_kernel,
    expand_weight_kernel,
    layer_norm_gradient_kernel,
    normal_gradient_kernel,
    output_gradient_kernel,
    output_kernel,
    output_sums_kernel,
    project_input_kernel,
    project_kernel,
    project_weight_kernel,
    weight_gradient_kernel,
)

# ---- forward -----------------------------------------------------------------------------------------------------------------


def expand(x: Tensor, weight: Tensor, bias: Tensor, eps: float, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h = LayerNorm(x) weight^T + bias in the dtype of weight (R, C), and the moments of GELU(h): partials (P, 2, R), counts (P,)."""
    x, weight = x.contiguous(), weight.contiguous()
    h = x.new_empty(*x.shape[:3], len(weight), dtype=weight.dtype)
    launch = expand_launch(x, weight, bias, h, eps, moments)
    launch.run()
    return h, *_moments(launch, h)


def dw(h: Tensor, n1: Tensor, weight: Tensor, bias: Tensor | None, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u = depthwise 3x3 of BatchNorm(GELU(h)) by weight (R, 1, 3, 3), + BatchNorm(GELU(h)), and the moments of GELU(u)."""
    h, weight = h.contiguous(), weight.contiguous()
    u = torch.empty_like(h)
    launch = dw_launch(h, n1, weight, bias, u, moments)
    launch.run()
    return u, *_moments(launch, u)


def project(u: Tensor, n2: Tensor, weight: Tensor, bias: Tensor | None, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y = BatchNorm(GELU(u)) weight^T + bias, weight (C, R), and the moments of y."""
    u, weight = u.contiguous(), weight.contiguous()
    y = u.new_empty(*u.shape[:3], len(weight))
    launch = project_launch(u, n2, weight, bias, y, moments)
    launch.run()
    return y, *_moments(launch, y)


def output(y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor | None) -> Tensor:
    """shortcut + factor * BatchNorm(y), factor (B,); in the wider dtype of y and shortcut."""
    y, shortcut = y.contiguous(), None if shortcut is None else shortcut.contiguous()
    dtype = y.dtype if shortcut is None else torch.promote_types(y.dtype, shortcut.dtype)
    out = torch.empty_like(y, dtype=dtype)
    output_launch(y, n3, factor, shortcut, out).run()
    return out


def expand_launch(x: Tensor, weight: Tensor, bias: Tensor, h: Tensor, eps: float, moments: bool) -> Launch:
    r, c = weight.shape
    rows = x.numel() // c
    config = product_config(rows, c, r, weight.element_size(), is_exact(weight.dtype), EXPAND_TILE)
    partials, counts = _new_moments(h, -(-rows // config.block_n), moments)
    return _launch(
        expand_kernel,
        -(-rows // config.block_n) * -(-r // config.block_out),
        reads=dict(x=x, weight=weight, bias=bias),
        writes=dict(h=h, partials=partials, counts=counts),
        numbers=dict(rows=rows, eps=eps),
        constants=dict(C=c, R=r, EXACT=_exact_gelu(h), **_product(config, "C", "R", weight.dtype)),
        config=config,
        flops=2 * rows * c * r,
        elements=h.numel(),
        loops=(-(-c // config.block_in), -(-c // config.block_in)),
    )


def dw_launch(h: Tensor, n1: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, moments: bool) -> Launch:
    config, programs, geometry = _strips(h)
    partials, counts = _new_moments(u, programs, moments)
    return _launch(
        dw_kernel,
        programs * -(-h.shape[3] // config.block_c),
        reads=dict(h=h, n1=n1, weight=weight, bias=bias),
        writes=dict(u=u, partials=partials, counts=counts),
        config=config,
        elements=u.numel(),
        **geometry,
    )


def project_launch(u: Tensor, n2: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, moments: bool) -> Launch:
    c, r = weight.shape
    rows = u.numel() // r
    config = product_config(rows, r, c, weight.element_size(), is_exact(weight.dtype))
    partials, counts = _new_moments(y, -(-rows // config.block_n), moments)
    return _launch(
        project_kernel,
        -(-rows // config.block_n) * -(-c // config.block_out),
        reads=dict(u=u, n2=n2, weight=weight, bias=bias),
        writes=dict(y=y, partials=partials, counts=counts),
        numbers=dict(rows=rows),
        constants=dict(C=c, R=r, EXACT=_exact_gelu(u), **_product(config, "R", "C", weight.dtype)),
        config=config,
        flops=2 * rows * c * r,
        elements=u.numel(),
        loops=(-(-r // config.block_in),),
    )


def output_launch(y: Tensor, n3: Tensor, factor: Tensor | None, shortcut: Tensor | None, out: Tensor) -> Launch:
    return _elementwise(output_kernel, dict(y=y, n3=n3, factor=factor, shortcut=shortcut), dict(out=out), y)


# ---- backward ----------------------------------------------------------------------------------------------------------------


def output_sums(grad: Tensor, y: Tensor, n3: Tensor, factor: Tensor | None) -> Tensor:
    """The sums (2, C) of BN3's gradient over this process's pixels, of the gradient of ``output``."""
    launch = output_sums_launch(grad.contiguous(), y.contiguous(), n3, factor)
    launch.run()
    return add_partials(launch.arguments["partials"])  # type: ignore[arg-type]


def output_gradient(grad: Tensor, y: Tensor, n3: Tensor, s3: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient of y from that of ``output``."""
    grad, y = grad.contiguous(), y.contiguous()
    dy = torch.empty_like(y)
    output_gradient_launch(grad, y, n3, s3, factor, dy).run()
    return dy


def project_weight(
    grad: Tensor,
    y: Tensor,
    n3: Tensor,
    s3: Tensor,
    factor: Tensor | None,
    u: Tensor,
    n2: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of y, as ``output_gradient`` makes it; gradients of the projection's weight (C, R) and bias (C,) in the weight's dtype, and
    the sums (2, R) of BN2's gradient."""
    grad, y, u = grad.contiguous(), y.contiguous(), u.contiguous()
    dy = torch.empty_like(y)
    *before, launch = project_weight_launches(grad, y, n3, s3, factor, u, n2, dy)
    for other in before:
        other.run()
    return dy, *_weight_gradient(launch, weight, gamma, beta)


def project_input(dy: Tensor, weight: Tensor, u: Tensor, n2: Tensor, s2: Tensor | None) -> Tensor:
    """The gradient of u."""
    dy, weight, u = dy.contiguous(), weight.contiguous(), u.contiguous()
    du = torch.empty_like(u)
    project_input_launch(dy, weight, u, n2, s2, du).run()
    return du


def dw_gradient(du: Tensor, h: Tensor, n1: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of BN1's output, and sums (12 R,): two of BN1's gradient, the gradients of the bias and of the taps (R, 9)."""
    du, h, weight = du.contiguous(), h.contiguous(), weight.contiguous()
    dt = torch.empty_like(h)
    launch = dw_gradient_launch(du, h, n1, weight, dt)
    launch.run()
    return dt, add_partials(launch.arguments["partials"])  # type: ignore[arg-type]


def expand_input(
    dt: Tensor, h: Tensor, n1: Tensor, s1: Tensor, weight: Tensor, x: Tensor, shortcut: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, shortcut being that which passes by, and the moments (rows, 2) of LayerNorm."""
    dt, h, weight, x = dt.contiguous(), h.contiguous(), weight.contiguous(), x.contiguous()
    shortcut = None if shortcut is None else shortcut.contiguous()
    dx, moments = torch.empty_like(x), x.new_empty(x.numel() // x.shape[3], 2, dtype=torch.float32)
    for launch in expand_input_launches(dt, h, n1, s1, weight, x, shortcut, dx, moments, eps):
        launch.run()
    return dx, moments


def expand_weight(
    dt: Tensor,
    h: Tensor,
    n1: Tensor,
    s1: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the expansion's weight (R, C) and bias (R,) in the weight's dtype, and of LayerNorm's bias and weight, (2, C)."""
    dt, h, x = dt.contiguous(), h.contiguous(), x.contiguous()
    return _weight_gradient(expand_weight_launch(dt, h, n1, s1, x, moments), weight, gamma, beta)


def output_sums_launch(grad: Tensor, y: Tensor, n3: Tensor, factor: Tensor | None) -> Launch:
    block_n, block_c = element_blocks(y.shape[3])
    rows = y.numel() // y.shape[3]
    steps = max(1, min(8, rows // (block_n * 256)))
    programs = -(-rows // (block_n * steps))
    partials = y.new_empty(programs, 2, y.shape[3], dtype=torch.float32)
    return _launch(
        output_sums_kernel,
        programs * -(-y.shape[3] // block_c),
        reads=dict(grad=grad, y=y, n3=n3, factor=factor),
        writes=dict(partials=partials),
        numbers=dict(rows=rows, pixels=y.shape[1] * y.shape[2]),
        constants=dict(C=y.shape[3], STEPS=steps, BLOCK_N=block_n, BLOCK_C=block_c),
        elements=y.numel(),
        loops=(steps,),
    )


def output_gradient_launch(
    grad: Tensor, y: Tensor, n3: Tensor, s3: Tensor, factor: Tensor | None, dy: Tensor
) -> Launch:
    return _elementwise(output_gradient_kernel, dict(grad=grad, y=y, n3=n3, s3=s3, factor=factor), dict(dy=dy), y)


def project_weight_launches(
    grad: Tensor, y: Tensor, n3: Tensor, s3: Tensor, factor: Tensor | None, u: Tensor, n2: Tensor, dy: Tensor
) -> list[Launch]:
    """One kernel where one tile holds the gradient of the weight; else each of its tiles would make dy anew, which a kernel before them makes."""
    of_output = dict(grad=grad, y=y, n3=n3, s3=s3, factor=factor)
    operands: dict[str, Tensor | None] = dict(u=u, n2=n2)
    pixels = dict(pixels=y.shape[1] * y.shape[2])
    c, r = y.shape[3], u.shape[3]
    config, _ = weight_config(y.numel() // c, r, c, y.element_size(), is_exact(y.dtype))
    if config.block_out >= c and config.block_in >= r:
        return [_products(project_weight_kernel, operands | of_output, dict(dy=dy), pixels, dy, u, "C", "R")]
    operands |= dict.fromkeys(of_output) | dict(dy=dy)
    return [
        output_gradient_launch(grad, y, n3, s3, factor, dy),
        _products(project_weight_kernel, operands, {}, pixels, dy, u, "C", "R"),
    ]


def project_input_launch(dy: Tensor, weight: Tensor, u: Tensor, n2: Tensor, s2: Tensor | None, du: Tensor) -> Launch:
    c, r = weight.shape
    rows = u.numel() // r
    config = product_config(rows, c, r, weight.element_size(), is_exact(weight.dtype), PROJECT_INPUT_TILE)
    return _launch(
        project_input_kernel,
        -(-rows // config.block_n) * -(-r // config.block_out),
        reads=dict(dy=dy, weight=weight, u=u, n2=n2, s2=s2),
        writes=dict(du=du),
        numbers=dict(rows=rows),
        constants=dict(C=c, R=r, EXACT=_exact_gelu(u), **_product(config, "C", "R", weight.dtype)),
        config=config,
        flops=2 * rows * c * r,
        elements=u.numel(),
        loops=(-(-c // config.block_in),),
    )


def dw_gradient_launch(du: Tensor, h: Tensor, n1: Tensor, weight: Tensor, dt: Tensor) -> Launch:
    config, programs, geometry = _strips(h)
    return _launch(
        dw_gradient_kernel,
        programs * -(-h.shape[3] // config.block_c),
        reads=dict(du=du, h=h, n1=n1, weight=weight),
        writes=dict(dt=dt, partials=h.new_empty(programs, 12 * h.shape[3], dtype=torch.float32)),
        config=config,
        elements=h.numel(),
        **geometry,
    )


def expand_input_launches(
    dt: Tensor,
    h: Tensor,
    n1: Tensor,
    s1: Tensor,
    weight: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    dx: Tensor,
    moments: Tensor,
    eps: float,
) -> list[Launch]:
    """One kernel where a tile of the product holds whole rows of x, else the product and LayerNorm's gradient apart."""
    hidden = dict(dt=dt, h=h, n1=n1, s1=s1, weight=weight)
    if x.shape[3] <= WHOLE_ROW:
        return [_expand_input_launch(hidden, x, shortcut, dx, moments, eps)]
    dz = torch.empty_like(x, dtype=weight.dtype)
    return [_normal_gradient_launch(hidden, dz), _layer_norm_gradient_launch(dz, x, shortcut, dx, moments, eps)]


def _expand_input_launch(
    hidden: Mapping[str, Tensor], x: Tensor, shortcut: Tensor | None, dx: Tensor, moments: Tensor, eps: float
) -> Launch:
    weight = hidden["weight"]
    r, c = weight.shape
    rows = len(moments)
    config = expand_input_config(rows, r, c, weight.element_size(), is_exact(weight.dtype))
    return _launch(
        expand_input_kernel,
        -(-rows // config.block_n),
        reads=dict(**hidden, x=x, shortcut=shortcut),
        writes=dict(dx=dx, moments=moments),
        numbers=dict(rows=rows, eps=eps),
        constants=dict(C=c, R=r, EXACT=_exact_gelu(hidden["h"]), **_product(config, "R", "C", weight.dtype)),
        config=config,
        flops=2 * rows * c * r,
        elements=hidden["h"].numel(),
        loops=(-(-r // config.block_in),),
    )


def _normal_gradient_launch(hidden: Mapping[str, Tensor], dz: Tensor) -> Launch:
    weight = hidden["weight"]
    r, c = weight.shape
    rows = dz.numel() // c
    config = product_config(rows, r, c, weight.element_size(), is_exact(weight.dtype))
    return _launch(
        normal_gradient_kernel,
        -(-rows // config.block_n) * -(-c // config.block_out),
        reads=hidden,
        writes=dict(dz=dz),
        numbers=dict(rows=rows),
        constants=dict(C=c, R=r, EXACT=_exact_gelu(hidden["h"]), **_product(config, "R", "C", weight.dtype)),
        config=config,
        flops=2 * rows * c * r,
        elements=hidden["h"].numel(),
        loops=(-(-r // config.block_in),),
    )


def _layer_norm_gradient_launch(
    dz: Tensor, x: Tensor, shortcut: Tensor | None, dx: Tensor, moments: Tensor, eps: float
) -> Launch:
    c = x.shape[3]
    block_n = row_block(c)
    return _launch(
        layer_norm_gradient_kernel,
        -(-len(moments) // block_n),
        reads=dict(dz=dz, x=x, shortcut=shortcut),
        writes=dict(dx=dx, moments=moments),
        numbers=dict(rows=len(moments), eps=eps),
        constants=dict(C=c, BLOCK_N=block_n, BLOCK_C=block(c)),
        elements=x.numel(),
    )


def expand_weight_launch(dt: Tensor, h: Tensor, n1: Tensor, s1: Tensor, x: Tensor, moments: Tensor) -> Launch:
    reads = dict(dt=dt, h=h, n1=n1, s1=s1, x=x, moments=moments)
    return _products(expand_weight_kernel, reads, {}, {}, dt, x, "R", "C")


def weight_gradient_launch(
    products: Tensor,
    biases: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    sums: Tensor,
) -> Launch:
    """products (P, out, in) and biases (P, out) into dweight (out, in), dbias (out,) and sums (2, in)."""
    programs, out, in_ = products.shape
    block_in, block_out = 16, min(64, block(out))
    return _launch(
        weight_gradient_kernel,
        -(-in_ // block_in),
        reads=dict(products=products, biases=biases, weight=weight, gamma=gamma, beta=beta),
        writes=dict(dweight=dweight, dbias=dbias, sums=sums),
        numbers=dict(programs=programs),
        constants=dict(OUT=out, IN=in_, BLOCK_OUT=block_out, BLOCK_IN=block_in),
        elements=products.numel(),
        loops=(-(-out // block_out), programs),
    )


def _weight_gradient(
    launch: Launch, weight: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a kernel of partial products, and add them up."""
    launch.run()
    weight = weight.contiguous()
    products, biases = launch.arguments["products"], launch.arguments["biases"]
    assert isinstance(products, Tensor) and isinstance(biases, Tensor)
    _, out, in_ = products.shape
    dweight, dbias, sums = torch.empty_like(weight), weight.new_empty(out), products.new_empty(2, in_)
    weight_gradient_launch(products, biases, weight, gamma, beta, dweight, dbias, sums).run()
    return dweight, dbias, sums


# ---- parts -------------------------------------------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    programs: int,
    *,
    reads: Mapping[str, Tensor | None],
    writes: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float],
    constants: Mapping[str, Any],
    elements: int,
    config: ProductConfig | StripConfig | None = None,
    flops: int = 0,
    loops: tuple[float, ...] = (),
) -> Launch:
    """A launch on a grid of one axis; a loop of one turn is none, as the compiler unrolls it."""
    return Launch(
        kernel=kernel,
        grid=(programs,),
        arguments={**reads, **writes, **numbers},
        constants=constants,
        num_warps=config.num_warps if config else 4,
        num_stages=config.num_stages if isinstance(config, ProductConfig) else 1,
        reads=sum(t.nbytes for t in reads.values() if t is not None),
        writes=sum(t.nbytes for t in writes.values() if t is not None),
        flops=flops,
        elements=elements,
        loops=tuple(n for n in loops if n > 1),
    )


def _elementwise(kernel: Any, reads: Mapping[str, Tensor | None], writes: Mapping[str, Tensor], y: Tensor) -> Launch:
    """A kernel on tiles of maps like y (B, H, W, C)."""
    c = y.shape[3]
    rows = y.numel() // c
    block_n, block_c = element_blocks(c)
    return _launch(
        kernel,
        -(-rows // block_n) * -(-c // block_c),
        reads=reads,
        writes=writes,
        numbers=dict(rows=rows, pixels=y.shape[1] * y.shape[2]),
        constants=dict(C=c, BLOCK_N=block_n, BLOCK_C=block_c),
        elements=y.numel(),
    )


def _products(
    kernel: Any,
    reads: Mapping[str, Tensor | None],
    writes: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    grad: Tensor,
    x: Tensor,
    out: str,
    in_: str,
) -> Launch:
    """A kernel of a weight's gradient; grad (B, H, W, outputs), x (B, H, W, inputs), and the kernel's names of these widths."""
    outputs, inputs = grad.shape[3], x.shape[3]
    rows = grad.numel() // outputs
    config, steps = weight_config(rows, inputs, outputs, grad.element_size(), is_exact(grad.dtype))
    programs = -(-rows // (config.block_n * steps))
    return _launch(
        kernel,
        programs * -(-outputs // config.block_out) * -(-inputs // config.block_in),
        reads=reads,
        writes=dict(
            **writes,
            products=grad.new_empty(programs, outputs, inputs, dtype=torch.float32),
            biases=grad.new_empty(programs, outputs, dtype=torch.float32),
        ),
        numbers=dict(rows=rows, **numbers),
        constants={out: outputs, in_: inputs, "STEPS": steps, "EXACT": _exact_gelu(grad)}
        | _product(config, in_, out, grad.dtype),
        config=config,
        flops=2 * rows * inputs * outputs,
        elements=max(grad.numel(), x.numel()),
        loops=(steps,),
    )


def _product(config: ProductConfig, in_: str, out: str, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a product's tile, ``in_`` and ``out`` being the kernel's names of the widths."""
    return {
        "BLOCK_N": config.block_n,
        f"BLOCK_{in_}": config.block_in,
        f"BLOCK_{out}": config.block_out,
        "PRECISION": precision_of(dtype),
    }


def _strips(h: Tensor) -> tuple[StripConfig, int, dict[str, Any]]:
    """The tile of a depthwise kernel on h (B, H, W, R), programs a tile of channels, and what both kernels take."""
    images, height, width, r = h.shape
    config = strip_config(images, height, width, r)
    programs = strip_programs(images, height, width, r)
    constants = dict(
        R=r,
        EXACT=_exact_gelu(h),
        SPLIT=bool(width % 2),
        ROWS=config.rows,
        PAIRS=config.pairs,
        BLOCK_C=config.block_c,
    )
    mean_rows = height / -(-height // config.rows)
    numbers = dict(images=images, height=height, width=width)
    return config, programs, dict(numbers=numbers, constants=constants, loops=(mean_rows,))


def _exact_gelu(x: Tensor) -> bool:
    return x.dtype == torch.float32


def _new_moments(like: Tensor, programs: int, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the moments of a map's tiles, or for none."""
    if not wanted:
        return None, None
    return like.new_empty(programs, 2, like.shape[3], dtype=torch.float32), like.new_empty(
        programs, dtype=torch.float32
    )


def _moments(launch: Launch, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a launch wrote into them; without moments those of no program."""
    partials, counts = launch.arguments["partials"], launch.arguments["counts"]
    if isinstance(partials, Tensor) and isinstance(counts, Tensor):
        return partials, counts
    return like.new_empty(0, 2, like.shape[3], dtype=torch.float32), like.new_empty(0, dtype=torch.float32)
