"""How far a result may lie from the exact one, by error analysis.

Another rounding of the same formula is no measure: by luck it is next to exact, and a result that is as good as can be
is then "twice as bad". The bounds here hold for every kernel, on every processor (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., sections 2.2, 3.1 and 3.5):

- Storing v in a dtype of machine epsilon eps moves it by eps / 2 * |v| at most.
- A sum of k products a_i b_i, in any order, in blocks or in one, with or without fused multiply-add, is off by
  k * eps' * sum |a_i b_i| at most. eps' is that of the accumulator: float32's for bfloat16 and float16, else that of
  the dtype itself. (Rounding to nearest would need half of it; matrix units that truncate need all.)

They assume what torch does by default: float32 is multiplied as float32 (no TF32), and halves are summed in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rounded:
    """The exact value of a result, in float64, and how far what is computed and stored in `dtype` may be from it.

    Written with these, a formula gives both at once: each operation passes on the errors of what it is given and adds
    its own, entry by entry. An implementation may round less often than the formula has operations, never more often.
    """

    exact: Tensor
    error: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, given: Tensor, dtype: torch.dtype) -> Rounded:
        """`given`, which is computed with in `dtype`: cast to it where it is wider."""
        exact = given.detach().double()
        return cls(exact, (exact - exact.to(dtype)).abs(), dtype)

    def stored(self, dtype: torch.dtype | None = None) -> Rounded:
        """The same, rounded once more: to its own dtype, or to another."""
        to = torch.finfo(dtype or self.dtype)
        smallest = to.smallest_normal * to.eps  # below it, eps / 2 * |v| is less than the distance of two numbers
        most = self.exact.abs() + self.error
        return Rounded(self.exact, self.error + to.eps / 2 * most + smallest / 2, dtype or self.dtype)

    def __matmul__(self, other: Rounded) -> Rounded:
        a, b = self.exact.abs(), other.exact.abs()
        passed_on = a @ other.error + self.error @ (b + other.error)
        summing = (self.exact.shape[-1] + 2) * self._accumulator_eps * (a @ b + passed_on)  # 2 for a scale and a bias
        return Rounded(self.exact @ other.exact, passed_on + summing, self.dtype).stored()

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.exact + other.exact, self.error + other.error, self.dtype).stored()

    def __mul__(self, factor: Tensor | float) -> Rounded:
        size = torch.as_tensor(factor, dtype=torch.float64).abs()
        return Rounded(self.exact * factor, self.error * size, self.dtype).stored()

    def sum(self, dim: int) -> Rounded:
        most = (self.exact.abs() + self.error).sum(dim)
        summing = self.exact.shape[dim] * self._accumulator_eps * most
        return Rounded(self.exact.sum(dim), self.error.sum(dim) + summing, self.dtype).stored()

    def tanh(self) -> Rounded:
        """Its slope is 1 at most; libraries compute it to 2 units in the last place."""
        return Rounded(self.exact.tanh(), self.error, self.dtype).stored().stored().stored().stored()

    @property
    def T(self) -> Rounded:
        return Rounded(self.exact.T, self.error.T, self.dtype)

    def view(self, shape: torch.Size) -> Rounded:
        return Rounded(self.exact.view(shape), self.error.view(shape), self.dtype)

    @property
    def _accumulator_eps(self) -> float:
        return torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps

    def excess(self, found: Tensor) -> float:
        """The largest error of `found` in units of its bound: more than 1 is a fault."""
        assert found.shape == self.exact.shape
        off = (found.detach().double() - self.exact).abs()
        units = torch.where(off == 0, 0.0, off / self.error).nan_to_num(torch.inf, torch.inf)
        return float(units.max()) if units.numel() else 0.0


def assert_rounded(found: Tensor, expected: Rounded, what: str = "the result") -> None:
    """Fail unless each entry of `found` is within its bound."""
    excess = expected.excess(found)
    assert excess <= 1, f"{what} is off by {excess:.3g} times what rounding can explain"


class Condition:
    """How far the output of a whole model may be from the exact one, to first order in eps.

    S = |y| + sum of |dy/dp| |p| over all entries p of parameters, buffers and the input is what an output y moves by if
    all of them change by their own size, each in the worst direction. A layer's rounded output W x is that of a W which
    is changed by eps / 2 * |W|, or less, so one rounding of it moves y by eps / 2 * S at most; the sums behind it, of
    `terms` products, by terms * eps' * S. ROUNDINGS counts what happens to one layer's values on their way to the next:
    A, A x, B A x, its product with the scale, its sum with W x, the activation, and two for norms and softmax. Layers
    that come later have parameters, and so parts of S, of their own. A and B are parameters too: S counts s |B| |A| |x|
    also where W + s B A is small by cancellation.

    All roundings may point the same way here, which they hardly do: in half precision it finds an update that is off by
    about its own size. Where the formula is at hand, Rounded is the sharper tool.
    """

    ROUNDINGS = 8

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        """Of `model`, in float64, at its input x; it is left as it is."""
        twin = copy.deepcopy(model).double()
        x = x.double() if x.is_floating_point() else x
        own = [*twin.parameters(), *twin.buffers(), x]
        self._moved = [t.requires_grad_() for t in own if t.is_floating_point()]
        with torch.enable_grad():
            self._outputs = twin(x).flatten().unbind()
        self.terms = max(t.numel() // min(t.shape) for t in self._moved if t.dim() > 1)

    def excess(self, found: Tensor, exact: Tensor | None = None, dtype: torch.dtype | None = None) -> float:
        """The largest error of `found` in units of its bound: more than 1 is a fault.

        `exact` is the output of the model if not given, and `dtype` what is computed in, that of `found` if not given.
        """
        if exact is None:
            exact = torch.stack(self._outputs).detach().view(found.shape)
        dtype = dtype or found.dtype
        off = (found.detach().double() - exact).abs().flatten().nan_to_num(torch.inf, torch.inf)
        y = self._outputs[int(off.argmax())]
        slopes = torch.autograd.grad(y, self._moved, retain_graph=True, allow_unused=True)
        moves = ((t.detach() * slope).abs().sum() for t, slope in zip(self._moved, slopes) if slope is not None)
        S = y.detach().abs() + sum(moves)
        eps, summed = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
        bound = S * (self.ROUNDINGS * eps / 2 + self.terms * summed)
        return float(off.max() / bound) if off.any() else 0.0
