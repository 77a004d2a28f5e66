"""Arrays outside of the device's memory: images to read, results to write, the arguments of a call.

Owns sources, adapters of slides, targets, sinks, journals and what they compare, and what of a call is a
tensor. May import `graph` and below. Hands on `Source`, `Sink`, and `Inputs`.
"""
