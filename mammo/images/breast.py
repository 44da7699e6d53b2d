"""Find the breast in a mammogram, remove artifacts and the pectoral muscle, detect bright spots."""

import cv2
import numpy as np

from mammo.base.files import InputError


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

    @staticmethod
    def max_pix_val(dtype):
        """Largest value of the unsigned integer type `dtype`: 255 or 65535. InputError for any other type."""
        dtype = np.dtype(dtype)
        if dtype not in (np.uint8, np.uint16):
            raise InputError(f"Expected an image of dtype uint8 or uint16. Received {dtype}.")
        return int(np.iinfo(dtype).max)

    def select_largest_obj(self, img_bin, lab_val=255, fill_holes=False, smooth_boundary=False, kernel_size=15):
        """Mask of the largest 8-connected object of a binary image.

        img_bin: (H, W), non-zero in the objects. lab_val: value of the mask inside the object, 1..255.
        fill_holes: include what is enclosed by the object.
        smooth_boundary: morphological opening with a square of kernel_size pixels, after the filling.

        Returns a uint8 mask (H, W). Raises InputError when there is no object.
        """
        _, labels, stats, _ = cv2.connectedComponentsWithStats((img_bin > 0).astype("uint8"), connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        if not areas.size:
            raise InputError("No object to select: no pixel of the image is above the threshold.")
        mask = np.where(labels == 1 + areas.argmax(), np.uint8(lab_val), np.uint8(0))
        if fill_holes and (labels == 0).any():
            flooded = mask.copy()
            cv2.floodFill(flooded, None, _flood_seed(labels), lab_val)
            mask[flooded != lab_val] = lab_val
        if smooth_boundary:
            mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _square(kernel_size))
        return mask

    def suppress_artifacts(self, img, global_threshold=0.05, kernel_size=15):
        """Set all but the largest object (the breast) to zero: labels, tape, scratches.

        img: (H, W) uint8 or uint16. global_threshold: what exceeds it is an object; a fraction of the dtype's
        largest value if below 1, else a pixel value. kernel_size: see `select_largest_obj`.

        Returns (image in the dtype of `img`, uint8 breast mask with 0 and 255). Raises InputError for other
        dtypes and when no pixel exceeds the threshold.
        """
        if global_threshold < 1:
            global_threshold = global_threshold * self.max_pix_val(img.dtype)
        mask = self.select_largest_obj(
            img > int(global_threshold), fill_holes=True, smooth_boundary=True, kernel_size=kernel_size
        )
        return np.where(mask > 0, img, np.zeros((), img.dtype)), mask

    def remove_pectoral(self, img, breast_mask, high_int_threshold=0.8, morph_kn_size=3, n_morph_op=7, sm_kn_size=25):
        """Set the pectoral muscle to zero: the largest very bright region, bounded by a watershed.

        The histogram-equalised image is thresholded; the largest object, eroded, marks the muscle, what lies
        beyond its dilation marks other tissue, and what lies outside `breast_mask` marks the background. The
        tissue's basin, opened, is kept. In a view without muscle the brightest tissue is lost instead.

        img: (H, W) uint8. breast_mask: (H, W), non-zero in the breast.
        high_int_threshold: a fraction of 255 if below 1, else a pixel value, of the equalised image.
        morph_kn_size, n_morph_op: side of the square and repetitions of the erosion and the dilation.
        sm_kn_size: side of the square of the final opening.

        Returns (equalised image without muscle, (H, W) uint8; the equalised image in colour with the
        watershed lines in red, (H, W, 3) uint8, BGR). Raises InputError for other dtypes, for a mask of
        another shape, and when no pixel exceeds the threshold.
        """
        if img.dtype != np.uint8:
            raise InputError(f"Pectoral removal: Expected an image of dtype uint8. Received {img.dtype}.")
        if breast_mask.shape != img.shape:
            raise InputError(f"Expected a breast mask of shape {img.shape}. Received {breast_mask.shape}.")
        if high_int_threshold < 1:
            high_int_threshold = high_int_threshold * self.max_pix_val(img.dtype)
        equalised = cv2.equalizeHist(img)
        bright = self.select_largest_obj(equalised > int(high_int_threshold), fill_holes=True)
        muscle = cv2.erode(bright, _square(morph_kn_size), iterations=n_morph_op)
        near_muscle = cv2.dilate(bright, _square(morph_kn_size), iterations=n_morph_op)

        background_label, tissue_label, muscle_label = 64, 128, 255
        markers = np.zeros(img.shape, np.int32)
        markers[near_muscle == 0] = tissue_label
        markers[muscle > 0] = muscle_label
        markers[breast_mask == 0] = background_label
        colour = cv2.cvtColor(equalised, cv2.COLOR_GRAY2BGR)
        cv2.watershed(colour, markers)
        colour[markers == -1] = (0, 0, 255)

        tissue = (markers == tissue_label).astype("uint8")
        tissue = cv2.morphologyEx(tissue, cv2.MORPH_OPEN, _square(sm_kn_size))
        return np.where(tissue > 0, equalised, np.uint8(0)), colour

    def process(self, img, pect_removal=False, artif_suppression=True, median_filtering=True):
        """Median filter of 3 x 3, artefact suppression and pectoral removal, each as asked.

        img: (H, W) uint8 or, without `pect_removal`, uint16.

        Returns (processed image in the dtype of `img`, coloured watershed image or None): see
        `suppress_artifacts` and `remove_pectoral`, also for the errors.
        """
        self.max_pix_val(img.dtype)
        if median_filtering:
            img = cv2.medianBlur(img, 3)
        if not (artif_suppression or pect_removal):
            return img, None
        suppressed, mask = self.suppress_artifacts(img)
        if artif_suppression:
            img = suppressed
        if pect_removal:
            return self.remove_pectoral(img, mask)
        return img, None


def _square(size):
    return np.ones((size, size), np.uint8)


def _flood_seed(labels):
    """(x, y) from which the published program floods the background: its first pixel in raster order.

    The program exchanged row and column, so that an object at the left edge can take the seed and the whole
    image is then filled. Its output is reproduced; where the exchange left the image it failed, and the pixel
    itself is used.
    """
    row, column = (int(v) for v in np.argwhere(labels == 0)[0])
    height, width = labels.shape
    return (row, column) if row < width and column < height else (column, row)


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


def detect_blobs(img, patch_size, *, min_area=3, min_int=0.5, max_int=0.95, th_step=10):
    """Bright spots of any shape, no larger than a patch.

    img: 2-D array of any real dtype, not negative. min_area: pixels. min_int, max_int: range of thresholds as
    fractions of the image's maximum. th_step: threshold step on the 0..255 scale. Returns an (n, 3) float array
    of x, y and diameter in pixels, in OpenCV's order.
    """
    highest = img.max()
    lowest_threshold, highest_threshold = int(min_int * 255), int(max_int * 255)
    # A spot must show at two thresholds; newer OpenCV raises when there is only one.
    if highest <= 0 or highest_threshold - lowest_threshold <= th_step:
        return np.zeros((0, 3))
    params = cv2.SimpleBlobDetector_Params()
    params.minThreshold = lowest_threshold
    params.maxThreshold = highest_threshold
    params.thresholdStep = th_step
    params.filterByArea = True
    params.minArea = min_area
    params.maxArea = patch_size**2
    params.filterByCircularity = False
    params.filterByColor = False
    params.filterByConvexity = False
    params.filterByInertia = False
    blobs = cv2.SimpleBlobDetector_create(params).detect((img / highest * 255).astype("uint8"))
    return np.array([(*blob.pt, blob.size) for blob in blobs]).reshape(-1, 3)
