"""Training of LoRAs, ControlNets, tokens and Stage C: data, tasks, losses, and a loop that can be resumed."""
