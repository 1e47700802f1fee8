"""Loaded networks for the front door and the headless host: each with its device, its memory and what patches change.

device.py    where networks run, in which precision, in how much memory
prompt.py    prompts and picture prompts, encoded
diffusion.py Stage C and Stage B: a sampling run
control.py   ControlNets: their part in a run
codec.py     pictures to latents and back, in tiles where memory is short (tiled.py)
weights.py   which weight is at fault where NaN comes out
"""
