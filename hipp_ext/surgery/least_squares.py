"""Least squares of a weight, from sums of products over tokens that are never held together."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-2
PULLS = (1.0, 10.0, 100.0)  # times the ridge, of which held-out rows choose one


@dataclass(eq=False)
class Products:
    """What least squares needs to know of inputs X and of D, what the outputs of X lack.

    Attributes:
        gram: X^T X, float32.
        cross: X^T D, float32.
    """

    gram: Float[Tensor, "columns columns"]
    cross: Float[Tensor, "columns outputs"]

    @classmethod
    def none(cls, weight: Float[Tensor, "outputs columns"]) -> "Products":
        """The products of no tokens, for the layer of this weight."""
        outputs, columns = weight.shape
        zeros = torch.zeros(columns, columns + outputs, device=weight.device)
        return cls(*zeros.split([columns, outputs], dim=1))

    def add(
        self, inputs: Float[Tensor, "tokens columns"], lacking: Float[Tensor, "tokens outputs"]
    ) -> None:
        """Add the products of further tokens, float32."""
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, lacking)

    def __add__(self, other: "Products") -> "Products":
        return Products(self.gram + other.gram, self.cross + other.cross)

    @property
    def finite(self) -> bool:
        """Whether no input and no output was NaN or infinite."""
        # An entry of a Gram matrix is never larger than those on its diagonal.
        return bool(torch.isfinite(self.gram.diagonal()).all() and torch.isfinite(self.cross).all())

    def change(self, ridge: float) -> Float[Tensor, "outputs columns"]:
        """C that minimises ||X C^T - D||^2 + lambda ||C||^2, float64.

        lambda is `ridge` times the mean of the Gram matrix's diagonal.
        """
        gram = self.gram.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        factor, _ = torch.linalg.cholesky_ex(gram)  # should it fail, `excess` tells
        return torch.cholesky_solve(self.cross.double(), factor).T

    def excess(self, change: Float[Tensor, "outputs columns"]) -> float:
        """||X C^T - D||^2 - ||D||^2 of a change C: below zero where it brings outputs nearer."""
        slope = (change @ self.gram.double()).sub_(self.cross.T, alpha=2)
        return float(slope.mul_(change).sum())


def improved(
    weight: Float[Tensor, "outputs columns"], fitted: Products, held_out: Products, ridge: float
) -> Tensor | None:
    """The weight after the change that least squares finds, in its dtype; None: no change helps.

    Args:
        weight: weight of the columns that X has.
        fitted: products of the rows to fit on.
        held_out: products of other rows: the solution of `fitted` must bring their outputs nearer
            too, and of PULLS times the ridge they choose the one that does so most. All products
            zero: no rows are held out. The final solution is that of both.
        ridge: pull towards no change.
    """

    def solution(products: Products, pull: float) -> tuple[Tensor, Tensor]:
        new = (weight.double() + products.change(pull)).to(weight.dtype)
        return new, new.double() - weight.double()  # what rounding leaves of the change

    pull = ridge
    if bool(held_out.gram.diagonal().any()):
        pulls = [ridge * times for times in PULLS]
        excess = {p: held_out.excess(solution(fitted, p)[1]) for p in pulls}
        # Not one that is NaN, as where a factorisation failed.
        pull = min((p for p in pulls if excess[p] < 0), key=lambda p: excess[p], default=None)
        if pull is None:
            return None
    both = fitted + held_out
    new, change = solution(both, pull)
    return new if both.excess(change) < 0 else None
