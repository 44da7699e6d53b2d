"""Import the original's names of heatmap region features: see `mammo.maps.trees`."""

from mammo.maps.trees import (
    global_max_intensity,
    prob_heatmap_features,
    region_features,
    topK_region_idx,
    total_area,
)

__all__ = ["global_max_intensity", "prob_heatmap_features", "region_features", "topK_region_idx", "total_area"]
