"""From a data set as downloaded to prepared folders and patches."""
