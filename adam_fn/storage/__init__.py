"""How moments are stored (codec.py, low_bit_codes.py) and what becomes of bfloat16 parameters (parameter_bits.py)."""
