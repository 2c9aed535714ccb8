"""What the phase notebooks call."""
