"""What users call besides `compile`: check, infer, LSUV initialisation, freezing, benchmarks, networks by name.

Each file is one tool. May import `compiler` and below. Hands on the functions that `fxstream` exports.
"""
