"""`cascade verify`: what the model files that are here hold and give, in a JSON file for an issue."""
