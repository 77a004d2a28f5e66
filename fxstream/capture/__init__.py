"""From a call of the user's model to one functional ATen graph that holds at every image size.

Owns tracing (`trace`), what a trace depends on in the tensors of a call (`input_key`), dynamo's graph
(`traced_graph`), its ATen form (`aten`, `casts`, `functional`), independence of sizes (`capture`, `size_symbols`),
what is done at a first call alone (`first_call`), and what no capture takes (`refusals`). May import `graph` and
below. Hands on a `Captured` graph.
"""
