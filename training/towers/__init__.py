"""The towers: training them from scratch on the drawings of the corpus, embedding it, measuring them."""
