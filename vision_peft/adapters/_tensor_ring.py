"""Rings of tensor cores: a matrix or a table whose entries are traces of products of small matrices, one a core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Cores = Sequence[Tensor]


def times_ring(W: Tensor, cores: Cores) -> Tensor:
    """W T (m, n) for the cores of T, without T: first core by first core, the product of the others at once. Two matrix products."""
    head, tail = cores[0], cores[1]  # (I_1, J_1, r_0, r_1); (I, J, r_1, r_0), grown over the rest
    for core in cores[2:]:
        tail = torch.einsum("ijrs,klst->ikjlrt", tail, core).flatten(0, 1).flatten(1, 2)
    (first, _, R, _), rest, m = head.shape, len(tail), len(W)
    left = head.permute(1, 2, 3, 0).reshape(first * R * R, first)
    right = tail.permute(3, 2, 0, 1).reshape(R * R * rest, rest)
    # bmm, since matmul chooses its order of summation by requires_grad, and the start would not cancel to the last bit
    mixed = torch.bmm(left.expand(m, -1, -1), W.reshape(m, first, rest))  # (m, J_1 r_0 r_1, I)
    return (mixed.view(m * first, R * R * rest) @ right).view(W.shape)


def chain(cores: Cores) -> Tensor:
    """Products of the cores' matrices for all indices (I_1 ... I_D, R, R), index 1 the slowest."""
    product = cores[0]
    for core in cores[1:]:
        product = (product[:, None] @ core).flatten(0, 1)
    return product


def identity_core(core: Tensor) -> Tensor:
    """I / R for every pair of bonds (I, I, R, R), of which a ring gives the identity."""
    return torch.eye(len(core)).to(core)[:, :, None, None].expand_as(core) / core.shape[-1]


def gram_core(core: Tensor) -> Tensor:
    """(I, I, R^2, R^2): the core of T T^T less that of the identity, sum_l A[i, l] (x) A[j, l] - delta_ij / R^2."""
    products = torch.einsum("ilrs,jltu->ijrtsu", core, core).flatten(4, 5).flatten(2, 3)
    return products - identity_core(products)


def most_equal(size: int) -> tuple[int, int, int]:
    """Three ascending factors of the smallest sum."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    triples = [(a, b, size // (a * b)) for a in divisors for b in divisors if a <= b and size % (a * b) == 0 and b <= size // (a * b)]
    return min(triples, key=sum)
