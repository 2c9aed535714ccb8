"""What is learned: the attractor's training on a frozen model, and nano models from scratch."""
