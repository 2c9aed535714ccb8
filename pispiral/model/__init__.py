"""The language model: loading, quantization, attention, caches, prefill and decoding."""
