"""The attractor: a recurrent state of constant size, and the adapter that reads and writes it beside a model."""
