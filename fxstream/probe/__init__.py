"""What the rules claim, measured on the real operators before anything is streamed.

Owns strips, NaN propagation and the comparison of values in tiles. May import `runtime` and below. Hands on a
`ProbeReport` for each part of the graph.
"""
