"""Write a low-rank adapter set as a LoRA folder of Hugging Face PEFT; what PEFT would compute differently is refused, never approximated.

PEFT is not imported. What its layers compute is restated in `_branch` and compared with the module's own code on random numbers, so
that convolutions with dilation, standardised weights or other padding are found by what they do, not by what they are called.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_peft.engine.factored import stack_rows
from vision_peft.engine.install import Installation, _find, _known
from vision_peft.engine.site import Site
from vision_peft.engine.store import CONFIG, WEIGHTS, staged_folder
from vision_peft.errors import UserError

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Factors(NamedTuple):
    """The update B A of one whole parameter."""

    site: Site  # the first of its sites, for messages
    B: Tensor  # (out, r)
    A: Tensor  # (r, in)

    def padded(self, rank: int) -> _Factors:
        more = rank - self.A.shape[0]
        return self._replace(B=F.pad(self.B, (0, more)), A=F.pad(self.A, (0, 0, 0, more)))


class _Target(NamedTuple):
    """What PEFT wraps: a module, or (`parameter`) one parameter of it."""

    path: str
    rank: int
    tensors: dict[str, Tensor]  # by PEFT's name below the wrapper
    parameter: str = ""


def save_peft(folder: str | os.PathLike[str], network: nn.Module, *, name: str = "default", base_model: str | None) -> Path:
    """Write the adapter set `name` so that `peft.PeftModel.from_pretrained(bare network, folder)` computes the same in eval mode.

    Scales are folded into the factors and dropout is left out, because the folder is for inference. An existing folder is replaced
    only when all is written, and only if it is itself a PEFT folder.

    Args:
        base_model: hub name or path of the bare network, for PEFT's config; None where there is none.

    Raises:
        UserError: one line, for a method that is not low-rank, for a site that PEFT cannot adapt exactly (named), or for a folder
            that holds something else. Nothing is written then.
    """
    found = _find(network)
    _known(found, name)
    method = found.sets[name].method
    if not method.low_rank:
        raise UserError(f"method {method.name} is not a low-rank update, so PEFT cannot hold it: use --to merged or --rank")
    target = _writable(Path(folder))
    targets = _targets(network, _factors(found, name))
    tensors = _named_tensors(network, targets)
    config = _config(network, targets, base_model)
    _warn_dense(network, targets)
    with staged_folder(target) as staging:
        save_file({key: value.float().cpu().contiguous().clone() for key, value in tensors.items()}, staging / WEIGHTS, {"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return target


def _writable(folder: Path) -> Path:
    """The folder, if replacing it destroys nothing but an earlier PEFT export (our own adapter folders have the same file names)."""
    if folder.exists():
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {""}
        if names - {CONFIG, WEIGHTS, "README.md"} or (CONFIG in names and '"peft_type"' not in (folder / CONFIG).read_text()):
            raise UserError(f"{folder}: exists and is not a PEFT folder: choose another one")
    return folder


def _unfit(site: Site, reason: str) -> UserError:
    return UserError(f"{site.name}: PEFT's LoRA cannot hold this layer ({reason}): use --to merged, or leave it out of adapter.targets")


@torch.no_grad()
def _factors(found: Installation, name: str) -> dict[tuple[str, str], _Factors]:
    """The factors of every adapted parameter, by (reader, parameter); slices of a fused projection as one block-diagonal form."""
    adapters = found.sets[name].eval()
    named = adapters.named_adapters()
    by_parameter: dict[tuple[str, str], list[Site]] = {}
    for site in adapters.sites:
        by_parameter.setdefault((site.reader, site.parameter), []).append(site)
    result = {}
    for key, sites in by_parameter.items():
        parameter = found.saved.get(sites[0].path, found.network.get_parameter(sites[0].path))  # frozen, also while merged
        blocks = []
        for site in sites:
            with torch.autocast(parameter.device.type, enabled=False):
                form = named[site.name].compact().factored(site.matrix(parameter).float())
            if site.role != "weight" or form is None or form.scale is not None:
                raise _unfit(site, "its update is not a product of two factors")
            blocks.append((site.rows or (0, parameter.shape[0]), form))
        form = stack_rows(blocks, parameter.shape[0])
        result[key] = _Factors(sites[0], form.B, form.A).padded(max(1, form.A.shape[0]))  # PEFT has no rank 0
    return result


def _targets(network: nn.Module, factors: dict[tuple[str, str], _Factors]) -> list[_Target]:
    """What PEFT is to wrap, in network order. Raises UserError for the first site that it cannot adapt exactly."""
    uses = Counter(id(child) for module in network.modules() for child in module._modules.values())
    bare_rank = max((each.A.shape[0] for each in factors.values() if each.site.kind == "bare"), default=0)
    targets: list[_Target] = []
    for (path, parameter), each in factors.items():
        module, site = network.get_submodule(path), each.site
        if not path:
            raise _unfit(site, "it belongs to the network's root, which PEFT does not wrap")
        if site.calls != ("forward",):
            raise _unfit(site, f"it is read in {site.calls[0]}(), and PEFT acts in forward() only")
        if uses[id(module)] > 1:
            raise _unfit(site, "the layer is used in several places, and PEFT would wrap one of them")
        if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
            targets.append(_attention(module, path, each))
        elif isinstance(module, nn.MultiheadAttention) and parameter == "out_proj.weight":
            # 0.21 and earlier compute W + 2 B A (huggingface/peft#3774 mends it): no factors are right before and after
            raise _unfit(site, "PEFT adds the update of an nn.MultiheadAttention's out_proj twice")
        elif site.kind == "bare" and "." not in parameter:
            _check_bare(network, path, parameter, each.site, factors)
            # PEFT 0.21 warns of a rank_pattern for a parameter, so bare parameters share the default rank
            padded = each.padded(bare_rank)
            targets.append(_Target(path, bare_rank, {"lora_A.weight": padded.A, "lora_B.weight": padded.B}, parameter))
        elif isinstance(module, (nn.Linear, nn.Embedding, *_CONV)) and parameter == "weight":
            _check_same_function(module, each)
            form = _form(module, each.B, each.A)
            targets.append(_Target(path, next(iter(form.values())).shape[0], form))
        else:
            raise _unfit(site, f"{type(module).__name__} reads {parameter} itself")
    return targets


def _check_bare(network: nn.Module, path: str, parameter: str, site: Site, factors: dict[tuple[str, str], _Factors]) -> None:
    """PEFT finds bare parameters by the end of their names, and loses those below a module that it has wrapped for another."""
    above = [other for (other, _), each in factors.items() if each.site.kind == "bare" and path.startswith(f"{other}.")]
    if above:
        raise _unfit(site, f"PEFT cannot adapt bare parameters of both {above[0]} and {path}")
    for other, _ in network.named_parameters():
        if other.endswith(f".{path}.{parameter}") and tuple(other.rsplit(".", 1)) not in factors:
            raise _unfit(site, f"PEFT would adapt {other} with it")


def _attention(module: nn.MultiheadAttention, path: str, each: _Factors) -> _Target:
    """PEFT adapts in_proj and out_proj together and with one rank: out_proj gets zeros."""
    tensors = {"lora_A.weight": each.A, "lora_B.weight": each.B}
    tensors |= {f"base_layer.out_proj.{key}": value.new_zeros(value.shape) for key, value in tensors.items()}
    tensors["base_layer.out_proj.lora_B.weight"] = each.B.new_zeros(module.embed_dim, each.B.shape[1])
    return _Target(path, each.A.shape[0], tensors)


def _form(module: nn.Module, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """The factors B (out, r), A (r, in) in the shapes of PEFT's layer for this module.

    PEFT's A of a grouped convolution reads all channels and only its B is grouped, so each group gets an A of its own that is zero
    on the channels of the others: exact, but no longer small.
    """
    if isinstance(module, nn.Embedding):
        return {"lora_embedding_A": B.mT, "lora_embedding_B": A.mT}
    if isinstance(module, nn.Linear):
        return {"lora_A.weight": A, "lora_B.weight": B}
    groups, kernel = module.groups, module.weight.shape[1:]  # (in/groups, kh, kw)
    parts = [(part, A) for part in B.chunk(groups)]
    if groups > 1 and B.shape[0] // groups < A.shape[0]:  # e.g. depthwise: one row a group, which is its own A
        parts = [(torch.eye(len(part), device=B.device), part @ A) for part, _ in parts]
    rank = parts[0][1].shape[0]
    down = A.new_zeros(groups * rank, groups * kernel[0], *kernel[1:])
    for index, (_, part) in enumerate(parts):
        down[index * rank : (index + 1) * rank, index * kernel[0] : (index + 1) * kernel[0]] = part.reshape(rank, *kernel)
    up = torch.cat([part for part, _ in parts])
    return {"lora_A.weight": down, "lora_B.weight": up.reshape(*up.shape, *(1 for _ in kernel[1:]))}


def _warn_dense(network: nn.Module, targets: list[_Target]) -> None:
    grouped = [each for each in targets if getattr(network.get_submodule(each.path), "groups", 1) > 1]
    if grouped:
        size = sum(4 * tensor.numel() for each in grouped for tensor in each.tensors.values()) / 2**20
        warnings.warn(
            f"{len(grouped)} grouped convolutions ({grouped[0].path}, ...) take {size:.1f} MiB in PEFT's layout, where every group reads "
            "all channels, and PEFT cannot merge them: --to merged is smaller",
            stacklevel=3,
        )


def _branch(module: nn.Module, form: dict[str, Tensor], x: Tensor) -> Tensor:
    """What PEFT's layer adds to the module's own output; for convolutions it builds two layers of the module's own class."""
    if isinstance(module, nn.Embedding):
        A, B = form["lora_embedding_A"].mT.clone(), form["lora_embedding_B"].mT
        return F.embedding(x, A, module.padding_idx, module.max_norm, module.norm_type) @ B
    A, B = form["lora_A.weight"], form["lora_B.weight"]
    if isinstance(module, nn.Linear):
        return F.linear(F.linear(x, A), B)
    with torch.device("meta"):  # draws no random numbers
        down = type(module)(A.shape[1], len(A), module.kernel_size, module.stride, module.padding, bias=False)
        ones = (1,) * (A.dim() - 2)
        up = type(module)(len(A), len(B), ones, ones, groups=module.groups, bias=False)
    down.weight, up.weight = nn.Parameter(A), nn.Parameter(B)
    return up(down(x))


