"""One summary of a network in five forms: terminal, JSON, HTML, pictures, closed formulas.

`summary` computes, the other files only draw; the homes of rich (`terminal`) and sympy (`closed_form`). May import
`tools` and below. Hands on the output of the command line.
"""
