"""Nodes of the pack: one file per family, each node thin, everything host-specific behind `hosts`."""
