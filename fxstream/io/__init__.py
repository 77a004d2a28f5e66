"""Arrays outside of the device's memory: images to read, results to write, the arguments of a call.

Owns sources, sinks, journals, and what of a call is a tensor. May import `graph` and below. Hands on `Source`,
`Sink`, and `Inputs`.
"""
