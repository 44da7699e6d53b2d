"""What training needs besides the networks: checkpoints, callbacks, resuming, devices, scores."""
