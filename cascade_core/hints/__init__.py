"""Hints for ControlNets, made from pictures, and masks."""
