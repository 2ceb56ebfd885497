"""`planish run` and `load`: engines that answer texts, images and recordings."""
