"""What is trained: LoRAs, ControlNets, Stage C itself, learned tokens."""
