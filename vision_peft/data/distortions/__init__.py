"""The distortion bank of image quality: 26 ways to spoil a picture, at 5 levels each.

Names, order and levels are those of the bank that Re-IQA trains with (Saha, Mishra, Bovik, CVPR 2023; the KADID library before it). A level
is an index: for a few distortions it is not a severity (mean shift brightens, leaves alone, darkens). Read from the released code's
behaviour; `variant="official"` keeps the sharpening that the released code has by mistake.
"""

from vision_peft.data.distortions.bank import BANK, LEVELS, Distortion, distort

__all__ = ["BANK", "LEVELS", "Distortion", "distort"]
