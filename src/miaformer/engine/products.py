"""Matrix products of inference behind one interface, with what follows them fused in where the processor can.

On CPUs, PyTorch's `addmm` copies the bias to the size of the result, and leaves GELU and residual to passes of their
own: a third of an eager block of DeiT-S (docs/log.md). oneDNN's linear, which `torch.compile` calls, does all in
one pass; it is used wherever nobody asks for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from miaformer.engine.changes import versions
from miaformer.engine.kernels import POINTWISE, onednn_pays

Layer = tuple[Tensor, Tensor | None]  # weight and bias


class Products(Protocol):
    """x: (T, in); weight: (out, in), a slice of a parameter; bias: (out,) or None."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(T, out)."""
        ...

    def side_by_side(self, x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
        """`linear` with each of several layers: (T, its out) each."""
        ...

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: Any) -> Tensor:
        """The same through the activation `act`, a module."""
        ...

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """The same plus `residual` (T, out)."""
        ...


class Plain:
    """PyTorch's own operations: any device, any dtype, differentiable."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def side_by_side(self, x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
        return [self.linear(x, weight, bias) for weight, bias in layers]

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: Any) -> Tensor:
        activated: Tensor = act(F.linear(x, weight, bias))
        return activated

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        return _added(x, weight, bias, residual)


class OneDnn(Plain):
    """oneDNN's linear with fused bias, GELU and residual: CPU, no gradients.

    Its kernels are compiled for a number of rows, at 0.5 to 1 ms each, and the last 1,024 are kept.
    """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _pays(x, weight):
            return F.linear(x, weight, bias)
        out: Tensor = POINTWISE.default(x, _dense(weight), bias, "none", [], "")
        return out

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: Any) -> Tensor:
        gelu = gelu_kind(act)
        if gelu is None or not _pays(x, weight):
            activated: Tensor = act(self.linear(x, weight, bias))
            return activated
        out: Tensor = POINTWISE.default(x, _dense(weight), bias, "gelu", [], gelu)
        return out

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if not _pays(x, weight):
            return _added(x, weight, bias, residual)
        fused: Tensor = POINTWISE.binary(x, residual, _dense(weight), bias, "add")
        return fused


class Packed(OneDnn):
    """The same with copies of weights in the layout that oneDNN's kernels read, made when a weight is first used.

    A plain weight is rearranged in every call, which takes as long as thirty rows of the product. Each cut of a weight
    has a copy of its own, made anew where the weight has changed in place. For weights that stay, and views of them:
    what is known of a weight is never forgotten.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], _Copy] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._pays(x, weight):
            return F.linear(x, weight, bias)
        out: Tensor = POINTWISE.default(x, self._packed(weight), bias, "none", [], "")
        return out

    def side_by_side(self, x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
        """As one product with a copy of all layers together: a tenth faster at a hundred rows, a fifth at fifty."""
        weights, biases = zip(*layers, strict=True)
        if not self._pays(x, *weights):
            return [F.linear(x, weight, bias) for weight, bias in layers]
        originals = weights if biases[0] is None else (*weights, *biases)
        copy = self._copy_of(*originals, make=lambda: _joined(weights, biases))
        out: Tensor = POINTWISE.default(x, copy.weight, copy.bias, "none", [], "")
        return out.split([len(weight) for weight in weights], dim=1)

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: Any) -> Tensor:
        gelu = gelu_kind(act)
        if gelu is None or not self._pays(x, weight):
            activated: Tensor = act(self.linear(x, weight, bias))
            return activated
        out: Tensor = POINTWISE.default(x, self._packed(weight), bias, "gelu", [], gelu)
        return out

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if not self._pays(x, weight):
            return _added(x, weight, bias, residual)
        fused: Tensor = POINTWISE.binary(x, residual, self._packed(weight), bias, "add")
        return fused

    @staticmethod
    def _pays(x: Tensor, *weights: Tensor) -> bool:
        """Whether oneDNN is the faster one for one product with all of these together."""
        size = sum(weight.numel() for weight in weights)
        return x.dtype != torch.float32 or onednn_pays(len(x), size, True, torch.get_num_threads())

    def _packed(self, weight: Tensor) -> Tensor:
        return self._copy_of(weight, make=lambda: (weight.detach(), None)).weight

    def _copy_of(self, *originals: Tensor, make: Callable[[], Layer]) -> _Copy:
        """What is known of these tensors, or a copy of the layer that `make` makes of them now."""
        key = (originals[0].shape, *(tensor.data_ptr() for tensor in originals))  # a cut is a new tensor in each call
        now = versions(originals)
        known = self._copies.get(key)
        if known is None or known.versions != now:
            weight, bias = make()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            known = _Copy(packed, bias, now, weight.numel(), tuple(tensor.detach() for tensor in originals))
            self._copies[key] = known
        return known

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()  # copies of a model make their own

    @property
    def nbytes(self) -> int:
        """Memory of the copies made so far."""
        return sum(copy.size * copy.originals[0].element_size() for copy in self._copies.values())


