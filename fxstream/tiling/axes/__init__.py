"""One segment along one axis: what tiles read, and the grids of tiles."""
