"""`egtrain.optim` in other people's training programs, a module each.

Each module says in its own words what it needs; importing this package imports none of them.
"""
