"""A graph without writes: what they write to, through views of each other, and operators in their place."""
