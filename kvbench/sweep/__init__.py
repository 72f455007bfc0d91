"""Sweeps: the plan of cells, their cost, and measuring them."""
