"""Find the breast in a mammogram, remove artifacts and the pectoral muscle, detect bright spots."""

import cv2
import numpy as np

from mammo.base.files import InputError


class DMImagePreprocessor:
    """Preprocess a greyscale mammogram: 2-D array, dark background, bright breast."""

    @classmethod
    def segment_breast(
        cls, img: np.ndarray, low_int_threshold: float = 0.05, crop: bool = True
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
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
    def max_pix_val(dtype) -> int:
        """Return the largest value of an unsigned integer type, 255 or 65535. InputError for any other type."""
        dtype = np.dtype(dtype)
        if dtype not in (np.uint8, np.uint16):
            raise InputError(f"Expected an image of dtype uint8 or uint16. Received {dtype}.")
        return int(np.iinfo(dtype).max)

    def select_largest_obj(
        self,
        img_bin: np.ndarray,
        lab_val: int = 255,
        fill_holes: bool = False,
        smooth_boundary: bool = False,
        kernel_size: int = 15,
    ) -> np.ndarray:
        """Return the mask of the largest 8-connected object of a binary image.

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

    def suppress_artifacts(
        self,
        img: np.ndarray,
        global_threshold: float = 0.05,
        fill_holes: bool = False,
        smooth_boundary: bool = True,
        kernel_size: int = 15,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Set all but the largest object (the breast) to zero: labels, tape, scratches.

        img: (H, W) uint8 or uint16. global_threshold: what exceeds it is an object; a fraction of the image's own
        maximum if below 1, else a pixel value. fill_holes, smooth_boundary: without effect, as in the published
        program, which always does both. kernel_size: see `select_largest_obj`.

        Returns (image in the dtype of `img`, uint8 breast mask with 0 and 255). Raises InputError for other
        dtypes and when no pixel exceeds the threshold.
        """
        self.max_pix_val(img.dtype)
        if global_threshold < 1:
            global_threshold *= float(img.max())
        mask = self.select_largest_obj(
            img > int(global_threshold), fill_holes=True, smooth_boundary=True, kernel_size=kernel_size
        )
        return np.where(mask > 0, img, np.zeros((), img.dtype)), mask

    def remove_pectoral(
        self,
        img: np.ndarray,
        breast_mask: np.ndarray,
        high_int_threshold: float = 0.8,
        morph_kn_size: int = 3,
        n_morph_op: int = 7,
        sm_kn_size: int = 25,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Set the pectoral muscle to zero: the largest very bright region, bounded by a watershed.

        The histogram-equalised image is thresholded; the largest object, eroded, marks the muscle, what lies
        beyond its dilation marks other tissue, and what lies outside `breast_mask` marks the background. The
        tissue's basin, opened, is kept. In a view without muscle the brightest tissue is lost instead.

        img: (H, W) uint8, or uint16, which is first scaled by its own maximum to 0..255. breast_mask: (H, W), non-zero
        in the breast.
        high_int_threshold: a fraction of 255 if below 1, else a pixel value, of the equalised image.
        morph_kn_size, n_morph_op: side of the square and repetitions of the erosion and the dilation.
        sm_kn_size: side of the square of the final opening.

        Returns (equalised image without muscle, (H, W) uint8; the equalised image in colour with the
        watershed lines in red, (H, W, 3) uint8, BGR). Raises InputError for other dtypes, for a mask of
        another shape, and when no pixel exceeds the threshold.
        """
        self.max_pix_val(img.dtype)
        if breast_mask.shape != img.shape:
            raise InputError(f"Expected a breast mask of shape {img.shape}. Received {breast_mask.shape}.")
        if high_int_threshold < 1:
            high_int_threshold *= 255
        equalised = cv2.equalizeHist(img if img.dtype == np.uint8 else _as_uint8(img))
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

    def process(
        self,
        img: np.ndarray,
        median_filtering: bool = True,
        blur_kn_size: int = 3,
        artif_suppression: bool = True,
        low_int_threshold: float = 0.05,
        kernel_size: int = 15,
        pect_removal: bool = False,
        high_int_threshold: float = 0.8,
        **pect_kwargs,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Filter by the median, suppress artifacts and remove the pectoral muscle, each as asked.

        img: (H, W) uint8 or uint16. blur_kn_size: side of the median filter, odd. low_int_threshold, kernel_size: those
        of `suppress_artifacts`. high_int_threshold, pect_kwargs: those of `remove_pectoral`.

        Returns (processed image, coloured watershed image or None). The image has the dtype of `img`, or, without its
        muscle, is equalised uint8. Raises InputError as those two do, and for an even filter.
        """
        self.max_pix_val(img.dtype)
        if median_filtering:
            img = _median(img, blur_kn_size)
        if not (artif_suppression or pect_removal):
            return img, None
        suppressed, mask = self.suppress_artifacts(img, low_int_threshold, kernel_size=kernel_size)
        if artif_suppression:
            img = suppressed
        if pect_removal:
            return self.remove_pectoral(img, mask, high_int_threshold, **pect_kwargs)
        return img, None


def _median(img, size):
    if size < 1 or size % 2 == 0:
        raise InputError(f"blur_kn_size: Expected an odd number. Received {size}.")
    if img.dtype == np.uint8 or size <= 5:
        return cv2.medianBlur(img, size)
    from scipy.ndimage import median_filter  # OpenCV's larger filters are for 8 bits

    return median_filter(img, size, mode="nearest")


def _square(size):
    return np.ones((size, size), np.uint8)


def _flood_seed(labels):
    """Return (x, y) from which the published program floods the background: its first pixel in raster order.

    The program exchanged row and column, so that an object at the left edge can take the seed and the whole
    image is then filled. Its output is reproduced; where the exchange left the image it failed, and the pixel
    itself is used.
    """
    row, column = (int(v) for v in np.argwhere(labels == 0)[0])
    height, width = labels.shape
    return (row, column) if row < width and column < height else (column, row)


def _as_uint8(img):
    """Scale `img` by its own maximum to 0..255, truncated; InputError where that has no meaning."""
    if img.ndim != 2 or img.size == 0:
        raise InputError(f"Expected a greyscale image of shape (height, width). Received shape {img.shape}.")
    scaled = img.astype("float32")
    highest = scaled.max()
    if not (np.isfinite(highest) and np.isfinite(scaled.min())):
        raise InputError("Expected finite pixel values. Received an image with NaN or infinite pixels.")
    if highest <= 0:
        raise InputError("Expected an image with some bright pixels. Received one with none above zero.")
    return np.clip(scaled / highest * 255, 0, 255).astype("uint8")


def detect_blobs(
    img: np.ndarray,
    patch_size: int,
    *,
    min_area: int = 3,
    min_int: float = 0.5,
    max_int: float = 0.95,
    th_step: int = 10,
) -> np.ndarray:
    """Detect bright spots of any shape, no larger than a patch.

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
