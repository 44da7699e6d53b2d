"""Import the original's names of predictions for one breast: see `mammo.maps.trees` and `mammo.train.scoring`."""

from mammo.maps.trees import make_pred_case
from mammo.train.scoring import pred_2view_img_list

__all__ = ["make_pred_case", "pred_2view_img_list"]
