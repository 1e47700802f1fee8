"""Training tasks: LoRAs, ControlNets, whole networks, learned tokens."""
