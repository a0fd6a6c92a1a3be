"""SAM's parts by segment-anything, joined so that a batch of images with one prompt each passes through; its state_dict keys are SAM's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_peft.backbones.sam_attention import fold_attention
from vision_peft.backbones.segmentation import Masks, Prompts

WIDTH = 256  # of embeddings and tokens


@dataclass(frozen=True)
class Shape:
    """Of an image encoder: `whole` are the blocks that attend to the whole image, the others to windows."""

    width: int
    depth: int
    heads: int
    whole: tuple[int, ...]
    window: int = 14


SHAPES = {
    "vit_b": Shape(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Shape(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Shape(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": Shape(64, 4, 4, (1, 3), window=3),
}


class SamEncoder(ImageEncoderViT):
    """The image encoder as a chain: start(), a step a block, the neck as the last step.

    Args:
        windows: False makes every block attend to the whole image.
        positions: False leaves out relative positions.
    """

    def __init__(self, shape: Shape, image_size: int, windows: bool, positions: bool, checkpointing: bool) -> None:
        super().__init__(
            img_size=image_size,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=positions,
            window_size=shape.window if windows else 0,
            global_attn_indexes=shape.whole,
        )
        self.checkpointing = checkpointing
        self.grid = (image_size // 16, image_size // 16)
        self.steps = shape.depth + 1  # the neck is the last
        fold_attention(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.start(images), 0, self.steps)

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        """Steps first to last - 1 on what start() or step first - 1 gave."""
        for block in self.blocks[first:last]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.neck(x.permute(0, 3, 1, 2)) if last == self.steps and first < self.steps else x

    def start(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, h, w, C), positions added."""
        return self.patch_embed(images) + self.pos_embed

    def step_of(self, path: str) -> int:
        """Index of the step that owns the parameter with this path from the encoder."""
        parts = path.split(".")
        return {"blocks": int(parts[1]) if parts[0] == "blocks" else 0, "neck": self.steps - 1}.get(parts[0], 0)


class BatchedDecoder(MaskDecoder):
    """B image embeddings with one set of prompts each; the stock decoder repeats the images once a prompt and cannot."""

    def predict_masks(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse_prompt_embeddings: Tensor, dense_prompt_embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, _, H, W = image_embeddings.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(B, -1, -1), sparse_prompt_embeddings], 1)  # (B, 1 + masks + prompts, D)
        found, image = self.transformer(image_embeddings + dense_prompt_embeddings, image_pe.expand(B, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, (H, W)))  # (B, D / 8, 4 H, 4 W)
        masks = torch.stack([mlp(found[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        return torch.einsum("bkd,bdhw->bkhw", masks, upscaled), self.iou_prediction_head(found[:, 0])


class PlainTransformer(TwoWayTransformer):
    """The decoder's transformer without positional encodings of tokens and image, as S-SAM and SALT run it."""

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = point_embedding, image_embedding.flatten(2).permute(0, 2, 1)
        none = torch.zeros((), dtype=queries.dtype, device=queries.device)
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=none, key_pe=none)
        found = queries + self.final_attn_token_to_image(q=queries, k=keys, v=keys)
        return self.norm_final_attn(found), keys


class SamNetwork(nn.Module):
    """Image encoder, prompt encoder and mask decoder.

    Args:
        encoder: makes the image encoder; it has `grid`, `steps`, `start`, `run` and `step_of` as SamEncoder has.
        image_size: side of the input, which point and box coordinates are measured by.
        classes: masks of a semantic head besides the background's; None for SAM's own four mask tokens.
        plain: no positional encodings and no dense embedding in the decoder.
    """

    def __init__(self, encoder: Callable[[], nn.Module], image_size: int, classes: int | None, plain: bool) -> None:
        super().__init__()
        self.image_encoder = encoder()
        self.prompt_encoder = PromptEncoder(WIDTH, self.image_encoder.grid, (image_size, image_size), mask_in_chans=16)
        transformer = (PlainTransformer if plain else TwoWayTransformer)(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8)
        outputs = 3 if classes is None else classes
        self.mask_decoder = BatchedDecoder(transformer_dim=WIDTH, transformer=transformer, num_multimask_outputs=outputs)
        self.semantic, self.plain = classes is not None, plain

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Mask logits (B, K, h, w) of images (B, 3, S, S)."""
        return self.decode(self.image_encoder(images), prompts).logits

    def decode(self, embedding: Tensor, prompts: Prompts | None) -> Masks:
        B = len(embedding)
        with torch.autocast(embedding.device.type, enabled=False):  # half precision would lose the phases of the position encodings
            sparse, dense = self._embedded(prompts or Prompts(), B)
            positions = self.prompt_encoder.get_dense_pe()
        masks, quality = self.mask_decoder.predict_masks(embedding, positions, sparse.expand(B, -1, -1), dense)
        return Masks(masks, quality) if self.semantic else Masks(masks[:, :1], quality[:, :1])

    def _embedded(self, prompts: Prompts, B: int) -> tuple[Tensor, Tensor]:
        """Tokens (B or 1, n, D) and the dense embedding that is added to the image's."""
        points = None if prompts.points is None else (prompts.points.float(), prompts.labels)
        boxes = None if prompts.boxes is None else prompts.boxes.float()
        sparse, dense = self.prompt_encoder(points, boxes, None if prompts.masks is None else prompts.masks.float())
        if prompts.tokens is not None:
            sparse = torch.cat([sparse.expand(B, -1, -1), prompts.tokens.float()], 1)
        return sparse, torch.zeros_like(dense) if self.plain and prompts.masks is None else dense
