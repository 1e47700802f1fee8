"""`cascade verify`: checks the model files on this machine, and writes a JSON report for an issue."""
