"""What ControlNets read: hints made from pictures, and masks."""
