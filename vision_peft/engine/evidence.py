"""One calibration pass that collects what methods ask for: mean gradients of the weights, second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Evidence
from vision_peft.engine.readers import make_reader
from vision_peft.engine.site import Site
from vision_peft.engine.views import State
from vision_peft.errors import UserError


def collect(
    network: nn.Module,
    sites: Sequence[Site],
    kinds: Iterable[str],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
) -> dict[str, Evidence]:
    """Evidence by site name over some batches; the network, its gradients and running statistics are then as they were before.

    Args:
        kinds: of `gradient` (mean over batches of dL/dW, (out, in)) and `covariance` (mean of x x^T over input rows, (in, in)).
        batches: calibration batches, each handed to `loss`, which runs the network and returns a scalar.

    Raises:
        UserError: no batch was given, a covariance is asked of a site whose input cannot be seen, or a gradient never arrived.
    """
    kinds = set(kinds)
    found = {site.name: Evidence(torch.Generator()) for site in sites}
    moments: dict[str, tuple[Tensor, int]] = {}
    gradients: dict[str, Tensor] = {}
    state = State()
    readers = _observing(network, sites, state) if "covariance" in kinds else []
    parameters = {site.path: network.get_parameter(site.path) for site in sites} if "gradient" in kinds else {}
    required = {path: parameter.requires_grad for path, parameter in parameters.items()}
    statistics = [(buffer, buffer.clone()) for buffer in network.buffers()]  # of batch norms in training mode
    state.observer = lambda site, x: _accumulate(moments, site, network, x.detach())
    count = 0
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer calls no layer whose input could be seen
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.set_grad_enabled("gradient" in kinds):
            for batch in batches:
                value = loss(batch)
                count += 1
                if "gradient" in kinds:
                    _add_gradients(gradients, parameters, value)
        if count == 0:
            raise UserError("evidence: no calibration batch was given")
        for site in sites if "gradient" in kinds else ():
            if site.path not in gradients:
                raise UserError(f"evidence: no gradient reached {site.name}")
            found[site.name].gradient = site.matrix(gradients[site.path]) / count
        for site in sites if "covariance" in kinds else ():
            if site.name not in moments:
                raise UserError(f"evidence: the input of {site.name} was never seen")
            total, rows = moments[site.name]
            found[site.name].covariance = total / rows
        return found
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for reader in readers:
            reader.remove()
        for path, parameter in parameters.items():
            parameter.requires_grad_(required[path])
        with torch.no_grad():
            for buffer, value in statistics:
                buffer.copy_(value)


def _observing(network: nn.Module, sites: Sequence[Site], state: State) -> list[Any]:
    readers: dict[str, Any] = {}
    for site in sites:
        if site.kind not in ("linear", "conv"):
            raise UserError(f"evidence: {site.name} ({site.kind}) multiplies no input whose covariance could be taken")
        if site.reader not in readers:
            readers[site.reader] = make_reader(network.get_submodule(site.reader), state, site.calls)
        readers[site.reader].view(site.parameter).add("evidence", site, None)
    return list(readers.values())


def _add_gradients(gradients: dict[str, Tensor], parameters: dict[str, Tensor], value: Tensor) -> None:
    """Sums in float32, apart from the `grad` fields, which belong to training."""
    for path, gradient in zip(parameters, torch.autograd.grad(value, list(parameters.values()), allow_unused=True)):
        if gradient is not None:
            gradients[path] = gradients.get(path, 0) + gradient.float()


def _accumulate(moments: dict[str, tuple[Tensor, int]], site: Site, network: nn.Module, x: Tensor) -> None:
    with torch.autocast(x.device.type, enabled=False):
        rows = _patches(network.get_submodule(site.reader), x) if site.kind == "conv" else x.reshape(-1, x.shape[-1]).float()
        total, count = moments.get(site.name, (0.0, 0))
        moments[site.name] = (total + rows.mT @ rows, count + rows.shape[0])


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows (patches * groups, in/groups * kh * kw) that the flattened kernel multiplies."""
    plain = type(conv).forward is nn.Conv2d.forward and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        padding = f"padding {conv.padding!r} ({conv.padding_mode})"
        raise UserError(f"evidence: covariances of {type(conv).__name__} with {padding} are not available")
    columns = F.unfold(x.float(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (B, in * kh * kw, L)
    return columns.mT.reshape(-1, columns.shape[1] // conv.groups)
