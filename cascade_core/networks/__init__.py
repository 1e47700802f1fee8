"""The networks: one configuration and one module each, with the published names of every weight."""
