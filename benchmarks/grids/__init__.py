"""Recorded grids: every configuration of a workload measured in fresh processes, so that searches can be replayed."""
