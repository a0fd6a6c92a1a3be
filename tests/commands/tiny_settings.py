"""Settings that the tests of the commands start from."""

from __future__ import annotations

from pathlib import Path

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def tiny_settings() -> dict:
    return {
        "seed_everything": 3,
        "model": {
            "class_path": "FewShotClassification",
            "init_args": {
                "backbone": {
                    "class_path": "vision_peft.backbones.Vit",
                    "init_args": {"name": "test_vit", "image_size": 32, "pretrained": False},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            },
        },
        "data": {
            "class_path": "FewShotImages",
            "init_args": {"source": {"class_path": "Digits"}, "shots": 1, "augment": "none"},
        },
        "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2, "alpha": 4}}, "targets": "qv"},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
    }
