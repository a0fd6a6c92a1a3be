"""`vision-peft export`: an adapter as merged weights, in PEFT's or diffusers' layout, or as a checked copy; compared with the original.

  vision-peft export checkpoints/quickstart --to merged --output backbone.safetensors
  vision-peft export checkpoints/generator --to diffusers --output lora       # for pipeline.load_lora_weights
  vision-peft export checkpoints/generator --to pipeline --output generator   # any method, merged, for from_pretrained
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.commands.networks import find_folders, on_random_input, rebuild
from vision_peft.commands.parser import CommandParser
from vision_peft.engine import diffusers_layout
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.as_lora import as_lora
from vision_peft.engine.install import merge, unmerge
from vision_peft.engine.merged import save_merged
from vision_peft.engine.peft_layout import save_peft
from vision_peft.engine.store import CARD, CONFIG, WEIGHTS, load_adapter, read_config, read_tensors, replace_folder
from vision_peft.errors import UserError
from vision_peft.generation.acts import ALWAYS, acts_of

# of the largest output: float32 sums in another order
TOLERANCE = {"adapter": 0.0, "merged": 1e-4, "peft": 1e-5, "diffusers": 1e-5, "pipeline": 1e-4}
MERGED = ("merged", "pipeline")
FORMS = tuple(TOLERANCE)


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__)
    parser.add_argument("folder", type=Path, help="a run folder (config.yaml and adapter/) or an adapter folder")
    parser.add_argument("--to", choices=FORMS, required=True, help="merged: one weights file of the backbone; others: a folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.safetensors, .pt, .pth) or folder")
    parser.add_argument("--rank", type=int, help="write the best LoRA of this rank instead, whatever the method, and print its error")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    given = parser.parse_args(argv)
    if given.rank is not None and given.to not in ("peft", "diffusers"):
        raise UserError("--rank: goes with --to peft and --to diffusers only")
    export(given.folder, given.to, given.output, given.rank, given.force)


@torch.no_grad()
def export(folder: Path, form: str, output: Path, rank: int | None = None, force: bool = False) -> None:
    """Write one adapter in another form beside its place, prove it equal there, and move it into place.

    With a rank, what is written is the best LoRA of that rank, and what is proven is that PEFT computes the same as that LoRA.
    """
    if output.exists() and not force:
        raise UserError(f"{output}: exists already; --force replaces it")
    if output.exists() and not _replaceable(output, form):
        raise UserError(f"{output}: holds something else than an earlier export, which --force will not replace")
    adapter, config = find_folders(folder)
    backbone = rebuild(adapter, config)
    if form in ("diffusers", "pipeline") and not hasattr(backbone, "save_pipeline"):
        raise UserError(f"--to {form}: is for diffusion models, and this is a {type(backbone).__name__}")
    backbone.load()
    backbone.eval()
    bare = copy.deepcopy(backbone.network)
    adapters = load_adapter(backbone.network, adapter, sites=backbone.sites(), resized=backbone.resized)
    if form in ("peft", "diffusers") and (beside := read_config(adapter)["beside"]):
        raise UserError(f"{adapter}: this layout has no place for what was trained beside the method ({min(beside)}): use --to merged")
    acts = acts_of(read_config(adapter), adapter)
    if acts != ALWAYS and form != "adapter":
        span = f"between {acts[0]:g} and {acts[1]:g} of the noise schedule"
        warnings.warn(f"{adapter}: acts {span} only, which --to {form} cannot say: its pictures will differ", stacklevel=2)
    run = on_random_input(backbone, text=any(site.target.startswith("text.") for site in adapters.sites))
    name, approximation = "default", ""
    if rank is not None:
        exact, lora = run(backbone.network), as_lora(backbone.network, rank)
        name, (site, worst) = "as_lora", lora.worst
        change = float((run(backbone.network) - exact).norm() / exact.norm())
        approximation = f"; as a LoRA of rank {rank}: the updates are off by {lora.error:.1%} of their size"
        approximation += f" (worst: {site}, {worst:.1%}), the outputs by {change:.1%}" if worst else ""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        written = staging / output.name
        _write(form, written, adapter, backbone, name)
        verdict = _verdict(form, written, adapters, run(backbone.network), run, bare, backbone)
        replace_folder(written, output) if written.is_dir() else os.replace(written, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{output}: {adapters.method!r} on {len(adapters.sites)} sites; {verdict}{approximation}")
    parts = sorted({key.split(".")[1] for key in read_tensors(adapter) if key.startswith("parts.")})
    if parts and form != "adapter":
        print(f"not in it: {', '.join(parts)}, which stays in {adapter / WEIGHTS}")


def _replaceable(output: Path, form: str) -> bool:
    """Whether replacing it can destroy nothing but an export of that form."""
    if form == "merged" or not output.is_dir():
        return form == "merged" and output.is_file()
    if form == "pipeline":
        return (output / "model_index.json").is_file()
    return {each.name for each in output.iterdir()} <= {WEIGHTS, CONFIG, CARD, diffusers_layout.WEIGHTS}


def _write(form: str, path: Path, adapter: Path, backbone: Backbone, name: str) -> None:
    network = backbone.network
    if form == "merged":
        save_merged(path, network)
    elif form == "peft":
        save_peft(path, network, name=name, base_model=str(backbone.describe().get("name")))
    elif form == "diffusers":
        diffusers_layout.save_diffusers(path, network, name=name)
    elif form == "pipeline":
        merge(network)
        backbone.save_pipeline(str(path))
        unmerge(network)
    else:
        path.mkdir()
        for name in (WEIGHTS, CONFIG, CARD):
            if (adapter / name).is_file():
                shutil.copy2(adapter / name, path / name)


def _verdict(
    form: str, path: Path, adapters: AdapterSet, expected: Tensor, run: Callable[[nn.Module], Tensor], bare: nn.Module, backbone: Backbone
) -> str:
    """What the comparison of the written form with the adapted network found; UserError where they differ."""
    if form in ("peft", "diffusers") and find_spec("peft") is None:
        return "not compared, because the peft package is not installed"
    if form == "merged":
        bare.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True), strict=True)
    elif form == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(bare, path).eval()  # works on `bare` in place
    elif form == "diffusers":
        prefix = diffusers_layout.prefix_of(bare)
        bare.load_lora_adapter(str(path), prefix=prefix, weight_name=diffusers_layout.WEIGHTS)
        bare.eval()
    elif form == "pipeline":
        bare = type(bare).from_pretrained(path / backbone.files.part)
    else:
        load_adapter(bare, path, sites=backbone.sites(), resized=backbone.resized)
    difference, scale = float((run(bare) - expected).abs().max()), float(expected.abs().max())
    tolerance = 0.1 if form in MERGED and adapters.method.merge == "approximate" else TOLERANCE[form]
    if not difference <= tolerance * scale:
        raise UserError(f"{path.name}: not written, because it differs from the adapter by {difference:.1e} (largest output {scale:.1e})")
    return f"on random images it differs from the adapter by at most {difference:.1e} (largest output {scale:.1e})"
