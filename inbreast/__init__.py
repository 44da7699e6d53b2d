"""INbreast: preparation, finetuning, the subset experiment."""
