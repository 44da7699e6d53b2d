"""Where a network sees lesions: maps, their files, pictures and classifiers."""
