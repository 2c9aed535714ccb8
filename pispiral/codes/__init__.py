"""Position codes: exact phases, rotary frequencies, the spiral, the hybrid and their rivals."""
