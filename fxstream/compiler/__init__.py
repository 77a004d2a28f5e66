"""From a model to a module that streams: analysis, capture per mode, plan, probe and rewrite per image size.

Owns the pipeline and its caches. May import everything below it. Hands on `compile`, `analyze`, `plan` and
`StreamedModule`.
"""
