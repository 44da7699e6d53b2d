"""Breast segmentation, artefact suppression and pectoral muscle removal of mammograms."""

import cv2
import numpy as np

from dm_files import InputError


class DMImagePreprocessor:
    """Preprocessing steps of a greyscale mammogram: 2-D array, dark background, bright breast."""

    @classmethod
    def segment_breast(cls, img, low_int_threshold=0.05, crop=True):
        """Keep the largest bright object, which is the breast; set all else to zero.

        img: 2-D array (H, W) of any real dtype. It is scaled by its own maximum to 0..255, thresholded, and
        the contour of largest area, holes filled, is the breast.
        low_int_threshold: pixels above it may be breast; a fraction of the maximum if below 1, else a value
        on the 0..255 scale.
        crop: cut the result to the bounding box of the breast.

        Returns (breast image in the dtype of `img`, bounding box (x, y, width, height) in pixels of `img`).
        Raises InputError when the image is not 2-D, holds NaN or infinity, or has no pixel above the
        threshold.
        """
        scaled = _as_uint8(img)
        if low_int_threshold < 1:
            low_int_threshold = scaled.max() * low_int_threshold
        bright = np.where(scaled > int(low_int_threshold), np.uint8(255), np.uint8(0))
        contours, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if not contours:
            raise InputError(
                f"No breast found: no pixel above the threshold. Expected low_int_threshold below 255. "
                f"Received {low_int_threshold:g}."
            )
        breast = max(contours, key=cv2.contourArea)
        mask = cv2.drawContours(np.zeros_like(bright), [breast], -1, 255, cv2.FILLED)
        breast_img = np.where(mask > 0, img, np.zeros((), img.dtype))
        x, y, width, height = (int(v) for v in cv2.boundingRect(breast))
        if crop:
            breast_img = breast_img[y : y + height, x : x + width]
        return breast_img, (x, y, width, height)


def _as_uint8(img):
    """`img` scaled by its own maximum to 0..255, truncated; InputError where that has no meaning."""
    if img.ndim != 2 or img.size == 0:
        raise InputError(f"Expected a greyscale image of shape (height, width). Received shape {img.shape}.")
    scaled = img.astype("float32")
    highest = scaled.max()
    if not (np.isfinite(highest) and np.isfinite(scaled.min())):
        raise InputError("Expected finite pixel values. Received an image with NaN or infinite pixels.")
    if highest <= 0:
        raise InputError("Expected an image with some bright pixels. Received one with none above zero.")
    return np.clip(scaled / highest * 255, 0, 255).astype("uint8")