@torch.no_grad()
def _check_same_function(module: nn.Module, each: _Factors) -> None:
    """Raise UserError unless f(x; W + B A) = f(x; W) + PEFT's branch, tried with random B and A (the trained B may still be zero)."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(part.shape, generator=generator) / part.shape[1] ** 0.5 for part in (each.B, each.A))
    W = module.weight.detach().float().cpu()
    if isinstance(module, nn.Embedding):
        x = torch.arange(min(16, module.num_embeddings))
    elif isinstance(module, nn.Linear):
        x = torch.randn(2, module.in_features, generator=generator)
    else:
        sides = (2 * (d * (k - 1) + 1) + s for k, s, d in zip(module.kernel_size, module.stride, module.dilation))
        x = torch.randn(1, module.in_channels, *sides, generator=generator)

    def own(weight: Tensor) -> Tensor:
        shell = copy.copy(module)  # the same class and settings without the reader that adapts it
        shell.__dict__.pop("forward", None)
        floats = {name: None if value is None else value.detach().float().cpu() for name, value in module._parameters.items()}
        shell.__dict__["_parameters"] = {**floats, "weight": nn.Parameter(weight)}
        return type(shell).forward(shell, x)

    try:
        expected = own(W + (B @ A).reshape(W.shape))
        theirs = own(W.clone()) + _branch(module, _form(module, B, A), x)
        same = torch.allclose(theirs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    except (RuntimeError, TypeError, ValueError):  # shapes or arguments that PEFT's layer cannot have
        same = False
    if not same:
        why = "dilation, padding mode or a reparametrised weight, as a rule"
        raise _unfit(each.site, f"what PEFT makes of this {type(module).__name__} is another function: {why}")


def _named_tensors(network: nn.Module, targets: list[_Target]) -> dict[str, Tensor]:
    """The tensors under PEFT's keys: below every module that it wraps, names continue with `base_layer`."""
    bare: dict[str, list[str]] = {}
    for each in targets:
        if each.parameter and each.path not in bare:
            own = network.get_submodule(each.path)._parameters
            bare[each.path] = [name for name in own if any((each.path, name) == (other.path, other.parameter) for other in targets)]
    tensors = {}
    for each in targets:
        parts = each.path.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            parts[depth:depth] = ["base_layer"] * len(bare.get(".".join(each.path.split(".")[:depth]), ()))
        if each.parameter:  # wrappers of one module are nested in the order of its parameters, the first innermost
            parts += ["base_layer"] * (len(bare[each.path]) - 1 - bare[each.path].index(each.parameter))
        tensors |= {".".join(["base_model.model", *parts, suffix]): value for suffix, value in each.tensors.items()}
    return tensors


def _config(network: nn.Module, targets: list[_Target], base_model: str | None) -> dict[str, Any]:
    """adapter_config.json. PEFT matches names by their end and takes pattern keys for regular expressions, so both are anchored."""
    modules = [each.path for each in targets if not each.parameter]
    parameters = [f"{each.path}.{each.parameter}" for each in targets if each.parameter]
    clash = any(other.endswith(f".{path}") for path in modules for other, _ in network.named_modules() if other not in modules)
    default = next((each.rank for each in targets if each.parameter), Counter(each.rank for each in targets).most_common(1)[0][0])
    ranks = {f"^{re.escape(each.path)}": each.rank for each in targets if each.rank != default}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,  # scale 1: ours is in the factors
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": "|".join(map(re.escape, modules)) if clash else modules,  # a string is matched as a whole
        "target_parameters": parameters or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
