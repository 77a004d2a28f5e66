"""A model as one ATen graph that holds at every image size, with the type of each node at one size.

Owns the form of a captured model (`captured`), what a node does besides computing (`effects`), where in the user's
code it comes from (`user_code`), shapes at one size (`shapes`), and whether each node can be tiled
(`typed_graph`). May import `rules` and below. Hands on a typed graph at an image size.
"""
