"""`vision-peft import`: a LoRA, DoRA, LoHa or LoKr folder of Hugging Face PEFT, or a LoRA file of a generator, as an adapter folder.

  vision-peft import their_lora --config configs/task/fewshot_vit.yaml --output adapters/theirs
  vision-peft import style.safetensors --config configs/task/generator_faces.yaml --output adapters/style    # diffusers' or kohya's layout

Layers of timm and transformers vision transformers (and CLIP's towers) are found by their names. Trained heads are left out.
"""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.parser import CommandParser
from vision_peft.errors import UserError


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__, "vision-peft import FOLDER --config FILE [--KEY VALUE ...] --output FOLDER")
    parser.add_argument("folder", type=Path, help="of PEFT (adapter_config.json, adapter_model.safetensors), or a LoRA file")
    parser.add_argument("--config", "-c", metavar="FILE", action="append", required=True, help="names the backbone; overrides as for fit")
    parser.add_argument("--output", type=Path, required=True, help="adapter folder to write")
    parser.add_argument("--force", action="store_true", help="replace the adapter folder that is there")
    given, overrides = parser.parse_known_args(argv)
    if given.output.exists() and not given.force:
        raise UserError(f"{given.output}: exists already; --force replaces it")
    import torch

    from vision_peft.commands.run import make_cli
    from vision_peft.engine.diffusers_import import load_diffusers
    from vision_peft.engine.peft_import import load_peft
    from vision_peft.engine.store import CONFIG, save_adapter

    cli = make_cli("fit", [word for config in given.config for word in ("--config", config)] + overrides, run=False)
    backbone = cli.model.backbone
    torch.manual_seed(cli.config["fit"]["seed_everything"] or 0)  # random weights, where the config asks for them, are the run's
    backbone.load()
    with torch.no_grad():
        load = load_peft if (given.folder / CONFIG).is_file() or not hasattr(backbone, "save_pipeline") else load_diffusers
        adapters = load(backbone.network, given.folder, backbone.sites())
    card = f"# {type(adapters.method).__name__} adapter\n\nImported from {given.folder.name}.\n"
    save_adapter(given.output, backbone.network, backbone=backbone.describe(), resized=backbone.resized, card=card)
    print(f"{given.output}: {adapters.method!r} on {len(adapters.sites)} layers, {adapters.num_trainable():,} numbers; no head is in it")
