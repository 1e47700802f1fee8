"""Training of LoRAs, ControlNets, tokens and whole networks: data, tasks, losses, and a loop that can be resumed."""
