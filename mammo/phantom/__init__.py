"""Made mammograms in the layouts of the real data sets."""