@dataclass(frozen=True)
class _Copy:
    weight: Tensor  # opaque: in oneDNN's layout
    bias: Tensor | None  # of layers joined
    versions: list[int]  # of the originals, when they were copied
    size: int  # elements
    originals: tuple[Tensor, ...]  # kept: while they live, nothing else can be where they are


def _joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Layer:
    given = [bias.detach() for bias in biases if bias is not None]
    return torch.cat([weight.detach() for weight in weights]), torch.cat(given) if given else None


def _added(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """PyTorch's own product plus bias and residual (T, out); `addmm` with the residual would copy that first."""
    out = F.linear(x, weight, bias)
    return out.add_(residual) if out.dtype == residual.dtype else out + residual  # autocast's products are narrower


def gelu_kind(act: Any) -> str | None:
    """What PyTorch calls the approximation of a GELU, its own or timm's; None for other activations."""
    if type(act) is nn.GELU:
        return act.approximate
    return {GELU: "none", GELUTanh: "tanh"}.get(type(act))


def _pays(x: Tensor, weight: Tensor) -> bool:
    return x.dtype != torch.float32 or (
        weight.is_contiguous() and onednn_pays(len(x), weight.numel(), False, torch.get_num_threads())
    )


def _dense(weight: Tensor) -> Tensor:
    """Of a weight whose memory has gaps, as one cut by inputs, a copy: without it oneDNN runs a loop, 200 times slower.
    PyTorch's own float32 products take gaps as they are.
    """
    return weight.contiguous()


def _supported_by_onednn() -> frozenset[torch.dtype]:
    if POINTWISE is None:
        return frozenset()
    try:
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return frozenset()
    return frozenset({torch.float32, torch.bfloat16} if bfloat16 else {torch.float32})


def _count_flops() -> None:
    """Tell `torch.utils.flop_counter` (torch 2.14 knows neither) what the CPU's fused kernels compute."""

    def linear(x: Any, *others: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(2 * math.prod(x) * out_shape[-1])

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    fused: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if _ONEDNN_DTYPES:
        fused[POINTWISE] = linear
    for operation, formula in fused.items():
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)


_ONEDNN_DTYPES = _supported_by_onednn()
_count_flops()
_PLAIN, _ONEDNN = Plain(), OneDnn()


def products_for(x: Tensor, comes_again: bool = True, packed: Packed | None = None) -> Products:
    """What computes products with x, (T, C), with the weights of a block.

    packed: what to use in the place of `OneDnn`, for weights of x's dtype. comes_again: whether T is one of few. In
    float32, numbers of rows that may not come again are left to MKL, which compiles nothing (see `OneDnn`).
    `torch.backends.mkldnn.flags(enabled=False)` keeps to PyTorch's own operations.
    """
    if (
        x.dtype in _ONEDNN_DTYPES
        and (comes_again or x.dtype != torch.float32)
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    ):
        return packed or _ONEDNN
    return _PLAIN
