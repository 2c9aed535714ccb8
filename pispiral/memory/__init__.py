"""Memories of constant size: facts by name beside a frozen model, and the attractor inside a nano model."""
