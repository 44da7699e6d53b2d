"""Import the original's names of predictions for one breast: see `mammo.train.scoring`."""

from mammo.train.scoring import make_pred_case, pred_2view_img_list

__all__ = ["make_pred_case", "pred_2view_img_list"]
