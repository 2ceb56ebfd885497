"""`planish run` and `load`: answers of engines to texts, images and recordings."""
