"""The matrix products of a training step: recorded while it runs, counted, and run again alone as its ceiling.

What a step cannot avoid are its products: forward, and backward those of the gradients of inputs and weights. Alone, at
the shapes and strides that they have in the step, they take the time that a perfect step would take.

M rows | K inner | N columns of a product | B batch of products
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mimscale.errors import ConfigError

# Operands of one layout that the products take in turn. With one alone, every layer's weight would lie in the cache
# already.
_COPIES = 6


class ConvolutionError(ConfigError):
    """A step that is more than products."""


@dataclass(frozen=True)
class Layout:
    """How an operand lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """That of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An operand of this layout, of small random numbers."""
        tensor = torch.empty_strided(self.size, self.stride, dtype=dtype, device=device)
        return tensor.normal_(std=0.02)


@dataclass(frozen=True)
class Product:
    """[M, K] x [K, N], or a batch of them."""

    left: Layout
    right: Layout
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * math.prod(self.left.size) * self.right.size[-1]


@dataclass(frozen=True)
class Attention:
    """The products of scaled dot-product attention over q [B, heads, M, H] and k, v [B, heads, N, H]."""

    query: Layout
    key: Layout
    dtype: torch.dtype
    backward: bool

    @property
    def flops(self) -> int:
        """Two products forward; backward four, for the scores that are computed again are no need of the step."""
        *_, rows, numbers = self.query.size
        columns = self.key.size[-2]
        return (4 if self.backward else 2) * 2 * math.prod(self.query.size[:-2]) * rows * columns * numbers

    @property
    def recomputed_flops(self) -> int:
        """Fused kernels keep no scores, so their backward pass computes them again."""
        return self.flops // 4 if self.backward else 0


@dataclass(frozen=True)
class Recorded:
    """All products of one step, in their order."""

    products: tuple[Product | Attention, ...]

    @property
    def flops(self) -> int:
        """What was multiplied, without the scores that attention computes twice."""
        return sum(product.flops for product in self.products)

    @property
    def hardware_flops(self) -> int:
        """What the device did."""
        return self.flops + sum(product.recomputed_flops for product in self.products if isinstance(product, Attention))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every product that passes, backward ones too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product | Attention] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.products.append(Product(Layout.of(args[0]), Layout.of(args[1]), args[0].dtype))
        elif name in ("addmm", "baddbmm"):
            self.products.append(Product(Layout.of(args[1]), Layout.of(args[2]), args[1].dtype))
        elif "scaled_dot_product" in name:
            backward = name.endswith("backward")
            query, key = args[1:3] if backward else args[:2]
            self.products.append(Attention(Layout.of(query), Layout.of(key), query.dtype, backward))
        elif name in ("convolution", "convolution_backward"):
            raise ConvolutionError(
                "this network has convolutions, and only the products of transformers are recorded and run alone; "
                "`mimscale bench train` measures any network"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[list[Product | Attention]]:
    """Note the products of the block, of forward and backward passes."""
    recorder = _Recorder()
    with recorder:
        yield recorder.products


def record(step: Callable[[], object]) -> Recorded:
    """The products of one call of `step`, forward and backward."""
    with recording() as products:
        step()
    return Recorded(tuple(products))


class Replay:
    """Products alone, as a step's contender: `replay()` runs all of them once.

    Attention runs in whichever way is faster on this machine, as plain batched products or as the fused kernel, which
    needs no memory for the scores but computes a softmax as well.
    """

    def __init__(self, recorded: Recorded, device: torch.device) -> None:
        self._device = device
        self._pool: dict[tuple[Layout, torch.dtype], list[Tensor]] = {}
        self._turn = itertools.count()
        self._calls: list[Callable[[], object]] = []
        attentions: dict[Attention, Callable[[], object]] = {}
        for product in recorded.products:
            if isinstance(product, Product):
                self._calls.append(self._product(product.left, product.right, product.dtype))
            else:
                if product not in attentions:
                    attentions[product] = self._attention(product)
                self._calls.append(attentions[product])

    def __call__(self) -> None:
        """Run all products once."""
        for call in self._calls:
            call()

    def _operand(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        pool = self._pool.setdefault((layout, dtype), [])
        if len(pool) < _COPIES:
            pool.append(layout.empty(dtype, self._device))
        return pool[next(self._turn) % len(pool)]

    def _product(self, left: Layout, right: Layout, dtype: torch.dtype) -> Callable[[], object]:
        a, b = self._operand(left, dtype), self._operand(right, dtype)
        out = self._operand(_contiguous((*left.size[:-1], right.size[-1])), dtype)
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        return lambda: multiply(a, b, out=out)

    def _attention(self, product: Attention) -> Callable[[], object]:
        *batch, M, H = product.query.size
        N, B = product.key.size[-2], math.prod(batch)
        rows, columns, scores = _contiguous((B, M, H)), _contiguous((B, N, H)), _contiguous((B, M, N))
        turned = [
            Layout((B, size[2], size[1]), (size[1] * size[2], 1, size[2])) for size in (columns.size, scores.size)
        ]
        pairs = [(rows, turned[0]), (scores, columns)]  # scores; mixed values, or the gradient of the query
        if product.backward:  # of the values' weights and the query; of the values and the key
            pairs += [(turned[1], rows), (turned[1], rows)]
        plain = [self._product(left, right, product.dtype) for left, right in pairs]
        query = product.query.empty(product.dtype, self._device).requires_grad_(product.backward)
        key, value = (product.key.empty(product.dtype, self._device).requires_grad_(product.backward) for _ in range(2))

        def as_products() -> None:
            for multiply in plain:
                multiply()

        if product.backward:
            mixed = F.scaled_dot_product_attention(query, key, value)
            gradient = torch.ones_like(mixed)
            inputs = (query, key, value)

            def fused() -> object:
                return torch.autograd.grad(mixed, inputs, gradient, retain_graph=True)
        else:

            def fused() -> object:
                return F.scaled_dot_product_attention(query, key, value)

        return min((as_products, fused), key=lambda call: _seconds(call, self._device))


def _contiguous(size: tuple[int, ...]) -> Layout:
    strides = itertools.accumulate(reversed(size[1:]), lambda total, edge: total * edge, initial=1)
    return Layout(size, tuple(reversed(list(strides))))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    from mimscale.bench.hardware import seconds_of

    call()
    return min(seconds_of(call, device) for _ in range(3))
