"""Groups of scored responses to preference pairs: filters, length coefficient, selection, replay.

All of it is pure and seeded, and every function that drops something says how much and why through `stage.count`.
"""
