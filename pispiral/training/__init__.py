"""What is learned: memories of frozen models, and nano models from scratch."""
