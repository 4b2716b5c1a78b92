"""How moments are stored: as floats, in 8 bits or in a 16-bit word; bfloat16 parameters (parameter_bits.py)."""
