"""Import the original's name of breast segmentation and artifact removal: see `mammo.images.breast`."""

from mammo.images.breast import DMImagePreprocessor

__all__ = ["DMImagePreprocessor"]
