"""PEFT and transformers are the oracles: a folder that they wrote, loaded here, gives their outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones.timm_sites import name_sites, trace
from vision_peft.engine.install import attach, installed
from vision_peft.engine.peft_import import load_peft
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=LAYERS),
    "lora_patterns": lambda: peft.LoraConfig(
        r=3, target_modules=[*LAYERS, "patch_embed.proj"], rank_pattern={"blocks.1.mlp.fc1": 5}, alpha_pattern={"mlp.fc2": 11}
    ),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=LAYERS),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=LAYERS),
    "lokr_both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=LAYERS),
}


def vit() -> nn.Module:
    torch.manual_seed(1)
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=3)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return network.eval()


def timm_sites(network: nn.Module):
    return name_sites(network, trace(copy.deepcopy(network).to("meta"), 16)[0], ("forward",))


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


@pytest.fixture
def written(tmp_path):
    """`written(config)`: a folder that PEFT wrote for the tiny ViT, and what its model gives."""

    def write(config):
        model = stirred(peft.get_peft_model(vit(), config))
        model.save_pretrained(tmp_path / "peft")
        with torch.no_grad():
            return tmp_path / "peft", model(images())

    return write


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_timm_model(name, written, tmp_path):
    folder, expected = written(CONFIGS[name]())
    network = vit()
    assert not torch.allclose(network(images()), expected, atol=1e-2)
    adapters = load_peft(network, folder, timm_sites(network))
    torch.testing.assert_close(network(images()), expected, rtol=1e-5, atol=1e-5)
    assert "vision.0.attn.qkv" in adapters.named_adapters() and "vision.0.attn.q" not in adapters.named_adapters()
    save_adapter(tmp_path / "own", network)
    fresh = vit()
    load_adapter(fresh, tmp_path / "own", sites=timm_sites(fresh))
    torch.testing.assert_close(fresh(images()), network(images()))


def test_a_transformers_model(tmp_path):
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "layer_norm_eps": 1e-6}
    theirs = transformers.ViTModel(transformers.ViTConfig(**settings, image_size=16, patch_size=8), add_pooling_layer=False).eval()
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=0, global_pool="")
    network.eval().load_state_dict(as_timm(theirs.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(network(images()), theirs(images()).last_hidden_state, rtol=1e-4, atol=1e-4)
    names = ["query", "key", "value", "q_proj", "k_proj", "v_proj", "dense", "o_proj", "fc1", "fc2"]
    targets = [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names]
    model = stirred(peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=targets)))
    model.save_pretrained(tmp_path / "peft")
    adapters = load_peft(network, tmp_path / "peft", timm_sites(network))
    with torch.no_grad():
        torch.testing.assert_close(network(images()), model(images()).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert {"vision.0.attn.q", "vision.1.attn.out", "vision.1.mlp.fc2"} <= set(adapters.named_adapters())


def as_timm(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers ViT's weights under timm's keys, whatever names its version gives them."""
    def find(*words: str) -> torch.Tensor:
        [key] = [key for key in theirs if all(word in key for word in words)]
        return theirs[key]

    own = {"cls_token": find("cls_token"), "pos_embed": find("position_embeddings")}
    for kind in ("weight", "bias"):
        own[f"patch_embed.proj.{kind}"] = find("projection", kind)
        own[f"norm.{kind}"] = next(value for key, value in theirs.items() if key in (f"layernorm.{kind}", f"norm.{kind}"))
        for block in range(2):
            here = {key: value for key, value in theirs.items() if f"layer.{block}." in key or f"layers.{block}." in key}

            def pick(*ends: str, here=here, kind=kind) -> torch.Tensor:
                return next(value for key, value in here.items() if key.endswith(tuple(f"{end}.{kind}" for end in ends)))

            parts = [pick("query", "q_proj"), pick("key", "k_proj"), pick("value", "v_proj")]
            own[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            own[f"blocks.{block}.attn.proj.{kind}"] = pick("attention.output.dense", "o_proj")
            own[f"blocks.{block}.norm1.{kind}"] = pick("layernorm_before")
            own[f"blocks.{block}.norm2.{kind}"] = pick("layernorm_after")
            own[f"blocks.{block}.mlp.fc1.{kind}"] = pick("intermediate.dense", "fc1")
            rest = {key: value for key, value in here.items() if "attention" not in key}
            own[f"blocks.{block}.mlp.fc2.{kind}"] = next(
                value for key, value in rest.items() if key.endswith((f"output.dense.{kind}", f"fc2.{kind}"))
            )
    return own


def test_whole_and_parts_of_a_fused_projection():
    network = vit()
    sites = timm_sites(network)
    adapters = attach(network, LoRA(rank=2), "vision.*.attn.qkv", sites=sites)
    assert [(site.name, site.shape, site.rows) for site in adapters.sites] == [(f"vision.{i}.attn.qkv", (48, 16), None) for i in range(2)]
    with pytest.raises(UserError, match=r"vision.0.attn.q(kv)? and vision.0.attn.q(kv)? are one tensor"):
        attach(vit(), LoRA(rank=2), ["vision.0.attn.qkv", "vision.0.attn.q"], sites=sites)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, tensors: config.update(peft_type="VERA"), "peft_type VERA is not one of LORA, LOHA, LOKR"),
        (lambda config, tensors: config.update(bias="all"), "bias is 'all'"),
        (lambda config, tensors: config.pop("peft_type"), "key 'peft_type' is missing"),
        (lambda config, tensors: tensors.update({"base_model.model.head.weight": torch.ones(1)}), "belongs to no LoRA"),
        (lambda config, tensors: _rename(tensors, "blocks.1", "blocks.7"), "no layer 'blocks.7.attn.proj'; did you mean"),
        (lambda config, tensors: _resize(tensors, "blocks.0.mlp.fc1.lora_B.weight"), r"blocks.0.mlp.fc1: B has shape \(9, 3\)"),
        (lambda config, tensors: tensors.pop("base_model.model.blocks.0.mlp.fc1.lora_B.weight"), "fc1: lora_B is missing"),
        (lambda config, tensors: tensors.clear(), "holds no adapter layer"),
    ],
)
def test_refused_in_one_line_and_nothing_attached(change, message, written):
    folder, _ = written(CONFIGS["lora"]())
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    network = vit()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        load_peft(network, folder, timm_sites(network))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not installed(network) and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def _rename(tensors, old, new):
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def _resize(tensors, end):
    key = f"base_model.model.{end}"
    tensors[key] = tensors[key][:9]
