"""FourierFT: the update is the inverse Fourier transform of a spectrum with a few trained entries, at random places that stay.

    W' = W + s Re(F^-1(E)),    E (m, n) zero but for E[position_k] = c_k,    F^-1 the inverse 2-D transform with its 1 / (m n)

c (k,) real, trained; the positions are drawn once a shape, without repetition, from the run's seed, and all layers of equal shape
share them; they are not saved but drawn again on load. Start: c ~ N(0, 1) (`init: normal`, the paper's: the network is changed before
the first step), or c = 0 (`init: zero`, so W' = W). Trained: k numbers a weight, or all m n where it has fewer entries. The real
part of a real spectrum is a sum of cosines, so the update is even in both indices, and two entries at mirrored places do the same.
An entry moves the weight by s / (m n): scales found on one width do not carry over to another.

Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024; read: the layer of huggingface/peft,
which the tests compare with, and whose defaults are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Init = Literal["normal", "zero"]


class Positions(Shared):
    """Flat positions (k,) for every shape; those of a shape do not depend on which other shapes there are."""

    def __init__(self, sizes: dict[tuple[int, int], int]) -> None:
        super().__init__()
        self.sizes = sizes
        for shape, size in sizes.items():
            self.register_buffer(_name(shape), torch.zeros(size, dtype=torch.int64), persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        key = int(torch.randint(2**40, (), generator=generator))
        for shape, size in self.sizes.items():
            own = torch.Generator().manual_seed(key + shape[0] * 2**22 + shape[1])
            self.of(shape).copy_(torch.randperm(math.prod(shape), generator=own)[:size])

    def of(self, shape: tuple[int, int]) -> Tensor:
        return self.get_buffer(_name(shape))

    def fingerprint(self) -> Tensor:
        """One number a shape, which changes with every position and with their order."""
        marks = [self.of(shape) for shape in self.sizes]
        return torch.stack([(torch.cos(1.3 * mark.double()) * torch.cos(0.4 * torch.arange(len(mark)).to(mark))).sum() for mark in marks])


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


class FourierFTAdapter(Adapter):
    shared: Positions

    def __init__(self, site: Site, method: FourierFT, shared: Positions) -> None:
        super().__init__()
        self.scaling, self.init = method.scaling, method.init
        object.__setattr__(self, "shared", shared)  # no child: the positions belong to all layers of this shape
        self.c = nn.Parameter(torch.zeros(method.size(site)))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if self.init == "normal":
            self.c.copy_(torch.randn(self.c.shape, generator=evidence.generator))
        else:
            self.c.zero_()

    def weight(self, W: Tensor) -> Tensor:
        spectrum = W.new_zeros(W.numel()).index_copy(0, self.shared.of(tuple(W.shape)), self.c)
        return torch.add(W, torch.fft.ifft2(spectrum.view(W.shape)).real, alpha=self.scaling)


class FourierFT(Method):
    """Training of Fourier coefficients.

    Args:
        coefficients: k of every weight, or all its entries where it has fewer.
        scaling: s; the paper's settings are 100 to 150 for language encoders and 300 for ViT.
        init: `normal` draws the coefficients, `zero` starts at the pretrained network.
    """

    kind = "frequency"
    identity_at_init = False  # of the default; instances say what their init gives
    formula = "k"
    advice = "a thousand numbers a layer should give an update of any rank."
    tiny = {"coefficients": 24, "scaling": 10.0}

    def __init__(self, coefficients: int = 1000, scaling: float = 150.0, init: Init = "normal") -> None:
        if coefficients < 1:
            raise UserError(f"adapter.method.coefficients: {coefficients} is not positive")
        if init not in ("normal", "zero"):
            raise UserError(f"adapter.method.init: {init!r} is not one of normal, zero")
        self.coefficients, self.scaling, self.init = coefficients, scaling, init
        self.identity_at_init = init == "zero"

    def size(self, site: Site) -> int:
        """k of a site."""
        return min(self.coefficients, math.prod(site.matrix_shape))

    def shared(self, sites: Sequence[Site]) -> Positions:
        return Positions({site.matrix_shape: self.size(site) for site in sites})

    def adapter(self, site: Site, shared: Positions) -> FourierFTAdapter:
        return FourierFTAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        return self.size(site)
